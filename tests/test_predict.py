"""Predicted times of a GPU's steps: bytes, arithmetic and launches by hand."""

import csv

import pytest
import torch

from mobilenet_fast.accelerate.roofline import H100, H200, Work

pytest.importorskip("triton")
from benchmarks import predict, predict_layers  # noqa: E402
from benchmarks.cases import layers  # noqa: E402


def test_a_step_takes_the_longest_of_what_it_needs():
    us, launch = 1e-6, H100.launch_seconds
    assert Work(20e6, 0).seconds() == pytest.approx(10 * us + launch)
    assert Work(0, 37e6).seconds() == pytest.approx(10 * us + launch)
    assert Work(0, 0, macs=3.3e9).seconds() == pytest.approx(10 * us + launch)
    assert Work(0, 0, macs=3.3e9, dtype=torch.float32).seconds() == pytest.approx(20 * us + launch)
    assert Work(0, 0, instructions=150e6).seconds() == pytest.approx(10 * us + launch)
    assert Work(0, 0, turns=10, programs=6 * 132 + 1).seconds() == pytest.approx(20 * H100.load_seconds + launch)
    assert Work(30e6, 0, 1, 1).bound() == "memory" and Work(1, 1).bound() == "latency"


@pytest.fixture(scope="module")
def steps():
    return predict.steps_of("mobilenet_v3_small", torch.float16, H100)


def test_bytes_of_a_batch(steps):
    """Of the first convolution, and of a pointwise one with gate and residual; in half precision."""
    for batch in (1, 32):
        row, work = steps[batch][0]
        assert row.macs == work.macs == batch * 112 * 112 * 16 * 27
        assert row.bytes == 2 * (batch * (3 * 224**2 + 16 * 112**2) + 16 * 27)
        row, work = next((r, w) for r, w in steps[batch] if "gate + residual" in r.operation)
        channels = row.shape[1]
        pixels, hidden = row.shape[2] * row.shape[3], row.macs // (batch * channels * row.shape[2] * row.shape[3])
        assert row.bytes == 2 * (batch * (pixels * (hidden + 2 * channels) + hidden) + hidden * channels)


def test_what_fits_the_cache_comes_from_there(steps):
    for rows in steps.values():
        for row, work in rows:
            assert work.memory_bytes + work.cached_bytes >= row.bytes - 1
    # At batch 1 all but a few wait for one load, which takes longer than what they move and compute.
    for _, work in steps[1]:
        moved = work.memory_bytes / 2.0e12 + work.cached_bytes / 3.7e12
        computed = max(work.instructions / 15e12, work.macs / 330e12)
        rounds = -(-work.programs // (6 * 132))
        assert (work.bound() == "latency") == (0.7e-6 * work.turns * rounds >= max(moved, computed))
    assert len(steps[1]) - 3 <= [work.bound() for _, work in steps[1]].count("latency") < len(steps[1])
    assert steps[256][0][1].bound() == "memory" and steps[256][0][1].memory_bytes > 0


def test_page_and_csv(tmp_path, capsys):
    file = tmp_path / "predictions.md"
    assert predict.main(["--model", "mobilenet_v3_small", "--out", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "no measurements" in text and "## mobilenet_v3_small" in text
    with file.with_suffix(".csv").open(newline="") as opened:
        found = list(csv.DictReader(opened))
    assert {row["batch"] for row in found} == {"1", "32", "256"} and not any(row["measured_us"] for row in found)
    totals = {}
    for dtype in ("float16", "float32"):
        rows = [row for row in found if (row["chip"], row["batch"], row["dtype"]) == ("H200", "256", dtype)]
        totals[dtype] = sum(float(row["predicted_us"]) for row in rows)
        heading = f"| H200 | mobilenet_v3_small | {dtype} | 256 |"
        inference, training = [line.split("|") for line in text.splitlines() if line.startswith(heading)]
        assert float(inference[7]) == pytest.approx(totals[dtype] / 1e3, rel=0.01)
        assert 0 < float(training[5]) < float(training[6])
    assert totals["float32"] > 1.5 * totals["float16"]
    with file.with_name("predictions_layers_h200.csv").open(newline="") as opened:
        of_layers = list(csv.DictReader(opened))
    names = {case.name for case in layers.cases() if "cuda" in case.devices}
    assert {row["case"] for row in of_layers} == names and not any(row["measured_us"] for row in of_layers)
    networks = file.with_name("predictions_networks.csv")
    assert read(networks)[0]["measured_ms"] == ""
    networks.write_text("model,measured_ms\nmobilenet_v3_small,1\n")  # as an older version wrote it
    assert predict.main(["--model", "mobilenet_v3_small", "--out", str(file)]) == 0
    assert read(networks)[0]["measured_ms"] == ""


def read(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write(file, rows):
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def test_what_was_measured_stands_beside_the_prediction_and_stays(tmp_path, capsys):
    file = tmp_path / "predictions.md"
    command = ["--model", "mobilenet_v3_small", "--out", str(file)]
    case = layers.cases()[0].name
    result = {
        "case": case,
        "peer": "functional",
        "batch": "32",
        "direction": "forward",
        "device": "cuda",
        "gpu": "NVIDIA H200",
    }
    result |= {"suite": "layers", "dtype": "fp16", "median_ms": "0.5"}
    network = result | {"suite": "models", "case": "mobilenet_v3_small", "peer": "accelerate", "median_ms": "1.23456"}
    graph, failed = {"peer": "functional channels_last graph"}, {"batch": "1", "median_ms": ""}
    suite = [result | graph | {"median_ms": "0.0125"}, result, result | failed, network]
    name, dtype = "mobilenet_v3_small", torch.float32
    first = next(predict.step_rows({("H200", name, dtype): predict.steps_of(name, dtype, H200)}))
    timing = {
        "gpu": "NVIDIA H200",
        "model": first["model"],
        "dtype": "fp32",
        "batch": "1",
        "way": "planned",
        "step": "0",
    }
    timing |= {"kernel": first["kernel"], "shape": first["output"].replace("×", "x"), "is_default": "True", "us": "3.5"}
    tuned = [timing, timing | {"is_default": "False", "us": "2"}, timing | {"way": "all", "us": "1"}]
    step = {"network": "mobilenet_v3_small", "peer": "replace_layers channels_last", "device": "cuda", "dtype": "fp16"}
    step |= {"gpu": "NVIDIA H100 80GB HBM3", "batch": "256", "first_loss": "7", "median_ms": "9"}
    training = [step, step | {"peer": "eager", "median_ms": "20"}]
    results = {"suite": suite, "tuned": tuned, "training": training}
    files = [write(tmp_path / f"{name}.csv", rows) for name, rows in results.items()]
    for given in (["--measured", *files], []):
        assert predict.main([*command, *given]) == 0
        found = {
            what: [
                {name: row[name] for name in ("chip", "batch", "dtype", column)} for row in read(path) if row[column]
            ]
            for what, path, column in (
                ("steps", file.with_suffix(".csv"), "measured_us"),
                ("layers", tmp_path / "predictions_layers_h200.csv", "measured_us"),
                ("networks", tmp_path / "predictions_networks.csv", "measured_ms"),
            )
        }
        assert found == {
            "steps": [{"chip": "H200", "batch": "1", "dtype": "float32", "measured_us": "3.50"}],
            "layers": [{"chip": "H200", "batch": "32", "dtype": "fp16", "measured_us": "12.50"}],
            "networks": [
                {"chip": "H100", "batch": "256", "dtype": "float16", "measured_ms": "9.000"},
                {"chip": "H200", "batch": "32", "dtype": "float16", "measured_ms": "1.235"},
            ],
        }
        text = file.read_text(encoding="utf-8")
        assert "stands beside" in text and text.count("| 1.235 |") == text.count("| 9.000 |") == 1
    before = file.read_bytes()
    other = write(tmp_path / "other.csv", [{"name": "1"}])
    on_cpu = write(tmp_path / "cpu.csv", [result | {"device": "cpu"}])
    old = write(tmp_path / "old.csv", [{"network": "mobilenet_v1", "first_loss": "7", "median_ms": "9"}])
    broken, nan = (
        write(tmp_path / f"{name}.csv", [result | {"median_ms": value}])
        for name, value in (("broken", "abc"), ("nan", "nan"))
    )
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"suite,\xe9\n1,2\n")
    strange = write(tmp_path / "strange.csv", [result | {"gpu": "NVIDIA H100 PCIe"}])
    capsys.readouterr()
    assert predict.main([*command, "--measured", strange]) == 0
    said = capsys.readouterr().out
    assert "predictions_layers_h200.csv: of 1 measured, 1 have no prediction" in said
    assert f"as NVIDIA H100 PCIe, {case}, fp16, 32, forward" in said
    before = file.read_bytes()
    nowhere = write(tmp_path / "nowhere.csv", [{name: value for name, value in result.items() if name != "gpu"}])
    for given, what in (
        (nowhere, "was not measured on a GPU"),
        (old, "was not measured on a GPU"),
        (broken, "broken.csv is not as it was written"),
        (nan, "no time: nan"),
        (str(latin), "latin.csv is no CSV file"),
        (other, "is no file of"),
        (on_cpu, "was not measured on a GPU"),
        ("none.csv", "No such file"),
    ):
        with pytest.raises(SystemExit):
            predict.main([*command, "--measured", given])
        assert what in capsys.readouterr().err
    assert file.read_bytes() == before


def test_passes_of_training():
    """As docs/gpu.md counts them: over a layer's image, ours and PyTorch's."""
    norm, squeeze = layers.BatchNorm(64, 56, "relu"), layers.SqueezeExcite(64, 56, 16, "relu", "hardsigmoid")
    image = 8 * 64 * 56**2
    for layer, direction, ours, pytorch in ((norm, "training", 3 + 5, 5 + 8), (squeeze, "forward+both", 3 + 4, 3 + 10)):
        for passes, own in ((ours, True), (pytorch, False)):
            kernels = predict_layers.kernels_of(layer, direction, 8, torch.float16, own)
            assert sum(count for kernel in kernels for count in kernel.images.values()) // image == passes


def test_a_large_depthwise_convolution_by_hand():
    """(16, 64, 512, 512) in float32, 3×3: 1.07 GB read and as much written, at 2 TB/s; backward three such, which
    take longer than 43 instructions an element. Small kernels come to less than a hundredth."""
    layer = layers.LARGE[0][0]
    seconds = {
        direction: predict_layers.Call(torch.float32, H100)
        .add(predict_layers.kernels_of(layer, direction, 16, torch.float32))
        .seconds
        for direction in ("forward", "forward+both")
    }
    one = 16 * 64 * 512**2 * 4 / 2.0e12
    assert seconds["forward"] == pytest.approx(2 * one + 1.5e-6)
    assert 16 * 64 * 512**2 * (9 * 3.2 + 14) / 15e12 < 3 * one
    assert seconds["forward+both"] == pytest.approx(5 * one, rel=0.01)


def test_what_was_just_touched_comes_from_the_cache():
    """A backward pass reads its small input again, which the forward pass has read."""
    layer = layers.Convolution(16, 14, 14, 16, (3, 3), 1, (1, 1), True)
    call = predict_layers.Call(torch.float16, H100).add(
        predict_layers.kernels_of(layer, "forward+weight", 2, torch.float16)
    )
    image, (forward, backward, sums, *_) = 2 * 16 * 14**2 * 2, call.works
    partial = sums.cached_bytes
    assert partial % (16 * 9 * 4) == 0 and sums.memory_bytes == 0
    assert (forward.memory_bytes, forward.cached_bytes) == (2 * image, 0)
    assert (backward.memory_bytes, backward.cached_bytes) == (image + partial, image)
