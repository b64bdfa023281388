"""torch.compile(model, backend="mobilenet_fast")."""

import logging
import threading

import pytest
import torch
import torch._inductor.config
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

from mobilenet_fast.accelerate import backend, module, plan
from mobilenet_fast.models import create_model
from mobilenet_fast.nn import ConvNormAct, InvertedResidual


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=False):  # a peer of the benchmarks sets it
        yield
    torch._dynamo.reset()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, backend.__name__)
    return caplog


def network(in_channels=3):
    """Of this package's layers and torch's own."""
    return randomise_batch_norm(
        nn.Sequential(
            ConvNormAct(in_channels, 16, stride=2, activation_layer="hardswish"),
            InvertedResidual(16, 32, 16, squeeze_channels=8),
            nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.SiLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 10),
        ),
        seed=0,
        shape=(8, in_channels, 32, 32),
    )


def compiled(model, **options):
    return torch.compile(model, backend="mobilenet_fast", **options)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_lite0"])
def test_models(name, log):
    model = randomise_batch_norm(create_model(name, num_classes=10), seed=1)
    fast = compiled(model, options={"strict": True}, fullgraph=True)
    assert_parity(model, fast, pictures(2, 3, 96, 96))
    assert not log.records


def test_one_capture_serves_every_batch_of_a_dynamic_graph(monkeypatch):
    captured = []
    original = backend.AcceleratedModule._prepare
    monkeypatch.setattr(
        backend.AcceleratedModule, "_prepare", lambda self, *a: captured.append(self) or original(self, *a)
    )
    model = network()
    fast = compiled(model, dynamic=True, options={"strict": True})
    for batch in (2, 3, 5):
        assert_parity(model, fast, pictures(batch, 3, 32, 32, seed=batch))
    (form,) = set(captured)
    assert len(form._captures) == 1 and len(form._plans) == 3


def test_a_batch_that_grows_becomes_dynamic():
    model = network()
    fast = compiled(model, options={"strict": True})
    for batch in (2, 4, 7):
        assert_parity(model, fast, pictures(batch, 3, 32, 32, seed=batch))


def test_a_number_that_changes(log):
    layer = network()[0]
    fast = compiled(lambda x, number: layer(x) * number, dynamic=True)
    x = pictures(2, 3, 32, 32)
    for number in range(12):
        with torch.no_grad():
            torch.testing.assert_close(fast(x, number / 4 + 0.1), layer(x) * (number / 4 + 0.1))
        assert ("its numbers change" in log.text) == (number >= 8)


def test_graph_breaks():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network()[:2], network()[2:]

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x * 2), {"mean": x.mean((2, 3))}

    model = Breaks().eval()
    assert_parity(model, compiled(model), pictures(2, 3, 32, 32))


@pytest.mark.parametrize("freezing", [False, True])
def test_weights_are_packed_once_and_again_after_a_change(freezing, monkeypatch):
    packed = []
    original = plan.PackedWeights.get
    monkeypatch.setattr(plan.PackedWeights, "get", lambda self, *a: packed.append(a) or original(self, *a))
    model, x = network(), pictures(2, 3, 32, 32)
    fast = compiled(model, options={"strict": True})
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        before = fast(x).clone()
        count = len(packed)
        assert count > 0
        fast(x)
        assert len(packed) == count
        model[5].bias += 1
        torch.testing.assert_close(fast(x), before + 1)
        assert len(packed) == 2 * count
    assert_parity(model, fast, x)


def test_two_networks_of_one_code_keep_their_weights():
    one, two = network(), network()
    with torch.no_grad():
        two[5].weight.mul_(2)
    models = [(model, compiled(model, options={"strict": True})) for model in (one, two)]
    for model, fast in models * 2:
        assert_parity(model, fast, pictures(2, 3, 32, 32))


def test_graphs_that_need_gradients_run_in_pytorch(log):
    model, x = network().train(), pictures(4, 3, 32, 32)
    loss = compiled(model)(x).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "it needs gradients" in log.text


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.mul_(2) + 1, "writes to an input"),
        (lambda x: x.view(-1), "returns memory of an input"),
        (lambda x: x.half() + 1, None),
        (lambda x: x.sum().item() * x, None),
        (lambda x: torch.sort(x, -1).values + x.size(0), None),
    ],
)
def test_graphs_do_to_their_inputs_what_they_do_in_pytorch(function, why, log):
    x = pictures(2, 3, 8, 8)
    expected_x, actual_x = x.clone(), x.clone()
    with torch.no_grad():
        expected, actual = function(expected_x), compiled(function)(actual_x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_x, expected_x)
    assert why is None or why in log.text
    if why == "returns memory of an input":
        assert actual.data_ptr() == actual_x.data_ptr()


def test_batch_norm_in_training_mode_updates_its_statistics():
    model, x = network().train(), pictures(4, 3, 32, 32)
    with torch.no_grad():
        compiled(model)(x)
    assert model[2][1].num_batches_tracked == 3  # two by the fixture


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model, x = network().to(dtype), pictures(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_autocast_runs_in_pytorch(log):
    model, x = network(), pictures(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert "autocast is on" in log.text


def test_strict():
    with torch.no_grad(), pytest.raises(Exception, match="strict=True allows no step through ATen"):
        compiled(lambda x: torch.sort(x).values, options={"strict": True})(pictures(2, 3, 8, 8))


def test_unknown_option():
    with torch.no_grad(), pytest.raises(Exception, match="options may have strict, got 'speed'"):
        compiled(network(), options={"speed": 1})(pictures(2, 3, 32, 32))


@torch.no_grad()
def test_sizes_that_change_in_any_dimension():
    for function, sizes in (
        (lambda x: nn.functional.max_pool2d(x, 2), [(2, c, 8, 9) for c in (3, 5, 7, 11)]),
        (lambda x: torch.einsum("blhd,bmhd->bhlm", x, x).softmax(-1), [(2, n, 4, 8) for n in (10, 12, 17, 23)]),
    ):
        for dynamic in (None, True):
            torch._dynamo.reset()
            fast = compiled(function, dynamic=dynamic)
            for size in sizes:
                x = torch.randn(size)
                torch.testing.assert_close(fast(x), function(x))


VIEWS = {"view": lambda y: y.view(-1), "slice": lambda y: y[:, :2], "detach": torch.detach, "clone": torch.clone}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_results_that_share_memory_do_so(view, layout):
    conv = nn.Conv2d(8, 8, 1)

    def run(x):
        y = conv(x).contiguous()
        z = VIEWS[view](y)
        torch._dynamo.graph_break()
        z.add_(1)
        return y

    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=layout)
    torch.testing.assert_close(compiled(run)(x), run(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_results_have_the_layout_that_the_next_graph_was_compiled_for(dtype):
    conv = nn.Conv2d(8, 8, 1, dtype=dtype)

    def run(x):
        y = conv(x).contiguous()
        torch._dynamo.graph_break()
        return y.view(2, -1) * 2

    x = torch.randn(2, 8, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(run)(x), run(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_the_model_takes_but_a_plan_does_not(log):
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(torch.randn(2, 3), torch.randn(2, 3))
    assert torch.equal(compiled(lambda x: x * 3)(x).a, x.a * 3)
    with pytest.raises(IndexError, match="out of range"):  # PyTorch's own
        compiled(lambda i: nn.functional.embedding(i, torch.ones(3, 4)) * 2)(torch.tensor([5]))


@pytest.mark.parametrize("buffer", [False, True])
@torch.no_grad()
def test_other_weights_take_no_other_capture(buffer, monkeypatch):
    captures = []
    original = module._capture
    monkeypatch.setattr(module, "_capture", lambda *args: captures.append(1) or original(*args))

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(8, 8)
            self.register_buffer("state", torch.zeros(2, 8)) if buffer else setattr(self, "state", torch.zeros(2, 8))

        def forward(self, x):
            self.state = torch.tanh(self.cell(x) + self.state)
            return self.state

    model, x = Recurrent().eval(), torch.randn(2, 8)
    fast, state = compiled(model), torch.zeros(2, 8)
    for _ in range(5):
        model.cell.weight.mul_(0.9)
        state = torch.tanh(model.cell(x) + state)
        torch.testing.assert_close(fast(x), state)
    assert len(captures) <= 2


@torch.no_grad()
def test_statistics_of_a_training_forward():
    """Batch norm writes its running statistics without PyTorch counting it."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)).eval()
    fast, x = compiled(model), torch.randn(4, 3, 8, 8) + 2
    fast(x)
    for runs in (model, fast):
        model.train()
        runs(x)
        model.eval()
        torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_calls_from_several_threads():
    """One thread captures while others trace."""
    model = create_model("mobilenet_v3_small").eval()
    fast, inputs = compiled(model), [torch.randn(n, 3, 64, 64) for n in (1, 2)]
    expected = [model(x) for x in inputs]
    failures = []

    def run(order):
        try:
            with torch.no_grad():
                for i in order:
                    torch.testing.assert_close(fast(inputs[i]), expected[i], rtol=1e-3, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    fast(inputs[1])
    threads = [threading.Thread(target=run, args=(order,)) for order in ((0, 1, 1, 0), (1, 0, 0), (0, 0, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
