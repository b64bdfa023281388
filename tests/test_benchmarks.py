import copy
import csv
import dataclasses
import io
import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.cases import CASES, SUITES, Problem, Setting, find_case, layers
from benchmarks.cases.networks import NETWORKS, plain, randomise
from benchmarks.cases.registry import Case
from benchmarks.gauges import ROOT
from benchmarks.peers import PEERS
from benchmarks.timing import Result, measure
from mobilenet_fast import _C, functional, models
from mobilenet_fast.nn import fusion

main = command.main


def tiny_network(batch):
    """A network of every kind of layer that converters have to translate, and that takes seconds to convert."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 5, 1, 2, groups=8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 3, 1, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    model = nn.Sequential(OrderedDict(features=features))  # pnnx writes names into Python, where 0 is none
    return Problem(randomise(model, 32), [torch.randn(batch, 3, 32, 32) for _ in range(4)]).solve()


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "models" in peer.suites])
def test_peer_computes_what_the_model_does(name, batch, tmp_path, monkeypatch):
    peer = PEERS[name]
    if peer.missing():
        pytest.skip(f"not installed: {', '.join(peer.missing())}")
    monkeypatch.chdir(tmp_path)  # where converters leave their scraps
    with torch.no_grad():
        problem = tiny_network(batch)
        folder = tmp_path / "model"
        if peer.convert:
            folder.mkdir()
            peer.convert(problem, folder)
        run = peer.prepare(problem, 1, *([folder] if peer.convert else []))
        outputs = [torch.as_tensor(run(peer.given(x))).clone() for x in problem.inputs]
    assert outputs[0].shape == (batch, 10)
    assert problem.error_of(outputs) <= problem.allowed(peer.tolerance)


@pytest.mark.parametrize("name", [name for suite, name in CASES if suite == "operators"])
def test_the_fused_operator_computes_what_the_module_does(name):
    problem = CASES["operators", name].problem(1)
    with torch.no_grad():
        outputs = [problem.fused(x) for x in problem.inputs]
    assert problem.error_of(outputs) <= problem.allowed()


def test_a_wrong_output_is_not_allowed():
    problem = CASES["operators", "pointwise_conv2d 64to24 56x56"].problem(1)
    with torch.no_grad():
        outputs = [problem.module(x) for x in problem.inputs]
    assert problem.error_of(outputs) <= problem.allowed()
    assert problem.error_of([outputs[0], outputs[0]]) > problem.allowed()  # the first answer to every question
    assert not problem.error_of([outputs[0], outputs[1] * float("nan")]) <= problem.allowed()
    outputs[0][0, 3] *= 1.01
    assert problem.error_of(outputs) > problem.allowed()


@pytest.mark.parametrize("name", ("mobilenet_v3_small", "efficientnet_lite0", "inception_v3"))
def test_layers_are_those_of_the_model(name):
    found = {layer for layer in layers.found(name) if isinstance(layer, layers.Convolution)}
    build, size = NETWORKS[name]
    with torch.device("meta"):
        wanted = {(m.in_channels, m.out_channels, m.kernel_size) for m in build().modules() if isinstance(m, nn.Conv2d)}
    got = {(c.channels, c.out_channels, c.kernel) for c in found}
    squeezes = {shape for shape in wanted - got if shape[2] == (1, 1)}
    assert got == wanted - squeezes
    assert all(layers.parse(str(c)) == c for c in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others_that_are_missing_are_ours(name, monkeypatch):
    build, _ = NETWORKS[name]
    with torch.device("meta"):
        theirs = sorted(tuple(p.shape) for p in build().parameters())
        monkeypatch.setattr("benchmarks.cases.networks.version", lambda package: None)
        ours = build()
    assert type(ours).__module__.startswith("mobilenet_fast.")
    assert sorted(tuple(p.shape) for p in ours.parameters()) == theirs


@pytest.mark.parametrize(
    "name", ("mobilenet_v3_small", "mobilenet_v1", "mnasnet_a1", "efficientnet_lite0", "efficientnet_b0")
)
def test_our_networks_in_their_place_run_no_kernel_of_ours(name, monkeypatch):
    """Or what is timed as PyTorch would be this package."""
    ours = models.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x)
        copied = copy.deepcopy(plain(ours))
        for module in (_C, functional):
            for operation in ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite"):
                monkeypatch.setattr(module, operation, None)
        monkeypatch.setattr(fusion.Plan, "__call__", None)
        torch.testing.assert_close(copied(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        torch.save(copied, buffer := io.BytesIO())
        buffer.seek(0)
        torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), copied(x))


def test_a_layer_by_its_name():
    problem = find_case("layers", "depthwise_conv2d 24x9x7 to 24 k5x3 s2 p2x1").problem(3)
    assert problem.exact[0].shape == (3, 24, 5, 4)
    assert problem.macs == 3 * 24 * 5 * 4 * 5 * 3
    assert problem.error_of([problem.fused(x) for x in problem.inputs]) <= problem.allowed()


def test_macs():
    problem = CASES["operators", "pointwise_conv2d 64to24 56x56"].problem(2)
    assert problem.macs == 2 * 24 * 64 * 56 * 56
    assert problem.bytes == 4 * (2 * (24 + 64) * 56 * 56 + 24 * 64)


def test_every_peer_names_known_suites():
    assert all(set(peer.suites) <= set(SUITES) for peer in PEERS.values())


def test_a_peer_that_is_not_installed_has_a_row():
    peer = dataclasses.replace(PEERS["eager"], name="absentee", needs=("no-such-package", "torch"))
    (result,) = measure(CASES["operators", "pointwise_conv2d 64to24 56x56"], [peer], Setting(), 1, 0)
    assert result.absent == "not installed: no-such-package" and result.median_ms is None and not result.failed
    table = report.results_table([result])
    assert "missing" in table and "absentee: not installed: no-such-package" in table
    assert "missing" in report.summary([result])


def test_an_operation_that_a_peer_lacks_has_a_row():
    case = find_case("layers", "conv2d 3x9x9 to 4 k3x3 s1 p1x1")
    (result,) = measure(case, [PEERS["functional channels_last"]], Setting(), 1, 0)
    assert result.absent and result.median_ms is None and not result.failed


def test_a_changed_recipe_or_way_of_converting_is_another_folder():
    def convert(problem, folder):
        pass

    case = Case("models", "a", tiny_network, "recipe")
    assert case.folder(1) != case.folder(2)
    assert case.folder(1) != dataclasses.replace(case, recipe="another").folder(1)
    assert Case("operators", "a", tiny_network).folder(1) is None
    runtime = PEERS["ncnn"]
    assert runtime.conversion(case, 1) != dataclasses.replace(runtime, convert=convert).conversion(case, 1)


def test_no_figures_while_a_test_is_red(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "TESTS", ("test_no_such_file.py",))
    assert main(["operators", "--case", "64to24", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no figures while a test is red" in printed.err and not printed.out and not [*tmp_path.iterdir()]


def test_the_tests_that_are_run_first_exist():
    for test in command.TESTS:
        file, _, function = test.partition("::")
        assert f"def {function or 'test_'}" in (ROOT / "tests" / file).read_text()


def results():
    peers = {"eager channels_last": 9.0, "LiteRT": 3.0, "ncnn": None, "accelerate": 2.0}
    for threads in (1, 2):
        for case in ("mobilenet_v2", "mobilenet_v3_small"):
            for name, ms in peers.items():
                r = Result("models", case, name, threads, 1, ms, ms, ms, ours=name == "accelerate")
                if ms:
                    r.error, r.gmacs, r.mbytes, r.peak_gflops, r.peak_low_gflops = 1e-6, 0.1, 40.0, 200.0, 190.0
                    r.peak_share = r.gflops / r.peak_gflops
                else:
                    r.absent = "not installed: ncnn"
                yield r


def test_summary():
    lines = report.summary([*results()]).splitlines()
    assert "1 thread(s) · batch 1" in lines and "2 thread(s) · batch 1" in lines
    assert lines[4].split() == ["mobilenet_v2", "9", "3", "missing", "2", "50", "LiteRT", "1.50"]
    assert lines[-1].endswith("95.0–200.0 GFLOP/s")


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    ceilings = {threads: {"l2": 80.0, "memory": 25.0} for threads in (1, 2)}
    files = report.save([*results()], ceilings, tmp_path)
    plots = [file for file in files if file.suffix == ".png"]
    assert [file.name.rsplit("-")[-1] for file in plots] == ["speed.png", "roofline.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in plots)


def test_a_run_prints_and_saves(tmp_path, capsys):
    arguments = ["operators", "--case", "64to24", "--peer", "functional", "copy", "--threads", "1", "2"]
    arguments.append("--skip-tests")
    assert main([*arguments, "--rounds", "1", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "pointwise_conv2d 64to24 56x56 · 1 thread(s) · batch 1" in printed
    assert printed.count("a line between threads and back") == 1
    (json_file,), (csv_file,) = tmp_path.glob("*.json"), tmp_path.glob("*.csv")
    saved = json.loads(json_file.read_text())
    assert {r["peer"] for r in saved["results"]} == {"functional", "functional channels_last", "copy"}
    assert all(r["median_ms"] > 0 for r in saved["results"])
    assert {r["threads"] for r in saved["results"]} == {1, 2} and all(r["peak_gflops"] > 0 for r in saved["results"])
    assert all((r["trip_ns"] or 0) > 0 if r["threads"] == 2 else r["trip_ns"] is None for r in saved["results"])
    assert saved["copy_gbytes_per_second"]["1"].keys() == {"l2", "memory"}
    assert {"command", "commit", "cpu", "isa", "versions"} <= saved["conditions"].keys()
    with csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {"median_ms", "peak_share", "versions", "cpu", "threads", "commit"} <= rows[0].keys()


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


@pytest.mark.parametrize("option", ["--threads", "--batch", "--rounds", "--seconds"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        main(["operators", option, "0"])
    assert f"argument {option}: " in capsys.readouterr().err


def test_text_table():
    assert report.text_table([["", "ms"], ["a", "1.5"], ["long", "10"]]) == "       ms\n---------\na     1.5\nlong   10"


def test_text_table_with_a_heading_of_two_lines():
    table = report.text_table([["", "ours\nms"], ["a", "1.5"]])
    assert table == "   ours\n     ms\n-------\na   1.5"
