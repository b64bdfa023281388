"""The family, with the state_dict keys of torchvision, or timm where torchvision lacks the model."""

from .efficientnet_lite import EfficientNetLite, efficientnet_lite0
from .mobilenet_v2 import MobileNetV2, mobilenet_v2
from .mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from .registry import create_model, list_models

__all__ = [
    "EfficientNetLite",
    "MobileNetV2",
    "MobileNetV3",
    "create_model",
    "efficientnet_lite0",
    "list_models",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
]
