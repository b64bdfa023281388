"""NetAdapt: what is proposed, which proposal is taken, and that a run that was interrupted ends as one that was not."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import import_torchvision
from torch import nn

from mobilenet_fast import cli, cost, models
from mobilenet_fast.nn import ConvNormAct, InvertedResidual
from mobilenet_fast.search.blocks import channel_groups, with_widths
from mobilenet_fast.search.netadapt import MeasuredLatency, latencies_in_turn, netadapt

X = torch.zeros(1, 3, 16, 16)
ROOT = Path(__file__).parents[1]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        ConvNormAct(3, 16, stride=2),
        InvertedResidual(16, 64, 24, stride=2, squeeze_channels=8),
        InvertedResidual(24, 72, 24),
        InvertedResidual(24, 48, 40),
        ConvNormAct(40, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


_known = {}


def latency(model):
    """In ms: 1e-5 of its multiply-accumulates, and some that no block can take away."""
    shapes = tuple(parameter.shape for parameter in model.parameters())
    if shapes not in _known:
        _known[shapes] = cost.count(model, X.shape).macs / 1e5 + 0.1
    return _known[shapes]


def finetune(model, steps):
    """Changes the weights by what depends on torch's generator."""
    with torch.no_grad():
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def evaluate(model):
    return model[-1].weight.sum().item() + model[0][0].weight.sum().item()


def adapt(**options):
    given = {
        "model": network(),
        "finetune": finetune,
        "evaluate": evaluate,
        "target_latency_ms": 2.0,
        "example_input": X,
        "delta": 0.08,
        "steps": 2,
        "latency": latency,
    }
    return netadapt(**(given | options))


def assert_same(ours, other):
    assert ours.proposals == other.proposals
    assert (ours.widths, ours.latency_ms, ours.accuracy) == (other.widths, other.latency_ms, other.accuracy)
    for mine, theirs in zip(ours.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_chosen_latency_is_measured_again():
    """What is measured too low at first ends no search too early."""
    asked = set()

    def optimistic(model):
        shapes = tuple(parameter.shape for parameter in model.parameters())
        share = 1.0 if shapes in asked or not asked else 0.9
        asked.add(shapes)
        return share * latency(model)

    result = adapt(latency=optimistic)
    assert latency(result.model) == result.latency_ms <= 2.0
    chosen = [row for row in result.proposals if row["chosen"]]
    assert chosen[-1]["latency_ms"] == result.latency_ms and all(row["latency_ms"] > 2.0 for row in chosen[:-1])
    before = result.first_latency_ms, result.first_accuracy
    for row in chosen:  # and so is the score
        less_ms = before[0] - row["latency_ms"]
        assert row["score"] == ((row["accuracy"] - before[1]) / less_ms if less_ms > 0 else -math.inf)
        before = row["latency_ms"], row["accuracy"]


def test_each_proposal_is_faster_by_delta_and_as_wide_as_that_allows():
    model = network()
    groups = {group.name: group for group in channel_groups(model, X)}
    before, mode = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.training
    result = adapt(model=model)
    required = 0.08 * latency(model)
    assert result.first_latency_ms == latency(model)
    widths = {name: group.width(model) for name, group in groups.items()}
    for _, rows in itertools.groupby(result.proposals, key=lambda row: row["step"]):
        rows = list(rows)
        current_ms = latency(with_widths(model, groups.values(), widths))
        assert current_ms > 2.0
        for row in rows:
            assert row["kind"] == groups[row["layer"]].kind
            assert row["channels_before"] == widths[row["layer"]]
            assert row["channels"] % 8 == 0
            for wider, is_fast in ((0, True), (8, False)):
                proposed = widths | {row["layer"]: row["channels"] + wider}
                ms = latency(with_widths(model, groups.values(), proposed))
                assert (current_ms - ms >= required) == is_fast
                assert is_fast <= (ms == row["latency_ms"])
        assert len({row["layer"] for row in rows}) == len(rows)
        chosen = [row for row in rows if row["chosen"]]
        assert chosen == [max(rows, key=lambda row: row["score"])]
        widths[chosen[0]["layer"]] = chosen[0]["channels"]
    assert result.proposals[-1]["step"] >= 2
    assert result.widths == widths == {name: group.width(result.model) for name, group in groups.items()}
    assert result.latency_ms == latency(result.model) <= 2.0
    assert model.training == mode
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_torchvisions_mnasnet_whose_layers_have_versions():
    torch.manual_seed(0)
    model = import_torchvision().models.mnasnet0_5(num_classes=10)
    count = lambda model: sum(parameter.numel() for parameter in model.parameters()) / 1e6  # noqa: E731
    target, x = 0.95 * count(model), torch.zeros(1, 3, 32, 32)
    result = netadapt(model, finetune, lambda model: 0.5, target, example_input=x, delta=0.04, steps=0, latency=count)
    assert count(result.model) == result.latency_ms <= target
    assert torch.equal(result.model.classifier[1].bias, model.classifier[1].bias)


# Latency is a sum over groups of so much a channel, and accuracy is what is said of a group's least width.
BY_HAND = {
    "1.block.0.0": (64, 1 / 8, 0.88),  # 48 channels: 2 ms less, -0.02
    "1.block.3.0": (24, 1 / 2, 0.87),  # 16 channels: 4 ms less, -0.03
    "2.block.0.0": (72, 1 / 16, 0.86),  # 40 channels: 2 ms less, -0.04
    "3.block.0.0": (48, 1 / 4, 0.80),  # 40 channels: 2 ms less, -0.10
    "3.block.2.0": (40, 1 / 64, 0.90),  # 8 channels: half a millisecond less, which is no proposal
}


@pytest.mark.parametrize(("rule", "chosen"), [("ratio", "1.block.3.0"), ("least loss", "1.block.0.0")])
def test_rules_choose_as_computed_by_hand(rule, chosen):
    groups = channel_groups(network(), X)

    def latency(model):
        return sum(BY_HAND[group.name][1] * group.width(model) for group in groups) - 5.125

    def evaluate(model):
        return min([0.9, *(BY_HAND[g.name][2] for g in groups if g.width(model) < BY_HAND[g.name][0])])

    assert latency(network()) == 32
    result = adapt(latency=latency, evaluate=evaluate, delta=1 / 16, target_latency_ms=30, rule=rule)
    assert [(row["layer"], row["channels"], 32 - row["latency_ms"], row["accuracy"]) for row in result.proposals] == [
        ("1.block.0.0", 48, 2, 0.88),
        ("1.block.3.0", 16, 4, 0.87),
        ("2.block.0.0", 40, 2, 0.86),
        ("3.block.0.0", 40, 2, 0.80),
    ]
    assert [row["layer"] for row in result.proposals if row["chosen"]] == [chosen]
    scores = [-0.01, -0.0075, -0.02, -0.05] if rule == "ratio" else [0.88, 0.87, 0.86, 0.80]
    assert [row["score"] for row in result.proposals] == pytest.approx(scores)


def test_where_no_group_is_enough_less_is_asked_for():
    result = adapt(delta=0.9)
    assert result.latency_ms <= 2.0
    assert {row["step"] for row in result.proposals} == set(range(1, result.proposals[-1]["step"] + 1))


def test_the_proposals_are_fine_tuned_and_the_last_model_once_more():
    calls = []
    result = adapt(finetune=lambda model, steps: calls.append(steps), steps=3, final_steps=7)
    assert calls == [3] * len(result.proposals) + [7]
    assert torch.equal(result.model[0][0].weight, network()[0][0].weight[:, :3][: result.model[0][0].out_channels])


def test_seeds_count_and_the_global_generator_stays():
    state = torch.get_rng_state()
    first, same, other = adapt(seed=1), adapt(seed=1), adapt(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(first, same)
    assert first.accuracy != other.accuracy


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path):
    expected = adapt(log=tmp_path / "whole.csv")
    calls = 0

    def finetune_thrice(model, steps):
        nonlocal calls
        calls += 1
        finetune(model, steps)
        if calls % 4 == 0:
            raise Interrupted

    files = {"checkpoint": tmp_path / "run.pt", "log": tmp_path / "run.csv"}
    interruptions = 0
    while True:
        try:
            result = adapt(finetune=finetune_thrice, **files)
            break
        except Interrupted:
            interruptions += 1
    assert_same(result, expected)
    assert interruptions == calls // 4 > 2
    assert files["log"].read_text() == (tmp_path / "whole.csv").read_text()

    def unwanted(*arguments):
        raise AssertionError("the checkpoint has it")

    assert_same(adapt(finetune=unwanted, evaluate=unwanted, latency=unwanted, **files), expected)


def test_decisions_are_repeated_from_the_latencies_of_the_first_run(tmp_path):
    """A machine that has become half as fast gives the same result as one that has not."""

    def run(checkpoint, slower):
        calls = 0

        def last_fails(model, steps):
            nonlocal calls
            calls += 1
            if slower and calls == 9:
                raise Interrupted
            finetune(model, steps)

        return adapt(finetune=last_fails, checkpoint=checkpoint)

    expected = run(None, False)
    with pytest.raises(Interrupted):
        run(tmp_path / "run.pt", True)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    known = len(state["latencies"])
    asked = []

    def half_as_fast(model):
        asked.append(model)
        return 2 * latency(model)

    def later(model, steps):
        raise Interrupted

    with pytest.raises(Interrupted):  # of the proposal under way everything is known
        adapt(finetune=later, latency=half_as_fast, checkpoint=tmp_path / "run.pt")
    assert known > 9
    assert not asked
    assert_same(adapt(checkpoint=tmp_path / "run.pt"), expected)


def test_a_killed_run_goes_on(tmp_path):
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import test_netadapt
        calls = 0
        def finetune(model, steps):
            global calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            test_netadapt.finetune(model, steps)
        test_netadapt.adapt(finetune=finetune, checkpoint={str(tmp_path / "run.pt")!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    calls = []

    def counted(model, steps):
        calls.append(steps)
        finetune(model, steps)

    expected = adapt()
    assert_same(adapt(finetune=counted, checkpoint=tmp_path / "run.pt"), expected)
    assert len(calls) == len(expected.proposals) + 1 - 3


def test_log_and_plot(tmp_path):
    seen = []

    def progress(work, items):
        seen.append(list(items))
        return map(work, items)

    result = adapt(log=tmp_path / "log.csv", progress=progress)
    with (tmp_path / "log.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert rows == [{name: str(value) for name, value in row.items()} for row in result.proposals]
    assert seen == [list(range(5))] * result.proposals[-1]["step"]
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_measured_latency_is_the_first_models_share(monkeypatch):
    """What is measured: the accelerated models, in evaluation mode; a machine that slows down slows both."""
    module = sys.modules[netadapt.__module__]
    slower = itertools.count(1)

    def in_turn(models, x):
        assert x is X
        factor = next(slower)
        return [factor * latency(model._model.model) for model in models]

    monkeypatch.setattr(module, "latencies_in_turn", in_turn)
    measured, expected = (adapt(latency=each, delta=0.15, target_latency_ms=2.5) for each in (None, latency))
    assert [row["channels"] for row in measured.proposals] == [row["channels"] for row in expected.proposals]
    assert measured.latency_ms == pytest.approx(expected.latency_ms)


def test_latency_is_measured_while_threads_meet_as_they_did_at_first(monkeypatch):
    """Where they share no cache each model takes longer by what they take to meet: here 3 ms, at most times."""
    module = sys.modules[netadapt.__module__]
    meeting = itertools.cycle((3, 0, 3))

    def in_turn(models, x):
        extra = next(meeting)
        return [latency(model._model.model) + extra for model in models]

    monkeypatch.setattr(module, "latencies_in_turn", in_turn)
    model = network()
    groups = channel_groups(model, X)
    small = with_widths(model, groups, dict.fromkeys((group.name for group in groups), 8))
    measured = MeasuredLatency(model, X)
    for _ in range(4):
        assert measured(small) == pytest.approx(latency(small))
    assert measured.first_ms == latency(model)


def test_a_choice_that_gains_nothing_is_not_taken(tmp_path):
    """Latencies as first measured are too low by a tenth, more than a step is to gain; anew they are what they are."""
    asked = {}

    def optimistic(model):
        shapes = tuple(parameter.shape for parameter in model.parameters())
        asked[shapes] = asked.get(shapes, 0) + 1
        return latency(model) * (0.9 if asked[shapes] == 1 and len(asked) > 1 else 1)

    result = adapt(latency=optimistic, delta=0.05)
    reached = [result.first_latency_ms] + [row["latency_ms"] for row in result.proposals if row["chosen"]]
    assert all(after <= before - 0.025 * reached[0] for before, after in itertools.pairwise(reached))
    assert latency(result.model) == result.latency_ms == reached[-1] <= 2.0
    steps = [row["step"] for row in result.proposals]
    assert steps == sorted(steps) and len(result.proposals) > len(adapt(delta=0.05).proposals)


def test_models_are_timed_in_turn():
    calls = []
    first, second = latencies_in_turn([lambda x: calls.append("a"), lambda x: calls.append("b")], X, rounds=3)
    assert first > 0
    assert second > 0
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns == ["a", "b", "a", "b", "a"]  # once each, then b and a, a and b, b and a


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model must be an nn.Module, got str"),
        ({"finetune": None}, TypeError, "finetune must be callable, got NoneType"),
        ({"evaluate": 3}, TypeError, "evaluate must be callable, got int"),
        ({"latency": 3}, TypeError, "latency must be callable, got int"),
        ({"target_latency_ms": 0}, ValueError, "target_latency_ms must be a positive number, got 0"),
        ({"target_latency_ms": "1"}, ValueError, "target_latency_ms must be a positive number, got '1'"),
        ({"target_latency_ms": 3}, ValueError, r"target_latency_ms=3 is no less than the model's, 2\.805 ms"),
        ({"target_latency_ms": 0.2}, ValueError, r"can't be reached: .* ms is the least, with all blocks at their le"),
        ({"delta": 0}, ValueError, "delta must be a positive number, got 0"),
        ({"delta": 1.0}, ValueError, r"delta must be less than 1, a share of the latency, got 1\.0"),
        ({"steps": -1}, ValueError, "steps must be an integer of at least 0, got -1"),
        ({"steps": 1.5}, ValueError, r"steps must be an integer of at least 0, got 1\.5"),
        ({"final_steps": -1}, ValueError, "final_steps must be an integer of at least 0, got -1"),
        ({"divisor": 0}, ValueError, "divisor must be an integer of at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"keep": "last"}, ValueError, "keep must be one of 'first', 'largest norm', got 'last'"),
        ({"rule": "best"}, ValueError, "rule must be one of 'ratio', 'least loss', got 'best'"),
        ({"divisor": 80}, ValueError, "no block to make narrower by multiples of 80 channels"),
        ({"model": nn.Conv2d(3, 8, 3)}, ValueError, "no block to make narrower by multiples of 8 channels"),
        ({"evaluate": lambda model: float("nan")}, ValueError, "evaluate must give a finite number, got nan"),
        ({"latency": lambda model: -1}, ValueError, r"latency must give a positive number of ms, got -1\.0"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=f"netadapt: .*{message}"):
        adapt(**options)


def test_the_least_latency_is_that_of_all_blocks_at_their_least_width():
    model = network()
    groups = channel_groups(model, X)
    least = latency(with_widths(model, groups, {group.name: 8 for group in groups}))
    with pytest.raises(ValueError, match=f"{least:.4g} ms is the least"):
        adapt(target_latency_ms=0.99 * least)
    assert adapt(target_latency_ms=least, steps=0).widths == {group.name: 8 for group in groups}


def in_place(model):
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
    return model


class HasOwnState(nn.Identity):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        assert state == {"calls": 3}


def test_numbers_of_other_kinds_and_state_that_is_no_tensor(tmp_path):
    model = nn.Sequential(HasOwnState(), network())
    options = {"model": model, "target_latency_ms": Fraction(2), "delta": np.float32(0.08)}
    options |= {
        "evaluate": lambda model: evaluate(model[1]),
        "finetune": lambda model, steps: finetune(model[1], steps),
    }
    options |= {"latency": lambda model: latency(model[1]), "checkpoint": tmp_path / "run.pt"}
    first, again = adapt(**options), adapt(**options)
    assert (first.widths, first.proposals) == (again.widths, again.proposals)


def test_a_checkpoint_of_another_run(tmp_path):
    file = tmp_path / "run.pt"
    file.write_text("nothing")
    with pytest.raises(ValueError, match=r"netadapt: .*run\.pt is no checkpoint"):
        adapt(checkpoint=file)
    file.unlink()
    adapt(checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"netadapt: .*run\.pt was made with another delta, seed"):
        adapt(checkpoint=file, delta=0.1, seed=3)
    others = {
        "shapes, weights, modules": {"model": nn.Sequential(*network()[:-1], nn.Linear(32, 7))},
        "weights": {"model": network(seed=1)},
        "modules": {"model": in_place(network())},
        "example_input": {"example_input": torch.zeros(1, 3, 32, 32)},
        r"rate \(note\)": {"note": {"rate": 0.1}},
    }
    for other, options in others.items():
        with pytest.raises(ValueError, match=rf"^netadapt: .*run\.pt was made with another {other}$"):
            adapt(checkpoint=file, **options)
    assert file.read_bytes() == before
    note = {"rate": 0.1, "classes": ["cat", "dog"]}
    assert_same(adapt(checkpoint=tmp_path / "noted.pt", note=note), adapt(checkpoint=tmp_path / "noted.pt", note=note))
    with pytest.raises(ValueError, match=r"was made with another rate \(note\), classes \(note\)$"):
        adapt(checkpoint=tmp_path / "noted.pt")


def test_measured_latencies_are_of_a_machine_and_its_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[netadapt.__module__], "MeasuredLatency", lambda *arguments: latency)
    file, threads = tmp_path / "run.pt", torch.get_num_threads()
    made = adapt(latency=None, checkpoint=file)
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=r"run\.pt was made with another threads$"):
            adapt(latency=None, checkpoint=file)
    finally:
        torch.set_num_threads(threads)
    assert_same(adapt(latency=None, checkpoint=file), made)


@pytest.mark.parametrize("content", [b"", {"recipe": None}, {"recipe": {}}, [1], {"latencies": {}}])
def test_broken_checkpoints(tmp_path, content):
    file = tmp_path / "run.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"^netadapt: \S+run\.pt is no checkpoint: .+$"):
        adapt(checkpoint=file)


def test_where_latency_stops_falling_the_least_is_named():
    groups = channel_groups(network(), X)

    def all_or_nothing(model):
        widths = [group.width(model) for group in groups]
        first = [group.width(network()) for group in groups]
        return 3.0 if widths == first else 1.0 if set(widths) == {8} else 2.95

    with pytest.raises(RuntimeError, match=r"no proposal is faster than 2\.95 ms any more; the least .* is 1 ms"):
        adapt(latency=all_or_nothing, target_latency_ms=1.5, delta=0.01, steps=0)


def test_the_command(tmp_path, capsys, monkeypatch):
    """On four colours' pictures; latency is that of the multiply-accumulates."""
    image = pytest.importorskip("PIL.Image")
    for label, colour in enumerate(("red", "lime", "blue", "white")):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for i in range(5):
            image.new("RGB", (40 + label, 40 + i), colour).save(tmp_path / "pictures" / colour / f"{i}.png")
    model = models.mobilenet_v3_small(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    macs = cost.count(model, (1, 3, 32, 32)).macs
    module = sys.modules[netadapt.__module__]
    count = lambda model: cost.count(model, (1, 3, 32, 32)).macs / macs  # noqa: E731
    monkeypatch.setattr(module, "MeasuredLatency", lambda *arguments: count)
    command = ["netadapt", "mobilenet_v3_small", str(tmp_path / "pictures"), "--weights", str(tmp_path / "weights.pt")]
    command += ["--target-ms", "0.9", "--delta", "0.05", "--steps", "1", "--size", "32", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "latency 1 → 0.8" in printed
    narrow = torch.load(tmp_path / "out" / "model.pt", weights_only=False)
    assert count(narrow) <= 0.9
    assert {"log.csv", "checkpoint.pt", "model.pt"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert cli.main(command) == 0  # from the checkpoint
    assert capsys.readouterr().out == printed
    assert cli.main([*command, "--rate", "0.5"]) == 1
    assert "checkpoint.pt was made with another rate (note)\n" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "other"), "--target-ms", "0.01"]) == 1
    assert "netadapt: target_latency_ms=0.01 can't be reached" in capsys.readouterr().err
    (tmp_path / "pictures" / "red" / "9.png").write_text("nothing")
    assert cli.main(command) == 1
    assert "9.png" in capsys.readouterr().err
