"""Predicted times of a GPU's steps: bytes, arithmetic and launches by hand."""

import csv

import pytest

from benchmarks import predict


def test_a_step_takes_the_longest_of_what_it_needs():
    assert predict.predicted_us("pointwise_conv2d", 3e3, 1e3, False) == predict.LAUNCH_US
    assert predict.predicted_us("pointwise_conv2d", 30e6, 1e3, False) == pytest.approx(10)
    assert predict.predicted_us("pointwise_conv2d", 55e6, 1e3, True) == pytest.approx(10)
    assert predict.predicted_us("conv2d", 3e3, 3.5e9, False) == pytest.approx(10)
    assert predict.predicted_us("depthwise_conv2d + relu", 3e3, 300e6, False) == pytest.approx(16)


@pytest.fixture(scope="module")
def rows():
    return predict.plans("mobilenet_v3_small", 224)


def test_bytes_of_a_batch(rows):
    """Of the first convolution, a depthwise one, a pointwise one with gate and residual, and a squeeze-excite."""
    assert not any("inverted_residual" in row.operation for row in rows[0])
    for batch in (1, 32):
        steps = predict.steps_of("mobilenet_v3_small", batch, *rows)
        by_kind = {}
        for step in steps:
            by_kind.setdefault(step.operation, step)
        first = steps[0]
        weights = 2 * 16 * 3 * 9
        assert first.macs == batch * 112 * 112 * 16 * 27
        assert first.bytes == 2 * batch * (3 * 224**2 + 16 * 112**2) + weights
        depthwise = steps[1]
        assert depthwise.operation.startswith("depthwise") and depthwise.macs == batch * 16 * 9 * 56 * 56
        sums = 2 * batch * 16 * 56  # at most one a row, of the squeeze-excite behind it
        assert 0 < depthwise.bytes - (2 * batch * 16 * (112**2 + 56**2) + 2 * 16 * 9) <= sums
        excite = by_kind["squeeze_excite"]
        assert excite.bytes == 2 * (2 * 16 * 8) + batch * 2 * 2 * 16


def test_a_batch_fits_the_cache_until_it_does_not(rows):
    small, large = (predict.steps_of("mobilenet_v3_small", batch, *rows) for batch in (1, 256))
    assert not small[0].fits_l2 and all(step.fits_l2 for step in small[1:])  # the picture comes from memory
    assert not large[1].fits_l2 and large[-1].fits_l2
    assert large[1].bound == "memory" and small[1].bound == "launch"


def test_page_and_csv(tmp_path, capsys):
    file = tmp_path / "predictions.md"
    assert predict.main(["--model", "mobilenet_v3_small", "--out", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert "no measurements" in text and "## mobilenet_v3_small" in text
    with file.with_suffix(".csv").open(newline="") as opened:
        found = list(csv.DictReader(opened))
    assert {row["batch"] for row in found} == {"1", "32", "256"} and not any(row["measured_us"] for row in found)
    total = sum(float(row["predicted_us"]) for row in found if row["batch"] == "256")
    (line,) = [line for line in text.splitlines() if line.startswith("| mobilenet_v3_small | 256 |")]
    assert float(line.split("|")[5]) == pytest.approx(total / 1e3, rel=0.01)
