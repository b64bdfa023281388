"""accelerate() on Triton kernels: on a GPU, or on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import contextlib
import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import poisoned_memory
from model_parity import assert_parity, pictures, randomise_batch_norm
from random_network import RandomNetwork
from test_accelerate_blocks import Block
from test_triton_kernels import DEVICE, INTERPRETED, bfloat16_arithmetic, exact_products  # noqa: F401
from torch import nn
from torch.utils._pytree import tree_leaves

from mobilenet_fast import accelerate, models
from mobilenet_fast.accelerate import cuda
from mobilenet_fast.accelerate.passes import optimise

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def gpu(test):
    skip = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter has no CUDA graphs")
    return pytest.mark.gpu_alone(skip(test))


def fast_form(model, *args, **kwargs):
    return accelerate(copy.deepcopy(model).to(DEVICE), *args, backend="triton", **kwargs)


def leaves_of(outputs):
    return [leaf.cpu() for leaf in tree_leaves(outputs)]


def check(model, fast, x, allowed=4e-6):
    """``fast`` errs by ``allowed`` of the largest output, or four times what eager does in the same dtype."""
    dtype = fast.dtype or x.dtype
    with torch.no_grad(), poisoned_memory():
        actual = leaves_of(fast(x.to(DEVICE)))
    with torch.no_grad():
        eager = tree_leaves(copy.deepcopy(model).to(dtype)(x.to(dtype)))
        exact = tree_leaves(copy.deepcopy(model).double()(x.double()))
    for y, plain, y64 in zip(actual, eager, exact, strict=True):
        assert y.shape == plain.shape and y.dtype == plain.dtype
        error, eager_error = ((z.double() - y64).abs().max() for z in (y, plain))
        assert error <= max(allowed * y64.abs().max(), 4 * eager_error)


@pytest.mark.parametrize("seed", (0, 1, 2, 3, 4, 6, 7))  # of the first eight; 5 takes the interpreter a minute
def test_random_networks(seed, monkeypatch):
    if seed % 2:  # blocks run as one step wherever they can
        monkeypatch.setattr(cuda, "_fastest", lambda graph, limits, expand, depthwise, project: (expand, project))
    model = RandomNetwork(seed)
    n, c, h, w = model.input_shape
    x = torch.randn(n, c, h, 2 * w)[..., ::2] if seed % 3 else torch.randn(n, c, h, w)
    x = x.to(memory_format=torch.channels_last) if seed % 3 == 1 else x
    check(model, fast_form(model), x)


# Kernel, stride, expand, project, residual, squeeze-excite: which layers are there; and which of them are fused.
@pytest.mark.parametrize(
    "options, choice",
    (
        ((3, 1, True, True, True, False), "all"),
        ((3, 1, True, True, True, False), "project"),
        ((5, 2, True, True, False, False), "all"),
        ((5, 2, True, True, False, True), "expand"),
        ((3, 1, True, True, True, True), "none"),
        ((7, 1, False, True, True, False), "project"),
        ((3, 2, True, False, False, True), "expand"),
    ),
)
def test_fused_blocks(options, choice, monkeypatch):
    def choose(graph, limits, expand, depthwise, project):
        return (expand if choice in ("expand", "all") else None, project if choice in ("project", "all") else None)

    monkeypatch.setattr(cuda, "_fastest", choose)
    torch.manual_seed(0)
    check(model := Block(*options).eval(), fast_form(model), torch.randn(2, 10, 9, 7))


class Small(nn.Module):
    """A MobileNetV3 in small: stem, blocks of all kinds, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, 1e-3), nn.Hardswish())
        plain, squeezed = ((3, 1, True, True, True, squeeze, 10, 20) for squeeze in (False, True))
        self.blocks = nn.Sequential(nn.Conv2d(16, 10, 1), Block(*plain), Block(*squeezed))
        self.head = nn.Sequential(nn.Conv2d(10, 40, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(40, 24), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x):
        return self.classifier(self.head(self.blocks(self.stem(x))))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return randomise_batch_norm(Small(), seed=0, shape=(8, 3, 12, 12))


@pytest.mark.parametrize("dtype, channels_last", ((torch.float32, False), (torch.float64, True)))
def test_whole_network(small, dtype, channels_last):
    model = copy.deepcopy(small).to(dtype)
    x = pictures(3, 3, 12, 12).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    fast = fast_form(model, x.to(DEVICE))
    assert not fast.explain().fallbacks and fast.explain().isa == "triton"
    with torch.no_grad():
        exact, y = copy.deepcopy(model).double()(x.double()), fast(x.to(DEVICE)).cpu()
    assert y.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 1e-13
    assert (y - exact).abs().max() <= allowed * exact.abs().max()
    check(model, fast, x[:1])  # another batch


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision(small, dtype):
    x = pictures(2, 3, 12, 12)
    fast = fast_form(small, x.to(DEVICE), dtype=dtype)
    check(small, fast, x)
    assert torch.equal(fast(x.to(dtype).to(DEVICE)), fast(x.double().to(DEVICE)))
    assert len(fast._plans) == 1  # for inputs of any floating-point dtype


def test_weights_are_folded_before_they_are_rounded():
    """A statistic that float16 can't hold is none of the kernels' concern."""
    model = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)).eval()
    model[1].running_var.fill_(1e-9)  # 0 in float16
    model[1].eps = 1e-12  # cuDNN takes no 0
    model[0].weight.data *= 1e-5
    x = torch.randn(1, 16, 3, 3)
    with torch.no_grad():
        y, exact = fast_form(model, dtype=torch.float16)(x.to(DEVICE)).cpu(), model(x)
    assert (y - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_a_half_model_runs_as_it_is():
    model = Block(3, 1, True, True, True, True, 16, 24).eval().half()
    fast = fast_form(model)
    check(model, fast, torch.randn(2, 16, 4, 5).half())
    assert not fast.explain().fallbacks


def test_what_has_no_kernel_runs_in_pytorch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 1)
            self.offset = nn.Parameter(torch.randn(1, 16, 1, 1))

        def forward(self, x):
            x = torch.tanh(self.conv(x)) + self.offset
            a, b = x.chunk(2, 1)
            values, indices = x.flatten(2).max(2)
            return torch.cat([b, a.exp(), x], 1), values, indices

    torch.manual_seed(0)
    model = Model().eval()
    fast = fast_form(model)
    check(model, fast, torch.randn(2, 8, 5, 3))
    names = [row.operation for row in fast.explain().fallbacks]
    assert "aten::tanh" in names and "aten::exp" in names
    half = fast_form(model, dtype=torch.float16)
    check(model, half, torch.randn(2, 8, 5, 3))


def test_concatenations_are_written_in_place():
    """Branches of Inception write into their channels of the sum; what can't is copied there."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(16, 8, 1)
            self.three = nn.Conv2d(16, 24, 3, padding=1)
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

        def forward(self, x):
            pooled = nn.functional.max_pool2d(x, 3, 1, 1)
            inner = torch.cat([torch.relu(self.one(x)), pooled], 1)
            y = torch.cat([torch.relu(self.three(x)), self.depthwise(x), inner, x], 1)
            return y, nn.functional.avg_pool2d(y, 3, 2, 1)

    torch.manual_seed(0)
    model = Branches().eval()
    fast = fast_form(model)
    check(model, fast, torch.randn(2, 16, 7, 5))
    copies = [row for row in fast.explain().rows if row.kernel == "copy into cat"]
    assert len(copies) == 1  # the input itself


def test_vectors_of_any_stride():
    """Biases, statistics and affine parameters that are columns of a table."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {
                "pointwise": (16, 8, 1, 1),
                "depthwise": (16, 1, 3, 3),
                "linear": (5, 16),
                "dense": (16, 16, 3, 3),
            }
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))
            self.register_buffer("table", torch.rand(16, 6) + 0.5)

        def forward(self, x):
            columns = self.table.unbind(1)
            x = nn.functional.conv2d(x, self.pointwise, columns[0])
            x = nn.functional.conv2d(torch.tanh(x), self.depthwise, columns[1], groups=16)
            x = nn.functional.batch_norm(torch.tanh(x), *columns[2:6])
            x = nn.functional.conv2d(x, self.dense, columns[0], padding=1)
            return nn.functional.linear(x.mean((2, 3)), self.linear, columns[1][:5])

    torch.manual_seed(0)
    model = Strided().eval()
    check(model, fast_form(model), torch.randn(2, 8, 5, 4))


def test_several_filters_a_channel():
    model = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1, groups=8), nn.Hardswish()).eval()
    fast = fast_form(model)
    check(model, fast, torch.randn(2, 8, 6, 5))
    assert not fast.explain().fallbacks


@pytest.mark.parametrize("padding", ((0, 1, 0, 1), (2, 0, 1, 3)))
@pytest.mark.parametrize("channels, groups", ((3, 1), (24, 1), (24, 24)))
def test_padding_of_one_side(padding, channels, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 24, 3, 2, groups=groups)
    model = nn.Sequential(nn.ZeroPad2d(padding), conv, nn.ReLU6()).eval()
    check(model, fast_form(model), torch.randn(1, channels, 9, 8))


def test_nothing_else_is_alive_after_its_last_reader(small):
    x = pictures(2, 3, 12, 12).to(DEVICE)
    fast = fast_form(small, x)
    (entry,) = fast._plans.values()
    freed = [key for step in entry.plan.steps for key in step.frees]
    written = {key for step in entry.plan.steps for key in step.writes}
    assert len(freed) == len(set(freed)) and written - set(freed) == set(entry.plan.outputs)


def test_outputs_are_the_callers(small):
    fast, x = fast_form(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval()), torch.randn(1, 4, 3, 3, device=DEVICE)
    first = fast(x)
    kept = first.clone()
    second = fast(x + 1)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    first.zero_()
    assert torch.equal(fast(x), kept)


def test_empty_batch(small):
    fast = fast_form(small, pictures(2, 3, 12, 12).to(DEVICE))
    assert fast(torch.zeros(0, 3, 16, 16, device=DEVICE)).shape == (0, 10)


def test_copies_pickles_and_new_weights(tmp_path):
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    fast = fast_form(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), dtype=torch.float16)
    y = fast(x)
    fast.save(tmp_path / "fast.pt")
    for other in (copy.deepcopy(fast), torch.load(tmp_path / "fast.pt", weights_only=False)):
        assert other.dtype == torch.float16 and other.backend == "triton" and torch.equal(other(x), y)
    state = {name: torch.zeros_like(tensor) for name, tensor in fast.state_dict().items()}
    fast.load_state_dict(state)
    assert not fast(x).any()


def test_blocks_are_fused_where_that_takes_less_time():
    """The wide maps of a large batch are fused with their projection, as that saves a pass; many hidden channels that
    few programs would go through are not.
    """
    model = models.mobilenet_v2().eval()
    fast = fast_form(model, torch.zeros(2, 3, 64, 64, device=DEVICE), dtype=torch.float16)
    (entry,) = fast._plans.values()

    def kernels(batch):
        leaves = [torch.zeros(1, dtype=torch.float16, device="meta").expand(batch, 3, 64, 64)]
        graph = entry.capture.lower(leaves, dict(fast._model.state_dict()), cuda.KERNEL_DTYPES)
        plan = cuda.build(optimise(graph), cuda.CudaWeights(), torch.device(DEVICE))
        return [row.kernel for row in plan.report.rows]

    assert any("depthwise + project" in kernel for kernel in kernels(256)[:12])
    assert not any("+" in kernel for kernel in kernels(2)[-8:])


def test_bad_input(small):
    x = pictures(2, 3, 12, 12).to(DEVICE)
    fast = fast_form(small, x, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^accelerate: input must be \(N, 3, H, W\), got \(2, 4, 16, 16\)$"):
        fast(torch.zeros(2, 4, 16, 16, device=DEVICE))
    with pytest.raises(TypeError, match="^accelerate: input must be torch.float16, got torch.int64$"):
        fast(torch.zeros(2, 3, 16, 16, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="must be on .*, got meta$"):
        fast(torch.zeros(2, 3, 16, 16, device="meta"))
    with pytest.raises(NotImplementedError, match="strict=True"):
        fast_form(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()).eval(), torch.zeros(1, 8, 2, 2, device=DEVICE), strict=True
        )


@pytest.fixture
def happened(monkeypatch):
    """What is done with CUDA's graphs, streams and events, in whose place others are: a replay computes the outputs
    anew, from the inputs kept.
    """
    happened = []

    class Event:
        def record(self, stream):
            happened.append("record")

    class Stream:
        def wait_stream(self, other):
            happened.append("wait for stream")

        def wait_event(self, event):
            happened.append("wait for event")

    class Graph:
        def replay(self):
            happened.append("replay")
            recorded = self.plan.recorded
            for kept, new in zip(recorded.outputs, self.plan.execute(recorded.inputs), strict=True):
                kept.copy_(new)

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        happened.append("capture")
        yield

    for name, other in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "current_stream": Stream,
        "set_stream": lambda stream: None,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device: (8, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, other)
    return happened


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has graphs of its own")
def test_what_is_recorded(happened, monkeypatch):
    """Inputs are copied in, outputs cloned, each run waits for the one before; in inference mode as well."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    fast = fast_form(model, x)
    (entry,) = fast._plans.values()
    monkeypatch.setattr(entry.plan, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "plan", entry.plan, raising=False)
    execute, fills = entry.plan.execute, []

    def noted(tensors):
        fills.append(torch.utils.deterministic.fill_uninitialized_memory)
        return execute(tensors)

    monkeypatch.setattr(entry.plan, "execute", noted)
    with torch.inference_mode():
        first = fast(x)
    # What fills new tensors in PyTorch's deterministic mode is not recorded: a replay would fill the inputs.
    assert fills[:2] == [True, False] and torch.utils.deterministic.fill_uninitialized_memory
    assert happened == ["wait for stream", "wait for stream", "capture", "wait for event", "replay", "record"]
    with torch.no_grad():
        second = fast(2 * x)
        expected = [model(x), model(2 * x)]
    assert happened[6:] == ["wait for event", "replay", "record"]
    for y, wanted in zip((first, second), expected, strict=True):
        torch.testing.assert_close(y, wanted)
    recorded = entry.plan.recorded
    mine = {tensor.data_ptr() for tensor in (*recorded.inputs, *recorded.outputs)}
    assert not mine & {x.data_ptr(), first.data_ptr(), second.data_ptr()}


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has graphs of its own")
def test_what_cannot_be_recorded_runs_step_by_step(happened, monkeypatch):
    @contextlib.contextmanager
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    model = nn.Conv2d(3, 8, 1).eval()
    x = torch.randn(2, 3, 5, 5)
    fast = fast_form(model, x)
    (entry,) = fast._plans.values()
    monkeypatch.setattr(entry.plan, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    before = torch.backends.cudnn.benchmark
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x))
    assert entry.plan.why_not_recorded.startswith("operation not permitted") and "replay" not in happened
    assert torch.backends.cudnn.benchmark == before


# On a GPU alone


@gpu
@pytest.mark.parametrize("dtype", (None, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    "name", ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet_a1")
)
def test_models(name, dtype):
    torch.manual_seed(0)
    model = randomise_batch_norm(models.create_model(name), seed=0)
    fast = fast_form(model, dtype=dtype)
    x = pictures(4, 3, 96, 96)
    check(model, fast, x, allowed=1e-5)
    (entry,) = fast._plans.values()
    assert entry.plan.recorded is not None and not entry.plan.report.fallbacks
    if dtype is None:
        assert_parity(model, lambda x: fast(x.to(DEVICE)).cpu(), x)


@gpu
def test_graphs_of_all_shapes_share_their_memory(small):
    fast = fast_form(small)
    inputs = [pictures(n, 3, size, size).to(DEVICE) for n, size in ((1, 16), (4, 32), (2, 24), (1, 16), (4, 32))]
    with torch.no_grad():
        results = [fast(x) for x in inputs]
        for x, y in zip(inputs, results, strict=True):
            torch.testing.assert_close(small(x.cpu()), y.cpu(), rtol=1e-4, atol=1e-4)


@gpu
def test_streams_and_threads(small):
    fast = fast_form(small)
    inputs = [pictures(1 + i % 3, 3, 16, 16, seed=i).to(DEVICE) for i in range(12)]
    expected = [fast(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(offset):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(60):
                index = (i + offset) % len(inputs)
                if not torch.equal(fast(inputs[index]), expected[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@gpu
def test_within_a_callers_graph(small):
    fast, x = fast_form(small), pictures(2, 3, 12, 12).to(DEVICE)
    expected = fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, expected.flip(0))


@gpu
def test_steps_that_cannot_be_recorded_run_all_the_same():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.conv(x)
            return y + torch.linalg.inv(torch.eye(4, device=x.device, dtype=x.dtype) + 0.1 * y[0, 0])

    model = Waits().eval()
    fast, stream = fast_form(model), torch.cuda.current_stream()
    for size in (1, 2):  # a failed recording is in nobody's way
        check(model, fast, torch.randn(size, 8, 4, 4), allowed=1e-5)
        assert torch.cuda.current_stream() == stream
    assert all(entry.plan.why_not_recorded for entry in fast._plans.values())
    assert "no CUDA graph: " in str(fast.explain())


@gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("residual", (False, True))
def test_dense_layers(residual, dtype):
    """On cuDNN's kernels with ReLU, or without where it has none: odd channel counts in half precision."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(17, 23, 3, padding=1), nn.Conv2d(23, 23, 3, padding=1)

        def forward(self, x):
            y = torch.relu(self.one(x))
            return torch.relu(self.two(y) + y if residual else self.two(y))

    torch.manual_seed(0)
    model = Dense().eval()
    check(model, fast_form(model, dtype=dtype), torch.randn(2, 17, 9, 8), allowed=1e-5)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(small):
    fast = accelerate(copy.deepcopy(small).to("cuda:1"))
    other = fast_form(small)
    for n in (1, 2, 1):
        x = pictures(n, 3, 12, 12, seed=n)
        with torch.no_grad():
            expected = small(x)
        for y in (other(x.cuda()), fast(x.to("cuda:1"))):
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


@gpu
def test_capture_before_the_first_call(small):
    fast, x = fast_form(small), pictures(2, 3, 12, 12).to(DEVICE)
    with pytest.raises(RuntimeError, match="^accelerate: inputs of these shapes must be passed once before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fast(x)
    assert fast(x).shape == (2, 10)


@gpu
def test_profile(small):
    x = pictures(2, 3, 12, 12).to(DEVICE)
    profile = fast_form(small).profile(x, runs=3)
    assert len(profile.seconds) == len(profile.rows) and min(profile.seconds) > 0
    assert profile.copy_gbytes > 100 and "% of copy" in str(profile)
