"""``python -m benchmarks --device cuda`` as far as it goes without a GPU."""

import csv
import dataclasses
import json
import math
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import pytest
import torch
from fake_gpu import FakeGpu, LocalWorker
from test_benchmarks import tiny_network
from torch import nn

from benchmarks import __main__ as command
from benchmarks import gauges, gpu_session, report, timing
from benchmarks.cases import CASES, SUITES, Problem, Setting, cases_of, find_case, layers
from benchmarks.cases.placed import PlacedProblem
from benchmarks.cases.registry import Case
from benchmarks.device import CudaDevice
from benchmarks.peers import CUDA_PEERS, PEERS, Unsupported, jax_peer
from benchmarks.peers.cuda import fold_batch_norms, fuse_relus
from benchmarks.timing import Result, measure
from benchmarks.worker import Session

TINY = Case("models", "tiny", tiny_network)
DEPTHWISE = "depthwise_conv2d 24x9x7 to 24 k5x3 s2 p2x1"
BATCH_NORM = "batch_norm_act 24x9x9 relu6"
EAGER = [name for name in CUDA_PEERS if name.startswith("eager")]


def on_gpu(**options):
    return Setting(device="cuda", **{"batch": 2, "dtype": "fp32", **options})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(timing, "Worker", LocalWorker)
    monkeypatch.setattr(LocalWorker, "open", 0)
    monkeypatch.setattr(LocalWorker, "free_mib", staticmethod(lambda count: 1e5))
    for module in (gauges, report):
        monkeypatch.setattr(module, "gpu_process", lambda: fake_gpu.gpu_process)
    monkeypatch.setattr(command, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_session, "start", lambda *peer, at_once: SimpleNamespace(kill=lambda: None))


@pytest.fixture(autouse=True)
def usual_kernels():
    with torch.backends.cudnn.flags(enabled=True):
        yield


@pytest.mark.parametrize("dtype", ("fp32", "fp16", "bf16"))
def test_a_placed_problem_is_held_to_float64_of_the_float32_weights(dtype):
    problem = tiny_network(1)
    exact = problem.module.double()
    setting = on_gpu(batch=3, dtype=dtype)
    placed = PlacedProblem(tiny_network(1), setting, "cpu")
    outputs = [placed.module(x) for x in placed.inputs[:2]]
    assert outputs[0].dtype == placed.dtype and outputs[0].shape == (3, 10)
    pairs = zip(placed.inputs, outputs, strict=False)
    with torch.no_grad():
        errors = [(y - (z := exact(x.double()))).abs().max() / z.abs().max() for x, y in pairs]
    assert placed.error_of(outputs) == pytest.approx(max(errors).item())
    assert placed.eager_error == pytest.approx(max(errors).item())
    assert {"fp32": 1e-8, "fp16": 1e-5, "bf16": 1e-4}[dtype] < placed.eager_error < 0.1


def test_chunks_compare_all_images(monkeypatch):
    monkeypatch.setattr("benchmarks.cases.placed.CHUNK_ELEMENTS", 2 * 24 * 9 * 7)
    setting = on_gpu(batch=5, direction="forward+both")
    placed = PlacedProblem(find_case("layers", DEPTHWISE).problem(1), setting, "cpu")
    outputs = [placed.call(placed.module, x) for x in placed.leaves(placed.inputs[:2])]
    assert placed.error_of(outputs) <= placed.allowed()
    for tensor in outputs[1]:
        before = tensor[-1].clone()
        tensor[-1, 0] += 0.1 * tensor.abs().max()
        assert placed.error_of(outputs) > placed.allowed()
        tensor[-1] = math.nan
        assert not placed.error_of(outputs) <= placed.allowed()
        tensor[-1] = before
    assert placed.error_of(outputs) <= placed.allowed()


@pytest.mark.parametrize(
    "name, direction",
    [(name, direction) for name in (BATCH_NORM, DEPTHWISE) for direction in find_case("layers", name).directions],
)
def test_directions(name, direction):
    case = find_case("layers", name)
    session = Session(case, CUDA_PEERS["eager channels_last"], on_gpu(direction=direction), FakeGpu())
    placed = PlacedProblem(case.problem(1), on_gpu(direction=direction), "cpu")
    (x,) = placed.leaves(placed.inputs[:1])
    shapes = [tuple(t.shape) for t in placed.call(placed.module, x)]
    y, w = ((2, 24, 5, 4), (24, 1, 5, 3)) if case.name == DEPTHWISE else (tuple(x.shape), (24,))
    gradients = {
        "forward": [],
        "forward+input": [tuple(x.shape)],
        "forward+weight": [w],
        "forward+both": [tuple(x.shape), w],
        "training": [tuple(x.shape), w, (24,)],
    }[direction]
    assert shapes == [y, *gradients]
    assert session.facts["error"] <= placed.allowed()


def test_bytes_and_macs_of_a_layer_and_its_gradients():
    x, y, w = (4 * n for n in (2 * 24 * 9 * 7, 2 * 24 * 5 * 4, 24 * 5 * 3 + 24))  # with a bias
    macs = 2 * 24 * 5 * 4 * 5 * 3
    expected = {
        "forward": (macs, x + w + y),
        "forward+input": (2 * macs, x + w + y + y + w + x),
        "forward+weight": (2 * macs, x + w + y + x + y + w),
        "forward+both": (3 * macs, x + w + y + x + y + w + x + w),
    }
    for direction, cost in expected.items():
        placed = PlacedProblem(find_case("layers", DEPTHWISE).problem(1), on_gpu(direction=direction), "cpu")
        assert (placed.macs, placed.bytes) == cost


def test_bytes_of_a_network_are_halved_in_half():
    whole, half = (PlacedProblem(tiny_network(1), on_gpu(dtype=dtype), "cpu") for dtype in ("fp32", "fp16"))
    assert whole.bytes == 2 * half.bytes and whole.macs == half.macs == 2 * tiny_network(1).macs


@pytest.mark.parametrize("dtype", ("fp32", "fp16"))
@pytest.mark.parametrize("name", [name for name, peer in CUDA_PEERS.items() if "models" in peer.suites])
def test_peer_computes_what_the_model_does(name, dtype, monkeypatch):
    peer = CUDA_PEERS[name]
    if peer.missing():
        pytest.skip(f"not installed: {', '.join(peer.missing())}")
    if name == "accelerate":
        monkeypatch.setattr("mobilenet_fast.accelerate", lambda model, inputs, dtype: model.to(dtype))
    if "fused" in name:
        monkeypatch.setattr("benchmarks.peers.cuda.CONVOLUTION_RELU", convolution_relu)
        case = Case("models", "relus", lambda batch: Problem(with_relus(), [torch.randn(batch, 3, 9, 9)] * 4).solve())
    else:
        case = TINY
    device = FakeGpu()
    session = Session(case, peer, on_gpu(dtype=dtype), device)  # which checks the outputs
    assert session.facts["error"] > 0 and all(ms > 0 for ms in session.turn(0.01))
    assert bool(device.captured) == peer.graph


def convolution_relu(x, weight, bias, stride, padding, dilation, groups):
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def with_relus():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 1),
        nn.ReLU6(),
        nn.BatchNorm2d(4),
    )
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def test_batch_norm_and_relu_are_taken_into_convolutions():
    model, x = with_relus(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        folded = fold_batch_norms(model, x)
        names = [str(node.target) for node in folded.graph.nodes if node.op == "call_function"]
        assert names.count("aten.batch_norm.default") == 1 and names.count("aten.conv2d.default") == 3
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert fuse_relus(folded, convolution_relu) == 3  # a ReLU6 among them
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_stay_apart_where_cudnn_has_no_fused_one(monkeypatch):
    seen = []

    def dense_only(x, weight, bias, stride, padding, dilation, groups):
        if groups > 1:
            raise RuntimeError("no engine")
        seen.append(groups)
        return convolution_relu(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr("benchmarks.peers.cuda.CONVOLUTION_RELU", dense_only)
    case = Case("models", "relus", lambda batch: Problem(with_relus(), [torch.randn(batch, 3, 9, 9)] * 4).solve())
    Session(case, CUDA_PEERS["cuDNN fused channels_last graph"], on_gpu(), FakeGpu())
    assert seen


def test_a_convolution_without_relu_is_not_fused():
    case = CASES["operators", "pointwise_conv2d 64to24 56x56"]
    with pytest.raises(Unsupported, match="no convolution with ReLU"):
        Session(case, CUDA_PEERS["cuDNN fused channels_last graph"], on_gpu(), FakeGpu())


def test_jax_says_what_it_does_not_know():
    pytest.importorskip("jax")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ELU()).eval()
    with pytest.raises(Unsupported, match="no translation of aten.elu"):
        jax_peer.translate(fold_batch_norms(model, torch.randn(1, 3, 4, 4)))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 1, 1)], ids=str)
def test_pools_in_jax(pool):
    pytest.importorskip("jax")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pool).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 7)
    run, weights = jax_peer.translate(fold_batch_norms(model, x))
    torch.testing.assert_close(torch.from_dlpack(run(weights, jax_peer.to_jax(x))), model(x))


def test_depthwise_kernels_are_chosen_where_torch_lets():
    case = find_case("layers", DEPTHWISE)
    if hasattr(torch.backends.cudnn, "depthwise_kernel"):
        Session(case, CUDA_PEERS["eager native"], on_gpu(), FakeGpu())
        assert torch.backends.cudnn.depthwise_kernel == "native"
    else:
        with pytest.raises(Unsupported, match="leaves no choice"):
            Session(case, CUDA_PEERS["eager native"], on_gpu(), FakeGpu())


def test_what_ours_is_given_in_layers():
    for name in (BATCH_NORM, DEPTHWISE, "squeeze_excite 24x9x9 squeeze 8 silu sigmoid"):
        case = find_case("layers", name)
        for direction in case.directions:
            for peer in ("functional", "functional channels_last graph"):
                session = Session(case, CUDA_PEERS[peer], on_gpu(direction=direction), FakeGpu(cold=True))
                assert session.facts["error"] is not None
    with pytest.raises(Unsupported):
        Session(find_case("layers", "conv2d 3x9x9 to 4 k3x3 s1 p1x1"), CUDA_PEERS["functional"], on_gpu(), FakeGpu())


def test_a_wrong_output_ends_a_session(monkeypatch):
    broken = dataclasses.replace(CUDA_PEERS["eager"], prepare=lambda problem, threads: lambda x: x * 1.1)
    case = Case("operators", "same", lambda batch: Problem(nn.Identity(), [torch.randn(batch, 3, 4, 4)] * 2).solve())
    with pytest.raises(AssertionError, match="wrong output"):
        Session(case, broken, on_gpu(), FakeGpu())


def test_caches_are_emptied_before_each_call_of_a_layer():
    device = FakeGpu(cold=True)
    session = Session(find_case("layers", DEPTHWISE), CUDA_PEERS["eager"], on_gpu(), device)
    before = device.flushes
    assert len(session.turn(0.01)) == device.flushes - before > 0


def test_kernels_of_a_row():
    session = Session(find_case("layers", DEPTHWISE), CUDA_PEERS["eager"], on_gpu(), FakeGpu())
    assert session.kernels() == {"kernel": "conv_kernel", "kernel_us": 5.0, "kernels": 3, "kernels_us": 6.0}


def test_the_profiler_is_read(monkeypatch):
    """Of the profiler's events the kernels, not copies of memory and not the host's."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [("cudaLaunchKernel", cpu), ("a", cuda), ("Memcpy DtoD", cuda), ("b", cuda)]

    class Span:
        def elapsed_us(self):
            return 7.0

    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *rest):
            pass

        def events(self):
            class Named:
                time_range = Span()

                def __init__(self, name, device_type):
                    self.name, self.device_type = name, device_type

            return [Named(*event) for event in events]

    device = FakeGpu()
    monkeypatch.setattr(device, "profiler", Profile)
    assert CudaDevice.kernels(device, lambda: None) == [("a", 7.0), ("b", 7.0)]


def test_cases_and_peers_of_a_gpu():
    names = [case.name for case in cases_of("layers", "cuda")]
    assert {name.split()[0] for name in names} == {
        "depthwise_conv2d",
        "pointwise_conv2d",
        "batch_norm_act",
        "squeeze_excite",
    }
    assert all(str(layers.parse(name)) == name for name in names)
    assert (
        "batch_norm_act 960x7x7 hardswish" in names and "squeeze_excite 672x14x14 squeeze 168 relu hardsigmoid" in names
    )
    assert "batch_norm_act 64x112x112 relu" in names  # whose ReLU is a function, in GoogLeNet
    assert {name.split()[0] for name in (case.name for case in cases_of("layers"))} == {
        "depthwise_conv2d",
        "pointwise_conv2d",
        "conv2d",
    }
    assert {"eager", "eager graph", "eager channels_last native graph"} <= set(EAGER) and len(EAGER) == 10
    assert all(set(peer.suites) <= set(SUITES) for peer in CUDA_PEERS.values())


def test_large_layers_have_a_batch_and_dtype_of_their_own():
    options = command.parse(["layers", "--device", "cuda", "--dtype", "fp16", "bf16", "--batch", "1", "32"])
    cases = [case for case in cases_of("layers", "cuda") if case.batches]
    runs = command.runs_of(options, cases)
    assert len(runs) == 2 * 4
    assert {(setting.batch, setting.dtype) for _, setting in runs} == {(16, "fp32"), (64, "fp32")}


def test_options_of_a_gpu(capsys):
    options = command.parse(["models", "--device", "cuda"])
    assert (options.batch, options.dtype) == ([1, 32, 256], ["fp16", "bf16", "fp32"])
    runs = command.runs_of(options, [CASES["models", "mobilenet_v2"]])
    assert [setting.label for _, setting in runs] == [
        f"{dtype} · batch {n} · forward" for dtype in options.dtype for n in options.batch
    ]
    assert command.parse(["layers", "--device", "cuda"]).batch == [32] and command.parse(["layers"]).batch == [1]
    for arguments, said in (
        (["--dtype", "fp16"], "--device cpu takes no --dtype"),
        (["--direction", "forward"], "--device cpu takes no --direction"),
        (["--device", "cuda", "--threads", "2"], "--device cuda takes no --threads"),
        (["demo", "--device", "cuda"], "demo takes no --device"),
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert said in capsys.readouterr().err


def test_a_direction_that_no_case_has(fake):
    arguments = ["operators", "--device", "cuda", "--case", "64to24", "--direction", "training", "--skip-tests"]
    with pytest.raises(SystemExit, match="no case has direction training"):
        command.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="^benchmarks: --device cuda needs a GPU, torch sees none$"):
        command.main(["--device", "cuda"])


def test_floor():
    assert gauges.floor_ms(3000, 0, 3000, 7e5) == 1.0
    assert gauges.floor_ms(3000, 700, 3000, 7e5) == 2.0


def test_peaks_are_bytes_and_operations_over_their_times():
    peaks = gauges.Peaks("cpu", lambda call: call() is None or 2.0, size=64, copied=1000)
    assert peaks.read("fp16") == {"copy_gbytes": 2 * 1000 / 2e6, "matrix_gflops": 2 * 64**3 / 2e6}


def test_a_run_prints_and_saves(fake, tmp_path, capsys):
    arguments = [
        "operators",
        "--device",
        "cuda",
        "--case",
        "480x14x14 k3",
        "--peer",
        "eager channels_last graph",
        "functional",
    ]
    arguments += ["copy", "--dtype", "fp32", "--batch", "1", "--skip-tests", "--rounds", "1", "--seconds", "0.01"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "depthwise_conv2d 480x14x14 k3 s1 · fp32 · batch 1 · forward+both · floor" in printed
    assert "TF32 allowed" in printed and "conv_kernel 83 %" in printed and "Fake · driver 1" in printed
    (csv_file,), (json_file,) = tmp_path.glob("operators-cuda-*.csv"), tmp_path.glob("*.json")
    with csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["direction"] for row in rows} == {"forward", "forward+input", "forward+weight", "forward+both"}
    for row in rows:
        assert (row["gpu"], row["driver"], row["device"], row["tf32"]) == ("Fake", "1", "cuda", "True")
        assert (
            row["commit"] and "torch=" in row["versions"] and row["kernel"] == "conv_kernel" and row["kernels"] == "3"
        )
        if row["peer"] != "copy":
            floor = max(float(row["mbytes"]) / 3000, 2 * float(row["gmacs"]) / 7e5 * 1e3)
            assert float(row["floor_ms"]) == pytest.approx(floor)
            assert float(row["floor_share"]) == pytest.approx(floor / float(row["median_ms"]))
    saved = json.loads(json_file.read_text())
    assert saved["copy_gbytes_per_second"] == {"fp32": {"memory": 3000.0}}
    assert saved["conditions"]["device"] == "cuda"


@pytest.mark.parametrize("room", (1, 2, 3))
def test_peers_that_do_not_fit_together_are_timed_in_groups(room, fake, monkeypatch):
    monkeypatch.setattr(LocalWorker, "free_mib", staticmethod(lambda count: 1e5 if count < room else 1e4))
    peers = [CUDA_PEERS[name] for name in ("eager", "eager channels_last", "functional")]
    results = measure(find_case("layers", DEPTHWISE), peers, on_gpu(), 2, 0.01)
    assert [r.group for r in results] == [1 + i // room for i in range(3)]
    assert all(r.median_ms and not r.failed for r in results) and LocalWorker.open == 0
    assert (f"in {results[-1].group} groups" in report.results_table(results)) == (room < 3)


def test_a_peer_that_finds_no_memory_gets_another_turn(fake, monkeypatch):
    monkeypatch.setattr(LocalWorker, "free_mib", staticmethod(lambda count: 1e5 if count == 1 else 0))
    peers = [CUDA_PEERS[name] for name in ("eager", "eager channels_last")]
    results = measure(find_case("layers", DEPTHWISE), peers, on_gpu(), 1, 0.01)
    assert [r.group for r in results] == [1, 2] and all(r.median_ms for r in results)
    monkeypatch.setattr(LocalWorker, "free_mib", staticmethod(lambda count: 0))
    results = measure(find_case("layers", DEPTHWISE), peers, on_gpu(), 1, 0.01)
    assert [r.failed for r in results] == ["OutOfMemoryError"] * 2


def test_a_peer_that_takes_too_long_has_a_row():
    case = CASES["operators", "pointwise_conv2d 64to24 56x56"]
    (result,) = measure(case, [PEERS["eager"]], Setting(), 1, 0.01, limit=0.01)
    assert result.failed == "no answer after 0.01 s" and result.median_ms is None


def results():
    peers = {"eager channels_last graph": 3.0, "torch.compile max-autotune": 2.0, "JAX": None, "accelerate": 1.0}
    for batch in (1, 32):
        for case in ("mobilenet_v2", "mobilenet_v3_small"):
            for name, ms in peers.items():
                r = Result("models", case, name, 1, batch, ms, ms, ms, device="cuda", dtype="fp16")
                r.ours = name == "accelerate"
                if ms:
                    r.error, r.gmacs, r.mbytes, r.peak_gflops, r.peak_low_gflops = 1e-3, 0.3, 600.0, 7e5, 7e5
                    r.copy_gbytes, r.floor_ms, r.floor_share = 3000.0, 0.2, 0.2 / ms
                    r.peak_share = r.gflops / r.peak_gflops
                    r.kernel, r.kernel_us, r.kernels, r.kernels_us, r.group = "conv", 5.0, 3, 10.0, 1
                else:
                    r.absent = "not installed: jax"
                yield r


def test_tables():
    rows = [*results()]
    table = report.results_table(rows[:4]).splitlines()
    assert table[0] == (
        "mobilenet_v2 · fp16 · batch 1 · forward · floor 0.2 ms: 600 MB at 3000 GB/s, "
        "0.3 G multiply-adds at 700 TFLOP/s"
    )
    (ours,) = [line for line in table if line.startswith("accelerate")]
    assert ours.split() == ["accelerate", "1", "1–1", "3.00", "1.0e-03", "20", "3", "conv", "50", "%"]
    summary = report.summary(rows)
    assert "fp16 · batch 32 · forward" in summary and "GFLOP/s" not in summary
    (line,) = [line for line in summary.split("\n\n")[0].splitlines() if line.startswith("mobilenet_v2")]
    assert line.split() == ["mobilenet_v2", "3", "2", "missing", "1", "20", "torch.compile", "max-autotune", "2.00"]


def test_plots_are_written(fake, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*results()]
    files = report.save(rows, report.limits(rows), tmp_path, report.conditions("cuda"))
    plots = [file for file in files if file.suffix == ".png"]
    assert [file.name.rsplit("-")[-1] for file in plots] == ["speed.png", "roofline.png", "floor.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in plots)


def test_a_session_ends_with_a_table_whatever_fails(fake, tmp_path, monkeypatch):
    def run_tests(name, arguments, seconds, out):
        if name == "gpu":
            raise OSError("no pytest")
        return {"name": name, "status": "1", "summary": "1 failed", "seconds": 1.0, "failures": ["FAILED a"]}

    monkeypatch.setattr(gpu_session, "run_tests", run_tests)
    case = "pointwise_conv2d 24x7x7 to 24 k1x1 s1 p0x0"
    steps = (
        gpu_session.Step("layers", case, ("functional channels_last graph", "eager channels_last graph"), 2, "fp32"),
        gpu_session.Step("layers", "conv2d 3x9x9 to 4 k3x3 s1 p1x1", ("functional",), 2, "fp32"),
        gpu_session.Step("models", "no such model", ("accelerate", "eager"), 1),
    )
    lines = "\n".join(gpu_session.session(tmp_path, 1000, steps)).splitlines()
    end = lines[lines.index("gpu tests: OSError: no pytest") :]
    assert end[1:3] == ["triton tests: 1 failed (1)", "FAILED a"]
    assert [line for line in end if line.startswith("pointwise_conv2d 24x7x7 1×1 fp32 batch 2")]
    assert "no such model, eager: KeyError: ('models', 'no such model')" in end
    assert json.loads((tmp_path / "session.json").read_text())["tests"][0] == {
        "failed": "OSError: no pytest",
        "name": "gpu",
    }
    with (tmp_path / "session.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["median_ms"]) for row in rows] == [True, True, False, False, False]
    assert all(row["gpu"] == "Fake" and row["commit"] for row in rows)
    assert [bool(row["failed"]) for row in rows] == [False, False, True, True, True]


def test_a_session_says_what_it_had_no_time_for(fake, tmp_path):
    step = gpu_session.STEPS[0]
    rows = gpu_session.rows_of(step, gpu_session.Clock(5))
    assert [r.failed for r in rows] == ["TimeoutError: no time left"] * 2
    assert "failed" in gpu_session.table([rows])


def test_all_steps_of_a_session_are_of_cases_and_peers():
    for step in gpu_session.STEPS:
        case = find_case(step.suite, step.case)
        assert step.direction in case.directions
        assert all(step.suite in CUDA_PEERS[name].suites for name in step.peers)
        assert any(CUDA_PEERS[name].ours for name in step.peers)


class Impatient(subprocess.Popen):
    """Whose time is up when its tests have come to the one that waits."""

    marker: Path

    def wait(self, timeout=None):
        while timeout == 100 and self.poll() is None:
            if self.marker.exists():
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return super().wait(timeout)


@pytest.mark.parametrize(
    "body, status, summary",
    [
        ("assert 1", "0", "1 passed"),
        ("assert 0", "1", "1 failed"),
        ("wait()", "ended after 100 s", ""),
        ("assert 0\n\n\ndef test_more():\n    wait()", "ended after 100 s", "1 failed"),
    ],
)
def test_tests_of_a_session(body, status, summary, tmp_path, monkeypatch):
    file, marker = tmp_path / "test_it.py", tmp_path / "waits"
    imports = "import pathlib\nimport time\n"
    wait = f"def wait():\n    pathlib.Path({str(marker)!r}).touch()\n    time.sleep(600)\n"
    file.write_text(f"{imports}\n\n{wait}\n\ndef test():\n    {body}\n")
    monkeypatch.setattr(Impatient, "marker", marker, raising=False)
    monkeypatch.setattr(gpu_session.subprocess, "Popen", Impatient)
    found = gpu_session.run_tests("it", [str(file)], 100, tmp_path, processes=1)
    assert found["status"] == status and found["summary"].startswith(summary)
    assert bool(found["failures"]) == body.startswith("assert 0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_session_without_a_gpu():
    with pytest.raises(SystemExit, match="^benchmarks: gpu_session needs a GPU, torch sees none$"):
        gpu_session.main([])


def test_a_session_without_facts_of_the_machine(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "run_tests", lambda name, *rest: {"status": "0", "summary": "1 passed"})
    monkeypatch.setattr(report, "conditions", lambda device: 1 / 0)
    step = gpu_session.Step("layers", DEPTHWISE, ("functional",), 2, "fp32")
    assert "of the machine: ZeroDivisionError: division by zero" in [*gpu_session.session(tmp_path, 1000, (step,))]
    with (tmp_path / "session.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["median_ms"] and not row["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_that_find_no_gpu_are_rows():
    """As it is, with a process of its own for the peer."""
    (result,) = measure(find_case("layers", DEPTHWISE), [CUDA_PEERS["eager"]], on_gpu(), 1, 0.01)
    assert result.failed and "CUDA" in result.failed and result.median_ms is None
