"""Triton kernels of the operations, for CUDA. One file an operation: kernels, then the functions that launch them.

They take what `mobilenet_fast.functional` has checked, and run as well on CPU tensors in Triton's interpreter
(``TRITON_INTERPRET=1``), which is how tests without a GPU hold them to the reference.
"""

from __future__ import annotations

from .batch_norm_act import batch_norm_act, batch_norm_act_backward, batch_norm_act_training
from .conv2d import conv2d, pack_conv2d
from .depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward
from .epilogue import epilogue
from .fold_batch_norm import fold_batch_norm
from .inverted_residual import inverted_residual
from .pointwise_conv2d import pointwise_conv2d
from .pool2d import global_avg_pool, mean_of_sums, pool2d, sum_pixels
from .squeeze_excite import squeeze_excite, squeeze_excite_gate, sums_of_products

__all__ = [
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_act_training",
    "conv2d",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "epilogue",
    "fold_batch_norm",
    "global_avg_pool",
    "inverted_residual",
    "mean_of_sums",
    "pack_conv2d",
    "pointwise_conv2d",
    "pool2d",
    "squeeze_excite",
    "squeeze_excite_gate",
    "sum_pixels",
    "sums_of_products",
]
