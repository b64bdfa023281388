"""The activations of `mobilenet_fast.reference.ACTIVATIONS` and their derivatives, for use inside kernels.

Both take float32 or float64 values. NaN and infinities go through as in PyTorch.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no assembly


@triton.jit
def _clamp6(x):
    return tl.minimum(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """ACTIVATION of x."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        x = _clamp6(x)
    elif ACTIVATION == "hardswish":
        if x.dtype == tl.float32 and not INTERPRETED:
            # Two instructions instead of five. NaN becomes 0 here, and NaN again in the product.
            x = x * tl.inline_asm_elementwise(
                "fma.rn.sat.f32 $0, $1, 0f3E2AAAAB, 0f3F000000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            x = x * _clamp6(x + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardsigmoid":
        x = _clamp6(x + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = _sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def activation_gradient(gradient, x, ACTIVATION: tl.constexpr):
    """``gradient`` times the derivative of ACTIVATION at x, at kinks as PyTorch has it."""
    if ACTIVATION == "relu":
        gradient = tl.where(x <= 0.0, 0.0, gradient)
    elif ACTIVATION == "relu6":
        gradient = tl.where((x <= 0.0) | (x >= 6.0), 0.0, gradient)
    elif ACTIVATION == "hardswish":
        inner = gradient * (x * (1.0 / 3.0) + 0.5)
        gradient = tl.where(x < -3.0, 0.0, tl.where(x <= 3.0, inner, gradient))
    elif ACTIVATION == "hardsigmoid":
        gradient = tl.where((x > -3.0) & (x < 3.0), gradient * (1.0 / 6.0), 0.0)
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
        gradient = gradient * gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "sigmoid":
        gate = _sigmoid(x)
        gradient = gradient * gate * (1.0 - gate)
    else:
        tl.static_assert(ACTIVATION == "none")
    return gradient
