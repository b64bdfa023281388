"""The layers are PyTorch's, faster: same construction, state, gradients, numbers; kernels only where they may run."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, import_timm, import_torchvision, operand, strides
from torch import nn

from mobilenet_fast import _C, reference
from mobilenet_fast import nn as fast
from mobilenet_fast.nn.dispatch import known
from mobilenet_fast.nn.fusion import Chained, Links

OPERATIONS = ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels called, as they are called."""
    names = []

    def recorded(name, kernel):
        def run(*args, **kwargs):
            names.append(name)
            return kernel(*args, **kwargs)

        return run

    for name in OPERATIONS:
        monkeypatch.setattr(_C, name, recorded(name, getattr(_C, name)))
    return names


def randomised(module, seed=0):
    """The module in float64 with random parameters and statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            value.normal_(0, 0.5, generator=generator)
            if key.endswith("running_var"):
                value.abs_().add_(0.1)
    return module


def input64(*shape, layout="contiguous"):
    return operand(shape, layout, torch.float64)


def assert_same(actual, expected):
    """As near as float64 is, in the same layout."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert strides(actual) == strides(expected)


def twins(ours, stock):
    """Both with the same random state, loaded under the same keys."""
    randomised(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.double().eval().load_state_dict(stock.state_dict())
    return ours, stock


def assert_same_training(ours, stock, x):
    """The same output, gradients of parameters and input, and running statistics, after a step in training mode."""
    results = []
    for module in (ours.train(), stock.train()):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
        module.zero_grad()
        module.eval()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Convolutions


CONVS = [
    {"args": (6, 6, 3)},
    {"args": (6, 6, 3, 2, 1)},
    {"args": (6, 12, (3, 5), (2, 1), (1, 2), 1, 6, False)},
    {"args": (6, 6, 5), "padding": "same", "dilation": 2},
    {"args": (6, 6, (2, 4)), "padding": "same"},
    {"args": (6, 6, 3), "padding": "valid", "bias": False},
    {"args": (6, 6, 3), "padding": 1, "padding_mode": "reflect"},
    {"args": (6, 6, 3), "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_is_a_conv2d(conv, layout, calls):
    kwargs = {key: value for key, value in conv.items() if key != "args"}
    stock_kwargs = kwargs if len(conv["args"]) > 6 else {**kwargs, "groups": 6}
    ours, stock = twins(fast.DepthwiseConv2d(*conv["args"], **kwargs), nn.Conv2d(*conv["args"], **stock_kwargs))
    assert isinstance(ours, nn.Conv2d) and vars(stock).keys() <= vars(ours).keys()
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(ours, name) == getattr(stock, name)
    x = input64(2, 6, 9, 8, layout=layout)
    with torch.no_grad():
        assert_same(ours(x), stock(x))
        assert calls == (["depthwise_conv2d"] if ours.padding_mode == "zeros" else [])
    del calls[:]
    assert_same_training(ours, stock, x)
    assert not calls


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_of_layers(activation, calls):
    x = input64(2, 6, 5, 5) * 8
    for ours in (
        fast.DepthwiseConv2d(6, 6, 3, activation=activation),
        fast.PointwiseConv2d(6, 8, activation=activation),
        fast.BatchNormAct2d(6, activation=activation),
        fast.SeparableConv2d(6, 8, activation=activation),
    ):
        randomised(ours)
        assert ours(x).requires_grad
        with torch.no_grad():
            fused = ours(x)
        assert_same(fused, ours(x).detach())
        last = getattr(ours, "pointwise", ours)
        last.activation = "none"
        assert_same(fused, reference.activation(ours(x), activation).detach())
    assert calls == ["depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "depthwise_conv2d", "pointwise_conv2d"]


def test_pointwise_is_a_conv2d(calls):
    ours, stock = twins(fast.PointwiseConv2d(6, 8), nn.Conv2d(6, 8, 1))
    x = input64(2, 6, 5, 7, layout="channels_last")
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls == ["pointwise_conv2d"]
    assert_same_training(ours, stock, x)


@pytest.mark.parametrize("size", [(1, 1), (6, 7), (7, 6), (9, 5)], ids=str)
@pytest.mark.parametrize(
    "kernel_size, stride, dilation", [(3, 2, 1), ((2, 5), 1, 2), (5, (2, 3), 1), (1, 2, 1)], ids=str
)
def test_conv2d_same_pads_as_tensorflow(size, kernel_size, stride, dilation, calls):
    timm = import_timm()
    ours, stock = twins(
        fast.Conv2dSame(4, 4, kernel_size, stride, dilation, groups=4),
        timm.layers.Conv2dSame(4, 4, kernel_size, stride, 0, dilation, groups=4),
    )
    x = input64(2, 4, *size, layout="channels_last")
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls == ["depthwise_conv2d"]
    assert ours(x).shape[2:] == tuple(-(-n // s) for n, s in zip(size, ours.stride, strict=True))
    assert_same_training(ours, stock, x)


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="DepthwiseConv2d: groups must be in_channels=8, got 2"):
        fast.DepthwiseConv2d(8, 8, 3, groups=2)
    with pytest.raises(ValueError, match="out_channels"):
        fast.DepthwiseConv2d(8, 12, 3)
    for layer in (fast.DepthwiseConv2d, fast.PointwiseConv2d, fast.BatchNormAct2d):
        args = (8, 8, 3) if layer is fast.DepthwiseConv2d else (8, 8) if layer is fast.PointwiseConv2d else (8,)
        with pytest.raises(ValueError, match=f"{layer.__name__}: activation must be one of .*hardswish.*, got 'tanh'"):
            layer(*args, activation="tanh")
    with pytest.raises(ValueError, match="^SqueezeExcitation: activation must be one of .*, got 'gelu'"):
        fast.SqueezeExcitation(8, 2, "gelu")
    with pytest.raises(ValueError, match="^SqueezeExcitation: scale_activation must be one of .*, got 'gelu'"):
        fast.SqueezeExcitation(8, 2, "relu", "gelu")
    with pytest.raises(ValueError, match="^ConvNormAct: activation_layer must be one of .*, got 'gelu'"):
        fast.ConvNormAct(8, 8, activation_layer="gelu")


# What kernels must leave to PyTorch


def test_other_tensors_run_in_pytorch(calls):
    conv = fast.DepthwiseConv2d(4, 4, 3, padding=1, activation="relu").eval()
    stock = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    stock[0].load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(conv(x[0]), stock(x[0]))  # no batch
        half = copy.deepcopy(conv).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        meta = copy.deepcopy(conv).to("meta")
        assert meta(x.to("meta")).shape == x.shape
        assert conv(x[:0]).shape == (0, 4, 6, 6)
        torch.testing.assert_close(torch.vmap(conv)(x[None])[0], stock(x))
        with pytest.raises(RuntimeError):
            conv(x.double())
        assert not calls
        conv(x)
        assert calls == ["depthwise_conv2d"]


def test_a_wrong_number_of_channels_is_pytorchs_to_refuse(calls):
    """Not a channel multiplier, as which the kernel would take any that divides the filters' number."""
    conv, norm = fast.DepthwiseConv2d(8, 16, 3), nn.BatchNorm2d(16)
    layers = (
        conv,
        fast.Conv2dSame(8, 8, 3, 2, groups=8),
        fast.SeparableConv2d(8, 4),
        fast.FusedSequential(conv, norm, nn.ReLU()),
        fast.FusedSequential(fast.Conv2dSame(8, 16, 3, groups=8), norm),
        fast.InvertedResidual(8, 8, 8),
    )
    with torch.no_grad():
        for layer in layers:
            layer.eval()(torch.ones(2, 8, 9, 9))
            for channels in (1, 4, 16):
                with pytest.raises(RuntimeError, match=rf"to have 8 channels, but got {channels} channels"):
                    layer(torch.ones(2, channels, 9, 9))
    assert calls.count("depthwise_conv2d") == len(layers)


def test_settings_changed_later_count():
    x = input64(2, 6, 7, 7)
    for changes in ({"stride": (2, 2)}, {"padding": (1, 0)}, {"stride": 2, "padding": 1}, {"groups": 2}):
        for ours in (fast.PointwiseConv2d(6, 6), fast.DepthwiseConv2d(6, 6, 3)):
            randomised(ours)
            for name, value in changes.items():
                setattr(ours, name, value)
            if "groups" in changes:
                ours.weight = nn.Parameter(torch.randn(6, 3, *ours.kernel_size, dtype=torch.float64))
            expected = F.conv2d(x, ours.weight, ours.bias, ours.stride, ours.padding, 1, ours.groups).detach()
            with torch.no_grad():
                assert_same(ours(x), expected)


def test_lazily_negated_input():
    conv = randomised(fast.ConvNormAct(4, 4, groups=4))
    x = torch.complex(*input64(2, 1, 4, 5, 5)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        for module in (conv, conv[0]):
            assert_same(module(x), module(x.resolve_neg()))


def test_derivatives_of_every_kind_are_pytorchs():
    block = randomised(fast.InvertedResidual(4, 8, 4, squeeze_channels=4, activation_layer="silu"))
    x, tangent = input64(2, 4, 5, 5), input64(2, 4, 5, 5).flip(0)
    assert torch.autograd.gradcheck(block, x.clone().requires_grad_(), fast_mode=True)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = block(torch.autograd.forward_ad.make_dual(x, tangent))
        forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(torch.func.jvp(block, (x,), (tangent,))[1], forward)
    step = 1e-6
    torch.testing.assert_close(
        (block(x + step * tangent) - block(x - step * tangent)) / (2 * step), forward, rtol=1e-6, atol=1e-6
    )


def test_frozen_layers_use_kernels_with_gradients_enabled(calls):
    block = randomised(fast.ConvNormAct(4, 4, groups=4)).requires_grad_(False)
    x = input64(1, 4, 5, 5)
    assert torch.is_grad_enabled()
    y = block(x)
    assert calls == ["depthwise_conv2d"] and not y.requires_grad
    assert_same(block(x.requires_grad_()).detach(), y)
    assert calls == ["depthwise_conv2d"]


def every_layer():
    return nn.Sequential(
        fast.ConvNormAct(3, 8, stride=2, activation_layer="hardswish"),
        fast.InvertedResidual(8, 16, 8, squeeze_channels=8),
        fast.SeparableConv2d(8, 8, padding=1),
        fast.BatchNormAct2d(8, activation="relu6"),
        fast.Conv2dSame(8, 8, 3, 2, groups=8),
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_sees_standard_operators():
    model, x = randomised(every_layer()), input64(2, 3, 12, 12)
    for exported in (model, model.train()):
        graph = torch.export.export(exported, (x,)).graph
        targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
        assert targets and not [t for t in targets if not t.startswith("aten")], targets
    model.eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    assert_same(torch.jit.trace(model, x)(x).detach(), model(x).detach())
    traceable = model[:3]
    assert_same(torch.fx.symbolic_trace(traceable)(x).detach(), traceable(x).detach())


def test_compiles_without_graph_breaks():
    model, x = randomised(every_layer()), input64(2, 3, 12, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach())


# Batch norm


@pytest.mark.parametrize(
    "kwargs", [{}, {"eps": 0.1, "momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_act_is_a_batch_norm(kwargs, layout, calls):
    ours, stock = twins(fast.BatchNormAct2d(6, **kwargs), nn.BatchNorm2d(6, **kwargs))
    x = input64(4, 6, 5, 3, layout=layout)
    assert_same_training(ours, stock, x)
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls == (["batch_norm_act"] if kwargs.get("track_running_stats", True) else [])


# Squeeze-and-excitation


@pytest.mark.parametrize(
    "activations",
    [
        (),
        (nn.SiLU,),
        (nn.ReLU, nn.Hardsigmoid),
        ("hardswish", "hardsigmoid"),
        (nn.Tanh,),
        (lambda: nn.ReLU(True), nn.Sigmoid),
    ],
    ids=["default", "silu", "relu hardsigmoid", "by name", "tanh", "function"],
)
def test_squeeze_excitation_is_torchvisions(activations, calls):
    stock_activations = [
        nn.Hardswish if a == "hardswish" else nn.Hardsigmoid if a == "hardsigmoid" else a for a in activations
    ]
    stock = import_torchvision().ops.SqueezeExcitation(6, 4, *stock_activations)
    ours, stock = twins(fast.SqueezeExcitation(6, 4, *activations), stock)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in stock.named_children()]
    x = input64(2, 6, 5, 3, layout="channels_last")
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls == ([] if nn.Tanh in activations else ["squeeze_excite"])
    assert_same_training(ours, stock, x)


@pytest.mark.parametrize("name", ["avgpool", "fc1", "activation", "fc2", "scale_activation"])
def test_hooks_in_a_squeeze_excitation_fire(name, calls):
    ours = randomised(fast.SqueezeExcitation(6, 4))
    x, seen = input64(2, 6, 5, 3), []
    with torch.no_grad():
        expected = ours(x)
        handle = getattr(ours, name).register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert_same(ours(x), expected)
        assert len(seen) == 1 and calls == ["squeeze_excite"]
        handle.remove()
        ours.fc1 = nn.Conv2d(6, 4, 1, bias=False).double()
        ours(x)
        assert calls == ["squeeze_excite"] * 2
        ours.fc1 = nn.Conv2d(6, 4, 3, padding=1).double()
        ours(x)
        assert calls == ["squeeze_excite"] * 2


# Runs of layers


def layered(modules, x):
    """One after another, in PyTorch: gradients are asked for."""
    for module in modules:
        x = module(x.requires_grad_() if x.is_leaf else x)
    return x.detach()


@pytest.mark.parametrize(
    "args, expected",
    [
        ((6, 6, 3, 2, None, 6), "depthwise_conv2d"),
        ((6, 12, 5, 1, 0, 6, nn.BatchNorm2d, nn.Hardswish, 2), "depthwise_conv2d"),
        ((6, 8, 1), "pointwise_conv2d"),
        ((6, 8, 1, 1, None, 1, nn.BatchNorm2d, None), "pointwise_conv2d"),
        ((6, 8, 1, 1, None, 1, None, nn.SiLU), "pointwise_conv2d"),
        ((6, 8, 1, 1, None, 1, nn.BatchNorm2d, nn.Sigmoid, 1, None), "pointwise_conv2d"),
        ((6, 8, 3), "batch_norm_act"),
        ((6, 8, 3, 1, None, 2), "batch_norm_act"),
        ((6, 8, 1, 2), "batch_norm_act"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_conv_norm_act_is_torchvisions_in_one_call(args, expected, layout, calls):
    stock = import_torchvision().ops.Conv2dNormActivation(*args)
    ours, stock = twins(fast.ConvNormAct(*args), stock)
    assert ours.out_channels == stock.out_channels and isinstance(ours, nn.Sequential)
    x = input64(2, 6, 12, 12, layout=layout)
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls == [expected]
    assert_same_training(ours, stock, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("conv", ["depthwise", "pointwise", "same"])
def test_folding(bias, affine, size, residual, conv, calls):
    conv = {
        "depthwise": lambda: fast.DepthwiseConv2d(16, 16, 3, padding=1, bias=bias),
        "pointwise": lambda: nn.Conv2d(16, 16, 1, bias=bias),
        "same": lambda: fast.Conv2dSame(16, 16, 3, groups=16, bias=bias),
    }[conv]()
    chain = randomised(Residual(conv, nn.BatchNorm2d(16, affine=affine)))
    chain.adds_input = residual
    x = input64(1, 16, size, size)
    with torch.no_grad():
        fused = chain(x)
    assert calls == ["pointwise_conv2d" if conv.groups == 1 else "depthwise_conv2d"]
    plain = layered(chain.children(), x.clone())
    assert_same(fused, plain + x if residual else plain)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), ((2, 5), 1), ((4, 1), (1, 2)), (2, 3)], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid", "tensorflow"])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)], ids=str)
def test_named_padding_in_a_chain(kernel_size, dilation, padding, stride, calls):
    if padding == "tensorflow":
        conv = fast.Conv2dSame(6, 6, kernel_size, stride, dilation, groups=6)
    elif padding == "same" and stride != 1:
        # nn.Conv2d refuses it when it is made.
        conv = nn.Conv2d(6, 6, kernel_size, 1, padding, dilation, groups=6)
        conv.stride = (2, 1)
    else:
        conv = nn.Conv2d(6, 6, kernel_size, stride, padding, dilation, groups=6)
    chain = randomised(fast.FusedSequential(conv, nn.BatchNorm2d(6), nn.ReLU()))
    x = input64(2, 6, 9, 14)
    with torch.no_grad():
        if padding == "same" and stride != 1:
            with pytest.raises(RuntimeError, match="padding='same' is not supported"):
                chain(x)
            return
        actual = chain(x)
    assert calls == ["depthwise_conv2d"]
    assert_same(actual, layered(chain, x.clone()))


@known
class Residual(Chained):
    """Children one after another, plus the input."""

    adds_input = True

    def __init__(self, *children):
        super().__init__()
        for i, child in enumerate(children):
            self.add_module(str(i), child)

    def links(self):
        return Links(list(self.children()), self.adds_input)


@pytest.mark.parametrize("size", [1, 8])
def test_a_residual_is_added_behind_the_activation(size):
    chain = randomised(Residual(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    x = input64(1, 8, size, size)
    with torch.no_grad():
        fused = chain(x)
    assert_same(fused, layered(chain.children(), x.clone()) + x)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 6, 1, 1), (2, 6, 5, 1)], ids=str)
def test_a_residual_of_another_shape_is_broadcast(shape):
    x = input64(*shape)
    block = Residual(
        nn.Conv2d(shape[1], 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 5, padding=4, groups=6), nn.Conv2d(6, 6, 1)
    )
    block = randomised(block)
    with torch.no_grad():
        try:
            expected = layered(block.children(), x.clone()) + x
        except RuntimeError:
            with pytest.raises(RuntimeError):
                block(x)
        else:
            assert_same(block(x), expected)


def blocks_of_every_kind():
    """Blocks with residuals among modules that are none of ours, and one with such a module inside."""
    return fast.FusedSequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        fast.InvertedResidual(8, 16, 8, squeeze_channels=8),
        nn.MaxPool2d(3, 1, 1),
        fast.FusedSequential(fast.InvertedResidual(8, 8, 8), fast.InvertedResidual(8, 24, 16, stride=2)),
        Residual(
            fast.ConvNormAct(16, 16, 1), nn.AvgPool2d(3, 1, 1), fast.ConvNormAct(16, 16, 1, activation_layer=None)
        ),
        Residual(nn.Tanh()),
        nn.Dropout2d(),
        fast.SqueezeExcitation(16, 8),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", ["contiguous", "channels_last", "one channels_last"])
def test_chains_in_chains(layout, weights, calls):
    chain = randomised(blocks_of_every_kind())
    if weights == "channels_last":
        chain.to(memory_format=torch.channels_last)
    elif weights != "contiguous":
        chain[3].block[0][0].to(memory_format=torch.channels_last)
    x = input64(2, 3, 16, 16, layout=layout)
    with torch.no_grad():
        actual = chain(x)
    assert calls.count("pointwise_conv2d") == 7 and calls.count("depthwise_conv2d") == 3
    assert calls.count("squeeze_excite") == 2 and calls.count("batch_norm_act") == 1
    assert_same(actual, layered(chain, x.clone()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_modules_that_are_none_of_ours_see_the_layout_of_torch(layout):
    class Flat(nn.Module):
        def forward(self, x):
            seen.append(strides(x))
            return x

    seen = []
    chain = randomised(
        fast.FusedSequential(fast.ConvNormAct(3, 4), Flat(), Residual(fast.ConvNormAct(4, 4, 1), Flat()))
    )
    with torch.no_grad():
        chain(input64(2, 3, 6, 6, layout=layout))
        fused, seen = seen, []
        layered(chain, input64(2, 3, 6, 6, layout=layout))
    assert len(fused) == 2 and fused == seen


def test_chains_leave_to_pytorch_what_layers_do(calls):
    chain = randomised(fast.ConvNormAct(4, 4, groups=4))
    x = input64(2, 4, 5, 5)
    assert chain(x).requires_grad
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        with Watch():
            expected = chain(x)
        assert "aten::convolution" in seen
        assert_same(torch.vmap(chain)(x[None])[0], expected)
        single = copy.deepcopy(chain).float()
        with torch.autocast("cpu", torch.bfloat16):
            assert single(x.float()).dtype == torch.bfloat16
        single(x.bfloat16().float())
        with pytest.raises(RuntimeError):
            single(x)
        assert calls == ["depthwise_conv2d"]


def test_a_chain_of_everything(calls):
    chain = randomised(
        fast.FusedSequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.Identity(),
            nn.Hardswish(),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.ReLU6(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 9, 4),
            nn.ReLU(),
        )
    )
    x = input64(2, 3, 10, 10)
    with torch.no_grad():
        fused = chain(x)
    assert calls == ["batch_norm_act", "depthwise_conv2d", "batch_norm_act", "pointwise_conv2d"]
    assert_same(fused, layered(chain, x.clone()))
    assert fast.FusedSequential()(3) == 3


def test_changes_count_from_the_next_call(calls):
    chain = randomised(fast.ConvNormAct(6, 6, groups=6, activation_layer="hardswish"))
    x = input64(2, 6, 7, 7)
    conv, norm = chain[0], chain[1]

    def write_data():
        norm.running_mean.data.mul_(3)

    def write_numpy():
        conv.weight.detach().numpy()[...] *= -1

    def give_data():
        conv.weight.data = conv.weight.data * 0.5

    def give_parameter():
        norm.weight = nn.Parameter(torch.full_like(norm.weight, 1.5))

    def give_module():
        chain[2] = nn.ReLU6()

    def change_eps():
        norm.eps = 0.5

    def load():
        chain.load_state_dict({key: value * 1.25 for key, value in chain.state_dict().items()})

    def change_stride():
        conv.stride = (2, 2)

    def move_bound():
        chain[2].max_val = 0.5

    def take_module():
        del chain[2]

    changes = (
        write_data,
        write_numpy,
        give_data,
        give_parameter,
        give_module,
        change_eps,
        load,
        change_stride,
        move_bound,
        take_module,
    )
    with torch.no_grad():
        before = chain(x)
        for change in changes:
            change()
            after = chain(x)
            assert after.shape != before.shape or not torch.equal(after, before), change.__name__
            with torch.enable_grad():
                plain = layered(chain, x.clone())
            assert_same(after, plain)
            before = after
        assert set(calls) == {"depthwise_conv2d"} and len(calls) == 1 + len(changes)


# Each changes what `blocks_of_every_kind` computes.
CHANGES = {
    "an activation": lambda chain: chain[3].block[0].__setitem__(2, nn.ReLU6()),
    "an activation's class": lambda chain: setattr(chain[3].block[0][2], "__class__", nn.ReLU),
    "a block": lambda chain: chain[5].__setitem__(0, randomised(fast.InvertedResidual(8, 16, 8), seed=1)),
    "a shortcut": lambda chain: setattr(chain[3], "use_res_connect", False),
    "one module more": lambda chain: chain[3].block[1].append(nn.SiLU()),
    "one module less": lambda chain: chain[3].block[1].__delitem__(2),
    "the order": lambda chain: setattr(
        chain[3], "block", fast.FusedSequential(*(chain[3].block[i] for i in (0, 2, 1, 3)))
    ),
    "a stride": lambda chain: setattr(chain[5][1].block[1][0], "stride", (1, 2)),
    "a padding": lambda chain: setattr(chain[5][1].block[1][0], "padding", 2),
    "eps": lambda chain: setattr(chain[1], "eps", 0.7),
    "a mode": lambda chain: chain[5][1].block[0][1].train(),
    "statistics in place": lambda chain: chain[3].block[1][1].running_mean.data.add_(1),
    "statistics": lambda chain: setattr(chain[3].block[1][1], "running_var", torch.full((16,), 0.5).double()),
    "no statistics": lambda chain: [setattr(chain[3].block[1][1], f"running_{name}", None) for name in ("mean", "var")],
    "a gate": lambda chain: setattr(chain[3].block[2], "scale_activation", nn.Sigmoid()),
    "a gate's weight": lambda chain: chain[9].fc2.weight.data.mul_(-1),
    "a module of a mixed block": lambda chain: chain[6].__setattr__("1", nn.MaxPool2d(3, 1, 1)),
    "a forward": lambda chain: setattr(chain[1], "forward", lambda x: nn.BatchNorm2d.forward(chain[1], x) * 2),
    "a hook": lambda chain: chain[3].block[1][0].register_forward_hook(lambda module, args, output: output * 2),
    "a block's hook": lambda chain: chain[3].register_forward_pre_hook(lambda module, args: args[0] * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_inside_counts_from_the_next_call_on(change):
    chain = randomised(blocks_of_every_kind())
    x = input64(2, 3, 16, 16)
    with torch.no_grad():
        before = chain(x)
        CHANGES[change](chain)
        after = chain(x)
    assert after.shape != before.shape or not torch.allclose(after, before)
    assert_same(after, layered(chain, x.clone()))


def test_changes_that_are_undone(calls):
    chain = randomised(blocks_of_every_kind())
    x = input64(2, 3, 16, 16)
    conv, norm, block = chain[3].block[1][0], chain[1], chain[3]
    with torch.no_grad():
        before, kernels = chain(x), len(calls)
        handles = [m.register_forward_hook(lambda module, args, output: output * 2) for m in (conv, norm, block)]
        norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) * 2
        norm.train()
        assert not torch.allclose(chain(x), before)
        for handle in handles:
            handle.remove()
        del norm.forward
        norm.eval()
        norm.load_state_dict(randomised(blocks_of_every_kind())[1].state_dict())
        del calls[:]
        assert_same(chain(x), before)
        assert len(calls) == kernels


def test_attributes_that_cannot_be_compared():
    chain = randomised(blocks_of_every_kind())
    x = input64(2, 3, 16, 16)
    with torch.no_grad():
        for seed in range(3):
            for module in chain.modules():
                module.tag = torch.full((3,), float(seed))
            randomised(chain, seed)
            assert_same(chain(x), layered(chain, x.clone()))


def test_a_plan_keeps_nothing_alive_and_is_not_copied():
    chain = randomised(blocks_of_every_kind())
    with torch.no_grad():
        # The second call knows that the first has planned the mixed blocks inside.
        for _ in range(2):
            chain(input64(2, 3, 16, 16))
    assert chain._plan.holds(chain.links())
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert twin._plan is None
    gone = weakref.ref(chain)
    gc.disable()
    try:
        del chain
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", ["first", "last", "norms"])
def test_partly_frozen_chains_learn_the_same(frozen):
    ours = randomised(blocks_of_every_kind())
    for index, (name, parameter) in enumerate(ours.named_parameters()):
        parameter.requires_grad_(
            {"first": index > 15, "last": index < 15, "norms": not name.endswith(("0.1.weight", "1.1.bias"))}[frozen]
        )
    x = input64(2, 3, 16, 16)
    results = []
    for run in (ours, lambda x: nn.Sequential.forward(ours, x)):
        leaf = x.clone().requires_grad_(frozen == "norms")
        y = run(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in ours.parameters())])
        ours.zero_grad()
    assert [g is None for g in results[0]] == [g is None for g in results[1]]
    for actual, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_chains_in_several_threads():
    chain = randomised(blocks_of_every_kind())
    inputs = [input64(2, 3, 16, 16) * (i + 1) for i in range(4)]
    expected = [layered(chain, x.clone()) for x in inputs]

    def worker(x):
        with torch.no_grad():
            return [chain(x) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(worker, inputs), expected, strict=True):
            for actual in results:
                assert_same(actual, wanted)


def test_modes_and_hooks_inside_a_run_are_kept(calls):
    chain = randomised(fast.ConvNormAct(6, 6, groups=6))
    x = input64(2, 6, 7, 7)
    with torch.no_grad():
        fused = chain(x)
        for child in chain:
            seen = []
            for register in (child.register_forward_hook, child.register_forward_pre_hook):
                handle = register(lambda *_, seen=seen: seen.append(1))
                assert_same(chain(x), fused)
                handle.remove()
            child.forward = lambda y, child=child, seen=seen: seen.append(1) or type(child).forward(child, y)
            assert_same(chain(x), fused)
            del child.forward
            assert len(seen) == 3
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
        seen.clear()
        assert_same(chain(x), fused)
        handle.remove()
        assert seen == [*chain, chain]

        chain[1].train()
        batch_statistics = chain(x)
        assert not torch.allclose(batch_statistics, fused) and chain[1].num_batches_tracked == 1
        chain.train()
        chain[1].eval()
        del calls[:]
        frozen = chain(x)
        assert calls == ["depthwise_conv2d"]
        assert_same(frozen, layered(chain.eval(), x.clone()))


def test_parametrised_and_foreign_modules_run_by_themselves(calls):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    chain = randomised(fast.FusedSequential(Doubled(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.PReLU()))
    x = input64(2, 6, 7, 7)
    with torch.no_grad():
        y = chain(x)
    assert calls == ["batch_norm_act"]
    assert_same(y, layered(chain, x.clone()))

    chain = randomised(fast.ConvNormAct(6, 6, groups=6, bias=True))
    torch.nn.utils.parametrizations.weight_norm(chain[0])
    with torch.no_grad():
        y = chain(x)
    assert_same(y, layered(chain, x.clone()))


def test_tensors_in_the_place_of_parameters_count():
    x = input64(2, 6, 7, 7)
    for index in range(2):
        chain = randomised(fast.ConvNormAct(6, 6, groups=6, bias=True))
        with torch.no_grad():
            before = chain(x)
            for name in ("weight", "bias"):
                value = 2 * getattr(chain[index], name)
                delattr(chain[index], name)
                setattr(chain[index], name, value)
            after = chain(x)
        assert not torch.allclose(after, before)
        assert_same(after, layered(chain, x.clone()))
        swapped = {"0.bias": torch.ones(6, dtype=x.dtype)} if index else {"1.bias": torch.ones(6, dtype=x.dtype)}
        with torch.no_grad():
            called = torch.func.functional_call(chain, swapped, (x,))
        expected = torch.func.functional_call(chain, swapped, (x.clone().requires_grad_(),)).detach()
        assert_same(called, expected)
        assert not torch.allclose(called, after)


def test_inference_mode(calls):
    with torch.inference_mode():
        block = randomised(fast.InvertedResidual(6, 12, 6, squeeze_channels=4))
        x = input64(2, 6, 7, 7)
        y = block(x)
    assert y.is_inference() and calls == ["pointwise_conv2d", "depthwise_conv2d", "squeeze_excite", "pointwise_conv2d"]


# Blocks


@pytest.mark.parametrize(
    "row",
    [
        (6, 3, 12, 6, True, "HS", 1, 1),
        (6, 5, 6, 6, False, "RE", 1, 1),
        (6, 3, 12, 8, True, "RE", 2, 1),
        (6, 5, 12, 6, False, "HS", 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [3, 12])
def test_inverted_residual_is_torchvisions(row, size, calls):
    mobilenetv3 = import_torchvision().models.mobilenetv3
    channels, kernel_size, expanded, out_channels, squeezes, activation, stride, dilation = row
    config = mobilenetv3.InvertedResidualConfig(*row, width_mult=1.0)
    # The configuration rounds channels to multiples of eight.
    config.input_channels, config.expanded_channels, config.out_channels = channels, expanded, out_channels
    stock = mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)
    activation = {"HS": nn.Hardswish, "RE": "relu"}[activation]
    ours = fast.InvertedResidual(
        channels, expanded, out_channels, kernel_size, stride, dilation, 8 if squeezes else None, activation
    )
    ours, stock = twins(ours, stock)
    x = input64(2, channels, size, size)
    with torch.no_grad():
        assert_same(ours(x), stock(x))
    assert calls.count("depthwise_conv2d") == 1 and calls.count("squeeze_excite") == squeezes
    assert_same_training(ours, stock, x)


@pytest.mark.parametrize("order", ("depthwise_first", "pointwise_first"))
@pytest.mark.parametrize("between", (None, "relu", "silu", "elu"))
@pytest.mark.parametrize("bias", (False, True))
def test_separable_conv2d_in_either_order(order, between, bias):
    options = {"order": order, "activation_between": between}
    ours = randomised(fast.SeparableConv2d(6, 8, 3, 2, 1, bias=bias, activation="hardswish", **options))
    x = input64(2, 6, 9, 7)
    first, last = (ours.depthwise, ours.pointwise) if order == "depthwise_first" else (ours.pointwise, ours.depthwise)
    assert (last.bias is not None) == bias and (first.bias is not None) == (bias and between is not None)

    def conv(layer, x):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    y = conv(first, x)
    expected = F.hardswish(conv(last, y if between is None else getattr(F, between)(y))).detach()
    with torch.no_grad():
        assert_same(ours(x), expected)
    assert_same(ours(x).detach(), expected)
    assert ("pointwise_first" in repr(ours)) == (order == "pointwise_first")


def test_separable_conv_refuses_what_it_has_not():
    with pytest.raises(ValueError, match='^SeparableConv2d: order must be "depthwise_first" or "pointwise_first", got'):
        fast.SeparableConv2d(4, 4, order="sideways")
    with pytest.raises(
        ValueError, match="^SeparableConv2d: depth_multiplier must be 1 with order=.pointwise_first., got 2"
    ):
        fast.SeparableConv2d(4, 4, order="pointwise_first", depth_multiplier=2)
    with pytest.raises(ValueError, match="activation must be .*, got 'tanh'"):
        fast.SeparableConv2d(4, 4, activation_between="tanh")


@pytest.mark.parametrize("layer", (nn.GELU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.PReLU))
def test_activations_with_and_without_an_in_place_form(layer):
    activation = fast.ConvNormAct(3, 4, activation_layer=layer)[-1]
    assert type(activation) is layer and getattr(activation, "inplace", False) == (layer is nn.ELU)


def test_separable_conv2d():
    ours = randomised(fast.SeparableConv2d(6, 8, (3, 5), 2, (1, 2), bias=True, depth_multiplier=2, activation="relu"))
    x = input64(2, 6, 9, 9)
    assert list(ours.state_dict()) == ["depthwise.weight", "pointwise.weight", "pointwise.bias"]
    expected = F.conv2d(x, ours.depthwise.weight, None, 2, (1, 2), groups=6)
    expected = F.relu(F.conv2d(expected, ours.pointwise.weight, ours.pointwise.bias)).detach()
    with torch.no_grad():
        assert_same(ours(x), expected)
    assert_same(ours(x).detach(), expected)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(make):
    model, x = randomised(every_layer()), input64(2, 3, 12, 12)
    twin = make(model)
    assert repr(twin) == repr(model) and "activation=relu6" in repr(model)
    with torch.no_grad():
        expected = model(x)
        assert_same(twin(x), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert_same(model(x), expected)


def test_repr_tells_the_activation():
    assert repr(fast.DepthwiseConv2d(4, 4, 3, activation="silu")) == (
        "DepthwiseConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=4, activation=silu)"
    )
    assert repr(fast.PointwiseConv2d(4, 8)) == "PointwiseConv2d(4, 8, kernel_size=(1, 1), stride=(1, 1))"
    assert repr(fast.BatchNormAct2d(4, activation="relu")).endswith("track_running_stats=True, activation=relu)")
