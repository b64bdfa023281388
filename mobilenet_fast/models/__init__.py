"""The family, with the state_dict keys of torchvision, or timm where torchvision lacks the model."""

from .deeplab_v3plus import DeepLabV3Plus, deeplab_v3plus_xception
from .efficientnet import (
    EfficientNet,
    efficientnet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
)
from .efficientnet_lite import (
    EfficientNetLite,
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    efficientnet_lite3,
    efficientnet_lite4,
)
from .features import FeatureMaps
from .googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from .inception_v3 import InceptionOutputs, InceptionV3, inception_v3
from .keras import from_keras
from .lraspp import LRASPP, lraspp_mobilenet_v3_large
from .mnasnet import MnasNetA1, MnasNetB1, mnasnet_a1, mnasnet_b1
from .mobilenet_v1 import MobileNetV1, mobilenet_v1
from .mobilenet_v2 import MobileNetV2, mobilenet_v2
from .mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from .registry import create_model, list_models, list_weights
from .xception import Xception, xception

__all__ = [
    "LRASPP",
    "DeepLabV3Plus",
    "EfficientNet",
    "EfficientNetLite",
    "FeatureMaps",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "InceptionOutputs",
    "InceptionV3",
    "MnasNetA1",
    "MnasNetB1",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "Xception",
    "create_model",
    "deeplab_v3plus_xception",
    "efficientnet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
    "from_keras",
    "googlenet",
    "inception_v3",
    "list_models",
    "lraspp_mobilenet_v3_large",
    "list_weights",
    "mnasnet_a1",
    "mnasnet_b1",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "xception",
]
