import csv
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mobilenet_fast import cli, search
from mobilenet_fast.search import Architecture, Block, LatencyTable, SearchSpace, Stage, platform_aware_search, reward
from mobilenet_fast.search.controller import AgingEvolution, Controller
from mobilenet_fast.search.platform_aware_search import SearchResult, Trial, least_latency
from mobilenet_fast.search.space import SPACES, Skip

TINY = SearchSpace("tiny", (Stage(8, 1), Stage(16, 1, 2)), stem_channels=8, head_channels=16, num_classes=3)


def parameters(network):
    """A cheap stand-in for an accuracy."""
    return sum(p.numel() for p in network.parameters()) % 997 / 997


def layers(architecture):
    return float(sum(block.layers * block.out_channels for block in architecture.blocks))


def test_reward_by_hand():
    assert reward(0.75, 80, 80) == 0.75
    assert reward(0.75, 40, 80) == pytest.approx(0.75 * 2**0.07, rel=1e-12)
    assert reward(0.75, 160, 80) == pytest.approx(0.714478, rel=1e-5)  # 0.75 · 2^-0.07
    assert reward(0.6, 120, 60, -0.15) == pytest.approx(0.540750, rel=1e-5)  # 0.6 · 2^-0.15
    assert reward(0.6, 120, 60, 0) == 0.6
    assert reward(0.7 * 1.05, 2, 1) == pytest.approx(reward(0.7, 1, 1), rel=2e-3)  # why -0.07


def test_reward_of_a_ratio_that_no_float_has():
    assert reward(0.5, 1e-320, 1e308) == pytest.approx(0.5 * 10 ** (628 * 0.07), rel=1e-3)  # 1e-320 has few bits
    assert reward(0.5, 1e308, 1e-300) == pytest.approx(0.5 * 10 ** (-608 * 0.07), rel=1e-9)
    with pytest.raises(ValueError, match=r"^reward: 0\.5 \* \(1 / 2\) \*\* -1e\+300 is too large$"):
        reward(0.5, 1, 2, -1e300)
    with pytest.raises(ValueError, match=r"^reward: .* is too large$"):
        reward(1e308, 1, 2, -4)


@pytest.mark.parametrize("arguments", [(0.5, 0, 1), (0.5, 1, -1), (-0.1, 1, 1), (math.nan, 1, 1), (0.5, 1, 1, 0.1)])
def test_reward_refuses(arguments):
    with pytest.raises(ValueError, match="^reward: "):
        reward(*arguments)


@pytest.mark.parametrize("name", SPACES)
def test_networks_of_a_space(name):
    space, generator = SPACES[name](10), random.Random(0)
    for _ in range(3):
        choices = space.sample(generator)
        architecture = space.architecture(choices)
        assert Architecture.from_json(architecture.to_json()) == architecture
        assert [block.stride for block in architecture.blocks] == [stage.stride for stage in space.stages]
        network = architecture.build().eval()
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)
        other = space.mutate(choices, generator)
        assert sum(a != b for a, b in zip(choices, other, strict=True)) == 1
        space.architecture(other)


@pytest.mark.parametrize("skip", ["none", "identity", "pool"])
@pytest.mark.parametrize("operation", ["conv", "separable", "inverted_residual"])
def test_skips_are_added(operation, skip):
    block = Block(8, 2, 2, operation, 3, 3, 0.25, skip, "relu")
    first, second = (layer.eval() for layer in block.build(8))
    x = torch.randn(1, 8, 8, 8)
    y = first(x)
    assert y.shape == (1, 8, 4, 4)
    plain = Block(8, 1, 1, operation, 3, 3, 0.25, "none", "relu").build(8)[0].eval()
    inner = second.layer if isinstance(second, Skip) else second
    plain.load_state_dict(inner.state_dict())
    added = {"none": 0, "identity": y, "pool": torch.nn.functional.avg_pool2d(y, 3, 1, 1)}[skip]
    torch.testing.assert_close(second(y), plain(y) + added)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operation": "shuffle"}, "there is no operation 'shuffle'"),
        ({"skip": "pooling"}, "there is no skip 'pooling'; did you mean pool"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"layers": 0}, "layers must be a positive integer"),
        ({"squeeze_ratio": 2}, "squeeze_ratio must be from 0 to 1"),
    ],
)
def test_blocks_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        Block(8, **fields)


def test_no_architecture():
    for text in ("{}", "[1", '{"blocks": [{"channels": 3}]}'):
        with pytest.raises(ValueError, match="no description of a network"):
            Architecture.from_json(text)
    with pytest.raises(ValueError, match="choices must be 16 options of tiny"):
        TINY.architecture((0, 1))


def test_controller_learns_what_pays():
    best = (2, 1, 0)

    def learned():
        controller = Controller([3, 4, 2], seed=1)
        assert controller.probability(best) == pytest.approx(1 / 24)
        for _ in range(60):
            drawn = controller.sample(4)
            controller.learn(drawn, [sum(a == b for a, b in zip(d, best, strict=True)) / 3 for d in drawn])
        return controller.probability(best)

    assert learned() > 0.9
    assert learned() == learned()


def test_the_oldest_dies_and_the_best_drawn_has_a_child():
    evolution = AgingEvolution(TINY, seed=0, population=3, drawn=3)
    parents = evolution.propose(3)
    evolution.learn(parents, [0.1, 0.9, 0.2])
    child = evolution.propose(1)[0]
    assert sum(a != b for a, b in zip(child, parents[1], strict=True)) == 1
    evolution.learn([child], [0.3])
    assert [choices for _, choices in evolution.members] == [*parents[1:], child]


@pytest.mark.parametrize("method", ["controller", "evolution", "random"])
def test_a_stopped_search_goes_on_to_the_same_result(tmp_path, method):
    options = {"method": method, "seed": 3, "progress": False}
    whole = platform_aware_search(TINY, parameters, layers, 30, 30, log=tmp_path / "whole.csv", **options)
    assert whole == platform_aware_search(TINY, parameters, layers, 30, 30, **options)
    calls = []

    def fails(network):
        calls.append(network)
        if len(calls) == 14:
            raise RuntimeError("stopped")
        return parameters(network)

    log = tmp_path / "stopped.csv"
    with pytest.raises(RuntimeError, match="stopped"):
        platform_aware_search(TINY, fails, layers, 30, 30, log=log, **options)
    done = len(log.read_text().splitlines()) - 1
    assert done >= 13
    log.write_text(log.read_text() + "27,0.5,1")  # as a kill leaves it
    calls = [None] * 100
    assert platform_aware_search(TINY, fails, layers, 30, 30, log=log, **options) == whole
    assert len(calls) - 100 <= 30 - done  # nothing is evaluated twice
    assert sorted(log.read_text().splitlines()) == sorted((tmp_path / "whole.csv").read_text().splitlines())
    with pytest.raises(ValueError, match="the log of another search"):
        platform_aware_search(TINY, parameters, layers, 30, 30, method=method, seed=4, log=log, progress=False)


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_search
def slow(network):
    time.sleep(0.05)
    return test_search.parameters(network)
test_search.platform_aware_search(
    test_search.TINY, slow, test_search.layers, 30, 40, method="evolution", seed=5, log={log!r}, progress=False)
"""


def test_a_killed_search_goes_on_to_the_same_result(tmp_path):
    log, tests = tmp_path / "log.csv", Path(__file__).parent
    script = SCRIPT.format(root=str(tests.parent), tests=str(tests), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 8):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = len(log.read_text().splitlines())
    assert 8 < rows < 41
    options = {"method": "evolution", "seed": 5, "progress": False}
    whole = platform_aware_search(TINY, parameters, layers, 30, 40, **options)
    assert platform_aware_search(TINY, parameters, layers, 30, 40, log=log, **options) == whole


def test_more_trials_go_on_from_fewer(tmp_path):
    for method in ("controller", "evolution", "random"):
        options = {"method": method, "progress": False}
        log = tmp_path / f"{method}.csv"
        few = platform_aware_search(TINY, parameters, layers, 30, 30, log=log, **options)
        more = platform_aware_search(TINY, parameters, layers, 30, 45, log=log, **options)
        assert more.trials[:30] == few.trials
        assert more == platform_aware_search(TINY, parameters, layers, 30, 45, **options)


def test_the_log_of_another_search(tmp_path):
    log, note = tmp_path / "log.csv", {"steps": 40, "data": "digits"}
    usual = {"space": TINY, "evaluate": parameters, "latency": layers, "target_ms": 30, "trials": 6, "log": log}
    usual |= {"method": "random", "progress": False, "note": note}
    found = platform_aware_search(**usual)
    before = log.read_text()
    assert len(next(csv.DictReader(before.splitlines()))) == 6
    for options, said in (
        ({"space": dataclasses.replace(TINY, expansions=(2, 4))}, r"space\.expansions \[3, 6\], here \[2, 4\]$"),
        ({"space": dataclasses.replace(TINY, num_classes=4)}, r"space\.num_classes 3, here 4$"),
        ({"target_ms": 29}, r"target_ms 30\.0, here 29\.0$"),
        ({"reward_exponent": -0.15}, r"reward_exponent -0\.07, here -0\.15$"),
        ({"method": "evolution"}, 'method "random", here "evolution"$'),
        ({"at_once": 6}, "at_once 4, here 6$"),
        ({"note": note | {"steps": 60}}, r"steps \(note\) 40, here 60$"),
        ({"note": {"steps": 40}}, r'data \(note\) "digits", here not given$'),
        (
            {"latency": LatencyTable(size=32, timer=lambda parts: [1.0] * len(parts))},
            r"latency\.size not given, here 32",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"^platform_aware_search: .*log.csv is the log of another search: .*{said}"
        ):
            platform_aware_search(**(usual | options))
        assert log.read_text() == before
    assert platform_aware_search(**(usual | {"workers": 1, "progress": True})) == found
    log.write_text(before.replace("k3", "k5"))
    with pytest.raises(ValueError, match="log of another search, from trial 1 on"):
        platform_aware_search(**usual)
    log.write_text(before)
    (tmp_path / "log.csv.json").unlink()
    with pytest.raises(ValueError, match=r"log.csv.json does not say which search \S+log.csv is of \(.*No such file"):
        platform_aware_search(**usual)
    log.unlink()
    (tmp_path / "log.csv.json").write_text('{"blocks": []}')  # a file of the user's
    with pytest.raises(
        ValueError, match=r"log.csv.json does not say which search \S+log.csv is of \(it is none of a s"
    ):
        platform_aware_search(**usual)
    assert (tmp_path / "log.csv.json").read_text() == '{"blocks": []}' and not log.exists()
    for given in ("digits", {"data": Path("digits")}):
        with pytest.raises(TypeError, match="^platform_aware_search: note must be "):
            platform_aware_search(**(usual | {"note": given}))


def waits(network):
    print("working", flush=True)
    time.sleep(40)
    return 0.0


def test_workers_end_with_a_search_that_is_killed():
    tests = Path(__file__).parent
    script = f"""
import sys
sys.path[:0] = [{str(tests.parent)!r}, {str(tests)!r}]
import test_search as t
t.platform_aware_search(t.TINY, t.waits, t.layers, 30, 4, workers=2, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"working\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=15)  # until no process has this end of the pipe any more


def test_latencies_may_be_tensors(tmp_path):
    log = tmp_path / "log.csv"
    options = {"method": "random", "progress": False}
    for trials in (4, 6):
        found = platform_aware_search(
            TINY, parameters, lambda a: torch.tensor(layers(a)), 30, trials, log=log, **options
        )
    assert found == platform_aware_search(TINY, parameters, layers, 30, 6, **options)
    with pytest.raises(ValueError, match="latency must give a number of 0 or more, got 'x'"):
        platform_aware_search(TINY, parameters, lambda a: "x", 30, 4, **options)


def test_workers_change_nothing():
    options = {"method": "evolution", "seed": 2, "progress": False}
    alone = platform_aware_search(TINY, parameters, layers, 30, 6, **options)
    assert platform_aware_search(TINY, parameters, layers, 30, 6, workers=2, **options) == alone
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:  # which Ray's has the methods of
        assert platform_aware_search(TINY, parameters, layers, 30, 6, workers=pool, **options) == alone


def test_evaluation_is_seeded_and_leaves_torchs_generator():
    def draws(network):
        return torch.rand(()).item()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = platform_aware_search(TINY, draws, layers, 30, 5, method="random", progress=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert platform_aware_search(TINY, draws, layers, 30, 5, method="random", progress=False) == first
    assert len({trial.accuracy for trial in first.trials}) == 5


def test_pareto_front_and_best():
    rows = [(0.5, 2.0, 0.4), (0.6, 1.0, 0.7), (0.6, 1.5, 0.6), (0.9, 3.0, 0.65), (0.9, 3.0, 0.6), (0.3, 0.5, 0.3)]
    network = TINY.architecture([0] * 16)
    trials = tuple(Trial(i, (), network, *row) for i, row in enumerate(rows))
    found = SearchResult(trials)
    assert [trial.number for trial in found.pareto] == [5, 1, 3]
    assert found.best.number == 1


def test_an_unreachable_target():
    least = least_latency(TINY, layers)
    assert least == min(layers(TINY.architecture(TINY.sample(random.Random(i)))) for i in range(300))
    with pytest.raises(ValueError, match=f"no network of tiny takes 3 ms; the least found is {least:.3g} ms"):
        platform_aware_search(TINY, parameters, layers, 3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be an integer of at least 1"),
        ({"workers": -1}, "workers must be"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\^63 - 1, got -1"),
        ({"seed": 2**70}, "seed must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"at_once": 0}, "at_once must be"),
        ({"method": "evolutoin"}, "there is no method 'evolutoin'; did you mean evolution"),
        ({"target_ms": "30"}, "target_ms must be a number, got '30'"),
        ({"reward_exponent": None}, "reward_exponent must be a number, got None"),
        ({"target_ms": 0}, "target must be more than 0"),
        ({"reward_exponent": 0.07}, "w must be 0 or less"),
        ({"evaluate": lambda network: math.nan}, "evaluate must give a number of 0 or more, got nan"),
        ({"evaluate": lambda network: None}, "evaluate must give a number of 0 or more, got None"),
    ],
)
def test_search_refuses(options, message):
    usual = {"space": TINY, "evaluate": parameters, "latency": layers, "target_ms": 30, "trials": 4, "progress": False}
    with pytest.raises(ValueError, match=message):
        platform_aware_search(**(usual | options))


@pytest.mark.parametrize(("argument", "value"), [("space", "digits"), ("evaluate", None), ("latency", 3)])
def test_search_refuses_types(argument, value):
    usual = {"space": TINY, "evaluate": parameters, "latency": layers, "target_ms": 30, "trials": 4}
    with pytest.raises(TypeError, match=f"^platform_aware_search: {argument} must be .*, got {type(value).__name__}"):
        platform_aware_search(**(usual | {argument: value}))


def test_a_header_that_was_cut_off(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("trial,accur")
    platform_aware_search(TINY, parameters, layers, 30, 2, log=log, progress=False)
    assert len(log.read_text().splitlines()) == 3


def test_no_log(tmp_path):
    header = "trial,accuracy,latency_ms,reward,choices,network"
    for text in ("step,loss\n1,2\n", f"{header}\n1,2\n", "my only copy", f"{header},more"):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(ValueError, match="is no log of a search"):
            platform_aware_search(TINY, parameters, layers, 30, 5, log=tmp_path / "log.csv", progress=False)
        assert (tmp_path / "log.csv").read_text() == text


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("judge_of_networks.py").write_text("def few(network):\n    return 1 / len(list(network.modules()))\n")
    monkeypatch.setattr(search.LatencyTable, "predict", lambda table, network: layers(network))
    calibrated = []
    monkeypatch.setattr(search.LatencyTable, "calibrate", lambda table: calibrated.append(table))
    command = "search --target-ms 400 --trials 6 --method random --evaluate judge_of_networks:few".split()
    command += ["--log", "log.csv", "--output", "best.json"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "(best reward)" in printed and len(Path("log.csv").read_text().splitlines()) == 7
    assert Architecture(**{**(best := json.loads(Path("best.json").read_text())), "blocks": ()}).num_classes == 10
    assert len(best["blocks"]) == 4 and len(calibrated) == 1
    assert json.loads(Path("log.csv.json").read_text())["evaluate (note)"] == "judge_of_networks:few"
    assert cli.main([*command, "--size", "32"]) == 1
    assert "another search: size (note) 64, here 32; latency.size 64, here 32\n" in capsys.readouterr().err
    assert cli.main([*command, "--batch", "2", "--dtype", "bfloat16"]) == 1
    assert (
        'another search: latency.batch 1, here 2; latency.dtype "float32", here "bfloat16"\n' in capsys.readouterr().err
    )
    command[2] = "1"
    assert cli.main(command) == 1
    assert "no network of digits takes 1 ms" in capsys.readouterr().err
    Path("judges_that_fail.py").write_text(
        "def one(network):\n    return {}[5]\n\ndef two(network, size):\n    return 1\n"
    )
    for name, why in (("one", "KeyError: 5"), ("two", "TypeError: two() missing 1 required positional argument")):
        for workers in ("0", "2"):
            command = ["search", "--target-ms", "400", "--evaluate", f"judges_that_fail:{name}", "--workers", workers]
            assert cli.main(command) == 1
            assert f": --evaluate judges_that_fail:{name}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-ms", "0"], "must be positive"),
        (["--target-ms", "1", "--evaluate", "nothing"], "must be module:function"),
        (["--target-ms", "1", "--evaluate", "math:pi"], "which is no function"),
        (["--target-ms", "1", "--evaluate", "broken_module:f"], "got broken_module:f (ZeroDivisionError: "),
        (
            ["--target-ms", "1", "--output", "nowhere/best.json"],
            "--output: no file can be written at nowhere/best.json",
        ),
        (["--target-ms", "1", "--log", "nowhere/log.csv"], "--log: no file can be written at nowhere/log.csv"),
        (["--target-ms", "1", "--table", "nowhere/t.json"], "--table: no file can be written at nowhere/t.json"),
        (["--target-ms", "1", "--table", "."], "--table: no file can be written at ."),
        (["--target-ms", "1", "--workers", "-1"], "must be 0 or more"),
        ([], "--target-ms"),
    ],
)
def test_command_line_refuses(options, message, capsys, monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        cli.main(["search", *options])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_ten_digits_need_ten_classes(capsys):
    assert cli.main(["search", "--target-ms", "1", "--classes", "9"]) == 1
    assert capsys.readouterr().err == "mobilenet_fast: search: the digits are 10 classes, --classes 9 is less\n"


@pytest.mark.parametrize("options", (["--log", "a.csv", "--output", "a.csv.json"], ["--output", "latency.json"]))
def test_files_of_their_own(options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "--target-ms", "1", *options]) == 1
    message = "mobilenet_fast: search: --table, --log (with its .json) and --output must be files of their own\n"
    assert capsys.readouterr().err == message
    assert not any(tmp_path.iterdir())


def test_digits_are_trained_on():
    digits = pytest.importorskip("mobilenet_fast.search.digits")
    if digits.why_missing():
        pytest.skip(digits.why_missing())
    torch.manual_seed(0)
    accuracy = digits.train_on_digits(SPACES["digits"](10).architecture([0] * 32).build(), size=32, steps=30)
    assert accuracy > 0.3
