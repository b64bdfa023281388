"""Inverted residual blocks as one step: csrc/steps/inverted_residual.cpp, triton_kernels/inverted_residual.py."""

from __future__ import annotations

from collections.abc import Callable

from .graph import Graph, Node
from .passes import is_depthwise, is_pointwise, only_user

Choice = Callable[[Node | None, Node, Node | None], tuple[Node | None, Node | None]]
"""Of an expansion, a depthwise convolution and a projection that could run as one: the first and last that should."""


def by_cache(least_bytes: int, most_rows_bytes: int) -> Choice:
    """Blocks whose expanded tensor would leave a CPU's cache between the layers.

    ``least_bytes``, of the expanded tensor, is the L2 cache of a core. On smaller maps the layers stay apart: there
    each thread takes a part of the channels, and with them of the weights, while in a fused block each reads all
    weights for its rows, and computes the rows at which threads meet twice. (Half of the cache as the limit was
    2–4 % slower on two threads.) Nor are layers fused where the expanded rows that the filter meets at a time take
    more than ``most_rows_bytes`` and do not stay in the cache, as in dilated convolutions of many channels: 960
    channels on 33² with 5 × 5 taps two apart took 1.6 times as long fused.
    """

    def choose(expand: Node | None, depthwise: Node, project: Node | None) -> tuple[Node | None, Node | None]:
        hidden = depthwise.inputs[0]
        n, c, h, w = hidden.shape
        if c * h * w * hidden.dtype.itemsize < least_bytes:
            return None, None
        reach = (depthwise.attrs["kernel"][0] - 1) * depthwise.attrs["dilation"][0] + 1
        if reach * c * w * hidden.dtype.itemsize > most_rows_bytes:
            expand = None
        return expand, project

    return choose


def fuse_blocks(graph: Graph, choose: Choice) -> None:
    """Expand → depthwise → project, or two of them, as one node where they follow each other and ``choose`` says so."""
    users = graph.users()
    for depthwise in graph.matches(is_depthwise):
        # The means of a squeeze-excite need the whole depthwise output first.
        averaged = any(user.op in ("global_avg_pool", "squeeze_excite") for user in users[depthwise])
        expand, project = depthwise.inputs[0], only_user(graph, users, depthwise)
        if not _is_plain(expand) or "residual" in expand.attrs or only_user(graph, users, expand) is not depthwise:
            expand = None
        if averaged or project is None or not _is_plain(project) or project.inputs[0] is not depthwise:
            project = None
        expand, project = choose(expand, depthwise, project)
        if expand is None and project is None:
            continue
        hidden, last = depthwise.inputs[0], project or depthwise
        x = expand.inputs[0] if expand is not None else hidden
        block = Node(
            "inverted_residual",
            [x, *(project.inputs[1:] if project is not None else [])],
            last.shape,
            last.dtype,
            {
                "expand": expand and expand.attrs["weights"],
                "depthwise": depthwise.attrs["weights"],
                "project": project and project.attrs["weights"],
                "activations": tuple(n.activation if n else "none" for n in (expand, depthwise, project)),
                "hidden": hidden.shape[1],
                **{k: depthwise.attrs[k] for k in ("kernel", "stride", "padding", "dilation")},
            },
            last.name,
        )
        graph.nodes[graph.nodes.index(last)] = block
        graph.replace(last, block)
        graph.remove_dead()
        users = graph.users()


def _is_plain(node: Node) -> bool:
    return node.op == "conv2d" and is_pointwise(node) and "gate" not in node.attrs
