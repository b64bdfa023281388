"""Shapes, strides and settings that nobody thought of."""

import tolerance
import torch
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, check, operand, run_and_check, vector
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilenet_fast import _C, reference

odd_shapes = settings(deadline=None, derandomize=True, max_examples=300)
small = st.integers(1, 20)
layouts = st.sampled_from(LAYOUTS)
activations = st.sampled_from(ACTIVATIONS)
common = {
    "isa": st.sampled_from(_C.available_isas()),
    "dtype": st.sampled_from(DTYPES),
    "batch": st.integers(0, 3),
    "channels": st.one_of(st.integers(1, 40), st.integers(1, 300)),
    "layout": layouts,
    "activation": activations,
}
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@odd_shapes
@given(
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    extra=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    multiplier=st.integers(1, 4),
    bias=st.booleans(),
    scale=st.booleans(),
    weight_layout=layouts,
    **common,
)
def test_depthwise_conv2d(
    isa,
    dtype,
    batch,
    channels,
    layout,
    activation,
    kernel,
    stride,
    dilation,
    padding,
    extra,
    multiplier,
    bias,
    scale,
    weight_layout,
):
    # The smallest map that the kernel fits into, and a little more.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (size + more for size, more in zip(least, extra, strict=True))
    input = operand((batch, channels, height, width), layout, dtype)
    weight = operand((channels * multiplier, 1, *kernel), weight_layout, dtype, seed=1)
    bias = vector(channels * multiplier, dtype, seed=2) if bias else None
    scale = vector(channels * multiplier, dtype, seed=3) if scale else None
    run_and_check("depthwise_conv2d", (input, weight, bias, stride, padding, dilation, activation, scale), isa)


@odd_shapes
@given(
    outputs=st.one_of(st.integers(1, 40), st.integers(1, 300)),
    height=small,
    width=small,
    bias=st.booleans(),
    gate=st.none() | layouts,
    residual=st.none() | layouts,
    scale=st.booleans(),
    weight_layout=layouts,
    **common,
)
def test_pointwise_conv2d(
    isa, dtype, batch, channels, layout, activation, outputs, height, width, bias, gate, residual, scale, weight_layout
):
    input = operand((batch, channels, height, width), layout, dtype)
    weight = operand((outputs, channels, 1, 1), weight_layout, dtype, seed=1)
    bias = vector(outputs, dtype, seed=2) if bias else None
    gate = operand((batch, channels, 1, 1), gate, dtype, seed=3) if gate else None
    residual = operand((batch, outputs, height, width), residual, dtype, seed=4) if residual else None
    scale = vector(outputs, dtype, seed=5) if scale else None
    run_and_check("pointwise_conv2d", (input, weight, bias, activation, gate, residual, scale), isa)


@odd_shapes
@given(height=small, width=small, weight=st.booleans(), bias=st.booleans(), eps=st.floats(1e-8, 1.0), **common)
def test_batch_norm_act(isa, dtype, batch, channels, layout, activation, height, width, weight, bias, eps):
    input = operand((batch, channels, height, width), layout, dtype)
    mean, variance = vector(channels, dtype, seed=1), vector(channels, dtype, seed=2, positive=True)
    weight = vector(channels, dtype, seed=3) if weight else None
    bias = vector(channels, dtype, seed=4) if bias else None
    run_and_check("batch_norm_act", (input, mean, variance, weight, bias, eps, activation), isa)


@odd_shapes
@given(
    squeeze=st.integers(1, 70),
    height=small,
    width=small,
    bias1=st.booleans(),
    bias2=st.booleans(),
    squeeze_activation=activations,
    weight_layout=layouts,
    **common,
)
def test_squeeze_excite(
    isa,
    dtype,
    batch,
    channels,
    layout,
    activation,
    squeeze,
    height,
    width,
    bias1,
    bias2,
    squeeze_activation,
    weight_layout,
):
    input = operand((batch, channels, height, width), layout, dtype).add_(0.7)
    weight1 = operand((squeeze, channels, 1, 1), weight_layout, dtype, seed=1)
    weight2 = operand((channels, squeeze, 1, 1), weight_layout, dtype, seed=2)
    bias1 = vector(squeeze, dtype, seed=3) if bias1 else None
    bias2 = vector(channels, dtype, seed=4) if bias2 else None
    run_and_check("squeeze_excite", (input, weight1, bias1, weight2, bias2, squeeze_activation, activation), isa)


@odd_shapes
@given(strides=st.permutations(range(4)), steps=st.tuples(*[st.integers(1, 3)] * 4), **common)
def test_any_order_and_spacing_of_axes(isa, dtype, batch, channels, layout, activation, strides, steps):
    shape = (batch, channels, 6, 5)
    spaced = torch.full([shape[axis] * steps[axis] for axis in strides], float("nan"), dtype=dtype)
    order = [strides.index(axis) for axis in range(4)]
    input = spaced.permute(order)[tuple(slice(None, None, step) for step in steps)]
    input.copy_(operand(shape, dtype=dtype))
    weight = operand((channels, 1, 3, 3), dtype=dtype, seed=1)
    depthwise = (input, weight, None, (1, 1), (1, 1), (1, 1), activation)
    check("depthwise_conv2d", _C.depthwise_conv2d(*depthwise, isa=isa), depthwise)
    pointwise = (input, weight[:, :, :1, :1].transpose(0, 1), None, activation)
    check("pointwise_conv2d", _C.pointwise_conv2d(*pointwise, isa=isa), pointwise)
    ones = torch.ones(channels, dtype=dtype)
    norm = (input, ones, ones, None, None, 1e-5, activation)
    check("batch_norm_act", _C.batch_norm_act(*norm, isa=isa), norm)
    excite = (input, pointwise[1], None, weight[:, :, :1, :1], None, "relu", activation)
    check("squeeze_excite", _C.squeeze_excite(*excite, isa=isa), excite)


@odd_shapes
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=70), isa=common["isa"], activation=activations)
def test_activations_of_any_number(values, isa, activation):
    """Any float at all comes out as from torch, NaN and infinities too, wherever it lies in a vector."""
    x = torch.tensor(values)
    one = torch.ones(1)
    actual = _C.batch_norm_act(x.view(1, 1, 1, -1), one * 0, one, eps=0.0, activation=activation, isa=isa).flatten()
    expected = reference.activation(x.double(), activation)
    tolerance.assert_close(actual, expected, 2, expected.abs() + x.double().abs().clamp(max=1e3) + 1)
