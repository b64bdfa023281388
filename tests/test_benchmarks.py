import csv
import json

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.worker import error_of


@pytest.mark.parametrize("name", [name for suite, name in CASES if suite == "operators"])
def test_the_fused_operator_computes_what_the_module_does(name):
    problem = CASES["operators", name].make(1)
    with torch.no_grad():
        error, allowed = error_of(problem.fused(*problem.inputs), problem)
    assert error <= allowed


def test_a_wrong_output_is_not_allowed():
    problem = CASES["operators", "pointwise_conv2d 64to24 56x56"].make(1)
    with torch.no_grad():
        output = problem.module(*problem.inputs)
        output[0, 3] *= 1.01
        error, allowed = error_of(output, problem)
        assert error > allowed
        error, allowed = error_of(output * float("nan"), problem)
        assert not error <= allowed


def test_macs():
    problem = CASES["operators", "pointwise_conv2d 64to24 56x56"].make(2)
    assert problem.macs() == 2 * 24 * 64 * 56 * 56


def test_every_peer_names_known_suites():
    suites = {suite for suite, _ in CASES}
    assert all(set(peer.suites) <= suites for peer in PEERS.values())


def test_a_run_prints_and_saves(tmp_path, capsys):
    arguments = ["operators", "--case", "64to24", "--peer", "functional", "copy", "--threads", "1"]
    assert main([*arguments, "--rounds", "1", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    assert "pointwise_conv2d 64to24 56x56 · 1 thread(s) · batch 1" in capsys.readouterr().out
    (json_file,), (csv_file,) = tmp_path.glob("*.json"), tmp_path.glob("*.csv")
    saved = json.loads(json_file.read_text())
    assert {r["peer"] for r in saved["results"]} == {"functional", "functional channels_last", "copy"}
    assert all(r["median_ms"] > 0 for r in saved["results"])
    assert {"command", "commit", "cpu", "isa", "versions"} <= saved["conditions"].keys()
    with csv_file.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no case matches nonsense"):
        main(["operators", "--case", "nonsense"])


@pytest.mark.parametrize(
    "option", [["--case", "lite0"], ["--peer", "eager"], ["--batch", "2"], ["--out", "."]], ids=str
)
def test_the_demo_refuses_what_it_would_ignore(option, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *option])
    assert f"demo takes no {option[0]}" in capsys.readouterr().err


def test_the_demo_is_listed_without_being_run(capsys):
    assert main(["demo", "--list"]) == 0
    assert capsys.readouterr().out.startswith("cases:\n  efficientnet_lite0\n")


@pytest.mark.parametrize("option", ["--threads", "--batch"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        main(["operators", option, "0"])
    assert f"argument {option}: " in capsys.readouterr().err


def test_text_table():
    assert report.text_table([["", "ms"], ["a", "1.5"], ["long", "10"]]) == "       ms\n---------\na     1.5\nlong   10"
