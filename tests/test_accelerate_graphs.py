"""Small networks: what each form of layer becomes, and that it computes what PyTorch computes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, operand
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from mobilenet_fast import accelerate


class Net(nn.Module):
    """A module from a function; layers are its keyword arguments."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def seeded(build):
    torch.manual_seed(0)
    model = build()
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
    return model.eval()


def image(n=2, c=8, h=9, w=7, seed=1):
    return 3 * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def check(model, *args, fast=None, fallbacks=None, steps=None, allowed=1e-6, **kwargs):
    """Holds an accelerated model to the original in float64: each output may err by four times eager's error, or by
    what is allowed of the largest value."""
    model = model.eval()
    fast = accelerate(model) if fast is None else fast

    def run(function, convert=lambda tensor: tensor.clone()):
        inputs = tree_map(lambda x: convert(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        with torch.no_grad():
            return function(*inputs[0], **inputs[1])

    eager, actual = run(model), run(fast, lambda tensor: tensor)
    exact = run(copy.deepcopy(model).double(), lambda t: t.double() if t.is_floating_point() else t.clone())
    assert tree_structure(actual) == tree_structure(eager)
    for y, y32, y64 in zip(tree_leaves(actual), tree_leaves(eager), tree_leaves(exact), strict=True):
        if not isinstance(y32, torch.Tensor):
            assert type(y) is type(y32) and y == y32
            continue
        assert y.shape == y32.shape and y.dtype == y32.dtype
        if not y.is_floating_point():
            assert torch.equal(y, y32)
        elif y.numel():
            largest = y64.abs().max()
            error, eager_error = ((z.double() - y64).abs().max() for z in (y, y32))
            assert error <= max(allowed * largest, 4 * eager_error), f"errs by {error / largest:.1e}"
    report = fast.explain()
    if fallbacks is not None:
        assert [row.operation for row in report.fallbacks] == fallbacks, str(report)
    if steps is not None:
        assert [row.operation for row in report.rows] == steps, str(report)
    return fast


# Activations

ACTIVATIONS = {
    "relu": [F.relu, lambda x: x.clamp(min=0), lambda x: x.clamp_min(0), lambda x: F.hardtanh(x, 0, float("inf"))][:3],
    "relu6": [F.relu6, lambda x: F.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6), lambda x: torch.clamp(x, 0.0, 6.0)],
    "hardswish": [
        F.hardswish,
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3) / 6),
        lambda x: F.relu6(x + 3) / 6 * x,
        lambda x: x * F.relu6(3 + x) * (1 / 6),
        lambda x: x * F.relu6(x + 3) * 0.16666667,
        lambda x: F.relu6(x + 3) * x / 6,
        lambda x: x / 6 * F.relu6(x + 3),
        lambda x: (x + 3).clamp(0, 6) / 6 * x,
        lambda x: x.mul(F.hardtanh(x + 3, 0.0, 6.0).div(6)),
        lambda x: x * F.hardsigmoid(x),
        lambda x: F.hardsigmoid(x).mul_(x),
        lambda x: x.mul(F.relu6(x.add(3.0), inplace=True).div_(6.0)),
        lambda x: x * x.add(3).clamp_(0, 6).div_(6),
        lambda x: x * F.relu6(x + torch.tensor(3.0)) / torch.tensor(6.0),
    ],
    "hardsigmoid": [
        F.hardsigmoid,
        lambda x: F.relu6(x + 3) / 6,
        lambda x: F.relu6(x + 3, inplace=True) / 6,
        lambda x: (1 / 6) * F.relu6(x + 3),
        lambda x: (x + 3).clamp(0, 6) * (1 / 6),
        lambda x: F.relu6(x - (-3)).div(6),
    ],
    "silu": [F.silu, lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x, lambda x: x.sigmoid().mul_(x)],
    "sigmoid": [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid_()],
}
WRITTEN_OUT = [(name, i, f) for name, functions in ACTIVATIONS.items() for i, f in enumerate(functions)]


@pytest.mark.parametrize("name, number, activation", WRITTEN_OUT, ids=lambda v: "" if callable(v) else str(v))
def test_written_out_activations(name, number, activation):
    model = seeded(lambda: Net(lambda s, x: activation(s.conv(x)), conv=nn.Conv2d(8, 6, 1)))
    check(model, image(), steps=[f"pointwise_conv2d + {name}"])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 7), (2, 3, 5), (3,), (), (2, 1, 3, 2, 2)], ids=str)
def test_activations_alone(name, shape):
    activation = ACTIVATIONS[name][-1]
    values = torch.tensor([-3.0, 0.0, 3.0, 6.0, -7.0, 0.5, 2.9])
    x = values.repeat(60)[: torch.Size(shape).numel()].reshape(shape)
    check(Net(lambda s, x: activation(x)), x, steps=[f"{name}"])


LOOK_ALIKES = [
    lambda x, y: F.relu6(x + 2) / 6,
    lambda x, y: F.relu6(x + 3) / 5,
    lambda x, y: F.relu6(x + 3) * x,
    lambda x, y: x * F.relu6(y + 3) / 6,
    lambda x, y: y * torch.sigmoid(x),
    lambda x, y: x * F.relu(x + 3) / 6,
    lambda x, y: x * F.relu6(x + 3) / y,
    lambda x, y: F.relu6(torch.add(x, y, alpha=3)) / 6,
    lambda x, y: F.relu6(x + y) / 6,
    lambda x, y: x.clamp(0, 5),
    lambda x, y: x.clamp(max=6),
    lambda x, y: F.hardtanh(x),
    lambda x, y: F.leaky_relu(x),
    lambda x, y: F.gelu(x) + F.elu(y) + F.softplus(x) + F.mish(y),
    lambda x, y: 3 - x,
    lambda x, y: torch.sub(x, 2, alpha=3) + torch.add(y, 3, alpha=2) + 0,
    lambda x, y: x / 3 * 0 + torch.div(y, 0.5, rounding_mode="floor") - y // 2 + x % 3 + x**2,
]


@pytest.mark.parametrize("number", range(len(LOOK_ALIKES)))
def test_what_only_looks_like_an_activation(number):
    function = LOOK_ALIKES[number]
    model = seeded(
        lambda: Net(lambda s, x: function(s.a(x), s.b(x)), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 3, padding=1))
    )
    fast = check(model, image())
    operations = " ".join(row.operation for row in fast.explain().rows)
    assert not any(name in operations for name in ("hardswish", "hardsigmoid", "silu"))


def test_an_activation_whose_parts_are_used_elsewhere():
    def forward(self, x):
        x = self.conv(x)
        shifted = F.relu6(x + 3)
        return x * shifted / 6, shifted, x

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 8, 1)))
    check(model, image(), fallbacks=["add_scalar"])


# Gates


def _se(pool, view=lambda y: y, gate=torch.sigmoid, squeeze=F.relu, product=lambda x, y: x * y):
    return lambda s, x: product(x, gate(s.b(squeeze(s.a(view(pool(x))))))) if x.dim() else None


def _unview(forward):
    def to_map(self, x):
        return x * forward(self, x)[:, :, None, None]

    return to_map


POOLS = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive 1 1": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "mean": lambda x: x.mean([2, 3], keepdim=True),
    "mean of negative": lambda x: x.mean((-1, -2), True),
    "whole window": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "whole window, stride": lambda x: F.avg_pool2d(x, x.size()[2:], stride=1),
}
PRODUCTS = {
    "x * g": lambda x, g: x * g,
    "g * x": lambda x, g: g * x,
    "mul_": lambda x, g: x.mul_(g),
    "expand_as": lambda x, g: x * g.expand_as(x),
    "expand": lambda x, g: x * g.expand(-1, -1, x.shape[2], x.shape[3]),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("pool", POOLS)
def test_squeeze_excite_of_convolutions(pool, product):
    def forward(self, x):
        x = self.depthwise(x)
        g = F.hardsigmoid(self.b(F.silu(self.a(POOLS[pool](x)))))
        return self.project(F.relu(PRODUCTS[product](x, g)))

    model = seeded(
        lambda: Net(
            forward,
            depthwise=nn.Conv2d(24, 24, 3, groups=24),
            a=nn.Conv2d(24, 6, 1, bias=False),
            b=nn.Conv2d(6, 24, 1),
            project=nn.Conv2d(24, 8, 1),
        )
    )
    check(model, image(3, 24), steps=["depthwise_conv2d", "squeeze_excite", "gate + relu", "pointwise_conv2d"])


@pytest.mark.parametrize("expand", ["view", "expand_as", "index", "unsqueeze"])
@pytest.mark.parametrize("squeeze", ["view", "flatten", "mean", "squeeze"])
def test_squeeze_excite_of_linear_layers(squeeze, expand):
    def forward(self, x):
        b, c, _, _ = x.size()
        if squeeze == "mean":
            y = x.mean([2, 3])
        else:
            y = F.adaptive_avg_pool2d(x, 1)
            y = {
                "view": lambda: y.view(b, c),
                "flatten": lambda: y.flatten(1),
                "squeeze": lambda: y.squeeze(3).squeeze(2),
            }[squeeze]()
        y = torch.sigmoid(self.b(F.relu(self.a(y))))
        if expand == "view":
            return self.project(x * y.view(b, c, 1, 1))
        if expand == "expand_as":
            return self.project(x * y.view(b, c, 1, 1).expand_as(x))
        return self.project(x * (y[:, :, None, None] if expand == "index" else y.unsqueeze(2).unsqueeze(3)))

    model = seeded(
        lambda: Net(forward, a=nn.Linear(24, 5), b=nn.Linear(5, 24, bias=False), project=nn.Conv2d(24, 8, 1))
    )
    x = image(3, 24)
    fast = check(model, x)
    assert "pointwise_conv2d + gate" in [row.operation for row in fast.explain().rows]
    assert "squeeze_excite" in [row.operation for row in fast.explain().rows]
    check(model, x[:1], fast=fast)


def test_squeeze_excite_with_batch_norm_inside():
    model = seeded(
        lambda: Net(
            lambda s, x: x * s.se(x),
            se=nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(24, 6, 1),
                nn.BatchNorm2d(6),
                nn.ReLU6(),
                nn.Conv2d(6, 24, 1, bias=False),
                nn.BatchNorm2d(24),
                nn.Hardsigmoid(),
            ),
        )
    )
    check(model, image(2, 24), steps=["squeeze_excite", "gate"])


GATES = {
    "scalar": lambda s, x: x * 2,
    "learned scalar": lambda s, x: x * s.scalar,
    "learned channels": lambda s, x: x * s.channels,
    "of the other batch": lambda s, x: x * s.conv(x).mean((0, 2, 3), keepdim=True),
    "one an image": lambda s, x: x * x.mean((1, 2, 3), keepdim=True),
    "a map": lambda s, x: x * torch.sigmoid(s.one(x)),
    "a row": lambda s, x: x * x.mean(3, keepdim=True),
    "0-d": lambda s, x: x * x.mean(),
    "itself": lambda s, x: x * x,
    "a product of images": lambda s, x: x * s.conv(x),
    "a division": lambda s, x: x / (1 + x.abs().mean((2, 3), keepdim=True)),
    "gate times gate": lambda s, x: x.mean((2, 3), keepdim=True) * s.conv(x).mean((2, 3), keepdim=True),
    "outer product": lambda s, x: x.mean(3, keepdim=True) * x.mean(2, keepdim=True),
}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("n", [1, 2])
def test_products_of_every_shape(kind, n):
    model = seeded(
        lambda: Net(
            GATES[kind],
            scalar=nn.Parameter(torch.tensor(1.5)),
            channels=nn.Parameter(torch.rand(8, 1, 1)),
            conv=nn.Conv2d(8, 8, 1),
            one=nn.Conv2d(8, 1, 1),
        )
    )
    fast = check(model, image(n))
    rows = [row.operation for row in fast.explain().rows]
    if n > 1 and kind != "gate times gate":
        assert "gate" not in rows and "squeeze_excite" not in rows
    check(model, image(n, 8, 1, 1), fast=fast)


def test_a_gate_from_elsewhere_and_one_gate_for_two():
    def forward(self, x, y):
        g = torch.sigmoid(self.b(F.relu(self.a(F.adaptive_avg_pool2d(y, 1)))))
        return self.p(x * g), self.q(y * g), g

    model = seeded(
        lambda: Net(
            forward, a=nn.Conv2d(8, 4, 1), b=nn.Conv2d(4, 8, 1), p=nn.Conv2d(8, 5, 1), q=nn.Conv2d(8, 6, 3, padding=1)
        )
    )
    fast = check(model, image(), image(h=5, w=5, seed=2))
    operations = [row.operation for row in fast.explain().rows]
    assert "pointwise_conv2d + gate" in operations and "gate" in operations


@pytest.mark.parametrize(
    "view", [lambda y: y.reshape(y.shape[1], -1).t(), lambda y: y.reshape(1, -1).reshape(2, -1), lambda y: y.flip(0)]
)
def test_pooled_features_that_change_places(view):
    def forward(self, x):
        y = view(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return x * torch.sigmoid(self.b(F.relu(self.a(y)))).view(2, 8, 1, 1)

    check(seeded(lambda: Net(forward, a=nn.Linear(8, 4), b=nn.Linear(4, 8))), image())


def test_pooled_features_mixed_over_the_batch():
    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1).view(1, 16)
        return x * torch.sigmoid(self.b(F.relu(self.a(y)))).view(2, 8, 1, 1)

    fast = check(seeded(lambda: Net(forward, a=nn.Linear(16, 4), b=nn.Linear(4, 16))), image())
    assert "squeeze_excite" not in [row.operation for row in fast.explain().rows]


def test_channels_mixed_over_the_batch():
    def forward(self, x):
        y = self.a(F.adaptive_avg_pool2d(x, 1))
        return self.b(y.view(1, -1, 1, 1)), self.c(y.reshape(-1, 5)[:, :, None, None])

    layers = {"a": nn.Conv2d(8, 10, 1), "b": nn.Conv2d(20, 4, 1), "c": nn.Conv2d(5, 4, 1)}
    check(seeded(lambda: Net(forward, **layers)), image(), fallbacks=[])


# Some of the channels

SPLITS = {
    "chunk": lambda x: x.chunk(2, 1),
    "split": lambda x: x.split(12, -3),
    "sizes": lambda x: x.split([3, 17, 4], 1),
    "slices": lambda x: (x[:, :7], x[:, 7:], x[:, -5:], x[:, 3:20]),
    "of slices": lambda x: x[:, 2:].split([5, 17], 1),
}
CHANNEL_LAYERS = {
    "pointwise": (lambda c: nn.Conv2d(c, 9, 1), "pointwise_conv2d"),
    "depthwise": (lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c), "depthwise_conv2d"),
    "depthwise, stride 2": (lambda c: nn.Conv2d(c, c, 5, 2, 2, groups=c), "depthwise_conv2d"),
    "dense": (lambda c: nn.Conv2d(c, 6, (3, 1), padding=(1, 0)), "conv2d"),
    "dense of 2x2": (lambda c: nn.Conv2d(c, 6, 2), "conv2d"),
    "winograd": (lambda c: nn.Conv2d(c, 40, 3, padding=1), None),
    "pool": (lambda c: nn.MaxPool2d(3, 1, 1), "pool2d"),
    "batch norm": (lambda c: nn.BatchNorm2d(c), "batch_norm"),
    "hardswish": (lambda c: nn.Hardswish(), "hardswish"),
    "nothing": (lambda c: nn.Identity(), None),
    "squeeze-excite": (lambda c: SqueezeExcite(c), None),
    "mean": (lambda c: nn.AdaptiveAvgPool2d(1), None),
    "gelu": (lambda c: nn.GELU(), None),
}


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


SPLIT_LAYERS = [("sizes", layer) for layer in CHANNEL_LAYERS] + [(split, "depthwise") for split in SPLITS]


@pytest.mark.parametrize("split, layer", sorted(set(SPLIT_LAYERS)))
def test_channels_are_read_and_written_where_they_lie(split, layer):
    build, operation = CHANNEL_LAYERS[layer]
    sizes = [part.shape[1] for part in SPLITS[split](torch.empty(1, 24, 1, 1))]

    def forward(self, x):
        parts = SPLITS[split](F.relu(self.first(x)))
        return self.last(torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], 1))

    def network():
        layers = nn.ModuleList([build(c) for c in sizes])
        out = sum(layer(torch.zeros(1, c, 8, 8)).shape[1] for layer, c in zip(layers.eval(), sizes, strict=True))
        return Net(forward, first=nn.Conv2d(8, 24, 1), layers=layers, last=nn.Conv2d(out, 5, 1))

    middle = None if operation is None else [operation] * len(sizes)
    steps = middle and ["pointwise_conv2d + relu", *middle, "pointwise_conv2d"]
    allowed = 1e-5 if layer == "winograd" else 1e-6
    fast = check(seeded(network), image(), steps=steps, allowed=allowed)
    for n in (1, 8):  # eight images run one by one
        check(fast._model, image(n), fast=fast, allowed=allowed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_of_an_input_and_of_an_aten_result(layout):
    def forward(self, x):
        a, b = x.split([3, 5], 1)
        c, d = torch.tanh(x).chunk(2, 1)
        return self.a(a), self.b(b), self.c(c), F.relu(d), x[:, 2:4], x[:, 1:], self.c(x[:, ::2])

    layers = {"a": nn.Conv2d(3, 5, 1), "b": nn.Conv2d(5, 5, 3, groups=5), "c": nn.Conv2d(4, 2, 3)}
    check(seeded(lambda: Net(forward, **layers)), image().to(memory_format=layout))


def test_batch_norm_and_activation_of_concatenated_convolutions():
    def forward(self, x):
        a, b = self.expand(x).split([5, 11], 1)
        return F.silu(self.norm(torch.cat([self.a(a), self.b(b)], 1)))

    layers = {
        "expand": nn.Conv2d(8, 16, 1),
        "a": nn.Conv2d(5, 5, 3, padding=1, groups=5),
        "b": nn.Conv2d(11, 11, 5, padding=2, groups=11, bias=False),
        "norm": nn.BatchNorm2d(16),
    }
    steps = ["pointwise_conv2d", *["depthwise_conv2d + batch_norm + silu"] * 2]
    fast = check(seeded(lambda: Net(forward, **layers)), image(), steps=steps)
    check(fast._model, image(8), fast=fast)


def test_batch_norm_of_concatenated_values_that_others_read():
    def forward(self, x):
        a = self.a(x)
        return F.relu(self.norm(torch.cat([a, self.b(x), x], 1))), a

    layers = {"a": nn.Conv2d(8, 3, 1), "b": nn.Conv2d(8, 2, 1), "norm": nn.BatchNorm2d(13)}
    check(seeded(lambda: Net(forward, **layers)), image(), fallbacks=[])


@pytest.mark.parametrize("groups, out_channels", [(2, 32), (3, 51), (2, 200)])
def test_wide_groups(groups, out_channels):
    def build():
        conv = nn.Conv2d(51 * groups, out_channels * groups, 3, 2, 1, groups=groups)
        return nn.Sequential(nn.Conv2d(8, 51 * groups, 1), conv, nn.BatchNorm2d(out_channels * groups), nn.ReLU())

    steps = ["pointwise_conv2d", *["conv2d + batch_norm + relu"] * groups]
    fast = check(seeded(build), image(), steps=steps)
    check(fast._model, image(8), fast=fast)
    assert sum(row.macs for row in fast.explain().rows) == 8 * 51 * groups * (8 * 63 + 9 * out_channels * 20)


def test_factors_go_into_the_weights():
    def forward(self, x):
        y = F.relu(x + 0.17 * self.norm(self.a(x)))
        return y + self.b(y) / 3, self.c(y.mean((2, 3))) * -0.5

    layers = {"a": nn.Conv2d(8, 8, 1), "norm": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 8, 3, padding=1, bias=False)}
    steps = [
        "pointwise_conv2d + batch_norm + residual + relu",
        "conv2d + residual",
        "global_avg_pool",
        "linear",
    ]
    check(seeded(lambda: Net(forward, **layers, c=nn.Linear(8, 4))), image(), steps=steps)


@pytest.mark.parametrize("classes", [5, 8])
def test_a_classifier_with_a_sigmoid_is_right(classes):
    def build():
        return nn.Sequential(
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 12),
            nn.Hardswish(),
            nn.Dropout(),
            nn.Linear(12, classes),
            nn.Sigmoid(),
        )

    check(seeded(build), image(), fallbacks=[])


def test_a_pool_with_several_readers():
    def forward(self, x):
        x = self.depthwise(x)
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.b(F.relu(self.a(pooled)))), pooled.flatten(1), x.mean((2, 3))

    model = seeded(
        lambda: Net(forward, depthwise=nn.Conv2d(8, 8, 3, groups=8), a=nn.Conv2d(8, 4, 1), b=nn.Conv2d(4, 8, 1))
    )
    check(model, image())


# Sums

SUMS = {
    "residual after": lambda s, x: s.a(x) + x,
    "residual before": lambda s, x: x + s.a(x),
    "in place": lambda s, x: s.a(x).add_(x),
    "into the input": lambda s, x: x.add_(s.a(x)),
    "both convolutions": lambda s, x: s.a(x) + s.b(x),
    "both dense": lambda s, x: s.b(x) + s.c(x),
    "dense and its input": lambda s, x: s.b(F.relu(s.c(x))) + x,
    "dense and pointwise": lambda s, x: F.relu(s.b(x) + s.a(F.relu(s.c(x)))),
    "depthwise": lambda s, x: s.d(x) + x,
    "depthwise first": lambda s, x: s.a(s.d(x)) + s.d(x),
    "itself": lambda s, x: s.a(x) + s.a(x),
    "twice one tensor": lambda s, x: (lambda y: y + y)(s.a(x)),
    "sum also read": lambda s, x: (lambda y: (y + x, y))(s.a(x)),
    "activation before": lambda s, x: F.relu(s.a(x)) + x,
    "activation after": lambda s, x: F.hardswish(s.a(x) + x),
    "chain": lambda s, x: s.a(x) + x + s.b(x) + s.d(x),
    "chain of sums": lambda s, x: (x + s.a(x)) + (x + s.b(x)),
    "alpha": lambda s, x: torch.add(s.a(x), x, alpha=2),
    "difference": lambda s, x: s.a(x) - x,
    "channels": lambda s, x: s.a(x) + s.b(x).mean((2, 3), keepdim=True),
    "one channel": lambda s, x: s.a(x) + x[:, :1],
    "row": lambda s, x: s.a(x) + x[:, :, :1],
    "vector": lambda s, x: s.a(x) + s.vector,
    "one image": lambda s, x: s.a(x) + x[:1],
    "gated": lambda s, x: s.a(x * s.b(x).mean((2, 3), keepdim=True)) + x,
    "gated by what it adds": lambda s, x: (lambda g: s.a(s.p(x) * g) + g)(s.b(s.p(x))),
    "the input twice": lambda s, x: s.b(x) + x + x,
    "relu between": lambda s, x: F.relu(F.relu(s.a(x) + x) + s.b(x)),
}


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums(kind, layout):
    def build():
        return Net(
            SUMS[kind],
            a=nn.Conv2d(8, 8, 1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            c=nn.Conv2d(8, 8, 5, padding=2),
            d=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            p=nn.AdaptiveAvgPool2d(1),
            vector=nn.Parameter(torch.rand(1, 8, 1, 1)),
        )

    check(seeded(build), image().to(memory_format=getattr(torch, f"{layout}_format", torch.channels_last)))


def test_residuals_are_fused():
    model = seeded(lambda: Net(lambda s, x: F.relu6(s.a(x) + x), a=nn.Conv2d(8, 8, 1)))
    check(model, image(), steps=["pointwise_conv2d + residual + relu6"])
    model = seeded(lambda: Net(lambda s, x: x + s.a(x), a=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    check(model, image().mean((2, 3)), steps=["linear + batch_norm + residual"])


# Batch norm

NORMS = {
    "after a convolution": (lambda s, x: s.n(s.conv(x)), ["pointwise_conv2d + batch_norm"]),
    "two": (lambda s, x: s.m(s.n(s.conv(x))), ["pointwise_conv2d + batch_norm"]),
    "after a depthwise convolution": (lambda s, x: F.relu(s.n(s.d(x))), ["depthwise_conv2d + batch_norm + relu"]),
    "before": (lambda s, x: s.conv(s.n(x)), ["batch_norm", "pointwise_conv2d"]),
    "pre-activation": (lambda s, x: s.conv(F.relu(s.n(x))) + x, ["batch_norm + relu", "pointwise_conv2d + residual"]),
    "after relu": (lambda s, x: s.n(F.relu(s.conv(x))), ["pointwise_conv2d + relu", "batch_norm"]),
    "two readers": (lambda s, x: (lambda y: s.n(y) + y)(s.conv(x)), ["pointwise_conv2d", "batch_norm", "add"]),
    "output too": (lambda s, x: (lambda y: (s.n(y), y))(s.conv(x)), ["pointwise_conv2d", "batch_norm"]),
    "after a sum": (lambda s, x: s.n(s.conv(x) + x), ["pointwise_conv2d + residual", "batch_norm"]),
    "shared": (
        lambda s, x: s.n(s.conv(s.n(s.d(x)))),
        ["depthwise_conv2d + batch_norm", "pointwise_conv2d + batch_norm"],
    ),
    "plain": (lambda s, x: s.plain(s.conv(x)), ["pointwise_conv2d + batch_norm"]),
    "plain first": (lambda s, x: s.plain(x), ["batch_norm"]),
    "of the batch": (lambda s, x: s.batch(s.conv(x)), ["pointwise_conv2d", "aten::batch_norm"]),
    "vectors": (lambda s, x: s.one(s.linear(x.mean((2, 3)))), None),
    "vectors alone": (lambda s, x: s.one(x.mean((2, 3))), None),
    "sequences": (lambda s, x: s.one(s.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)), None),
    "rows of channels": (lambda s, x: s.nine(s.linear(x.mean(3).transpose(1, 2))), None),
}


@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm(kind):
    forward, steps = NORMS[kind]

    def build():
        return Net(
            forward,
            conv=nn.Conv2d(8, 8, 1, bias=False),
            d=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            n=nn.BatchNorm2d(8, eps=1e-3),
            m=nn.BatchNorm2d(8),
            plain=nn.BatchNorm2d(8, affine=False),
            batch=nn.BatchNorm2d(8, track_running_stats=False),
            one=nn.BatchNorm1d(8),
            nine=nn.BatchNorm1d(9),
            linear=nn.Linear(8, 8),
        )

    check(seeded(build), image(), steps=steps)


# Convolutions and padding

CONVOLUTIONS = {
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), ["conv2d"]),
    "multiplier": (lambda: nn.Conv2d(8, 16, 3, groups=8), ["conv2d"]),
    "depthwise": (lambda: nn.Conv2d(8, 8, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=8), []),
    "dilated": (lambda: nn.Conv2d(8, 5, 3, padding=2, dilation=2), []),
    "stride 2 of 1x1": (lambda: nn.Conv2d(8, 5, 1, stride=2), []),
    "padded 1x1": (lambda: nn.Conv2d(8, 5, 1, padding=1), []),
    "not square": (lambda: nn.Conv2d(8, 5, (1, 5), stride=(2, 1), padding=(0, 2)), []),
    "same": (lambda: nn.Conv2d(8, 5, (4, 3), padding="same", dilation=(1, 2)), []),
    "same depthwise": (lambda: nn.Conv2d(8, 8, 4, padding="same", groups=8), []),
    "valid": (lambda: nn.Conv2d(8, 5, 3, padding="valid"), []),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(8, 1, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 6, 1)), []),
    "whole image": (lambda: nn.Conv2d(8, 5, (9, 7)), []),
    "reflect": (lambda: nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"), ["aten::pad"]),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=8), ["aten::pad"]),
    "transposed": (lambda: nn.ConvTranspose2d(8, 5, 2, stride=2), ["aten::conv_transpose2d"]),
    "zero padding": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(8, 5, 3, stride=2)), []),
    "zero padding, depthwise": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, padding=1, groups=8)), []),
    "zero padding, 1x1": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 0, 2)), nn.Conv2d(8, 5, 1)), []),
    "zero padding twice": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d(2), nn.Conv2d(8, 5, 3)), ["pad"]),
    "zero padding, grouped": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3, groups=2)), ["pad", "conv2d"]),
    "cropping": (lambda: nn.Sequential(nn.ZeroPad2d((-1, 1, 0, 0)), nn.Conv2d(8, 5, 3)), ["aten::pad"]),
    "padding of ones": (lambda: nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 5, 3)), ["aten::pad"]),
    "width alone": (lambda: nn.Sequential(Net(lambda s, x: F.pad(x, (2, 1))), nn.Conv2d(8, 5, 3)), []),
    "batch padded": (
        lambda: nn.Sequential(Net(lambda s, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))), nn.Conv2d(8, 5, 3)),
        ["aten::pad"],
    ),
    "channels_last weights": (lambda: nn.Conv2d(8, 5, 3).to(memory_format=torch.channels_last), []),
    "upsampled": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 5, 3)), ["aten::upsample_nearest2d"]),
    "pooled": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 5, 1)), []),
    "average pooled": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 5, 1)), []),
    "pooled to its own size": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((9, 7)), nn.Conv2d(8, 5, 1)), []),
    "pooled with a larger window": (lambda: nn.Sequential(nn.AvgPool2d(20, ceil_mode=True), nn.Conv2d(8, 5, 1)), []),
    "pooled to 2x3": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((2, 3)), nn.Conv2d(8, 5, 1)), None),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind):
    build, fallbacks = CONVOLUTIONS[kind]
    fast = check(seeded(build), image(), fallbacks=fallbacks)
    check(fast._model, image(1), fast=fast)
    check(fast._model, image(0), fast=fast)


def test_convolutions_of_other_ranks():
    check(seeded(lambda: nn.Conv2d(8, 5, 3)), image()[0])
    check(seeded(lambda: nn.Conv1d(8, 5, 3)), image()[:, :, 0])
    check(seeded(lambda: nn.Conv3d(8, 5, 1)), image()[:, :, None])


def test_a_convolution_with_two_readers():
    def forward(self, x):
        y = self.a(x)
        return F.relu(y), self.b(F.hardswish(y)) + y

    check(seeded(lambda: Net(forward, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 3, padding=1))), image(), fallbacks=[])


def test_linear_layers():
    x = image()
    layers = {"a": nn.Linear(7, 5), "b": nn.Linear(63, 6, bias=False), "c": nn.Linear(8, 4)}

    def forward(self, x):
        return self.a(x), self.a(x[:, 0]), self.a(x[0, 0, 0]), self.b(x.flatten(2)), self.c(x.mean((2, 3))).relu()

    check(seeded(lambda: Net(forward, **layers)), x)


def test_weights_computed_in_the_graph():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = weight / weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias * 2, self.stride, self.padding)

    model = seeded(lambda: nn.Sequential(Standardised(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    fast = check(model, image(), steps=["conv2d + batch_norm + relu"])
    check(model, image(3), fast=fast)
    model = seeded(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.ReLU()))
    check(model, image(), steps=["pointwise_conv2d + relu"])
    fast = accelerate(model)
    with torch.no_grad():
        before = fast(image())
        model[0].parametrizations.weight.original0 *= 2
        assert torch.equal(fast(image()), before)
        check(model, image(), fast=fast.refresh())


def test_weights_from_the_input():
    def forward(self, x):
        return F.conv2d(x, x[:, :, :1, :1]), F.linear(x, x[0, 0]), F.conv2d(x, self.w, x[0, :4, 0, 0])

    check(seeded(lambda: Net(forward, w=nn.Parameter(torch.rand(4, 8, 1, 1)))), image())


def test_shared_modules_and_weights():
    def build():
        a, b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        b.weight = a.weight
        act = nn.Hardswish()
        return nn.Sequential(a, act, a, nn.BatchNorm2d(8), act, b, nn.ReLU(), a)

    fast = check(seeded(build), image(), fallbacks=[])
    assert len(fast._packed) == 3  # a, a with its batch norm, b


# In place


def _slices(self, x):
    y = self.conv(x)
    y[:, 0] = 5
    y[:, 1:3].mul_(2)
    y[:, :, 0] += y[:, :, 1]
    return y


def _base_after_view(self, x):
    y = self.conv(x)
    F.relu_(y.view(y.shape[0], -1))
    return y * 1.5


def _view_after_base(self, x):
    y = self.conv(x)
    rows = y.flatten(2)
    y.mul_(2)
    return rows.sum(-1), y


def _chunks(self, x):
    y = self.conv(x)
    a, b = y.chunk(2, 1)
    a.relu_()
    b.sigmoid_()
    return y + 1, torch.cat([b, a], 1)


def _dropped(self, x):
    y = self.conv(x)
    z = self.dropout(y)
    z.add_(1)
    return y * 2, z


def _into_out(self, x):
    y = self.conv(x)
    z = torch.empty_like(y)
    torch.add(y, y, out=z)
    return z


def _lists(self, x):
    y = self.conv(x)
    z = y * 2
    torch._foreach_add_([y, z], 1.0)
    return y, z


def _kept_dtype(self, x):
    return self.conv(x).add_(torch.ones(8, 1, 1, dtype=torch.float64))


def _before_batch_norm(self, x):
    y = self.conv(x)
    y[:, :2] *= 2
    return self.norm(self.conv(y))


def _mask(self, x):
    y = self.conv(x)
    y[y > 1] = 0
    y.masked_fill_(x < 0, 2)
    return y


def _fresh(self, x):
    y = x.new_zeros(x.shape[0], 8, 1, 1)
    y[:, 2] = 3
    y.add_(torch.tensor([2.0]).mul_(2))
    return self.conv(x) * y


def _copied(self, x):
    y = self.conv(x)
    z = y.clone()
    y.relu_()
    return z, y


IN_PLACE = {
    "activations": lambda s, x: F.relu_(F.hardswish(s.conv(x), inplace=True)).sigmoid_(),
    "read before": lambda s, x: (lambda y: (y * 2, y.relu_())[0])(s.conv(x)),
    "the input": lambda s, x: s.conv(x.relu_()),
    "a view of the input": lambda s, x: (x[:, :2].relu_(), s.conv(x))[1],
    "slices": _slices,
    "a base, after its view": _base_after_view,
    "a view, after its base": _view_after_base,
    "chunks": _chunks,
    "what dropout gave back": _dropped,
    "out=": _into_out,
    "lists": _lists,
    "a sum of another dtype": _kept_dtype,
    "before batch norm": _before_batch_norm,
    "masks": _mask,
    "new tensors": _fresh,
    "after a copy": _copied,
    "transposed": lambda s, x: (lambda y: (y.transpose(2, 3).mul_(2), y)[1])(s.conv(x)),
    "dropout": lambda s, x: F.dropout(s.conv(x), training=False, inplace=True) + 1,
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_operations(kind):
    model = seeded(lambda: Net(IN_PLACE[kind], conv=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8), dropout=nn.Dropout()))
    x = image()
    before = x.clone()
    check(model, x)
    assert torch.equal(x, before), "an accelerated model only reads its inputs"


def test_in_place_operations_do_not_cost_the_kernels():
    model = seeded(lambda: Net(_before_batch_norm, conv=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8)))
    assert "pointwise_conv2d + batch_norm" in [row.operation for row in check(model, image()).explain().rows]


# Inputs and outputs


def test_outputs_of_every_structure():
    def forward(self, x):
        y = self.conv(x)
        return {
            "features": [y, F.relu(y)],
            "twice": (y, y),
            "views": (y.view(y.shape[0], -1), y.flatten(2), y.mean((2, 3)), y.permute(0, 2, 3, 1)),
            "input": x,
            "input's view": x[:, 0],
            "none": None,
            "batch": x.shape[0],
            "name": "y",
            "number": 2.5,
            "weight": self.conv.bias,
            "constant": self.conv.bias * 2,
            "integers": y.argmax(1),
            "mask": y > 0,
            "double": y.double(),
            "half": y.half(),
        }

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 6, 1)))
    fast = check(model, image())
    with torch.no_grad():
        expected = fast(image())["constant"].clone()
        outputs = fast(image())
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaf.zero_()
        assert torch.equal(fast(image())["constant"], expected) and torch.equal(
            fast(image())["weight"], model.conv.bias
        )
    check(model, image(), fast=fast)


@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Identity()], ids=["flat", "maps"])
def test_pooled_features_are_an_output_without_a_copy(flatten):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), flatten))
    check(model, image(), steps=["pointwise_conv2d + relu", "global_avg_pool"])


@dataclasses.dataclass(frozen=True)
class Pooled:
    mean: torch.Tensor
    note: str = "of all pixels"
    count: int = dataclasses.field(init=False, default=2)


@dataclasses.dataclass
class Found:
    maps: dict[str, torch.Tensor]
    pooled: Pooled
    absent: torch.Tensor | None = None


def test_outputs_in_dataclasses():
    def forward(self, x):
        y = F.relu(self.conv(x))
        return [Found({"y": y}, Pooled(y.mean((2, 3)))), y + 1]

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 6, 1)))
    fast = accelerate(model)
    for n in (2, 1, 4):
        x = image(n)
        with torch.no_grad():
            (found, y), (fast_found, fast_y) = model(x), fast(x)
        assert type(fast_found) is Found and type(fast_found.pooled) is Pooled
        assert (fast_found.absent, fast_found.pooled.note, fast_found.pooled.count) == (None, "of all pixels", 2)
        torch.testing.assert_close(fast_found.maps, found.maps)
        torch.testing.assert_close(fast_found.pooled.mean, found.pooled.mean)
        torch.testing.assert_close(fast_y, y)
    assert len(fast._captures) == 1 and list(fast.state_dict()) == list(model.state_dict())


def test_results_are_the_callers():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    fast = accelerate(model)
    with torch.no_grad():
        first = fast(image())
        kept = first.clone()
        second = fast(image(seed=5))
        assert torch.equal(first, kept) and not torch.equal(first, second)
        first.zero_()
        assert torch.equal(fast(image()), kept)


def test_keyword_arguments_in_any_order():
    def forward(self, a, b=None, *, scale=1.0, names=("x",)):
        y = self.conv(a) if b is None else self.conv(a) - scale * b
        return y, len(names)

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 8, 1)))
    a, b = image(seed=2), image(seed=3)
    fast = check(model, a, b)
    check(model, a, fast=fast)
    check(model, b=b, a=a, fast=fast)
    check(model, a=a, b=b, fast=fast)
    check(model, a, b=b, scale=2.0, fast=fast)
    check(model, a, scale=-0.0, b=b, fast=fast)
    check(model, a, scale=0.0, b=b, fast=fast)
    check(model, a, scale=0, b=b, fast=fast)
    check(model, a, scale=True, b=b, fast=fast)
    captures = len(fast._captures)
    check(model, a, names=("x", "y"), fast=fast)
    check(model, a=b, b=a, fast=fast)
    assert len(fast._captures) == captures + 1


def test_inputs_in_lists_and_dicts():
    def forward(self, pair, more):
        return self.conv(pair[0]) * more["gate"] + pair[1] + more["deep"][0]

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(8, 8, 1)))
    x, gate = image(), image(h=1, w=1)
    fast = check(model, [x, 2 * x], {"gate": gate, "deep": (x.flip(1),)})
    check(model, [x[:1], x[:1]], {"gate": gate[:1], "deep": (x[:1],)}, fast=fast)
    wide = image(5)
    check(model, [wide, wide], {"gate": image(5, h=1, w=1), "deep": (wide,)}, fast=fast)


def test_integer_and_boolean_inputs():
    def forward(self, pixels, mask, index):
        x = self.conv((pixels.to(self.conv.weight.dtype) - 127) / 128)
        return (x * mask).index_select(1, index)

    model = seeded(lambda: Net(forward, conv=nn.Conv2d(3, 8, 3, padding=1)))
    pixels = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    check(model, pixels, pixels[:, :1] > 100, torch.tensor([3, 1]))


def test_operations_without_a_kernel():
    def forward(self, x):
        a, b = torch.split(x, [3, 5], 1)
        top = x.flatten(2).topk(3)
        y = torch.cat([b, F.interpolate(a, size=x.shape[2:], mode="bilinear")], 1)
        y = y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).contiguous().view_as(x)
        sequence, (hidden, _) = self.lstm(x.mean(3).transpose(1, 2))
        y = torch.where(y > 0, y, self.norm(y)) + torch.einsum("nchw,cd->ndhw", x, self.matrix)
        return y, top, sequence, hidden, torch.stack([y, x]).amax(0), torch.arange(x.shape[0]) + len(top)

    model = seeded(
        lambda: Net(forward, lstm=nn.LSTM(8, 4), norm=nn.GroupNorm(2, 8), matrix=nn.Parameter(torch.randn(8, 8)))
    )
    fast = check(model, image())
    check(model, image(1), fast=fast)
    check(model, image(3), fast=fast)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", ["dense", "pointwise", "depthwise", "batch_norm", "aten", "nothing"])
def test_layouts_of_inputs(layout, first):
    def forward(self, x):
        y = {
            "dense": lambda: self.dense(x),
            "pointwise": lambda: self.pointwise(x),
            "depthwise": lambda: self.depthwise(x),
            "batch_norm": lambda: self.norm(x),
            "aten": lambda: x.tanh(),
            "nothing": lambda: x,
        }[first]()
        return y, F.adaptive_avg_pool2d(y, 1), y.flatten(1)

    model = seeded(
        lambda: Net(
            forward,
            dense=nn.Conv2d(8, 8, 3),
            pointwise=nn.Conv2d(8, 8, 1),
            depthwise=nn.Conv2d(8, 8, 3, groups=8),
            norm=nn.BatchNorm2d(8),
        )
    )
    x = operand((2, 8, 9, 7), layout)
    fast = check(model, x)
    with torch.no_grad():
        y = fast(x)[0]
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    check(model, x[:, :, ::2, 1:], fast=fast)
    check(model, operand((1, 8, 1, 1)).expand(2, 8, 9, 7), fast=fast)
    negated = torch.view_as_complex(torch.randn(2, 8, 9, 7, 2)).conj().imag
    assert negated.is_neg()
    check(model, negated, fast=fast)


def test_nan_and_infinity():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()))
    x = image()
    x[0, 0, 0, 0], x[1, 2, 5, 5], x[1, 1, 8, 0] = float("nan"), float("inf"), float("-inf")
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model)(x), model(x), equal_nan=True)


# The batch


def _captures(fast):
    return len(fast._captures)


def test_a_new_batch_size_needs_no_capture():
    def build():
        return nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    for first in (1, 4, 2):
        model = seeded(build)
        fast = accelerate(model, image(first))
        packed = len(fast._packed)
        for n in (3, 1, 2, 7, 4):
            check(model, image(n), fast=fast, fallbacks=[])
        assert _captures(fast) == 1
        check(model, image(2, h=12), fast=fast)
        check(model, image(0), fast=fast, fallbacks=[])
        assert _captures(fast) == 3 and len(fast._packed) == packed


# Each goes another way for one image, or for none, with the same functions and sizes.
BY_BATCH = {
    "a number": lambda s, x: s.conv(x) * (3.0 if len(x) > 1 else 1.0) + len(x),
    "an integer": lambda s, x: s.conv(x) * (2 if len(x) > 1 else 1),
    "a dimension": lambda s, x: s.conv(x).softmax(2 if len(x) > 1 else 1),
    "a weight": lambda s, x: F.conv2d(x, s.conv.weight if len(x) > 1 else s.other.weight),
    "a layer": lambda s, x: (s.conv if len(x) > 1 else s.other)(x),
    "a result": lambda s, x: (lambda a, b: a if len(x) > 1 else b)(s.conv(x).sin(), s.other(x).sin()),
    "the mean": lambda s, x: s.conv(x).sum(0) / max(1, len(x)),
    "nothing": lambda s, x: s.conv(x).mean((2, 3)) if len(x) > 0 else torch.ones(0, 3, dtype=x.dtype),
}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("way", BY_BATCH)
def test_what_a_model_does_with_one_image_or_none(way, first):
    model = seeded(lambda: Net(BY_BATCH[way], conv=nn.Conv2d(8, 6, 3), other=nn.Conv2d(8, 6, 3)))
    fast = accelerate(model, image(first))
    for n in (2, 1, 3, 0, 1):
        check(model, image(n), fast=fast)


# What becomes of weights by the number of images is not to be packed once for all.
OF_BATCH = {
    "convolution": lambda s, x: F.conv2d(x, s.conv.weight / len(x), s.conv.bias * len(x)),
    "batch norm": lambda s, x: F.batch_norm(x, s.norm.running_mean * len(x), s.norm.running_var, eps=0.1 * len(x)),
    "linear": lambda s, x: F.linear(x.mean((2, 3)), s.linear.weight.repeat(len(x), 1)),
}


@pytest.mark.parametrize("way", OF_BATCH)
def test_weights_that_depend_on_the_batch(way):
    model = seeded(lambda: Net(OF_BATCH[way], conv=nn.Conv2d(8, 6, 3), norm=nn.BatchNorm2d(8), linear=nn.Linear(8, 3)))
    fast = accelerate(model, image(2))
    for n in (3, 5, 2):
        check(model, image(n), fast=fast)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_channels_of_what_has_no_kernel_in_parts(threads_used):
    def forward(self, x):
        y = x.tanh()
        z = self.first(x)
        a, b = y.chunk(2, 1)
        return self.second(z) + self.third(torch.cat([b, a], 1))

    model = seeded(
        lambda: Net(forward, first=nn.Conv2d(8, 16, 5, padding=2), second=nn.Conv2d(16, 8, 1), third=nn.Conv2d(8, 8, 1))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads_used)
    try:
        check(model, image(8, h=96, w=96), allowed=1e-5)
    finally:
        torch.set_num_threads(before)


def test_a_batch_norm_by_the_input():
    def forward(self, x):
        factors = x.mean((0, 2, 3))
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, factors, 2 * factors)

    check(seeded(lambda: Net(forward, norm=nn.BatchNorm2d(8))), image(2))


def test_layers_of_one_channel_behind_a_pooling():
    def forward(self, x):
        y = x.mean((2, 3)).unsqueeze(-1)
        return x * torch.sigmoid(self.second(F.relu(self.first(y)))).unsqueeze(-1)

    model = seeded(lambda: Net(forward, first=nn.Linear(1, 4), second=nn.Linear(4, 1)))
    fast = accelerate(model, image(2, 24))
    for c in (24, 200):
        check(model, image(1, c), fast=fast)


ODD = {
    "no outputs": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 81, 0)), (2, 8, 9, 9)),
    "no inputs": (lambda: Net(lambda s, x: s.layer(x[:, :0, 0, 0]), layer=nn.Linear(0, 5)), (2, 8, 9, 9)),
    "one bias": (
        lambda: Net(lambda s, x: F.linear(x[:, :, 0, 0], s.layer.weight, s.layer.bias[:1]), layer=nn.Linear(8, 4)),
        (2, 8, 9, 9),
    ),
    "a vector": (lambda: Net(lambda s, x: F.linear(x[:, :, 0, 0], s.layer.bias), layer=nn.Linear(3, 8)), (2, 8, 9, 9)),
    "all padding": (lambda: nn.MaxPool2d(2, 1, 1, 2), (1, 8, 1, 9)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", ODD)
def test_sizes_that_kernels_do_not_take(case):
    build, (n, c, h, w) = ODD[case]
    model, x = build().eval(), image(n, c, h, w)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_outputs_are_the_callers():
    model = Net(lambda s, x: (x.clone(), x * 1, x + 0, (y := s.conv(x)), y.clone(), y), conv=nn.Conv2d(8, 6, 3)).eval()
    fast = accelerate(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(2).contiguous(memory_format=layout)
        kept = x.clone()
        with torch.no_grad():
            outputs = fast(x)
        for output in outputs:
            output.zero_()
            assert torch.equal(x, kept)
        assert len({output.data_ptr() for output in outputs}) == 6


VIEWS = {
    "of an input": lambda s, x: (s.conv(x), x[:1], x[:, 2:4]),
    "of an output": lambda s, x: (y := torch.sin(s.conv(x)), y[:1], y.flatten(1)),
    "of one another": lambda s, x: torch.sin(s.conv(x)).chunk(2, 0),
    "of a weight": lambda s, x: (s.conv(x), s.conv.weight[:1]),
    "pooled, and read in another shape": lambda s, x: (y := x.mean((2, 3), keepdim=True), s.fc(y.flatten(1))),
    "vectors": lambda s, x: (y := x.mean((2, 3)), y[:1]),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 8])
def test_no_output_is_a_view(kind, memory_format, channels):
    model = seeded(lambda: Net(VIEWS[kind], conv=nn.Conv2d(channels, 6, 3), fc=nn.Linear(channels, 3)))
    x = image(2, c=channels).contiguous(memory_format=memory_format)
    kept, fast = x.clone(), check(model, x)
    with torch.no_grad():
        for chosen in range(len(fast(x))):
            outputs = fast(x)
            others = [output.clone() for output in outputs]
            outputs[chosen].fill_(7)
            others[chosen].fill_(7)
            assert torch.equal(x, kept)
            assert all(map(torch.equal, outputs, others))
    check(model, x, fast=fast)


BATCHES = {
    "squeeze": lambda s, x: s.conv(x).mean((2, 3), keepdim=True).squeeze(),
    "squeeze and sum": lambda s, x: s.conv(x).mean((2, 3), keepdim=True).squeeze().sum(0),
    "branch": lambda s, x: s.conv(x) if x.shape[0] == 1 else s.conv(x) * 2,
    "branch on a number": lambda s, x: s.conv(x) * (1.0 if x.shape[0] == 1 else 2.0),
    "large batches": lambda s, x: s.conv(x) if x.shape[0] < 4 else s.conv(x) * 2,
    "mean of batch": lambda s, x: s.conv(x) / x.shape[0],
    "batch among channels": lambda s, x: s.conv(x).reshape(1, -1, *x.shape[2:]).mean(1),
    "first images": lambda s, x: s.conv(x)[: (x.shape[0] + 1) // 2],
    "rows of all": lambda s, x: s.conv(x).reshape(-1, 7).softmax(0),
    "a fixed batch": lambda s, x: s.conv(x).view(2, -1) if x.shape[0] == 2 else s.conv(x).view(x.shape[0], 2, -1),
    "loop": lambda s, x: sum(s.conv(one[None]) for one in x),
    "number of the batch": lambda s, x: torch.arange(x.shape[0])[:, None, None, None] * s.conv(x),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("first", [1, 2])
def test_what_depends_on_the_batch(kind, first):
    model = seeded(lambda: Net(BATCHES[kind], conv=nn.Conv2d(8, 8, 1)))
    fast = accelerate(model, image(first))
    for n in (2, 1, 3, 5, 4, 2):
        check(model, image(n), fast=fast)


def test_a_batch_that_is_written_into_the_model():
    model = seeded(lambda: Net(lambda s, x: s.conv(x).view(2, 8, -1), conv=nn.Conv2d(8, 8, 1)))
    fast = check(model, image(2))
    with pytest.raises(ValueError, match=r"^accelerate: the model does not take these inputs: shape '\[2, 8, -1\]'"):
        fast(image(3, h=3, w=3))
    check(model, image(2), fast=fast)


# Chance


def test_dropout_does_nothing_in_evaluation():
    model = seeded(lambda: nn.Sequential(nn.Dropout(0.9), nn.Conv2d(8, 8, 1), nn.Dropout2d(), nn.Identity(), nn.ReLU()))
    check(model, image(), steps=["pointwise_conv2d + relu"])
    check(nn.Sequential(nn.Dropout(), nn.AlphaDropout(), nn.FeatureAlphaDropout()), image())


@pytest.mark.parametrize(
    "random",
    [
        lambda s, x: F.dropout(s.conv(x), 0.5),
        lambda s, x: F.dropout2d(s.conv(x), 0.5, training=True),
        lambda s, x: s.conv(x) + torch.rand(x.shape[0], 1, 1, 1),
        lambda s, x: s.conv(x) * torch.rand_like(s.conv.bias)[:, None, None],
        lambda s, x: s.conv(x) * torch.ones(8, 1, 1).bernoulli_(0.5),
        lambda s, x: F.conv2d(x, F.dropout(s.conv.weight)),
        lambda s, x: s.conv(x) + torch.randn_like(x).mul_(2),
    ],
)
def test_what_is_random_stays_random(random):
    model = seeded(lambda: Net(random, conv=nn.Conv2d(8, 8, 1)))
    fast = accelerate(model)
    x = image()
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = fast(x), fast(x)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(fast(x), first) and torch.equal(fast(x), second)
        typical = torch.stack([model(x) for _ in range(200)])
        actual = torch.stack([fast(x) for _ in range(200)])
        assert (actual.mean(0) - typical.mean(0)).abs().max() < typical.std(0).max() * 6 / 200**0.5 * 2**0.5


# With blocks, and what a model keeps


def test_with_blocks():
    def forward(self, x):
        with torch.enable_grad():
            y = self.a(x)
            z = F.relu(y)
        with torch.autocast("cpu", enabled=False):
            z = self.b(z.float() if z.dtype == torch.bfloat16 else z)
            z.add_(y)
        with torch.no_grad():
            return F.relu6(z)

    model = seeded(lambda: Net(forward, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 3, padding=1)))
    check(model, image(), fallbacks=[])


def test_a_cache_that_is_filled_at_the_first_call():
    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[:, self.index]
        return self.conv(x) + self.cache["bias"][:, :, None, None]

    class Caching(Net):
        def train(self, mode=True):
            self.cache = {}
            return super().train(mode)

    model = seeded(lambda: Caching(forward, conv=nn.Conv2d(8, 8, 1), table=nn.Parameter(torch.rand(1, 5))))
    model.index = torch.tensor([0, 1, 2, 3, 4, 1, 1, 0])
    fast = check(model, image())
    with torch.no_grad():
        model.table += 1
    model.eval()
    check(model, image(), fast=fast.refresh())
    check(model, image(h=5), fast=fast)


def test_neutral_numbers():
    model = seeded(lambda: Net(lambda s, x: F.relu(0 + s.a(x) * 1 + x), a=nn.Conv2d(8, 8, 1)))
    check(model, image(), steps=["pointwise_conv2d + residual + relu"])


# What is refused


def _stride(self, x):
    return torch.as_strided(self.conv(x), (2, 4), (8, 1))


def _scripted(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.conv(x)


def _counts(self, x):
    self.calls.add_(1)
    return self.conv(x) * self.calls


def _counts_a_part(self, x):
    y = self.conv(x) * self.calls
    self.calls.view(-1)[:1].add_(1)
    return y


def _writes_weights(self, x):
    self.conv.weight[0].mul_(2)
    return self.conv(x)


REFUSED = {
    "data decide the shape": (lambda s, x: s.conv(x)[x > 0], "depend on its data"),
    "data decide a number": (lambda s, x: s.conv(x) * x.max().item(), "depend on its data"),
    "data decide the path": (lambda s, x: s.conv(x) if x.max() > 0 else x, "Net cannot be captured: "),
    "numpy": (lambda s, x: s.conv(x + torch.from_numpy(x.numpy())), "Net cannot be captured: "),
    "strides": (_stride, "as_strided.* reads memory by its strides, cannot be a step of a plan"),
    "autocast": (_scripted, "wrap_with_autocast cannot be a step of a plan"),
    "a counter": (_counts, "the model changes its own 'calls' in forward|its own buffer 'calls' in forward"),
    "a part of a buffer": (_counts_a_part, "the model changes its own buffer 'calls' in forward"),
    "its weights": (_writes_weights, "the model changes its own parameter 'conv.weight' in forward"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, capfd):
    forward, message = REFUSED[kind]
    model = seeded(
        lambda: Net(forward, conv=nn.Conv2d(8, 8, 1)),
    )
    model.register_buffer("calls", torch.zeros(1))
    state = copy.deepcopy(model.state_dict())
    fast = accelerate(model)
    with pytest.raises(NotImplementedError, match=f"^accelerate: .*({message})") as error:
        fast(image())
    assert "\n" not in str(error.value)
    torch.testing.assert_close(fast.state_dict(), state, rtol=0, atol=0)
