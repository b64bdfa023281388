"""``python -m benchmarks.training``, on the CPU and as far as it goes without a GPU."""

import csv

import pytest
import torch
from fake_gpu import FakeGpu
from torch import nn

from benchmarks import training


def small():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
    depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
    return nn.Sequential(*convolution, *depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(training, "stock", lambda name: small())
    monkeypatch.setitem(training.NETWORKS, "mobilenet_v1", ("timm", "", 32))


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("peer", [p for p in training.PEERS["cuda"] if "compile" not in p])
def test_a_step_is_a_step(tiny, peer, dtype):
    """The losses of three steps are those of steps written out, in float32 within rounding."""
    device = FakeGpu()
    x, labels = training.data("mobilenet_v1", 4, device)
    step = training.step_of(peer, small(), x, labels, training.DTYPES[dtype], device)
    losses = [step().item() for _ in range(3)]
    model = small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel={"fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}[dtype])
    assert len(device.captured) == peer.endswith("graph")


def test_rows_of_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(training, "device_of", lambda kind: FakeGpu())

    def peak(name, peer, *setting):
        if peer == "eager":
            raise torch.OutOfMemoryError("no memory\nat all")
        return 5.0

    def broken(peer, *rest, step_of=training.step_of):
        if "native" in peer:
            raise RuntimeError("no kernel")
        return step_of(peer, *rest)

    monkeypatch.setattr(training, "peak_mib", peak)
    monkeypatch.setattr(training, "step_of", broken)
    peers = ["eager", "native", "replace_layers channels_last graph"]
    rows = training.measure("mobilenet_v1", peers, 4, 2, 1, "cuda", "bf16", 0.01)
    eager, native, ours = rows
    assert eager["failed"] == "OutOfMemoryError: no memory" and native["failed"] == "RuntimeError: no kernel"
    assert ours["failed"] is None and ours["peak_mib"] == 5
    for row in (eager, ours):
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["device"] == "cuda"
    assert native["median_ms"] is None and list(native) == list(ours)
    lines = training.table(rows).splitlines()
    assert "no kernel" in lines[-2] and "1.00" in lines[-1]


def test_command(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    peers = ["eager channels_last", "replace_layers channels_last"]
    command = ["--case", "mobilenet_v2", "--batch", "2", "--rounds", "1", "--threads", "1", "--out", str(file)]
    assert training.main([*command, "--peer", *peers]) == 0
    with file.open(newline="") as opened:
        theirs, ours = csv.DictReader(opened)
    assert float(theirs["first_loss"]) == pytest.approx(float(ours["first_loss"]), rel=0.1)  # dropout differs
    assert 0 < float(ours["peak_mib"]) < float(theirs["peak_mib"])
    assert "mobilenet_v2, fp32, batch 2, 1 threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    (
        ("--peer eager graph", "no peer 'graph' on cpu"),
        ("--depthwise --dtype bf16", "--depthwise is of fp32 on the CPU"),
        ("--depthwise --device cuda", "--depthwise is of fp32 on the CPU"),
        ("--dtype fp8", "invalid choice"),
    ),
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="needs a GPU, torch sees none"):
        training.main(["--device", "cuda"])


def test_gradients_of_depthwise_layers(tiny, capsys):
    assert training.main(["--depthwise", "--case", "mobilenet_v1", "--batch", "2", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 layers, × channels_last" in printed and printed.splitlines()[2].split()[:4] == ["8", "16", "3", "1"]
