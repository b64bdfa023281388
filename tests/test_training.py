"""Blocks in training: every kernel of the backward pass by instruction set and dtype against float64 autograd of the
plain modules, and what trainers do with a network."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, case_id, import_torchvision, pairwise
from tolerance import assert_close
from torch import nn

import mobilenet_fast
from mobilenet_fast import _C
from mobilenet_fast import nn as fast
from mobilenet_fast.nn import training
from mobilenet_fast.nn.dispatch import ACTIVATION_LAYERS

DTYPES = (torch.float32, torch.float64)
# Largest difference allowed, in units of the last place of the largest element, or four times what PyTorch's own layers
# err in float32 (in its units of the last place), if that is more: norms of few values stretch any rounding. Gradients
# are measured by the largest of all: of a norm's bias before another norm nothing is left but rounding.
UNITS = 64


@pytest.fixture(autouse=True)
def same_weights():
    """Of each layer's own initialisation, in every run: how far rounding is stretched depends on them."""
    torch.manual_seed(1)


@pytest.fixture
def on_isa(isa):
    _C.override_isa(isa)
    yield isa
    _C.override_isa("")


def randomised(module, seed=0):
    """Batch norms as a trained network has them; not what they are made with, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high, generator=generator)
            if norm.running_mean is not None:
                norm.running_mean.uniform_(-1, 1, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
    return module


def inverted_residual(channels=8, hidden=24, out=16, kernel=3, stride=1, activation="relu", squeeze=True, **norm):
    layer = ACTIVATION_LAYERS[activation]
    padding = norm.pop("padding", (kernel - 1) // 2)
    dilation = norm.pop("dilation", 1)
    layers = [
        *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden, **norm), layer()),
        nn.Conv2d(hidden, hidden, kernel, stride, padding, dilation, hidden, bias=False),
        *(nn.BatchNorm2d(hidden, **norm), layer()),
    ]
    if squeeze:
        layers.append(fast.SqueezeExcitation(hidden, 6, "relu", "hardsigmoid"))
    layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out, **norm)]
    return randomised(fast.FusedSequential(*layers))


def image(n=2, channels=8, height=9, width=10, dtype=torch.float32, seed=0):
    x = torch.randn((n, channels, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(memory_format=torch.channels_last)


def step(module, x, seed=1):
    """Output, gradients and buffers after a forward and a backward pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    y.backward(grad)
    result = {"output": y.detach(), "input": x.grad}
    result |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    result |= {f"buffer {name}": b for name, b in module.named_buffers() if b.is_floating_point()}
    return result


def plain(module, monkeypatch):
    monkeypatch.setattr(training.TrainingBlock, "_takes", lambda self, x, dtype: False)
    monkeypatch.setattr(fast.fusion.Chained, "forward", lambda self, x: self.plain_forward(x))
    return module


def check(module, x, monkeypatch, blocks=None):
    """A step of the module against one of its plain layers in float64, and against theirs in its own dtype."""
    stock, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    calls = []
    with monkeypatch.context() as patch:
        apply = training._Block.apply
        patch.setattr(training._Block, "apply", lambda *a: (calls.append(a[0]), apply(*a))[1])
        actual = step(module.to(x.dtype), x)
    assert len(calls) == blocks if blocks is not None else calls
    with monkeypatch.context() as patch:
        expected, eager = step(plain(exact, patch), x.double()), step(plain(stock.float(), patch), x.float())
    assert actual.keys() == expected.keys()
    of_values = {name for name in expected if name == "output" or name.startswith("buffer")}
    steepest = max(value.abs().max() for name, value in expected.items() if name not in of_values)
    for name, value in expected.items():
        size = value.abs().max() if name in of_values else steepest
        eager_units = (eager[name] - value).abs().max() / torch.finfo(torch.float32).eps
        allowed = torch.finfo(x.dtype).eps * max(UNITS * size, 4 * eager_units)
        error = (actual[name].double() - value).abs().max()
        assert error <= allowed, f"{name}: {error / size:.1e} of the largest, allowed {allowed / size:.1e}"


CASES = pairwise(
    lambda kernel, padding, dilation, size, stride, **case: all(
        n + 2 * (dilation * (kernel - 1) // 2 if padding is None else padding) > dilation * (kernel - 1) for n in size
    ),
    kernel=(3, 5, 7, 4, 1),
    stride=(1, 2, 3),
    dilation=(1, 2),
    padding=(None, 0, 3),
    activation=ACTIVATIONS,
    squeeze=(False, True),
    channels=(3, 8, 17),
    hidden=(2, 16, 37, 130),
    size=((9, 10), (7, 7), (17, 33), (16, 15)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_blocks(case, dtype, on_isa, monkeypatch):
    case = dict(case)
    height, width = case.pop("size")
    if case["padding"] is None:
        case["padding"] = case["dilation"] * (case["kernel"] - 1) // 2
    check(inverted_residual(**case), image(3, case["channels"], height, width, dtype), monkeypatch, blocks=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 70, 112, 56), (40, 8, 5, 5), (2, 300, 30, 30)), ids=str)
def test_work_that_is_cut(shape, dtype, on_isa, monkeypatch):
    """Bands of rows, slices of channels, several images a block, more images than groups."""
    n, hidden, height, width = shape
    for stride, kernel in ((1, 5), (2, 3)):
        module = inverted_residual(hidden=hidden, kernel=kernel, stride=stride, activation="hardswish", squeeze=n == 2)
        check(module, image(n, 8, height, width, dtype), monkeypatch, blocks=1)


def test_infinities_reach_what_they_meet(on_isa):
    """And no other tap or input, as at a border, where a gradient of zero would spread them."""
    for kernel, stride in ((3, 1), (5, 1), (5, 2), (4, 1)):
        x, weight = image(1, 16, 9, 9), torch.randn(16, 1, kernel, kernel)
        x[0, 3, 4, 0] = weight[2, 0, 0, 0] = float("inf")
        geometry = (stride, stride), (kernel // 2,) * 2, (1, 1)
        grad = torch.ones_like(F.conv2d(x, weight, None, *geometry, 16))
        expected = torch.ops.aten.convolution_backward(
            grad.double(), x.double(), weight.double(), None, *geometry, False, [0, 0], 16, [True, True, False]
        )
        at_y = grad, None, None, "none", None, None, None
        found = torch.ops.mobilenet_fast.depthwise_conv2d_gradients(
            *at_y, x, None, "none", None, weight, *geometry, True, True
        )
        for i in range(2):
            assert torch.equal(found[i].isfinite(), expected[i].isfinite())


DEPTHWISE = pairwise(
    lambda kernel, padding, dilation, size, **case: all(n + 2 * padding > dilation * (kernel - 1) for n in size),
    kernel=(3, 5, 7, 4),
    stride=(1, 2, 3),
    dilation=(1, 2),
    padding=(0, 1, 2, 3, 9),
    channels=(3, 16, 37),
    size=((1, 3), (5, 2), (7, 7), (14, 15), (9, 20)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE, ids=case_id)
def test_depthwise_gradients(case, dtype, on_isa):
    check_depthwise_gradients(3, **case, dtype=dtype)


def test_depthwise_gradients_that_go_past_the_caches(on_isa):
    for stride in (1, 2):
        check_depthwise_gradients(1, 3, stride, 1, 1, 64, (224, 224), torch.float32)


def check_depthwise_gradients(n, kernel, stride, dilation, padding, channels, size, dtype):
    """Of a convolution alone, both and each of them."""
    geometry = (stride, stride), (padding, padding), (dilation, dilation)
    x = image(n, channels, *size, dtype)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype)
    y = F.conv2d(x, weight, None, *geometry, channels)
    grad = image(*y.shape, dtype, seed=1)

    def exact(*operands):
        wanted = (False, [0, 0], channels, [True, True, False])
        return torch.ops.aten.convolution_backward(*(each.double() for each in operands), None, *geometry, *wanted)

    expected, scale = exact(grad, x, weight), exact(grad.abs(), x.abs(), weight.abs())
    terms = kernel**2, y.numel() // channels
    for wanted in ((True, True), (True, False), (False, True)):
        at_y = grad, None, None, "none", None, None, None
        found = torch.ops.mobilenet_fast.depthwise_conv2d_gradients(
            *at_y, x, None, "none", None, weight, *geometry, *wanted
        )
        for i in range(2):
            if wanted[i]:
                assert_close(found[i], expected[i], terms[i], scale[i])


def test_an_activation_in_place_on_what_others_read():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            filters = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
            self.body = nn.Sequential(nn.ReLU(inplace=True), filters, nn.BatchNorm2d(8))

        def forward(self, x):
            return x + self.body(x)

    stock = nn.Sequential(nn.Conv2d(8, 8, 1), Residual())
    ours = mobilenet_fast.replace_layers(copy.deepcopy(stock))
    x = image()
    torch.testing.assert_close(ours(x), stock(x))
    (reason,) = [row.reason for row in mobilenet_fast.training_report(ours) if row.modules == ("1.body.0",)]
    assert reason == "it writes to its input, and there is no convolution or norm before it"


@pytest.mark.parametrize("shape", ((4, 1, 28, 28), (4, 3, 1, 1)), ids=str)
def test_contiguous_images_that_channels_last_fits_too(shape):
    channels = shape[1]
    layers = nn.Conv2d(channels, 16, 3, 1, 2, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, bias=False)
    stock = nn.Sequential(*layers, nn.BatchNorm2d(16)).train()
    x = torch.randn(shape)
    expected = stock(x)
    assert mobilenet_fast.replace_layers(stock)(x).stride() == expected.stride()


def test_hooks_on_saved_tensors_may_change_their_layout():
    module, x = inverted_residual(), image().requires_grad_()
    module(x).sum().backward()
    expected, x.grad = x.grad, None
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        y = module(x)
    y.sum().backward()
    assert torch.equal(x.grad, expected)


def test_own_activations_are_named():
    class Own(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.7 * x)

    layers = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), Own(), nn.Conv2d(8, 8, 1, bias=False), nn.Mish()
    model = mobilenet_fast.replace_layers(nn.Sequential(*layers))
    reasons = {row.modules: row.reason for row in mobilenet_fast.training_report(model)}
    assert reasons["2",] == "Own is not known" and reasons["4",] == "Mish is not known"


def test_blocks_take_stock_names():
    block = import_torchvision().models.mobilenet_v2().features[1].eval()
    x = image(1, 32, 7, 7)
    expected = block(x=x)
    torch.testing.assert_close(mobilenet_fast.replace_layers(block)(x=x), expected)


def test_images_that_go_past_the_caches(on_isa, monkeypatch):
    """Gradients before the norms of 12.8 MB each, written by both kinds of convolution."""
    module = inverted_residual(hidden=64, activation="hardswish", squeeze=False)
    check(module, image(1, 8, 224, 224), monkeypatch, blocks=1)


@pytest.mark.parametrize("norm", ({"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}))
def test_batch_norms_of_every_kind(norm, monkeypatch):
    module = inverted_residual(**norm)
    check(module, image(), monkeypatch)
    check(module, image(seed=5), monkeypatch)  # a second step, with the statistics of the first
    tracked = [b for name, b in module.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == 2 for count in tracked)


def _with_a_parameter_for_a_statistic(norm):
    mean = norm._buffers.pop("running_mean")
    norm.running_mean = nn.Parameter(mean, requires_grad=False)


def _with_inference_statistics(norm):
    with torch.inference_mode():
        norm.running_mean = norm.running_mean.clone()


def _negated(name):
    def change(norm):
        tensor = torch._neg_view(getattr(norm, name).detach())
        setattr(norm, name, tensor if name.startswith("running") else nn.Parameter(tensor))

    return change


@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize(
    "change",
    (
        _with_a_parameter_for_a_statistic,
        _with_inference_statistics,
        *map(_negated, ("weight", "bias", "running_mean")),
        lambda norm: setattr(norm, "running_var", None),
        lambda norm: (setattr(norm, "running_var", None), setattr(norm, "running_mean", None)),
        lambda norm: setattr(norm, "running_mean", torch.zeros(5)),
        lambda norm: setattr(norm, "eps", 0.0),
    ),
)
def test_norms_that_somebody_changed_are_as_in_pytorch(change, train, monkeypatch):
    """The same numbers and counts, or the same error, before which nothing changed."""
    ours = inverted_residual(squeeze=False).train(train)
    stock, results = copy.deepcopy(ours), []
    for module, patched in ((ours, False), (stock, True)):
        change(module[1])
        before = {name: None if b is None else b.clone() for name, b in module[1]._buffers.items()}
        with monkeypatch.context() as patch:
            if patched:
                plain(module, patch)
            try:
                results.append(step(module, image()) | {"count": module[1].num_batches_tracked})
            except Exception as error:
                results.append({"error": type(error)})
                for name in ("running_mean", "running_var"):
                    after = module[1]._buffers.get(name)
                    assert (after is None) == (before.get(name) is None)
                    assert after is None or torch.equal(after, before[name])
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        if name == "error":
            assert results[0][name] is value
        else:
            torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_used_alone_as_well():
    """Its statistics may have been kept for another gradient, which their moving on doesn't spoil."""
    module, x = inverted_residual(squeeze=False), image()
    alone = module[1](x.repeat(1, 3, 1, 1))
    (module(x).sum() + alone.sum()).backward()
    assert module[1].num_batches_tracked == 2


def test_a_mean_far_from_zero(monkeypatch):
    x = image(dtype=torch.float32) + 1000
    check(inverted_residual(squeeze=False), x, monkeypatch)


@pytest.mark.parametrize("frozen", ("norms", "weights", "first norm", "input"))
def test_frozen_parts(frozen, monkeypatch):
    module, x = inverted_residual(), image()
    if frozen == "norms":
        for norm in module:
            norm.train(not isinstance(norm, nn.BatchNorm2d))
    elif frozen == "weights":
        module.requires_grad_(False)
        module[4].weight.requires_grad_()
    elif frozen == "first norm":
        module[1].eval().requires_grad_(False)
    if frozen != "input":
        return check(module, x, monkeypatch)
    same = copy.deepcopy(module)
    module(x).sum().backward()
    same(x.requires_grad_()).sum().backward()
    for a, b in zip(module.parameters(), same.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_layouts(layout, monkeypatch):
    module, x = inverted_residual(), image().contiguous(memory_format=layout)
    expected = copy.deepcopy(module)
    y = module(x.requires_grad_())
    with monkeypatch.context() as patch:
        assert y.stride() == plain(expected, patch)(x).stride()
    check(module, image()[:, :, ::2, 1:], monkeypatch)


@pytest.mark.parametrize(
    ("make", "shape"),
    (
        (lambda: inverted_residual(hidden=70, kernel=5), (9, 8, 40, 40)),
        (lambda: inverted_residual(hidden=70, kernel=5), (2, 8, 9, 9)),
        (lambda: inverted_residual(640, 960, 640, squeeze=False), (8, 640, 6, 6)),
        (lambda: stem(channels=8, pool=(3, 2)), (9, 8, 40, 40)),
    ),
)
def test_results_do_not_depend_on_threads(make, shape):
    """More of them than groups that the pixels are summed in, too."""
    module, x = make(), image(*shape)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 9, 14, 1):
            torch.set_num_threads(count)
            results.append(step(copy.deepcopy(module), x))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("activation", ("none", "silu", "sigmoid"))
@pytest.mark.parametrize("squeeze", (False, True))
def test_gradcheck(activation, squeeze):
    module = inverted_residual(2, 4, 3, activation=activation, squeeze=squeeze).double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *values):
        with torch.nn.utils.parametrize.cached():
            for name, value in zip(names, values, strict=True):
                owner, _, attribute = name.rpartition(".")
                module.get_submodule(owner)._parameters[attribute] = value
            stages = training.training_parts(list(module))[0].stages
            return training.run_block(stages, x, False)

    assert torch.autograd.gradcheck(call, (image(2, 2, 4, 3, torch.float64).requires_grad_(), *parameters))


@pytest.mark.parametrize("by_batch", (False, True))
def test_second_derivatives(by_batch, monkeypatch):
    module = inverted_residual(activation="silu").double()
    module[6].scale_activation = nn.Sigmoid()
    if not by_batch:
        module[1].eval()
        module[4].eval()

    def penalty(module):
        x = image(dtype=module[0].weight.dtype).requires_grad_()
        y = module(x)
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (grad**2).sum().backward()
        return [p.grad for p in module.parameters()]

    with monkeypatch.context() as patch:
        expected = penalty(plain(copy.deepcopy(module), patch))
        eager = penalty(plain(copy.deepcopy(module).float(), patch))
    units = max((e - value).abs().max() for e, value in zip(eager, expected, strict=True))
    allowed = 4 * units / torch.finfo(torch.float32).eps * torch.finfo(torch.float64).eps
    for actual, value in zip(penalty(module), expected, strict=True):
        assert (actual - value).abs().max() <= allowed


def test_one_value_a_channel_is_refused_as_pytorch_does():
    module = inverted_residual(stride=3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(image(1, 8, 3, 3).requires_grad_())
    module.eval()
    assert module(image(1, 8, 3, 3).requires_grad_()).shape == (1, 16, 1, 1)


@pytest.mark.parametrize("kind", ("forward", "pre", "backward", "backward_pre"))
@pytest.mark.parametrize("position", range(9))
def test_hooks_inside_fire(position, kind, monkeypatch):
    module = inverted_residual()
    check(module, image(), monkeypatch)
    fired = []
    hook = {
        "forward": "register_forward_hook",
        "pre": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward_pre": "register_full_backward_pre_hook",
    }[kind]
    handle = getattr(module[position], hook)(lambda *a: fired.append(kind) and None)
    module(image().requires_grad_()).sum().backward()
    assert fired == [kind]
    handle.remove()
    check(module, image(), monkeypatch)
    assert fired == [kind]


def saved_bytes(module, x):
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x.requires_grad_())
    keep = {y.untyped_storage().data_ptr()} | parameters
    return sum(size for data, size in held.items() if data not in keep)


def test_a_block_keeps_little(monkeypatch):
    module = fast.InvertedResidual(40, 120, 40, 5, squeeze_channels=32)
    x = image(4, 40, 28, 28)
    ours = saved_bytes(module, x)
    with monkeypatch.context() as patch:
        stock = saved_bytes(plain(module, patch), x)
    assert ours <= 0.45 * stock


@pytest.mark.parametrize("stem", (False, True))
def test_an_expansion_before_a_stride_is_not_kept(stem, monkeypatch):
    """But computed again, also where a projection, not the block's input, is what it reads."""
    module = fast.InvertedResidual(16, 64, 24, 3, stride=2, squeeze_channels=8)
    if stem:
        module = fast.FusedSequential(fast.ConvNormAct(16, 16, groups=16), fast.ConvNormAct(16, 16, 1), module)
    x = image(4, 16, 28, 28)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_FEW_CHANNELS", 0)
        whole = saved_bytes(module, x)
    assert saved_bytes(module, x) == whole - 4 * 64 * 28 * 28 * 4
    check(module, x, monkeypatch, blocks=1)
    y = module(image(4, 16, 28, 28).requires_grad_())
    first, second = (torch.autograd.grad(y.sum(), list(module.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_expansions_that_are_kept_or_not(monkeypatch):
    """Behind pooling; before a depthwise convolution that is not kept itself; with strides as people set them."""

    def stage(inputs, outputs, kernel=1, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]

    strided = stage(72, 72, 3, 2, 72), stage(72, 40)
    pooled = fast.FusedSequential(*stage(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1), *stage(24, 72), *strided[0], *strided[1])
    check(pooled, image(2, 3, 33, 30), monkeypatch, blocks=1)
    linear = nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False)
    check(fast.FusedSequential(*stage(16, 64), linear, *stage(64, 24)), image(2, 16, 12, 13), monkeypatch, blocks=1)
    module = fast.FusedSequential(*stage(16, 64), *stage(64, 64, 3, 2, 64))
    module[3].stride = 2
    check(module, image(2, 16, 12, 13), monkeypatch, blocks=1)


@pytest.mark.parametrize(
    "name", ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet1_0", "efficientnet_b0")
)
def test_networks_keep_little(name):
    stock = getattr(import_torchvision().models, name)().train()
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    ours = saved_bytes(mobilenet_fast.replace_layers(copy.deepcopy(stock)), x.clone())
    assert ours <= 0.45 * saved_bytes(stock, x.clone())


def test_bfloat16_is_kept_under_autocast(monkeypatch):
    module = fast.InvertedResidual(40, 120, 40, 5, squeeze_channels=32)
    wide = saved_bytes(module, image(4, 40, 28, 28))
    with torch.autocast("cpu", torch.bfloat16):
        ours = saved_bytes(module, image(4, 40, 28, 28, dtype=torch.bfloat16))
        with monkeypatch.context() as patch:
            stock = saved_bytes(plain(module, patch), image(4, 40, 28, 28, dtype=torch.bfloat16))
    assert ours <= 0.55 * wide and ours <= 0.45 * stock
    with torch.autocast("cpu", torch.float16):
        assert saved_bytes(module, image(4, 40, 28, 28, dtype=torch.float16)) > 0.9 * wide


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_second_derivatives_under_autocast(dtype, monkeypatch):
    module = fast.FusedSequential(
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), fast.DepthwiseConv2d(16, 16, 3, bias=False)
    )
    results = []
    for patched in (False, True):
        x = image(dtype=dtype).requires_grad_()
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            y = (plain(module, patch) if patched else module)(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.float().square().sum(), x)[0])
    assert results[0].dtype == results[1].dtype == dtype
    error = (results[0].double() - results[1].double()).norm()
    assert error <= 0.1 * results[1].double().norm()


def trainable(name):
    torch.manual_seed(0)
    return randomised(getattr(mobilenet_fast.models, name)(num_classes=5, dropout=0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet_a1", "xception"))
def test_networks(name, dtype, monkeypatch):
    model = trainable(name)
    if dtype == torch.float32:
        # Where an activation's slope jumps, rounding decides on which side of it some of a network's values lie.
        for parent in list(model.modules()):
            for child, layer in parent.named_children():
                if isinstance(layer, (nn.ReLU, nn.ReLU6, nn.Hardswish)):
                    setattr(parent, child, nn.SiLU())
    check(model, image(4, 3, 64, 64, dtype), monkeypatch)


def test_ten_steps_lose_the_same(monkeypatch):
    ours = trainable("mobilenet_v3_small")
    stock = copy.deepcopy(ours)
    exact = copy.deepcopy(ours).double()
    x, labels = image(8, 3, 64, 64), torch.arange(8) % 5

    def losses(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    actual = losses(ours, x)
    with monkeypatch.context() as patch:
        expected, eager = losses(plain(exact, patch), x.double()), losses(plain(stock, patch), x)
    assert expected[-1] < expected[0]
    assert (actual - expected).abs().max() <= max(1e-5, 4 * (eager - expected).abs().max())


def test_copies_pickles_and_state_dicts_stay_stock():
    module = inverted_residual()
    module(image().requires_grad_()).sum().backward()
    again = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (again, loaded):
        assert list(other.state_dict()) == list(module.state_dict())
        a, b = step(module, image()), step(other, image())
        assert torch.equal(a["output"], b["output"]) and torch.equal(a["input"], b["input"])


def test_gradients_that_no_kernel_reads():
    module = fast.FusedSequential(
        fast.ConvNormAct(8, 16, 1, activation_layer=nn.SiLU),
        fast.ConvNormAct(16, 16, groups=16, activation_layer=nn.SiLU),
    ).double()
    x = image(dtype=torch.float64).requires_grad_()
    y = module(x)
    assert type(y.grad_fn).__name__ == "_BlockBackward"
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    several = torch.stack([grad, 2 * grad])
    batched = torch.autograd.grad(y, x, several, retain_graph=True, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([wanted, 2 * wanted]))
    torch.testing.assert_close(torch.autograd.grad(y, x, torch._neg_view(-grad))[0], wanted)


def test_opcheck():
    """Schemas and fakes of the steps; their derivatives are the block's, not their own."""
    ops = torch.ops.mobilenet_fast
    x, weight, filters = image(), torch.randn(16, 8, 1, 1), torch.randn(8, 1, 3, 3)
    folded, gate, mean, coefficients = torch.rand(2, 8), torch.rand(2, 8), torch.rand(8), torch.rand(4, 16)
    geometry = [2, 1], [1, 0], [1, 2]
    y, _ = ops.pointwise_conv2d_forward(x, folded, "relu", gate, weight)
    filtered, _ = ops.depthwise_conv2d_forward(x, folded, "relu", filters, *geometry)
    unread, at_y = (None, "none", None, None), (y, y, None, "none", None, None, coefficients)
    calls = [
        (ops.pointwise_conv2d_forward, (x, folded, "relu", gate, weight)),
        (ops.depthwise_conv2d_forward, (x, folded, "relu", filters, *geometry)),
        (ops.batch_norm_statistics, (x,)),
        (ops.converted, (x, torch.bfloat16)),
        (ops.batch_norm_apply, (x, folded, "silu", gate, x)),
        (ops.batch_norm_pixel_sums, (x, folded, "silu", None)),
        (ops.batch_norm_pixel_sums, (x, folded, "silu", x)),
        (ops.batch_norm_gradient_sums, (x, x, *unread, mean)),
        (ops.batch_norm_gradient, (x, x, folded, "relu6", gate, gate, torch.rand(4, 8))),
        (ops.pointwise_conv2d_gradients, (*at_y, x, None, "none", None, None, weight, x, True, True)),
        (ops.pointwise_conv2d_gradients, (*at_y, x, folded, "relu", gate, None, weight, None, True, False)),
        (ops.pointwise_conv2d_gradients, (*at_y, x, folded, "relu", None, mean, weight, None, False, True)),
    ]
    dense, window = torch.randn(16, 8, 3, 3), ([3, 3], [2, 1], [1, 0], [1, 1])
    made, _ = ops.conv2d_forward(x, folded, "relu", None, dense, *geometry)
    pooled = ops.max_pool2d_forward(x, folded, "relu", *window)
    calls += [
        (ops.conv2d_forward, (x, folded, "relu", None, dense, *geometry)),
        (ops.conv2d_forward, (x, folded, "relu", gate, weight, [2, 2], [0, 0], [1, 1])),
        (ops.max_pool2d_forward, (x, folded, "relu", *window)),
        (ops.max_pool2d_gradients, (pooled, x, folded, "relu", mean, *window)),
        (ops.max_pool2d_gradients, (pooled, x, None, "none", None, *window)),
    ]
    for needed in ((True, True), (True, False), (False, True)):
        operands = x, folded, "relu", None, mean, dense, *geometry, *needed
        calls.append((ops.conv2d_gradients, (made, None, *unread, None, *operands)))
    at_filtered = filtered, None, *unread, None
    for needed in ((True, True), (True, False), (False, True)):
        operands = x, folded, "relu", mean, filters, *geometry, *needed
        calls.append((ops.depthwise_conv2d_gradients, (*at_filtered, *operands)))
        calls.append((ops.pointwise_conv2d_backward, (y, x, weight, *needed)))
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("given", ("float32", "lower", "float64"))
def test_autocast(given, dtype, monkeypatch):
    """Blocks err no more than PyTorch's layers do, and give what has their dtypes; float64 stays what it is."""
    given = {"float32": torch.float32, "lower": dtype, "float64": torch.float64}[given]
    module, x = inverted_residual(activation="silu"), image(dtype=given)
    if given == torch.float64:
        module.double()
    stock, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    calls = []
    with monkeypatch.context() as patch:
        apply = training._Block.apply
        patch.setattr(training._Block, "apply", lambda *a: (calls.append(a[0]), apply(*a))[1])
        with torch.autocast("cpu", dtype):
            actual = step(module, x)
    assert len(calls) == (given != torch.float64)
    with monkeypatch.context() as patch:
        expected = step(plain(exact, patch), x.double())
        with torch.autocast("cpu", dtype):
            eager = step(plain(stock, patch), x)
    for name, value in expected.items():
        assert actual[name].dtype == eager[name].dtype, name
        size = value.abs().max()
        eager_error, error = ((result[name].double() - value).abs().max() for result in (eager, actual))
        assert error <= eager_error + torch.finfo(dtype).eps * size, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("residual", "norm"))
def test_dtypes_under_autocast(kind, dtype, monkeypatch):
    module = fast.InvertedResidual(8, 24, 8)
    if kind == "norm":
        module = fast.FusedSequential(nn.BatchNorm2d(8), nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(image(dtype=dtype))
        with monkeypatch.context() as patch:
            assert actual.dtype == plain(module, patch)(image(dtype=dtype)).dtype


def stem(kernel=3, stride=2, dilation=1, padding=1, channels=3, out=8, activation="relu6", pool=None, before=True):
    layer = ACTIVATION_LAYERS[activation]
    layers = [nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8), layer()] if before else []
    layers += [nn.Conv2d(8 if before else channels, out, kernel, stride, padding, dilation, bias=False)]
    layers += [nn.BatchNorm2d(out), layer()]
    if pool is not None:
        layers += [nn.MaxPool2d(*pool)]
    return randomised(fast.FusedSequential(*layers, nn.Conv2d(out, 4, 1, bias=False), nn.BatchNorm2d(4)))


STEMS = pairwise(
    lambda kernel, padding, dilation, stride, channels, **case: (
        padding <= dilation * (kernel - 1) and (kernel, stride) != (1, 1)
    ),
    kernel=(3, 2, 5, 1),
    stride=(1, 2, 3),
    dilation=(1, 2),
    padding=(0, 1, 2),
    channels=(3, 17),
    out=(8, 33),
    before=(False, True),
    activation=("none", "relu6", "silu"),
    size=((11, 10), (16, 23)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STEMS, ids=case_id)
def test_dense_convolutions(case, dtype, on_isa, monkeypatch):
    case = dict(case)
    size = case.pop("size")
    check(stem(**case), image(3, case["channels"], *size, dtype), monkeypatch, blocks=1)


@pytest.mark.parametrize("activation", ("none", "relu6"))
def test_a_stem_of_an_input_without_gradient(activation, on_isa):
    module, x = stem(activation=activation, before=False), image(4, 3, 21, 22)
    same = copy.deepcopy(module)
    module(x).sum().backward()
    same(x.requires_grad_()).sum().backward()
    for a, b in zip(module.parameters(), same.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", ((3, 2, 1), (2,), (3, 1, 1), (2, 3), (3, 2, 0, 2), ((2, 3), (1, 2), (1, 0))), ids=str)
@pytest.mark.parametrize("channels", (5, 70))
def test_maximum_pooling(pool, channels, dtype, on_isa, monkeypatch):
    for activation in ("none", "hardswish"):
        module = stem(3, 1, 1, 1, out=channels, activation=activation, pool=pool)
        check(module, image(3, 3, 23, 26, dtype), monkeypatch, blocks=1)
    module = fast.FusedSequential(nn.Conv2d(8, channels, 1, bias=False), nn.MaxPool2d(*pool))  # nothing between
    check(module, image(2, 8, 13, 12, dtype), monkeypatch, blocks=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maximum_pooling_in_bands(dtype, monkeypatch):
    check(stem(3, 1, 1, 1, out=64, pool=(3, 2, 1)), image(2, 3, 130, 125, dtype), monkeypatch, blocks=1)


def test_the_first_of_equal_values_gets_the_gradient():
    module = fast.FusedSequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(3, 2, 1))
    nn.init.ones_(module[0].weight)
    x = image(1, 1, 7, 7).round().relu()
    x[0, 0, 3, 3] = torch.nan
    found = []
    for call in (module, lambda x: F.max_pool2d(x, 3, 2, 1)):
        z = x.clone().requires_grad_()
        call(z).sum().backward()
        found.append(z.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("activation", ("none", "silu"))
def test_gradcheck_of_other_stages(activation):
    modules = [
        *(nn.Conv2d(2, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), ACTIVATION_LAYERS[activation](), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 3, 3, 1, 1, 1, 3, bias=False), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)),
        nn.Conv2d(4, 2, 1, 2, bias=False),
    ]
    block = training.training_parts(randomised(nn.Sequential(*modules)).double())
    assert len(block) == 1

    def call(x):
        return training.run_block(block[0].stages, x, False)

    x = image(2, 2, 9, 11, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x) or activation == "none"


def test_a_separable_convolution_keeps_its_input_and_output(monkeypatch):
    layers = [fast.SeparableConv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    module = fast.FusedSequential(*[part for _ in range(2) for part in copy.deepcopy(layers)])
    module = fast.FusedSequential(
        *(m for m in module.modules() if not list(m.children()) and type(m) is not nn.Identity)
    )
    x = image(2, 64, 40, 40)
    assert saved_bytes(module, x) <= 3.1 * x.numel() * x.element_size()
    check(module, x, monkeypatch, blocks=1)
