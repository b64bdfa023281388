"""Layers to build with, or for `replace_layers` to put into an existing model. They train by PyTorch's autograd: on the
CPU, blocks of convolutions, batch norms and activations are one function of it."""

from .batch_norm_act import BatchNormAct2d
from .blocks import ConvNormAct, InvertedResidual, SeparableConv2d, StochasticDepth
from .conv2d_same import Conv2dSame
from .depthwise import DepthwiseConv2d
from .fusion import FusedSequential
from .inception import (
    CanonicalInception,
    InceptionSegments,
    InceptionTowers,
    NaiveInception,
    ReducedInception,
)
from .pointwise import PointwiseConv2d
from .squeeze_excite import SqueezeExcitation

__all__ = [
    "BatchNormAct2d",
    "CanonicalInception",
    "Conv2dSame",
    "ConvNormAct",
    "DepthwiseConv2d",
    "FusedSequential",
    "InceptionSegments",
    "InceptionTowers",
    "InvertedResidual",
    "NaiveInception",
    "PointwiseConv2d",
    "ReducedInception",
    "SeparableConv2d",
    "SqueezeExcitation",
    "StochasticDepth",
]
