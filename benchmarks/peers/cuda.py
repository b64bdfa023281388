"""What runs on an NVIDIA GPU: PyTorch in every way in which it may be fastest, and this package.

``cudnn.benchmark`` is on for all. TF32 is as torch has it by default: on for convolutions, off for matrix products.
"""

import copy
import itertools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from benchmarks.peers.registry import Unsupported, channels_last, cuda_peer, same

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default)
CONVOLUTION_RELU = aten.cudnn_convolution_relu.default
LAYOUTS = {"": (same, torch.contiguous_format), " channels_last": (channels_last, torch.channels_last)}


def choose_depthwise(kernel: str) -> None:
    """For the rest of the process, whose kernels PyTorch runs depthwise convolutions by."""
    flags = torch.backends.cudnn
    if not hasattr(flags, "depthwise_kernel"):
        raise Unsupported(f"torch {torch.__version__} leaves no choice of kernels for depthwise convolutions")
    flags.depthwise_kernel = kernel


def eager(layout: str, kernel: str) -> Callable:
    _, memory_format = LAYOUTS[layout]

    def prepare(problem, threads):
        if kernel != "auto":
            choose_depthwise(kernel)
        return copy.deepcopy(problem.module).to(memory_format=memory_format)

    return prepare


# Left to itself, PyTorch takes cuDNN for all that is channels_last.
CHOICES = [("", "auto"), ("", "cudnn"), ("", "native"), (" channels_last", "auto"), (" channels_last", "native")]
for (_layout, _kernel), _graph in itertools.product(CHOICES, (False, True)):
    _name = f"eager{_layout}{'' if _kernel == 'auto' else f' {_kernel}'}{' graph' * _graph}"
    cuda_peer(_name, given=LAYOUTS[_layout][0], graph=_graph)(eager(_layout, _kernel))


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, place: int, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else default


def fold_batch_norms(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The model's ATen operations; convolutions all have a bias, into which batch norm behind them is folded."""
    folded = torch.export.export(model, (x,)).module()
    graph = folded.graph

    def value(node):
        return None if node is None else attrgetter(node.target)(folded)

    for node in list(graph.nodes):
        if node.target not in CONVOLUTIONS:
            continue
        weight, bias = value(node.args[1]), value(argument(node, 2, None))
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        norm = only_user(node)
        if norm is not None and norm.target == aten.batch_norm.default:
            gamma, beta, mean, variance = map(value, norm.args[1:5])
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.args[7], gamma, beta)
            norm.replace_all_uses_with(node)
            graph.erase_node(norm)
        operands = []
        for what, tensor in (("weight", weight), ("bias", bias)):
            name = f"folded_{node.name}_{what}"
            folded.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            with graph.inserting_before(node):
                operands.append(graph.get_attr(name))
        node.args = (node.args[0], *operands, *node.args[3:])
    graph.eliminate_dead_code()
    folded.recompile()
    return folded


def fuse_relus(model: fx.GraphModule, convolution_relu: Callable, grouped: bool = True) -> int:
    """Runs convolutions with a ReLU behind them as one call; returns how many there were.

    Those with a ReLU6 as well: what is above 6 is still cut off by a kernel of its own, but the bias is added for free.
    ``grouped``: depthwise ones too.
    """
    graph, fused = model.graph, 0
    for node in list(graph.nodes):
        fuses = node.target == aten.conv2d.default and (grouped or argument(node, 6, 1) == 1)
        then = only_user(node) if fuses else None
        is_relu = then is not None and then.target in (aten.relu.default, aten.relu_.default)
        is_relu6 = then is not None and then.target in CLAMPS and then.args[1:] == (0.0, 6.0)
        if is_relu or is_relu6:
            stride, padding, dilation = (argument(node, i, d) for i, d in ((3, [1, 1]), (4, [0, 0]), (5, [1, 1])))
            node.target, fused = convolution_relu, fused + 1
            node.args = (*node.args[:3], stride, padding, dilation, argument(node, 6, 1))
        if is_relu:
            then.replace_all_uses_with(node)
            graph.erase_node(then)
    model.recompile()
    return fused


@cuda_peer("cuDNN fused channels_last graph", ("models", "operators"), given=channels_last, graph=True)
def fused_cudnn(problem, threads):
    """Batch norm folded; convolution, bias and ReLU in one call of cuDNN, other activations as kernels of their own."""
    if not hasattr(torch, "cudnn_convolution_relu"):
        raise Unsupported(f"torch {torch.__version__} has no fused convolution")
    if problem.setting.direction != "forward":
        raise Unsupported("forward only")
    x = channels_last(problem.inputs[0])
    for grouped in (True, False):
        model = fold_batch_norms(copy.deepcopy(problem.module), x)
        if not fuse_relus(model, CONVOLUTION_RELU, grouped) and not problem.is_network:
            raise Unsupported("no convolution with ReLU")
        model.to(memory_format=torch.channels_last)
        try:
            model(x)
            return model
        except RuntimeError:  # cuDNN has no fused kernel for all depthwise convolutions
            if not grouped:
                raise


def compiled(mode: str | None) -> Callable:
    def prepare(problem, threads):
        import torch._inductor.config

        torch._inductor.config.freezing = problem.setting.direction == "forward"
        module = copy.deepcopy(problem.module).to(memory_format=torch.channels_last)
        return torch.compile(module, mode=mode)

    return prepare


for _mode in (None, "reduce-overhead", "max-autotune"):
    _name = " ".join(["torch.compile", *([_mode] if _mode else [])])
    cuda_peer(_name, given=channels_last)(compiled(_mode))


@cuda_peer("copy", ("layers", "operators"), is_model=False)
def copy_input(problem, threads):
    """One read and one write of a tensor of the input's size."""
    target = torch.empty_like(problem.inputs[0])
    return lambda x: target.copy_(x)


@cuda_peer("accelerate", ("models",), ours=True)
def accelerate(problem, threads):
    """Runs a CUDA graph of its own, on the image as users have it."""
    import mobilenet_fast

    return mobilenet_fast.accelerate(problem.original, (problem.inputs[0],), dtype=problem.dtype)


def functional(problem, threads):
    if problem.trains:
        if problem.layer is None:
            raise Unsupported("no layer that trains")
        return problem.layer().train()
    if problem.fused is None:
        raise Unsupported("no function of this operation")
    return problem.fused


for _layout, _graph in itertools.product(LAYOUTS, (False, True)):
    _options = {"given": LAYOUTS[_layout][0], "graph": _graph, "ours": True}
    cuda_peer(f"functional{_layout}{' graph' * _graph}", ("layers", "operators"), **_options)(functional)
