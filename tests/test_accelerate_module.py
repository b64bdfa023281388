"""The module that accelerate() returns: life with it, beside its original and inside larger models."""

import copy
import ctypes
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import import_torchvision
from model_parity import pictures, randomise_batch_norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import mobilenet_fast
from mobilenet_fast import AcceleratedModule, accelerate, load
from mobilenet_fast.accelerate import Report
from mobilenet_fast.accelerate import module as accelerate_module


def small_net(classes=5):
    """What the family is made of, in a few layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, classes),
    ).eval()


@pytest.fixture
def model():
    return randomise_batch_norm(small_net(), 0, (8, 3, 24, 24))


@pytest.fixture
def x():
    return pictures(2, 3, 24, 24, seed=1)


@pytest.fixture(scope="module")
def network():
    """A whole network, with what it was accelerated to: tests read both."""
    torch.manual_seed(0)
    net = randomise_batch_norm(import_torchvision().models.mobilenet_v3_small(num_classes=20), 0, (4, 3, 64, 64))
    example = pictures(2, 3, 64, 64, seed=1)
    return net, accelerate(net, example, strict=True), example


def same(fast, model, x):
    with torch.no_grad():
        y, expected = fast(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    return True


# The original


def test_the_original_is_untouched(model, x):
    state = copy.deepcopy(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with torch.no_grad():
        before = model(x)
        fast = accelerate(model, x)
        fast(x)
        assert torch.equal(model(x), before)
    assert [id(p) for p in model.parameters()] == identities
    assert not any(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    model.train()(x).sum().backward()  # it still trains
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(fast(x), fast(x)) and not fast.training


def test_weights_are_taken_at_the_call_and_again_by_refresh(model, x):
    fast = accelerate(model, x)
    before = fast(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(fast(x), before)
    captures = list(fast._captures)
    assert fast.refresh() is fast
    assert model.training, "refresh() leaves the original as it is"
    same(fast, copy.deepcopy(model).eval(), x)
    assert not torch.allclose(fast(x), before) and fast._captures == captures
    model[10] = nn.Linear(24, 7)
    with pytest.raises(ValueError, match="^accelerate: the original's parameters or buffers have changed shape"):
        fast.refresh()
    assert fast(x).shape == (2, 5)


def test_the_graph_is_captured_when_first_needed(model, x):
    lazy = accelerate(model)
    assert lazy._captures == []
    with pytest.raises(RuntimeError, match="^accelerate: nothing is planned yet"):
        lazy.explain()
    same(lazy, model, x)
    assert len(lazy._captures) == 1 and len(lazy.explain().rows) == 5
    for eager in (accelerate(model, x), accelerate(model, (x,)), accelerate(model, example_kwargs={"input": x})):
        assert len(eager._captures) == 1 and len(eager.explain().rows) == 5


def test_captured_under_any_mode(model, x):
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            fast = accelerate(model)
            fast(x.clone())
        same(fast, model, x)
        with mode():
            same(fast, model, x.clone())
    fast = accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fast(x)
    assert y.dtype == torch.float32 and torch.equal(y, fast(x))


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has one setting for all")
@pytest.mark.parametrize("precision", ("ieee", "tf32"))
def test_captured_under_any_precision_of_convolutions(model, x, precision):
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        conv.fp32_precision = precision
        assert accelerate(model)(x).shape == (len(x), 5)
        assert (conv.fp32_precision, rnn.fp32_precision) == (precision, before[1])
    finally:
        conv.fp32_precision, rnn.fp32_precision = before


def test_autocast_changes_nothing_in_aten_steps():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Softmax(1)).eval()
    x = torch.randn(2, 4, 8, 8)
    fast = accelerate(model, x)
    expected = fast(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), expected)


# A module among modules


class Larger(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.backbone(x).relu())


@pytest.fixture
def larger(model, x):
    torch.manual_seed(1)
    plain = Larger(model).eval()
    fast = copy.deepcopy(plain)
    fast.backbone = accelerate(fast.backbone, x)
    return plain, fast


def test_as_part_of_a_larger_model(larger, x):
    plain, fast = larger
    same(fast, plain, x)
    assert [name for name, _ in fast.named_parameters()] == ["head.weight", "head.bias"]
    assert [name for name, _ in fast.named_modules()] == ["", "backbone", "head"]
    assert list(fast.named_buffers()) == []
    fast.train()
    assert fast.training and not fast.backbone.training
    assert fast.to("cpu").float().to(memory_format=torch.channels_last).requires_grad_(False) is fast
    fast.eval().zero_grad()
    same(fast, plain, x)
    fast.apply(lambda module: None)
    assert "Sequential, isa=" in repr(fast)
    fast.requires_grad_(True)
    fast(x).sum().backward()  # the head trains on what the backbone gives
    assert fast.head.weight.grad is not None


def test_state_dict_is_the_originals(larger):
    plain, fast = larger
    expected, actual = plain.state_dict(), fast.state_dict()
    assert list(actual) == list(expected)
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)
    assert not any(value.requires_grad for value in actual.values())
    assert actual._metadata["backbone.1"] == expected._metadata["backbone.1"]


def test_load_state_dict(larger, x):
    plain, fast = larger
    other = Larger(randomise_batch_norm(small_net(), 7, (8, 3, 24, 24))).eval()
    nn.init.normal_(other.backbone[0].weight)
    captures = list(fast.backbone._captures)
    assert str(fast.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    same(fast, other, x)
    assert fast.backbone._captures == captures
    same(larger[0], plain, x)
    plain.load_state_dict(fast.state_dict())
    same(plain, other, x)
    fast.backbone.load_state_dict(small_net().state_dict())
    same(fast.backbone, small_net(), x)


def test_state_that_does_not_fit_changes_nothing(larger, x):
    plain, fast = larger
    before = fast(x)
    for wrong, message in (
        (small_net(classes=7).state_dict(), "size mismatch for 10.weight"),
        ({}, 'Missing key.*"backbone.0.weight"'),
        ({**plain.state_dict(), "backbone.more": torch.zeros(1)}, 'Unexpected key.*"backbone.more"'),
    ):
        if "10.weight" in wrong:
            wrong = {**plain.state_dict(), **{f"backbone.{key}": value for key, value in wrong.items()}}
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            fast.load_state_dict(wrong)
    assert torch.equal(fast(x), before)
    partial = {"backbone.10.bias": torch.ones(5), "backbone.more": torch.zeros(1)}
    result = fast.load_state_dict(partial, strict=False)
    assert "backbone.0.weight" in result.missing_keys and "backbone.10.bias" not in result.missing_keys
    assert result.unexpected_keys == ["backbone.more"]
    with torch.no_grad():
        plain.backbone[10].bias.fill_(1)
    same(fast, plain, x)


@pytest.mark.parametrize(
    "convert, asked",
    [
        (lambda m: m.half(), "torch.float16 on cpu"),
        (lambda m: m.bfloat16(), "torch.bfloat16 on cpu"),
        (lambda m: m.double(), "torch.float64 on cpu"),
        (lambda m: m.to("meta"), "torch.float32 on meta"),
    ],
)
def test_conversions_are_refused(model, x, convert, asked):
    fast = accelerate(model, x)
    before = fast(x)
    with pytest.raises(
        NotImplementedError, match=f"^accelerate: .* stays torch.float32 on cpu, asked for {asked};"
    ) as error:
        convert(fast)
    assert "\n" not in str(error.value)
    assert torch.equal(fast(x), before)


def test_a_float64_model_stays_float64(model, x):
    fast = accelerate(model.double(), x.double()).double()
    assert fast(x.double()).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="stays torch.float64 on cpu, asked for torch.float32"):
        fast.float()


def test_export_of_a_larger_model_sees_plain_operations(larger, x):
    plain, fast = larger
    program = torch.export.export(fast, (x,))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operations and all(name.startswith("aten.") for name in operations)
    torch.testing.assert_close(program.module()(x), plain(x))


def test_trace_of_a_larger_model_sees_plain_operations(larger, x):
    plain, fast = larger
    with torch.no_grad():
        traced = torch.jit.trace(fast, (x,))
        other = pictures(2, 3, 24, 24, seed=3)
        torch.testing.assert_close(traced(other), plain(other))


def test_compiling_a_larger_model(larger, x):
    plain, fast = larger
    with torch.no_grad():
        compiled = torch.compile(fast, backend="aot_eager")
        for batch in (x, pictures(3, 3, 24, 24, seed=3)):
            torch.testing.assert_close(compiled(batch), plain(batch), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_accelerating_a_model_with_compiled_parts(model, x):
    def backend(graph, examples):
        def run(*inputs):
            # As inductor's code does, which would crash on tensors that have no memory.
            assert not any(isinstance(value, FakeTensor) for value in inputs)
            return graph(*inputs)

        return run

    relu = torch.compile(torch.relu, backend=backend)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return relu(self.net(x))

    compiled = torch.compile(model, backend=backend)
    for module in (compiled, nn.Sequential(compiled).eval(), Calls().eval()):
        same(module, module, x)  # compiles it
        fast = accelerate(module, x, strict=True)
        assert same(fast, module, x) and same(fast, module, x[:1]) and len(fast._captures) == 1
    torch._dynamo.reset()


def test_accelerating_a_model_that_holds_an_accelerated_one(larger, x):
    plain, fast = larger
    twice = accelerate(fast, x, strict=True)
    same(twice, plain, x)
    assert list(twice.state_dict()) == list(plain.state_dict())


def test_transforms_see_plain_operations(model, x):
    def forward_mode(net):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))).tangent

    fast = accelerate(model, x)
    for transform in (
        lambda net: torch.func.vmap(net)(x[:, None]),
        lambda net: torch.func.grad(lambda z: net(z).sum())(x),
        lambda net: torch.func.jvp(net, (x,), (x,)),
        forward_mode,
    ):
        torch.testing.assert_close(transform(fast), transform(model))
    same(fast, model, x)


def test_fake_tensors_and_modes_see_plain_operations(larger, x):
    from torch.utils.flop_counter import FlopCounterMode

    plain, fast = larger
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = torch.empty(x.shape)
        assert fast(fake).shape == plain(x).shape
    with pytest.raises(TypeError, match="^accelerate: input must be a plain tensor, got FakeTensor$"):
        fast.backbone(fake)
    counts = []
    for model in (plain, fast):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    same(fast, plain, x)


def test_a_usual_call_is_told_from_others(model, x):
    """run_usual() gives None wherever forward() has something to decide; results are the same both ways."""
    fast = accelerate(model, (x,))

    def usual(tensor, global_hooks=()):
        return fast._last.plan.run_usual(tensor, vars(fast), global_hooks)

    def runs(*args):
        return usual(*args) is not None

    with torch.no_grad():
        assert torch.equal(usual(x), fast.forward(x)) and torch.equal(fast(x), fast.forward(x))
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(usual(last), fast.forward(last))
        assert runs(x[:, :, :, :].requires_grad_())
    assert runs(x) and not runs(x.clone().requires_grad_())
    assert not any(map(runs, (x[:1], x[0], x.double(), x.to("meta"), x.to_sparse(), nn.Parameter(x), None, 3, [x])))
    assert not runs(torch._neg_view(x)) and torch.equal(fast(torch._neg_view(x)), fast(-x))
    assert not runs(x, ({}, {1: print}))
    with torch.autocast("cpu"):
        assert not runs(x)
    with FakeTensorMode():
        assert not runs(x)
    with torch.overrides.BaseTorchFunctionMode():
        assert not runs(x)
    with forward_ad.dual_level():
        assert not runs(forward_ad.make_dual(x, x))
    transformed = []

    def scaled(w):
        transformed.append(runs(x))
        return (fast(x) * w).sum()

    gradient = torch.func.grad(scaled)(torch.ones(()))
    assert transformed == [False]
    torch.testing.assert_close(gradient, model(x).sum().detach())
    with torch.inference_mode():
        assert runs(x) and runs(x.clone()) and fast(x).is_inference()


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
def test_hooks_see_every_call(model, x, everywhere):
    fast = accelerate(model, (x,))
    expected, seen = fast(x), []
    registry = nn.modules.module
    owner = (registry.register_module_forward_hook, registry.register_module_forward_pre_hook) if everywhere else None
    after, before = owner or (fast.register_forward_hook, fast.register_forward_pre_hook)
    handles = [after(lambda m, args, out: seen.append(out)), before(lambda m, args: seen.append(args))]
    try:
        assert torch.equal(fast(x), expected) and fast(x) is seen[-1] and len(seen) == 4
    finally:
        for handle in handles:
            handle.remove()
    fast(x)
    assert len(seen) == 4


def test_compile_in_place(model, x):
    fast = accelerate(model, (x,))
    expected = fast(x)
    fast.compile(backend="eager")
    assert torch.equal(fast(x), expected) and fast._last.plan.run_usual(x, vars(fast), ()) is None


class Scaled(nn.Module):
    def forward(self, x=None, other=None, scale=1.0):
        x = x[0] if isinstance(x, list) else x
        return (torch.relu(x) if other is None else torch.sigmoid(other)).mean((2, 3)) * scale


def test_a_usual_call_is_told_from_others_of_the_same_shape(x):
    model = Scaled().eval()
    fast = accelerate(model)
    for args, kwargs in [((x, None, 2.0), {}), ((), {"other": x}), (([x],), {}), ((x,), {"scale": 3.0})]:
        for _ in range(2):
            torch.testing.assert_close(fast(*args, **kwargs), model(*args, **kwargs))
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))


def test_another_forward_is_called(model, x):
    class Mine(AcceleratedModule):
        def forward(self, x):
            return super().forward(x) + 1

    fast, mine = accelerate(model, (x,)), Mine(model)
    expected = fast(x)
    for _ in range(3):
        assert torch.equal(mine(x), expected + 1)
    fast.forward = lambda x: "patched"
    assert fast(x) == "patched"
    del fast.forward
    seen = []
    fast._forward_hooks = type(fast._forward_hooks)()
    fast.register_forward_hook(lambda m, args, out: seen.append(out))
    assert torch.equal(fast(x), expected) and len(seen) == 1


def test_chance_is_left_alone(model, x):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    accelerate(model, x)(x)
    assert torch.equal(torch.rand(3), expected)


# Copies and files


def roundtrip(fast, path):
    fast.save(path)
    return load(path)


def torch_roundtrip(fast, path):
    buffer = io.BytesIO()
    torch.save({"net": fast}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["net"]


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda fast, path: copy.deepcopy(fast),
        lambda fast, path: copy.copy(fast),
        lambda fast, path: pickle.loads(pickle.dumps(fast)),
        torch_roundtrip,
        roundtrip,
        lambda fast, path: roundtrip(fast, str(path)),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "save and load", "path as text"],
)
def test_copies_and_files(network, tmp_path, duplicate):
    net, fast, x = network
    twin = duplicate(fast, tmp_path / "net.pt")
    assert type(twin) is AcceleratedModule and twin is not fast and not twin.training
    assert twin.strict and len(twin._plans) == 0
    assert torch.equal(twin(x), fast(x)) and str(twin.explain()) == str(fast.explain())
    assert list(twin.state_dict()) == list(net.state_dict())
    with pytest.raises(RuntimeError, match="^accelerate: a copy has no original to refresh from"):
        twin.refresh()


def test_copies_are_independent(model, x):
    fast = accelerate(model, x)
    before = fast(x)
    twin = copy.deepcopy(fast)
    twin.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    assert torch.equal(fast(x), before) and not torch.equal(twin(x), before)


def test_a_file_is_read_by_another_process(network, tmp_path):
    _, fast, x = network
    torch.save((x, fast(x)), tmp_path / "expected.pt")
    fast.save(tmp_path / "net.pt")
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch, helpers; helpers.import_torchvision()
import mobilenet_fast
x, y = torch.load({str(tmp_path / "expected.pt")!r})
print(torch.equal(mobilenet_fast.load({str(tmp_path / "net.pt")!r})(x), y))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True"], run.stderr


def test_load_wants_an_accelerated_module(model, tmp_path):
    torch.save(model, tmp_path / "plain.pt")
    with pytest.raises(TypeError, match="^load: '.*plain.pt' holds no accelerated module, got Sequential"):
        load(tmp_path / "plain.pt")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")


# What is refused


def test_models_that_are_refused(model, x):
    with pytest.raises(TypeError, match="^accelerate: model must be an nn.Module, got function$"):
        accelerate(lambda x: x)
    with pytest.raises(ValueError, match="^accelerate: model must be in evaluation mode, but it is in training mode"):
        accelerate(copy.deepcopy(model).train())
    partly = copy.deepcopy(model)
    partly[4].train()
    with pytest.raises(ValueError, match="but its '4' is in training mode; call eval()"):
        accelerate(partly)
    with pytest.raises(
        ValueError, match="^accelerate: model must be on the CPU or a CUDA device, got '0.weight' on meta$"
    ):
        accelerate(copy.deepcopy(model).to("meta"))
    scripted = torch.jit.script(model)
    for torchscript in (scripted, torch.jit.trace(model, x)):
        with pytest.raises(NotImplementedError, match="^accelerate: model must be Python, but it is TorchScript;"):
            accelerate(torchscript, x)
    with pytest.raises(NotImplementedError, match="but its '1' is TorchScript; accelerate what that was made from$"):
        accelerate(nn.Sequential(nn.Identity(), scripted).eval())
    uncopiable = copy.deepcopy(model)
    uncopiable.computed = uncopiable[0].weight * 2
    with pytest.raises(ValueError, match="^accelerate: Sequential cannot be copied: Only Tensors created explicitly"):
        accelerate(uncopiable)
    groups = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()).eval()
    message = "^accelerate: strict=True allows no step through ATen, got conv2d: a grouped convolution"
    with pytest.raises(NotImplementedError, match=message):
        accelerate(groups, torch.zeros(1, 4, 5, 5), strict=True)
    fast = accelerate(groups, strict=True)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=message):
            fast(torch.zeros(1, 4, 5, 5))
    assert fast._plans == {} and fast._captures == []


def test_a_model_that_was_exported_before(model, x):
    exported = torch.export.export(model, (x,)).module()
    assert exported.training  # a flag that nothing reads, and eval() is refused
    fast = accelerate(exported, x, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast.refresh()(x), model(x))


def test_profile_times_and_counts_each_step(x, threads):
    threads(1)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, 2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).eval()
    picture = torch.randn(3, 8, 13, 15)
    model(picture)
    profile = accelerate(model).profile(picture, runs=3)
    rows = {row.operation: row for row in profile.rows}
    assert rows["conv2d + relu"].macs == 3 * 6 * 7 * 16 * 8 * 9
    assert rows["depthwise_conv2d"].macs == 3 * 4 * 5 * 16 * 9
    assert rows["linear"].macs == 3 * 64 * 5 and rows["pool2d"].macs == 0
    assert rows["pool2d"].bytes == 4 * 3 * 16 * (4 * 5 + 2 * 2)
    assert len(profile.seconds) == len(profile.rows) and all(s > 0 for s in profile.seconds)
    assert profile.total_seconds > 0 and profile.peak_gflops > 0 and profile.threads == 1
    lines = str(profile).splitlines()
    assert len(lines) == len(profile.rows) + 2 and lines[0].split()[:3] == ["step", "operation", "output"]
    assert any("█" in line for line in lines[1:-1])
    with pytest.raises(ValueError, match="^accelerate: runs must be at least 1, got 0$"):
        accelerate(model).profile(picture, runs=0)
    block = accelerate(mobilenet_fast.models.mobilenet_v2().eval()).profile(torch.randn(1, 3, 224, 224), runs=1)
    assert sum(row.macs for row in block.rows) == 300_774_272  # the paper's 300 million, fused blocks included


BAD_INPUTS = {
    "dtype": (lambda x: x.double(), TypeError, "input must be torch.float32, got torch.float64"),
    "half": (lambda x: x.half(), TypeError, "input must be torch.float32, got torch.float16"),
    "integers": (lambda x: x.long(), TypeError, "input must be torch.float32, got torch.int64"),
    "rank": (lambda x: x[0, 0], ValueError, "input must have 4 dimensions, got shape (24, 24)"),
    "channels": (lambda x: x[:, :2], ValueError, "input must be (N, 3, H, W), got (2, 2, 24, 24)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), ValueError, "input must be (N, 3, H, W), got (2, 24, 24, 3)"),
    "device": (lambda x: x.to("meta"), ValueError, "input must be on the CPU, got meta"),
    "layout": (lambda x: x.to_sparse(), ValueError, "input must be strided, got torch.sparse_coo"),
    "gradient": (lambda x: x.clone().requires_grad_(), RuntimeError, "gradients do not flow through an accelerated"),
    "numpy": (lambda x: x.numpy(), TypeError, "inputs must be tensors, numbers or strings, got ndarray"),
    "nothing": (lambda x: None, (TypeError, ValueError), ""),
    "too small": (lambda x: x[:, :, :0], ValueError, ""),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_inputs_that_are_refused(model, x, kind, first):
    spoil, error_type, message = BAD_INPUTS[kind]
    fast = accelerate(model) if first else accelerate(model, x)
    plans, captures, state = dict(fast._plans), list(fast._captures), copy.deepcopy(fast.state_dict())
    before = None if first else fast.explain()
    with pytest.raises(error_type) as error:
        fast(spoil(x))
    text = str(error.value)
    assert text.startswith("accelerate: ") and "\n" not in text, text
    if not first or kind in ("dtype", "half", "integers", "device", "layout", "gradient", "numpy"):
        assert message in text
    assert fast._plans == plans and fast._captures == captures
    torch.testing.assert_close(fast.state_dict(), state, rtol=0, atol=0)
    if not first:
        assert fast.explain() is before
    same(fast, model, x)


def test_calls_of_another_structure_are_refused(model, x):
    fast = accelerate(model, x)
    for call in (lambda: fast(), lambda: fast(x, x), lambda: fast(x, more=x), lambda: fast(more=x)):
        with pytest.raises(
            (TypeError, ValueError), match="^accelerate: the model does not take these inputs: .*forward"
        ):
            call()
    same(fast, model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(input=x), fast(x))


def test_gradients_may_be_wanted_elsewhere(model, x):
    fast = accelerate(model, x)
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(fast(x.clone().requires_grad_()), expected)
    assert not fast(x).requires_grad


# The report


def test_report(network):
    _, fast, _ = network
    report = fast.explain()
    assert isinstance(report, Report)
    assert report.isa == mobilenet_fast.cpu_isa() and report.fallbacks == ()
    first = report.rows[0]
    assert (first.operation, first.shape, first.fallback) == ("conv2d + batch_norm + hardswish", (2, 16, 32, 32), "")
    assert first.kernel
    text = str(report).splitlines()
    assert len(text) == len(report.rows) + 2
    assert text[0].split() == ["step", "operation", "output", "kernel"]
    assert "2×16×32×32" in text[1]
    assert text[-1].startswith(f"{len(report.rows)} of {len(report.rows)} steps on {report.isa} kernels, arena ")


def test_report_names_what_fell_back():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 16, 3, groups=8)).eval()
    report = accelerate(model, torch.zeros(1, 4, 12, 12)).explain()
    assert [row.fallback for row in report.fallbacks] == [
        "a grouped convolution (2 groups) has no kernel",
        "no kernel for aten.tanh.default on float32",
        "a depthwise convolution with a channel multiplier has no step yet",
    ]
    assert "ATen: a grouped convolution (2 groups) has no kernel" in str(report)
    assert str(report).endswith(f"0 of 3 steps on {report.isa} kernels, arena 0.0 MiB")


# Plans


def test_plans_and_captures_that_are_kept(model, x, monkeypatch):
    monkeypatch.setattr(accelerate_module, "_MAX_PLANS", 3)
    fast = accelerate(model)
    sizes = [16, 20, 24]
    for size in sizes:
        same(fast, model, pictures(1, 3, size, size))
    packed = len(fast._packed)
    assert len(fast._plans) == len(fast._captures) == 3
    same(fast, model, pictures(1, 3, 16, 16))  # used again: 20 is the oldest now
    for size in (28, 32):
        same(fast, model, pictures(1, 3, size, size))
    assert {key[1][0][2] for key in fast._plans} == {16, 28, 32} and len(fast._captures) == 3
    assert len(fast._packed) == packed
    same(fast, model, pictures(1, 3, 20, 20))


def test_plans_of_all_shapes_share_their_memory(model):
    fast, alone = accelerate(model), accelerate(model)
    for size in (16, 20, 64, 24):
        for batch in (1, 5, 2):
            same(fast, model, pictures(batch, 3, size, size))
    for batch in (1, 5, 2):
        same(alone, model, pictures(batch, 3, 64, 64))
    assert 0 < fast._packed.arenas.idle_bytes == alone._packed.arenas.idle_bytes


def test_weights_computed_for_a_plan_go_with_it(monkeypatch):
    monkeypatch.setattr(accelerate_module, "_MAX_PLANS", 1)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))).eval()
    fast = accelerate(model)
    for size in (8, 9, 10):
        same(fast, model, pictures(1, 3, size, size))
        gc.collect()
        assert len(fast._packed) == 1


def test_memory_is_freed(model, x):
    fast = accelerate(model, x)
    fast(x)
    entry = next(iter(fast._plans.values()))
    traces = [weakref.ref(t) for t in (fast, entry.plan, entry.capture, fast._model, *entry.plan.weights)]
    del fast, entry
    gc.collect()
    assert [trace() for trace in traces] == [None] * len(traces)


def test_many_calls_hold_no_memory(model, x):
    fast = accelerate(model, x)

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    big = pictures(8, 3, 96, 96)
    with torch.no_grad():
        for _ in range(20):
            fast(big)
        before = resident()
        for _ in range(300):
            fast(big)
    assert resident() - before < 8 * 2**20


# Threads


def test_results_do_not_depend_on_the_number_of_threads(network, threads):
    _, fast, x = network
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(fast(x))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="needs Linux's account of threads")
def test_set_num_threads_is_obeyed(threads):
    model = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 3, padding=1)).eval()
    x = torch.randn(2, 64, 48, 48)
    fast = accelerate(model, x, strict=True)

    def nanoseconds():
        return {path: int((path / "schedstat").read_text().split()[0]) for path in Path("/proc/self/task").iterdir()}

    for count in (1, 2, 3, 1):
        threads(count)
        fast(x)  # starts the threads
        before = nanoseconds()
        for _ in range(10):
            fast(x)
        spent = sorted((after - before.get(path, 0) for path, after in nanoseconds().items()), reverse=True)
        working = [time for time in spent if time > 0.1 * spent[0]]
        assert len(working) == count, spent[:5]


@pytest.mark.parametrize("count", [1, 2])
def test_calls_at_once(network, threads, count):
    net, _, _ = network
    fast = accelerate(net)
    threads(count)
    shapes = [(1, 64, 64), (3, 64, 64), (1, 48, 80), (2, 33, 65)]
    inputs = [[pictures(n, 3, h, w, seed=s) for s in range(3)] for n, h, w in shapes]
    with torch.no_grad():
        expected = [[net(x) for x in batch] for batch in inputs]
    start = threading.Barrier(4)

    def worker(offset):
        torch.set_num_threads(count)
        start.wait()
        for step in range(8):
            i = (offset + step // 2) % 4
            for x, y in zip(inputs[i], expected[i], strict=True):
                torch.testing.assert_close(fast(x), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        return True

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        assert all(pool.map(worker, range(4)))
    assert len(fast._plans) == 4 and len(fast._captures) == 3


def test_models_accelerated_at_once(x):
    models = [small_net(classes) for classes in (3, 4, 5, 6)]
    start = threading.Barrier(4)

    def worker(model):
        start.wait()
        fast = accelerate(model)
        with torch.no_grad():
            return torch.allclose(fast(x), model(x), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(worker, models)) == [True] * 4


def test_refresh_while_others_call(model, x):
    fast = accelerate(model, x)
    before = fast(x)
    with torch.no_grad():
        model[10].bias += 1
    failures, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            y = fast(x)
            if not any(torch.allclose(y, before + shift, atol=1e-5) for shift in (0, 1)):
                failures.append(y)

    workers = [threading.Thread(target=call) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(20):
        fast.refresh()
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures and torch.allclose(fast(x), before + 1, atol=1e-5)


def test_the_gil_is_released(threads):
    threads(1)
    model = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.Conv2d(256, 64, 3, padding=1)).eval()
    x = torch.randn(4, 64, 64, 64)
    fast = accelerate(model, x)
    # Longer than the test: the other thread gets the GIL when it is released, and not otherwise.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    progress, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            progress[0] += 1
            time.sleep(0)  # gives the GIL back

    other = threading.Thread(target=count)
    try:
        other.start()
        time.sleep(0.01)
        ticks = []
        for _ in range(5):
            before = progress[0]
            fast(x)
            ticks.append(progress[0] - before)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert min(ticks) > 100, ticks


REGION = """
#include <omp.h>
void in_region(int threads, void (*call)(int)) {
#pragma omp parallel num_threads(threads)
  call(omp_get_thread_num());
}
"""


def test_inside_a_parallel_region(network, tmp_path, threads):
    _, fast, x = network
    threads(2)
    expected = fast(x)
    (tmp_path / "region.c").write_text(REGION)
    library = tmp_path / "region.so"
    try:
        subprocess.run(
            ["cc", "-fopenmp", "-shared", "-fPIC", "-o", library, tmp_path / "region.c"],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a C compiler with OpenMP: {error}")
    results = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def call(index):
        results[index] = [fast(x) for _ in range(3)]

    ctypes.CDLL(str(library)).in_region(3, call)
    assert sorted(results) == [0, 1, 2]
    assert all(torch.equal(y, expected) for ys in results.values() for y in ys)


def test_numbers_of_numpy_are_no_inputs(model):
    with pytest.raises(TypeError, match="^accelerate: inputs must be tensors, numbers or strings, got ndarray$"):
        accelerate(model, np.zeros((1, 3, 24, 24), dtype=np.float32))
