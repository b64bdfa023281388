"""Layers to build with, or for `replace_layers` to put into an existing model. They train by PyTorch's autograd."""

from .batch_norm_act import BatchNormAct2d
from .blocks import ConvNormAct, InvertedResidual, SeparableConv2d, StochasticDepth
from .conv2d_same import Conv2dSame
from .depthwise import DepthwiseConv2d
from .fusion import FusedSequential
from .pointwise import PointwiseConv2d
from .squeeze_excite import SqueezeExcitation

__all__ = [
    "BatchNormAct2d",
    "Conv2dSame",
    "ConvNormAct",
    "DepthwiseConv2d",
    "FusedSequential",
    "InvertedResidual",
    "PointwiseConv2d",
    "SeparableConv2d",
    "SqueezeExcitation",
    "StochasticDepth",
]
