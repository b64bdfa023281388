"""The table of all models, on small ones."""

import pytest
from torch import nn

from benchmarks import __main__ as command
from benchmarks import zoo
from benchmarks.cases import CASES
from benchmarks.cases.registry import Case
from benchmarks.cases.zoo import OURS, ZOO, Entry, copy_of, network
from benchmarks.peers import PEERS
from benchmarks.timing import Result
from mobilenet_fast import models


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 5),
    )


def broken():
    raise RuntimeError("no such network\nat all")


@pytest.fixture
def small(monkeypatch):
    entries = {
        "ours": copy_of(
            "mobilenet_v3_small", "torchvision", "mobilenet_v3_small", 64, {"num_classes": 5}, num_classes=5
        ),
        "grouped": Entry("someone", grouped, 32),
        "broken": Entry("nobody", broken),
    }
    for key in [key for key in CASES if key[0] == "zoo"]:
        monkeypatch.delitem(CASES, key)
    for name, entry in entries.items():
        monkeypatch.setitem(ZOO, name, entry)
        monkeypatch.setitem(CASES, ("zoo", name), Case("zoo", name, network(entry.build, entry.size)))
    monkeypatch.setattr(zoo, "examined", lambda case, threads: zoo.examine(case))


def cells(page, name):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows(small, tmp_path, monkeypatch, capsys):
    file = tmp_path / "docs" / "models.md"
    assert command.main(["zoo", "--skip-latency", "--out", str(file)]) == 1  # one has failed
    page = file.read_text()
    _, pixels, parameters, macs, error, kernels, paper, source = cells(page, "ours")
    expected = sum(p.numel() for p in models.mobilenet_v3_small(num_classes=5).parameters())
    assert (pixels, parameters, source) == ("64", f"{expected:,}", "torchvision mobilenet_v3_small")
    assert float(error.split()[0]) < 1e-4 and kernels.startswith("100 %") and not paper
    assert 4 < float(macs) < 6
    _, _, _, macs, _, kernels = cells(page, "grouped")
    assert macs == "0.1" and kernels.startswith("47.1 %, ")
    assert "- grouped: 1 × conv2d" in page
    assert cells(page, "broken")[1:] == ["224", "", "", "", "failed: RuntimeError: no such network"]
    assert "accelerate, ms" not in page


def test_latencies_and_differing_counts(small, tmp_path, monkeypatch):
    def examine(case, threads):
        return zoo.Row(case.name, 5, 10**6, [5, 2 * 10**6], 2e-3, 1e-6, 1e-5, 1.0, 3, 3)

    def measure(case, peers, setting, *rest):
        if case.name == "grouped":
            return [Result("zoo", case.name, peer.name, setting.threads, 1, failed="it broke") for peer in peers]
        return [Result("zoo", case.name, peer.name, setting.threads, 1, 1.5, 1.4, 1.6) for peer in peers]

    monkeypatch.setattr(zoo, "examined", examine)
    monkeypatch.setattr(zoo, "measure", measure)
    file = tmp_path / "models.md"
    arguments = [
        "--only",
        "ours",
        "grouped",
        "--peer",
        "accelerate",
        "--threads",
        "1",
        "--skip-tests",
        "--out",
        str(file),
    ]
    assert command.main(["zoo", *arguments]) == 1  # other counts than the reference, and an error that is too large
    row = cells(file.read_text(), "ours")
    assert row[4] == "**2.0e-03 (1.0e-06), allowed 1.0e-05**" and row[-1] == "1.5"
    assert row[-2] == "**torchvision mobilenet_v3_small: 5 and 2.0**"
    assert "- accelerate, grouped: it broke" in file.read_text()


def test_rows_of_earlier_runs_are_kept(small, tmp_path, monkeypatch):
    times = {
        "ours": {"eager channels_last": 3.0, "accelerate": 2.0},
        "grouped": {"eager channels_last": 3.0, "accelerate": 6.0},
    }

    def measure(case, peers, setting, *rest):
        return [
            Result("zoo", case.name, peer.name, setting.threads, 1, *[times[case.name][peer.name]] * 3, ours=peer.ours)
            for peer in peers
        ]

    monkeypatch.setattr(zoo, "examined", lambda case, threads: zoo.Row(case.name, 5, 10**6))
    monkeypatch.setattr(zoo, "measure", measure)
    file = tmp_path / "models.md"
    peers = ["--peer", "channels_last", "accelerate", "--skip-tests", "--out", str(file)]
    peers_of = {name: PEERS[name] for name in ("eager channels_last", "accelerate")}
    monkeypatch.setattr(command, "peers_of", lambda device: peers_of)
    for name in ("grouped", "ours"):
        assert command.main(["zoo", "--only", name, *peers]) == 0
    times["ours"]["accelerate"] = 1.0
    assert command.main(["zoo", "--only", "ours", *peers]) == 0
    page = file.read_text()
    assert cells(page, "grouped")[-2:] == ["3", "6"] and cells(page, "ours")[-2:] == ["3", "1"]
    assert "## Slower than PyTorch\n\n- grouped: eager channels_last takes 0.50 of the time\n" in page
    assert page.index("| ours |") < page.index("| grouped |")


def test_a_model_that_names_its_outputs():
    name = "lraspp_mobilenet_v3_large"
    row = zoo.examine(Case("zoo", name, network(ZOO[name].build, 128)))
    assert row.failed is None and row.is_right and row.share > 0.95


def test_every_model_of_ours_has_a_row():
    assert {entry.ours for entry in OURS} == set(models.list_models()) - {"efficientnet"}
    assert zoo.PAPERS.keys() <= {entry.ours for entry in OURS}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["zoo", "--batch", "2"], "zoo takes no --batch"),
        (["zoo", "--threads", "1", "1"], "zoo takes one number of --threads"),
        (["zoo", "--device", "cuda"], "zoo takes no --device"),
        (["models", "--skip-latency"], "models takes no --skip-latency"),
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err
