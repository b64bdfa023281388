"""Costs of layers and networks against the papers' formulas and what the modules say."""

import csv
import io

import pytest
import torch
from torch import nn

from mobilenet_fast import cli, cost, models

MILLION = 1e6


@pytest.mark.parametrize("kernel, in_channels, out_channels, size", [(3, 3, 5, 4), (5, 192, 32, 28), (3, 7, 1, 9)])
def test_formulas_are_what_modules_cost(kernel, in_channels, out_channels, size):
    pixels, x = size**2, (1, in_channels, size, size)
    padding = kernel // 2
    standard = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
    depthwise = nn.Conv2d(in_channels, in_channels, kernel, padding=padding, groups=in_channels, bias=False)
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    assert cost.count(standard, x).macs == cost.standard_macs(kernel, in_channels, out_channels, pixels)
    assert cost.count(depthwise, x).macs == cost.depthwise_macs(kernel, in_channels, pixels)
    assert cost.count(pointwise, x).macs == cost.pointwise_macs(in_channels, out_channels, pixels)
    separable = cost.separable_macs(kernel, in_channels, out_channels, pixels)
    assert cost.count(nn.Sequential(depthwise, pointwise), x).macs == separable
    ratio = separable / cost.standard_macs(kernel, in_channels, out_channels, pixels)
    assert ratio == pytest.approx(cost.separable_ratio(kernel, out_channels))
    assert (ratio > 1) == (out_channels == 1)  # one output channel: the separable one costs more


def test_the_worked_cases():
    # 6 × 6 × 3 → 4 × 4 × 5 with 3 × 3.
    assert cost.count(nn.Conv2d(3, 5, 3), (1, 3, 6, 6)).macs == cost.standard_macs(3, 3, 5, 16) == 2160
    assert (cost.depthwise_macs(3, 3, 16), cost.pointwise_macs(3, 5, 16)) == (432, 240)
    # 5 × 5 on 28 × 28 × 192 → 32, and through 16 channels.
    assert cost.standard_macs(5, 192, 32, 784) == pytest.approx(120.4 * MILLION, rel=1e-3)
    assert cost.pointwise_macs(192, 16, 784) == pytest.approx(2.4 * MILLION, rel=5e-3)
    assert cost.standard_macs(5, 16, 32, 784) == pytest.approx(10.0 * MILLION, rel=5e-3)


class Sum(nn.Module):
    """A container that is never called."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1)) for _ in range(2))

    def forward(self, x):
        return self.ways[0](x) + self.ways[1][0](x)


def test_modules_of_a_list_count_once():
    found = cost.count(Sum(), (1, 3, 5, 5))
    assert found.macs == 2 * cost.pointwise_macs(3, 4, 25)
    assert [(layer.name, layer.macs) for layer in found.layers if layer.macs] == [("ways.0.0", 300), ("ways.1.0", 300)]


def test_layers_add_up():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten()
    )
    model.append(nn.Linear(128, 10))
    found = cost.count(model, (2, 3, 8, 8))
    expected = [
        ("0", "Conv2d", (2, 8, 4, 4), 2 * 27 * 8 * 16, 27 * 8 + 8, 4 * 256),
        ("1", "BatchNorm2d", (2, 8, 4, 4), 0, 16, 4 * 256),
        ("5", "Linear", (2, 10), 2 * 1280, 1290, 4 * 20),
    ]
    assert [tuple(vars(layer).values()) for layer in found.layers] == expected
    assert (found.macs, found.parameters, found.activation_bytes) == tuple(
        sum(row[i] for row in expected) for i in (3, 4, 5)
    )
    assert model[0].weight.device.type == "cpu" and model.training and not model[0]._forward_hooks
    rows = list(csv.reader(io.StringIO(found.to_csv())))
    assert rows[0] == ["layer", "kind", "output", "macs", "parameters", "activation_bytes"] and len(rows) == 4
    assert str(found).splitlines()[-1].split()[1:] == [
        f"{found.macs:,}",
        f"{found.parameters:,}",
        f"{found.activation_bytes:,}",
    ]


def test_tied_parameters_count_once():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    found = cost.count(nn.Sequential(a, b), (1, 8))
    assert (found.parameters, found.macs) == (64, 128)
    assert a.weight is b.weight and a.weight.device.type == "cpu"


def test_shared_parameters_and_residuals_count_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(self.conv(x)) + x

    found = cost.count(Twice(), (1, 4, 2, 2))
    assert (found.macs, found.parameters) == (2 * 64, 20)
    assert found.activation_bytes == 3 * 64  # both convolutions' and the sum


@pytest.mark.parametrize(
    "name, size, macs, parameters",
    [  # millions, as the papers state them; where they differ by more than rounding, see the tolerance
        ("mobilenet_v1", 224, 569, 4.2),
        ("mobilenet_v2", 224, 300, 3.47),
        ("mobilenet_v3_large", 224, 219, 5.4),
        ("mobilenet_v3_small", 224, 56, 2.5),
        ("mnasnet_a1", 224, 312, 3.9),
        ("efficientnet_b0", 224, 390, 5.3),
        ("xception", 299, 8360, 22.86),
        ("inception_v3", 299, 5710, 23.8),
    ],
)
def test_networks_cost_what_their_papers_say(name, size, macs, parameters):
    with torch.device("meta"):
        options = {"aux_logits": False} if name == "inception_v3" else {}
        model = models.create_model(name, **options)
    found = cost.count(model, (1, 3, size, size))
    assert found.macs == pytest.approx(macs * MILLION, rel=0.03)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters == pytest.approx(parameters * MILLION, rel=0.03)


def test_multipliers_of_mobilenet_v1():
    def macs(width_mult, size):
        with torch.device("meta"):
            model = models.mobilenet_v1(width_mult=width_mult)
        return cost.count(model, (1, 3, size, size)), sum(p.numel() for p in model.parameters())

    (whole, parameters), (half, fewer), (small, same) = macs(1.0, 224), macs(0.5, 224), macs(1.0, 112)
    # α² on both, but for stem, depthwise layers and classifier, which go with α; ρ² on arithmetic alone, but that half
    # of 7 pixels is 4.
    assert 0.25 < half.macs / whole.macs < 0.28 and 0.25 < fewer / parameters < 0.33
    assert 0.25 < small.macs / whole.macs < 0.265 and same == parameters
    assert sum(layer.kind in ("Conv2d", "DepthwiseConv2d", "PointwiseConv2d") for layer in whole.layers) == 27


def test_xception_has_36_convolutions_in_14_modules():
    with torch.device("meta"):
        found = cost.count(models.xception(), (1, 3, 299, 299))
    separable = {layer.name.rpartition(".")[0] for layer in found.layers if layer.kind == "PointwiseConv2d"}
    assert len(separable) + 2 == 36  # a depthwise and a pointwise one count as one; two of the stem
    modules = {name.split(".")[0] for name in separable}
    assert len(modules) == 12 + 2  # conv3 and conv4 are one module of the paper's, the stem another


def test_scaling_to_a_budget():
    assert cost.compound_scaling(0) == (1, 1, 224)
    b0 = cost.count(models.efficientnet_b0(), (1, 3, 224, 224))
    for budget in ({"macs": b0.macs}, {"params": b0.parameters}):
        width, depth, resolution = cost.scale_to_budget(**budget)
        ((name, value),) = budget.items()
        with torch.device("meta"):
            found = cost.count(models.efficientnet(width, depth, resolution), (1, 3, resolution, resolution))
        assert (found.macs if name == "macs" else found.parameters) <= value and 0.99 <= width < 1.1
    assert cost.scale_to_budget(macs=1e9)[0] > 1.1
    with pytest.raises(ValueError, match="^scale_to_budget: one of macs, params and latency_ms must be given, got 2"):
        cost.scale_to_budget(macs=1e9, params=1e6)
    assert cost.scale_to_budget(params=1e9) == cost.compound_scaling(8)
    with pytest.raises(ValueError, match="^scale_to_budget: macs must be positive, got nan"):
        cost.scale_to_budget(macs=float("nan"))
    with pytest.raises(ValueError, match="^scale_to_budget: macs=1000 is less than the smallest network"):
        cost.scale_to_budget(macs=1000)


def test_scaling_to_a_latency(monkeypatch):
    monkeypatch.setattr(cost, "_latency_ms", lambda width, depth, resolution, threads: width * resolution / threads)
    width, depth, resolution = cost.scale_to_budget(latency_ms=300, threads=2)
    assert width * resolution / 2 <= 300 and 1.2 * width * resolution / 2 > 300


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"^count: input_size must be positive integers, batch first, got \(1, 0\)$"):
        cost.count(nn.Linear(1, 1), (1, 0))
    with pytest.raises(ValueError, match=r"^count: the model does not take an input of \(1, 4, 8, 8\): "):
        cost.count(models.mobilenet_v3_small(), (1, 4, 8, 8))
    for size in (224, None):
        with pytest.raises(ValueError, match=f"^count: input_size must be positive integers, batch first, got {size}$"):
            cost.count(nn.Linear(1, 1), size)

    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(ValueError, match=r"^count: the model does not take an input of \(1, 1\): AssertionError$"):
        cost.count(Fails(), (1, 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)  # which never calls its out_proj

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(torch.ones(3))])
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return x * self.factors[0] + self.factors[0]


def test_parameters_are_those_that_a_call_reads():
    attention = Attention()
    assert cost.count(attention, (1, 5, 16)).parameters == sum(p.numel() for p in attention.parameters())
    assert cost.count(Listed(), (2, 3)).parameters == 3


def test_command_and_plot(tmp_path, capsys):
    assert cli.main(["cost", "mobilenet_v1", "--size", "128"]) == 0
    assert "conv_stem" in capsys.readouterr().out
    assert cli.main(["cost", "mobilenet_v1", "--size", "128", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(int(row["macs"]) for row in rows) == cost.count(models.mobilenet_v1(), (1, 3, 128, 128)).macs
    assert cli.main(["cost", "inception_v3", "--size", "32"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "does not take an input of (1, 3, 32, 32)" in said.err
    pytest.importorskip("matplotlib")
    cost.plot_scaling(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
