"""Steps that only accelerated models have, on every instruction set: pooling windows, concatenation, Winograd."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from test_accelerate_graphs import Net, check, image, seeded
from torch import nn

from mobilenet_fast import _C, accelerate, cost
from mobilenet_fast.accelerate import plan


@pytest.fixture
def on(isa, monkeypatch):
    """Plans are made for this instruction set."""
    monkeypatch.setattr(_C, "cpu_isa", lambda: isa)


POOLS = {
    "maximum": lambda x: F.max_pool2d(x, 3, 2, 1),
    "maximum, ceil_mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "maximum, stride 1": lambda x: F.max_pool2d(x, (3, 2), 1, (1, 0)),
    "maximum, default stride": lambda x: F.max_pool2d(x, 2),
    "maximum, dilation": lambda x: F.max_pool2d(x, 3, 1, 1, dilation=(2, 1)),
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mean, ceil_mode": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "mean of the image alone": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "mean, divisor": lambda x: F.avg_pool2d(x, (2, 3), 2, divisor_override=5),
}


@pytest.mark.parametrize("channels", [1, 7, 16, 67, 130])
@pytest.mark.parametrize("kind", POOLS)
def test_pooling_windows(on, threads, kind, channels):
    model = Net(lambda self, x: POOLS[kind](x))
    fast = check(model, image(c=channels), steps=["pool2d"])
    for count, shape in itertools.product((1, 3), ((1, channels, 8, 8), (3, channels, 5, 12), (0, channels, 6, 6))):
        threads(count)
        check(model, torch.randn(shape), fast=fast)


def test_pooling_passes_nan_and_infinity_on(on):
    x = image(c=19)
    x[0, ::3, 2, 3], x[1, ::2, 4, 4], x[0, 1, 0, 0] = float("nan"), float("inf"), -float("inf")
    for function in (POOLS["maximum"], POOLS["mean"]):
        model = Net(lambda self, x, function=function: function(x))
        torch.testing.assert_close(accelerate(model.eval(), x)(x), function(x), equal_nan=True)
    negative = torch.full((1, 8, 4, 4), -float("inf"))
    assert torch.equal(accelerate(Net(lambda self, x: F.max_pool2d(x, 2)).eval())(negative), negative[:, :, ::2, ::2])


def branches(self, x):
    return torch.cat([self.a(x), F.relu(self.b(x)), F.max_pool2d(x, 3, 1, 1), self.c(x)], 1)


def layers():
    return {"a": nn.Conv2d(8, 5, 1), "b": nn.Conv2d(8, 24, 3, padding=1), "c": nn.Conv2d(8, 8, 5, padding=2, groups=8)}


CATS = {
    "returned": (branches, ["pointwise_conv2d", "conv2d + relu", "pool2d", "depthwise_conv2d"]),
    "read on": (
        lambda self, x: self.d(branches(self, x)),
        ["pointwise_conv2d", "conv2d + relu", "pool2d", "depthwise_conv2d", "pointwise_conv2d"],
    ),
    "inputs": (lambda self, x: torch.cat((x, x.abs(), x), dim=-3), None),
    "nested": (lambda self, x: torch.cat([torch.cat([self.a(x), x], 1), self.a(x)], 1), None),
    "read elsewhere too": (lambda self, x: (lambda y: torch.cat([y, self.a(x)], 1).sum() + y)(self.a(x)), None),
    "pooled": (lambda self, x: branches(self, x).mean((2, 3)), None),
    "reshaped": (lambda self, x: torch.cat([self.a(x), self.b(x)], 1).flatten(1), None),
    "part returned": (lambda self, x: (lambda y: (y, torch.cat([y, x], 1)))(self.a(x)), None),
    "other dimension": (lambda self, x: torch.cat([self.a(x), self.a(x)], 2), None),
    "vectors": (lambda self, x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), None),
}


@pytest.mark.parametrize("kind", CATS)
def test_concatenation(kind, threads):
    forward, steps = CATS[kind]
    model = seeded(lambda: Net(forward, **layers(), d=nn.Conv2d(45, 6, 1)))
    fast = check(model, image(), steps=steps)
    for count in (1, 3):
        threads(count)
        check(model, image(3, h=6, w=11), fast=fast)
        check(model, image(1), fast=fast)
        check(model, image(0), fast=fast)


def test_copies_into_a_concatenation_multiply_nothing():
    def forward(self, x):
        y = self.a(x)
        return torch.cat([y, self.c(x)], 1), y

    model = seeded(lambda: Net(forward, **layers()))
    report = accelerate(model, image()).explain()
    assert any(row.operation == "copy into cat" for row in report.rows)
    assert sum(row.macs for row in report.rows) == cost.count(model, image().shape).macs


SIZES = [(1, 1), (4, 4), (7, 7), (9, 6), (13, 18)]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("channels, out_channels", [(16, 8), (19, 33), (40, 70), (64, 130)])
def test_winograd(on, monkeypatch, threads, channels, out_channels, padding):
    monkeypatch.setattr(plan, "winograd_is_faster", lambda *sizes: True)
    for activation in (nn.Identity(), nn.ReLU(), nn.SiLU()):
        model = seeded(
            lambda activation=activation: nn.Sequential(
                nn.Conv2d(channels, out_channels, 3, padding=padding, bias=padding != 1),
                nn.BatchNorm2d(out_channels),
                activation,
            )
        )
        exact = copy.deepcopy(model).double()
        fast = accelerate(model)
        for (h, w), n, count in itertools.product(SIZES, (1, 2), (1, 3)):
            if min(h, w) + 2 * padding < 3:
                continue
            threads(count)
            x = torch.randn(n, channels, h, w)
            with torch.no_grad():
                y, y64 = fast(x), exact(x.double())
            # What whole networks are held to; seen here: 4e-6, and 4e-7 by the direct sum.
            torch.testing.assert_close(y.double(), y64, rtol=0, atol=1e-5 * y64.abs().max().item())
    assert "Winograd" in fast.explain().rows[0].kernel


@pytest.mark.parametrize("channels", [16, 19, 70])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("faster", [True, False], ids=["winograd", "direct"])
def test_residual_of_a_dense_convolution(on, monkeypatch, threads, channels, activation, faster):
    monkeypatch.setattr(plan, "winograd_is_faster", lambda *sizes: faster)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    model = seeded(lambda: Net(lambda self, x: self.activation(self.conv(x) + x), conv=conv, activation=activation))
    fast, exact = accelerate(model), copy.deepcopy(model).double()
    for (h, w), n, count in itertools.product(SIZES, (1, 2), (1, 3)):
        threads(count)
        x = torch.randn(n, channels, h, w)
        with torch.no_grad():
            y, y64 = fast(x), exact(x.double())
        torch.testing.assert_close(y.double(), y64, rtol=0, atol=1e-5 * y64.abs().max().item())
    (row,) = fast.explain().rows
    assert "residual" in row.operation and ("Winograd" in row.kernel) == faster


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_convolution_with_more_weights_than_cache(on, threads, activation, residual):
    """A panel's weights are read in slices, each by all rows of a strip."""
    conv = nn.Conv2d(2100, 20, 3, padding=1)
    forward = lambda self, x: self.activation(self.conv(x) + (x[:, :20] if residual else 0))  # noqa: E731
    model = seeded(lambda: Net(forward, conv=conv, activation=activation))
    fast = accelerate(model)
    for count, shape in itertools.product((1, 3), ((1, 2100, 5, 5), (2, 2100, 3, 7), (1, 2100, 1, 1))):
        threads(count)
        check(model, torch.randn(shape), fast=fast, allowed=1e-5)  # of 18,900 terms a sum


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_that_aten_returns(memory_format):
    """Their layout is the input's, whichever way they come to it."""

    def forward(self, x):
        y = self.conv(x)
        return F.interpolate(y, scale_factor=3, mode="bilinear"), y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3)

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 5, 3)))
    x = image().to(memory_format=memory_format)
    for y in check(model, x)(x):
        assert y.is_contiguous(memory_format=memory_format)


def test_winograd_is_chosen_where_it_saves():
    cache = 2**20
    assert plan.winograd_is_faster((1, 64, 56, 56), (1, 192, 56, 56), cache)
    assert plan.winograd_is_faster((1, 32, 147, 147), (1, 64, 147, 147), cache)
    assert not plan.winograd_is_faster((1, 512, 7, 7), (1, 512, 7, 7), cache)  # too few tiles for so many weights
