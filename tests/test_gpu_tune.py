"""``python -m benchmarks.gpu_tune`` as far as it goes without a GPU."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402

from benchmarks import gpu_tune  # noqa: E402

MODEL = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def plan():
    return gpu_tune.plan_of(MODEL, 1, torch.float16, "cpu")


def test_every_step_is_launched_with_its_tile_and_others(plan):
    image = torch.empty(1, 3, 224, 224, dtype=torch.float16)
    found = []

    def run():
        for row, step, tile, is_default, call in gpu_tune.steps_with_tiles(plan, image, True):
            call()
            found.append((row, step.kernel, tile, is_default))

    with gpu_tune.on_cpu_tensors():
        launches = gpu_tune.record(run, 90)
    assert len(launches) > len(found)
    rows = [row for row, _, _, is_default in found if is_default]
    assert rows == list(range(len(plan.report.rows)))
    tiles = [(row, tile) for row, _, tile, _ in found if tile is not None]
    assert len(set(tiles)) == len(tiles) > 3 * len(rows)


def test_a_launch_is_compiled_without_a_gpu(plan, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(driver, "_active", gpu_tune.FakeDriver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    image = torch.empty(1, 3, 224, 224, dtype=torch.float16)
    with gpu_tune.on_cpu_tensors():
        launch, *_ = gpu_tune.record(lambda: next(gpu_tune.steps_with_tiles(plan, image, False)), 90)
    gpu_tune.compile_launch(launch)
    assert list(tmp_path.rglob("*.cubin"))
    gpu_tune.compile_launch(replace(launch, options=launch.options | {"num_warps": 3}))  # says so and goes on
    assert "num_warps" in capsys.readouterr().out


def test_ways_of_fusing(plan):
    apart = gpu_tune.plan_of(MODEL, 1, torch.float16, "cpu", "apart")
    together = gpu_tune.plan_of(MODEL, 1, torch.float16, "cpu", "all", "H200")
    assert len(together.report.rows) < len(plan.report.rows) <= len(apart.report.rows)
    assert not any("+ depthwise" in row.kernel for row in apart.report.rows)


def test_summary_names_what_is_faster():
    first = gpu_tune.Timing(MODEL, 1, "planned", 0, "", "", "1x8x7x7", "Triton conv2d", 1000, 1.0, "a=1", True, 4.0)
    found = gpu_tune.summary([first, replace(first, tile="a=2", is_default=False, us=2.0), replace(first, way="all")])
    assert "best     2.0 a=2" in found and found.splitlines()[-1] == f"{MODEL} batch 1 all: 4 us"
