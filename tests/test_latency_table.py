import json

import numpy as np
import pytest
import torch
from helpers import import_timm, import_torchvision
from torch import nn

from mobilenet_fast import models
from mobilenet_fast.nn import ConvNormAct, InvertedResidual
from mobilenet_fast.search import LatencyTable, SearchSpace, Stage, mobilenet_v3_space
from mobilenet_fast.search.latency import KINDS, Part, PartTimer, parts_of, parts_of_space

TINY = SearchSpace("tiny", (Stage(8, 1), Stage(16, 1, 2)), stem_channels=8, head_channels=16, num_classes=3)


class Clock:
    """Takes a part's channels for its milliseconds, and remembers what it measured."""

    def __init__(self):
        self.measured = []

    def __call__(self, parts):
        self.measured += parts
        return [0.5 if part.kind == "call" else float(part.out_channels) for part in parts]


def test_calibration_makes_predictions_what_a_network_takes(tmp_path):
    path, network, other = tmp_path / "table.json", models.mobilenet_v3_large(), models.mobilenet_v3_small()
    table = LatencyTable(path, size=32, timer=Clock())
    before, other_before = table.predict(network), table.predict(other)
    assert table.speed is None
    assert table.calibrate(2 * before) == pytest.approx(2)
    assert table.predict(network) == pytest.approx(2 * before)
    assert table.predict(other) == pytest.approx(2 * other_before)
    again = LatencyTable(path, size=32, measure=False, timer=Clock())
    assert again.predict(other) == table.predict(other)
    assert table.calibrate(before) == pytest.approx(1)  # whatever it was before
    assert table.calibrate(np.float32(2 * before)) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"calibrate takes a time that is possible, got 1e\+308 ms"):
        table.calibrate(1e308)
    assert table.speed == LatencyTable(path, size=32, measure=False, timer=Clock()).speed == pytest.approx(2)


@pytest.mark.parametrize("ms", [0, -1.0, float("nan"), float("inf"), "1"])
def test_calibration_refuses(ms):
    table = LatencyTable(size=32, timer=Clock())
    table.speed = 1.5
    with pytest.raises(ValueError, match="LatencyTable: calibrate takes a positive number of ms, got "):
        table.calibrate(ms)
    table.measures = False
    with pytest.raises(KeyError, match="not measured"):
        table.calibrate(1.0)
    assert table.speed == 1.5


def test_calibration_times_the_network():
    table, network = LatencyTable(size=32, threads=1, timer=Clock()), models.mobilenet_v3_large()
    before = table.predict(network)
    table._networks.seconds = 0.1
    table.calibrate()
    assert 0.01 < table.predict(network) < 1000 < before  # milliseconds, and a clock's


def test_parts_of_mobilenet_v3():
    parts = parts_of(models.mobilenet_v3_large(), (1, 3, 224, 224))
    assert [part.kind for part in parts] == [
        "conv2d", *["inverted_residual"] * 15, "conv2d", "global_avg_pool", "linear", "linear"
    ]  # fmt: skip
    assert parts[0] == Part("conv2d", 3, 16, 224, 224, kernel_size=3, stride=2, activation="hardswish")
    assert parts[1] == Part("inverted_residual", 16, 16, 112, 112, 16, 3, 1, activation="relu", skip="identity")
    assert parts[4] == Part("inverted_residual", 24, 40, 56, 56, 72, 5, 2, 24, "relu")
    assert parts[-2] == Part("linear", 960, 1280, activation="hardswish")


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "mnasnet_b1", "efficientnet_b0"])
def test_parts_of_other_chains(name):
    model = models.create_model(name)
    parts = parts_of(model, (1, 3, 224, 224))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    squeezes = sum(part.squeeze_channels > 0 for part in parts)
    blocks = [part for part in parts if part.kind == "inverted_residual"]
    expanding = sum(part.expanded_channels != part.in_channels for part in blocks)
    others = sum(part.kind == "conv2d" for part in parts)
    assert convolutions == 2 * squeezes + 2 * len(blocks) + expanding + others


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mnasnet_b1", lambda: import_torchvision().models.mnasnet1_0()),
        ("efficientnet_b0", lambda: import_torchvision().models.efficientnet_b0()),
        ("mobilenet_v2", lambda: import_timm().create_model("mobilenetv2_100")),
        ("mnasnet_a1", lambda: import_timm().create_model("semnasnet_100")),
        ("efficientnet_b0", lambda: import_timm().create_model("efficientnet_b0", drop_path_rate=0.2)),
    ],
)
def test_parts_of_other_peoples_networks(name, make):
    parts = parts_of(make(), (1, 3, 64, 64))
    assert parts == parts_of(models.create_model(name), (1, 3, 64, 64))
    assert sum(part.skip == "identity" for part in parts) in (9, 10)


def test_a_part_builds_what_it_is_found_in():
    for part in parts_of_space(TINY, 1, 32):
        shape = (1, part.in_channels, part.height, part.width)[: 2 if part.kind == "linear" else 4]
        assert parts_of(part.build(), shape) == [part]


def test_a_space_has_all_parts_of_its_networks():
    import random

    parts, generator = set(parts_of_space(TINY, 1, 32)), random.Random(0)
    for _ in range(20):
        assert set(parts_of(TINY.architecture(TINY.sample(generator)), (1, 3, 32, 32))) <= parts


def test_predictions_are_sums_and_parts_are_measured_once(tmp_path):
    clock, path = Clock(), tmp_path / "table.json"
    table = LatencyTable(path, size=32, timer=clock)
    network = nn.Sequential(
        ConvNormAct(3, 8, stride=2), InvertedResidual(8, 16, 8), InvertedResidual(8, 16, 8), nn.AdaptiveAvgPool2d(1)
    )
    assert table.predict(network) == 8 + 8 + 8 + 8 + 0.5
    assert len(clock.measured) == 4 and Part("call") in clock.measured
    assert table.predict(network) == 32.5 and len(clock.measured) == 4
    again = LatencyTable(path, size=32, measure=False, timer=clock)
    assert again.predict(network) == 32.5
    with pytest.raises(KeyError, match="not measured: conv2d 3→8 on 48×48 kernel 3 stride 2 relu"):
        again.predict(network, 48)
    assert len(clock.measured) == 4


def test_measuring_again_keeps_the_lesser_time():
    times = iter([3.0, 2.0, 5.0])
    table, part = LatencyTable(timer=lambda parts: [next(times) for _ in parts]), Part("linear", 3, 4)
    for expected in (3.0, 2.0, 2.0):
        table.measure([part], again=True)
        assert table.times[part] == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "GTX 9"), ("kernels", "mmx"), ("threads", 77), ("batch", 9), ("dtype", "int8"), ("torch", "0.4")],
)
def test_a_table_of_another_machine_is_refused(tmp_path, field, value):
    path = tmp_path / "table.json"
    LatencyTable(path, timer=Clock()).measure([Part("linear", 3, 4)])
    content = json.loads(path.read_text())
    content["conditions"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"was measured with {field} {value}, here it is ") as error:
        LatencyTable(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"conditions": {}, "parts": []}'])
def test_no_table(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="is no table of latencies"):
        LatencyTable(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("speed", "x", "speed must be a positive number, it is 'x'"),
        ("speed", 0, "speed must be a positive number, it is 0"),
        ("parts", [{"kind": "linear", "ms": "abc"}], "ms must be a positive number, it is 'abc'"),
        ("parts", [{"kind": "linear", "ms": float("nan")}], "ms must be a positive number, it is nan"),
        ("parts", [{"kind": "linear", "ms": 0}], "ms must be a positive number, it is 0"),
        ("parts", [{"kind": "call", "ms": -1}], "ms must be a positive number, it is -1"),
        ("parts", [{"kind": "shuffle", "ms": 1}], "there is no part 'shuffle'"),
        ("parts", [{"kind": "linear", "depth": 3, "ms": 1}], "depth"),
        ("parts", ["linear"], "'str' object has no attribute"),
        ("parts", 3, "not iterable"),
    ],
)
def test_broken_tables(tmp_path, field, value, message):
    path = tmp_path / "table.json"
    LatencyTable(path, timer=lambda parts: [0.0]).measure([Part("call")])  # a call may take no time beyond its steps
    LatencyTable(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"^LatencyTable: \S+table\.json is no table of latencies \(.*{message}.*\)$"):
        LatencyTable(path)


@pytest.mark.parametrize("device", ["meta", "xpu", "gpu"])
def test_other_devices(device):
    with pytest.raises(ValueError, match=f"""^LatencyTable: device must be "cpu" or "cuda", got '{device}'$"""):
        LatencyTable(device=device)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="^LatencyTable: device cuda needs a GPU, torch sees none$"):
        LatencyTable(device="cuda")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(ConvNormAct(3, 8), nn.ConvTranspose2d(8, 8, 3)), "no part is like 1, ConvTranspose2d"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2)), "no part is like 0, Conv2d"),
        (nn.Sequential(ConvNormAct(5, 8)), r"does not take \(1, 3, 224, 224\)"),
        (models.googlenet(), "no part is like"),
    ],
)
def test_networks_that_are_no_chains_of_parts(network, message):
    with pytest.raises(ValueError, match=message):
        LatencyTable(timer=Clock()).predict(network)


def test_branches_are_no_chain():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ConvNormAct(3, 8), ConvNormAct(3, 8)

        def forward(self, x):
            return self.a(x) + self.b(x)

    with pytest.raises(ValueError, match="networks must be chains, and b.0 does not take what a.0 gives"):
        LatencyTable(timer=Clock()).predict(Branches())


def test_bad_options():
    for options in ({"size": 0}, {"batch": 1.5}, {"threads": -1}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            LatencyTable(**options)
    with pytest.raises(TypeError, match="must be a module or an Architecture, got str"):
        LatencyTable(timer=Clock()).predict("v3")
    with pytest.raises(ValueError, match="there is no part 'shuffle'"):
        Part("shuffle", 3, 4)


def test_every_kind_of_part_is_timed_through_its_plan():
    """That times are told apart, not what they are: the larger of two parts takes longer by far."""
    small = [
        Part("conv2d", 3, 8, 16, 16, kernel_size=3, activation="relu"),
        Part("conv2d", 8, 8, 8, 8, kernel_size=3, squeeze_channels=8, activation="relu", skip="pool"),
        Part("depthwise_conv2d", 8, 8, 8, 8, kernel_size=3, activation="relu6"),
        Part("inverted_residual", 8, 8, 8, 8, 8, 3, activation="relu", skip="identity"),
        Part("inverted_residual", 8, 16, 8, 8, 24, 5, 2, 8, "hardswish", "relu"),
        Part("global_avg_pool", 8, 8, 8, 8),
        Part("linear", 8, 16, activation="hardswish"),
    ]
    assert {part.kind for part in small} | {"call"} == set(KINDS)
    timer = PartTimer(torch.device("cpu"), torch.get_num_threads(), 1, torch.float32, runs=3)
    large = Part("inverted_residual", 64, 64, 56, 56, 384, 5, 1, 0, "hardswish")
    *times, longest = timer([*small, large])
    assert all(0 < ms < longest for ms in times)


def test_the_space_of_mobilenet_v3_holds_its_skeleton():
    space = mobilenet_v3_space()
    assert [stage.out_channels for stage in space.stages] == [16, 24, 40, 80, 112, 160]
    assert {len(options) for name, options in space.decisions if name.endswith("kernel_sizes")} == {3}
