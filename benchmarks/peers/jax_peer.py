"""JAX on a GPU: XLA compiles the operations that PyTorch exports, with batch norm folded as for others."""

import functools
import os
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from benchmarks.peers.cuda import fold_batch_norms
from benchmarks.peers.registry import Unsupported, cuda_peer


def jax_module() -> Any:
    # Of the device's memory it would take three quarters at once, which others need.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    return jax


@functools.cache
def operations() -> dict[Any, Callable]:
    """What there is in the models' graphs, in JAX; XLA chooses the layout in memory."""
    import jax.numpy as jnp
    from jax import lax, nn

    aten = torch.ops.aten

    def pair(value):
        return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]

    def convolution(x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        sides = padding.upper() if isinstance(padding, str) else [(p, p) for p in pair(padding)]
        layout = ("NCHW", "OIHW", "NCHW")
        options = {"rhs_dilation": pair(dilation), "dimension_numbers": layout, "feature_group_count": groups}
        return lax.conv_general_dilated(x, weight, pair(stride), sides, **options) + bias[:, None, None]

    def batch_norm(x, weight, bias, mean, variance, training, momentum, eps, cudnn):
        scale = weight * lax.rsqrt(variance + eps)
        return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]

    def window(x, kernel, stride, padding, ceil):
        """Sizes, steps and padding of a pooling's windows: with ``ceil`` the last one may reach beyond the padding."""
        kernel, stride, padding = pair(kernel), pair(stride or kernel), pair(padding)
        sides = []
        for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
            rest = (size + 2 * p - k) % s
            sides.append((p, p + (s - rest if ceil and rest else 0)))
        return (1, 1, *kernel), (1, 1, *stride), ((0, 0), (0, 0), *sides)

    def max_pool(x, kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil=False):
        return lax.reduce_window(x, -jnp.inf, lax.max, *window(x, kernel, stride, padding, ceil))

    def avg_pool(x, kernel, stride=(), padding=(0, 0), ceil=False, count_include_pad=True):
        where = window(x, kernel, stride, padding, ceil)
        if ceil or not count_include_pad:
            raise Unsupported("no average over what windows hold of the map")
        zero = jnp.zeros((), x.dtype)
        return lax.reduce_window(x, zero, lax.add, *where) / (where[0][2] * where[0][3])

    def adaptive_avg_pool(x, size):
        if pair(size) != (1, 1):
            raise Unsupported(f"no adaptive pooling to {tuple(size)}")
        return x.mean((2, 3), keepdims=True)

    def flatten(x, start=0, end=-1):
        end %= x.ndim
        return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])

    def pad(x, sides, mode="constant", value=None):
        pairs = [(sides[i], sides[i + 1]) for i in range(0, len(sides), 2)][::-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=value or 0)

    def same(x, *rest, **options):
        return x

    table = {
        aten.conv2d: convolution,
        aten.batch_norm: batch_norm,
        aten.linear: lambda x, weight, bias=None: x @ weight.T + (0 if bias is None else bias),
        aten.relu: nn.relu,
        aten.hardtanh: lambda x, low=-1, high=1: jnp.clip(x, low, high),
        aten.relu6: nn.relu6,
        aten.hardswish: nn.hard_swish,
        aten.hardsigmoid: nn.hard_sigmoid,
        aten.silu: nn.silu,
        aten.sigmoid: nn.sigmoid,
        aten.add: jnp.add,
        aten.mul: jnp.multiply,
        aten.mean: lambda x, dims, keepdim=False: x.mean(tuple(dims), keepdims=keepdim),
        aten.max_pool2d: max_pool,
        aten.avg_pool2d: avg_pool,
        aten.adaptive_avg_pool2d: adaptive_avg_pool,
        aten.cat: lambda tensors, dim=0: jnp.concatenate(tensors, dim),
        aten.flatten: flatten,
        aten.view: lambda x, shape: x.reshape(shape),
        aten.reshape: lambda x, shape: x.reshape(shape),
        aten.pad: pad,
        aten.dropout: same,
        aten.contiguous: same,
    }
    return table | {getattr(aten, f"{op.__name__}_"): f for op, f in table.items() if hasattr(aten, f"{op.__name__}_")}


def translate(model: fx.GraphModule) -> tuple[Callable, dict[str, Any]]:
    """A function of weights and input, and the weights."""
    weights = {
        node.target: jax_module().dlpack.from_dlpack(attrgetter(node.target)(model).detach().contiguous())
        for node in model.graph.nodes
        if node.op == "get_attr" and isinstance(attrgetter(node.target)(model), torch.Tensor)
    }
    calls = [node for node in model.graph.nodes if node.op == "call_function"]
    unknown = {str(node.target) for node in calls} - {
        str(node.target) for node in calls if getattr(node.target, "overloadpacket", None) in operations()
    }
    if unknown:
        raise Unsupported(f"no translation of {', '.join(sorted(unknown))}")

    def run(weights, x):
        values = {}
        for node in model.graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr" and node.target in weights:
                values[node] = weights[node.target]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = operations()[node.target.overloadpacket](*args, **kwargs)
            elif node.op == "output":
                (result,) = fx.map_arg(node.args, values.__getitem__)
                return result[0] if isinstance(result, (tuple, list)) else result

    return run, weights


def to_jax(tensor: torch.Tensor) -> Any:
    return jax_module().dlpack.from_dlpack(tensor)


def wait(output: Any) -> None:
    """Torch and XLA each have a stream: the times are the host's, until the last of several calls has ended."""
    output.block_until_ready()


@cuda_peer("JAX", ("models",), ("jax", "jaxlib"), to_jax, returned=torch.from_dlpack, wait=wait)
def compiled(problem, threads):
    jax = jax_module()
    if jax.default_backend() != {"cuda": "gpu"}.get(problem.inputs[0].device.type, "cpu"):
        raise Unsupported(f"jax sees no GPU, only {jax.default_backend()}")
    run, weights = translate(fold_batch_norms(problem.module, problem.inputs[0]))
    return functools.partial(jax.jit(run), weights)
