"""From the Inception module to the separable convolution: equivalence where the paper says so, and what each costs."""

import pytest
import torch
from torch import nn

import mobilenet_fast
from mobilenet_fast import cost
from mobilenet_fast import nn as fast
from mobilenet_fast.nn import inception

OPTIONS = [{}, {"bias": True}, {"bias": True, "activation": "silu"}]


def gradients(module, x):
    """The output, and the gradients of a sum of its squares by the input and by the parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("towers", [1, 3])
def test_towers_are_segments(towers, options):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    module = fast.InceptionTowers(5, 12, 9, towers, **options).double()
    shared = module.to_shared()
    (y, by_x, by_towers), (shared_y, shared_by_x, by_shared) = gradients(module, x), gradients(shared, x)
    assert_equal(shared_y, y)
    assert_equal(shared_by_x, by_x)
    for name, gradient in by_shared.items():
        assert_equal(gradient, torch.cat([by_towers[f"tower{i + 1}.{name}"] for i in range(towers)]))
    with torch.no_grad():  # by kernels
        y = module(x)
        assert_equal(shared(x), y)
        shared.spatial.weight[0] += 1
        assert not torch.equal(shared(x), y) and torch.equal(module(x), y)  # weights are copies


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_many_segments_as_channels_are_a_separable_convolution(options):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    module = fast.InceptionSegments(5, 12, 12, 12, **options).double()
    separable = module.to_separable()
    assert separable.order == "pointwise_first" and type(separable.depthwise) is type(module.spatial)
    (y, by_x, by_module), (separable_y, separable_by_x, by_separable) = gradients(module, x), gradients(separable, x)
    assert_equal(separable_y, y)
    assert_equal(separable_by_x, by_x)
    for name, gradient in by_module.items():
        assert_equal(by_separable[name.replace("spatial", "depthwise")], gradient)
    with torch.no_grad():
        assert_equal(separable(x), y)


def test_segments_do_not_see_each_other():
    torch.manual_seed(0)
    module = fast.InceptionSegments(4, 6, 8, 2)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        y = module(x)
        module.pointwise.weight[:3] = 0
        changed = (module(x) != y).flatten(2).any(2)[0]
    assert changed.tolist() == [True] * 4 + [False] * 4


def test_branches_are_concatenated_in_the_order_of_the_figures():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 8)
    naive = fast.NaiveInception(6, 2, 3, 4)
    y = naive(x)
    assert y.shape == (2, naive.out_channels, 9, 8) and naive.out_channels == 15
    torch.testing.assert_close(y[:, 9:], nn.functional.max_pool2d(x, 3, 1, 1))
    conv = naive.branch3[0]
    assert conv.kernel_size == (5, 5) and conv.bias is not None
    torch.testing.assert_close(y[:, 5:9], conv(x).relu())
    reduced = fast.ReducedInception(6, 2, 3, 4, 1, 2, 3, bias=False, activation="none")
    y = reduced(x)
    assert y.shape[1] == reduced.out_channels == 11
    torch.testing.assert_close(y[:, 8:], reduced.branch4[1][0](nn.functional.max_pool2d(x, 3, 1, 1)))
    canonical = fast.CanonicalInception(6, 2, 3, 4, 1, 2, 3, activation="relu6")
    y = canonical(x)
    assert y.shape[1] == canonical.out_channels == 11
    torch.testing.assert_close(y[:, 8:], canonical.branch4[1][0](nn.functional.avg_pool2d(x, 3, 1, 1)).clamp(0, 6))
    assert [conv[0].kernel_size for conv in canonical.branch3] == [(1, 1), (3, 3), (3, 3)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: fast.NaiveInception(6, 2, 3, 4),
        lambda: fast.ReducedInception(6, 2, 3, 4, 1, 2, 3),
        lambda: fast.CanonicalInception(6, 2, 3, 4, 1, 2, 3, activation="hardswish"),
        lambda: fast.InceptionTowers(6, 4, 8, 2, bias=True, activation="relu"),
        lambda: fast.InceptionSegments(6, 8, 8, 8, activation="relu6"),
    ],
    ids=("naive", "reduced", "canonical", "towers", "segments"),
)
def test_accelerated(build):
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        exact = module.double()(x.double())
        module.float()
        for layer in (module, mobilenet_fast.accelerate(module, strict=True)):
            torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


# Code, output channels, parameters and multiply-accumulates.
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in inception.__doc__.splitlines()
    if line.startswith("|")
][2:]


@pytest.mark.parametrize("code, channels, parameters, macs", ROWS)
def test_costs_are_those_of_the_table(code, channels, parameters, macs):
    if code == "dense 3x3 convolution":
        code = "nn.Conv2d(192, 256, 3, padding=1)"
    module = eval(code.replace(")", ", bias=False)"), {"nn": nn, **vars(fast)})
    found = cost.count(module, (1, 192, 28, 28))
    assert f"{module(torch.empty(1, 192, 28, 28)).shape[1]}" == channels
    assert (f"{found.parameters:,}", f"{found.macs:,}") == (parameters, macs)


def test_the_parts_of_a_branch():
    # 5x5 on 28 × 28 × 192 → 32, and through a bottleneck of 16 channels.
    naive, reduced = fast.NaiveInception(192, 64, 128, 32), fast.ReducedInception(192, 64, 96, 128, 16, 32, 32)
    found = {
        layer.name: layer.macs for module in (naive, reduced) for layer in cost.count(module, (1, 192, 28, 28)).layers
    }
    assert found["branch3.0"] == 120_422_400
    assert found["branch3.0.0"] == 2_408_448 and found["branch3.1.0"] == 10_035_200


@pytest.mark.parametrize(
    "build, said",
    [
        (
            lambda: fast.InceptionSegments(4, 8, 9, 3),
            "InceptionSegments: mid_channels and out_channels must be multiples of segments=3, got 8 and 9",
        ),
        (lambda: fast.InceptionTowers(4, 8, 8, 0), "InceptionTowers: .* multiples of towers=0, got 8 and 8"),
        (
            lambda: fast.NaiveInception(4, 1, 1, 1, activation="elu"),
            "NaiveInception: activation must be one of .*, got 'elu'",
        ),
        (
            lambda: fast.InceptionSegments(4, 8, 8, 2).to_separable(),
            "to_separable: segments must be as many as channels, 8 and 8, got 2",
        ),
    ],
)
def test_errors(build, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        build()
