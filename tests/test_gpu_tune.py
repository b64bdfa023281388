"""``python -m benchmarks.gpu_tune`` as far as it goes without a GPU."""

import json
import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402

from benchmarks import gpu_tune  # noqa: E402
from mobilenet_fast.triton_kernels import tiles  # noqa: E402

MODEL = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def plan():
    return gpu_tune.plan_of(MODEL, 1, torch.float16, "cpu")


def test_every_step_is_launched_with_its_tile_and_others(plan):
    image = torch.empty(1, 3, 224, 224, dtype=torch.float16)
    found = []

    def run():
        for trial in gpu_tune.steps_with_tiles(plan, image, True):
            trial.call()
            found.append(trial)

    with gpu_tune.on_cpu_tensors():
        launches = gpu_tune.record(run, 90)
    assert len(launches) > len(found)
    rows = [trial.row for trial in found if trial.is_default]
    assert rows == list(range(len(plan.report.rows)))
    tried = [(trial.row, trial.tile) for trial in found if trial.tile is not None]
    assert len(set(tried)) == len(tried) > 3 * len(rows)


def test_launches_of_a_job_are_those_of_its_plan():
    """The plan is made before launches are recorded, or else constants would be computed by kernels that do not run."""
    launches = gpu_tune.launches_of(gpu_tune.trials_of((MODEL, 1, "fp16", "planned", False), "H100"))
    names = {launch.name for launch in launches}
    assert {"conv2d_forward", "depthwise_conv2d_forward", "pointwise_conv2d_forward"} <= names
    assert "batch_norm_act_forward" not in names


def test_gradients_are_launched_with_their_tiles():
    found = []

    def run():
        for trial in gpu_tune.gradients_with_tiles(MODEL, 2, torch.float16, "cpu", True):
            trial.call()
            found.append(trial)

    with gpu_tune.on_cpu_tensors():
        launches = gpu_tune.record(run, 90)
    assert {launch.kernel.__name__ for launch in launches} == {"_forward", "_backward"}
    by_default = [trial for trial in found if trial.is_default]
    assert len(by_default) == len({trial.step.name for trial in found}) == 9
    assert len(found) > 4 * len(by_default) and all(len(trial.keys) == 1 for trial in found)
    step = by_default[0].step
    assert step.name.startswith("depthwise_conv2d 16x112x112") and step.seconds > 0
    assert step.bytes >= 2 * 2 * (2 * 16 * 112**2 + 16 * 56**2)


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
    first = gpu_tune.Timing(
        "", MODEL, "fp16", 1, "planned", 0, "", "", "1x8x7x7", "Triton conv2d", 1000, 1.0, "a=1", True, 4.0
    )
    found = gpu_tune.summary([first, replace(first, tile="a=2", is_default=False, us=2.0), replace(first, way="all")])
    assert "best     2.0 a=2" in found and found.splitlines()[-1] == f"{MODEL} batch 1 all: 4 us"


def test_faster_tiles_are_kept_for_this_chip(plan, monkeypatch, tmp_path):
    image = torch.empty(1, 3, 224, 224, dtype=torch.float16)
    timing = gpu_tune.Timing("", MODEL, "fp16", 1, "planned", 0, "", "", "", "", 1000, 1.0, "", True, None)
    monkeypatch.setenv("MOBILENET_FAST_TILES", str(tmp_path / "made" / "tiles.json"))
    timed = []

    def run(sweep):
        chosen = []
        for trial in gpu_tune.steps_with_tiles(plan, image, sweep):
            trial.call()
            chosen += [trial.tile] if trial.is_default else []
            us = 4.0 if trial.is_default else 3.9 if len(timed) % 2 else None if len(timed) % 3 else 3.0
            timed.append((trial, replace(timing, us=us)))
        return chosen

    def chosen(sweep=False):
        found = []
        with gpu_tune.on_cpu_tensors():
            gpu_tune.record(lambda: found.extend(run(sweep)), 90)
        return found

    tiles._tuned.cache_clear()
    try:
        before = chosen(sweep=True)
        kept = gpu_tune.faster_tiles(timed)
        assert kept
        tiles.keep_tuned(kept)
        after = chosen()
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert changed and {new for _, new in changed} <= set(kept.values())
        file = tiles.tuned_path()
        kept = json.loads(file.read_text())
        of_another = {key: [{**tile, "rows": 0, "pixels": 0}, digest] for key, (tile, digest) in kept.items()}
        for text in ("{", "5", "[1]", '{"a": 3}', json.dumps(of_another)):
            file.write_text(text)
            tiles._tuned.cache_clear()
            with pytest.warns(UserWarning, match="tiles.json"):
                assert chosen() == before
            if text != json.dumps(of_another):
                with pytest.raises(ValueError, match="tiles.json can't be added to: .*; remove it"):
                    tiles.keep_tuned({})
                assert file.read_text() == text
    finally:
        monkeypatch.undo()
        tiles._tuned.cache_clear()
