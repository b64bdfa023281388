"""How far a result may lie from the float64 reference: ``C * eps * terms * scale``, and nothing else anywhere.

A sum of n terms, in any order and with any grouping, errs by at most n * eps * scale, where scale is the sum of its
terms' magnitudes: an array, one number for each output element. The steepest activation (hardswish) stretches that by
1.5, and a float64 result is compared with a reference that errs as much itself; the rest is for the rounding of the
activation.
"""

import torch
import torch.nn.functional as F

C = 4


def assert_close(actual, expected, terms, scale):
    """NaN and infinities must agree, all else be near."""
    assert actual.shape == expected.shape
    expected = expected.double()
    torch.testing.assert_close(actual.isnan(), expected.isnan(), msg="NaN in other places")
    infinite = expected.isinf()
    assert torch.equal(actual[infinite].double(), expected[infinite]), "infinities differ"
    error = (actual.double() - expected).abs()
    allowed = C * torch.finfo(actual.dtype).eps * terms * scale
    wrong = (error > allowed) & expected.isfinite()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong; at {at} got {actual[at].item()!r}, expected "
            f"{expected[at].item()!r}, allowed error {allowed.expand_as(error)[at].item():.2e}"
        )


def bounded(activation):
    """Sigmoids round at the size of their range, however small their argument is."""
    return 1.0 if activation in ("sigmoid", "hardsigmoid") else 0.0


def depthwise_conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, activation="none", scale=None):
    """terms, and the scale above: not the factor ``scale``, which rounds each term once more"""
    input, weight, bias = _sizes(input, _scaled(weight, scale), bias)
    size = F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.size(1))
    return weight[0].numel() + 1 + (scale is not None), size + bounded(activation)


def pointwise_conv2d(input, weight, bias=None, activation="none", gate=None, residual=None, scale=None):
    input, weight, bias, gate, residual = _sizes(input, _scaled(weight, scale), bias, gate, residual)
    size = F.conv2d(input if gate is None else input * gate, weight, bias)
    terms = weight[0].numel() + 2 + (scale is not None)
    return terms, size + (0 if residual is None else residual) + bounded(activation)


def batch_norm_act(input, running_mean, running_var, weight=None, bias=None, eps=1e-5, activation="none"):
    factor = (running_var.double() + eps).rsqrt() * (1 if weight is None else weight.double().abs())
    scale = (input.double().abs() + _channels(running_mean.double().abs())) * _channels(factor)
    return 3, scale + (0 if bias is None else _channels(bias.double().abs())) + bounded(activation)


def squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation="relu", gate_activation="hardsigmoid"):
    input, weight1, bias1, weight2, bias2 = _sizes(input, weight1, bias1, weight2, bias2)
    squeezed = F.conv2d(input.mean((2, 3), keepdim=True), weight1, bias1) + bounded(squeeze_activation)
    scale = input * (F.conv2d(squeezed, weight2, bias2) + bounded(gate_activation))
    return input.size(2) * input.size(3) + weight1[0].numel() + weight2[0].numel() + 2, scale


def _scaled(weight, scale):
    return weight.double() if scale is None else weight.double() * scale.double().view(-1, 1, 1, 1)


def _sizes(*tensors):
    return [None if t is None else t.double().abs() for t in tensors]


def _channels(vector):
    return vector[:, None, None]
