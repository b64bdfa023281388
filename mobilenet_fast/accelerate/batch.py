"""A batch run in parts, so that the maps of a part stay in cache from one layer to the next."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .graph import Graph, Node
from .passes import is_alias

_ROWS = 16
"""Of a matrix product for which it is worth reading the weights."""


def split_batch(graph: Graph, is_native: Callable[[Node], bool], cache_bytes: int, threads: int) -> None:
    """Sets :attr:`Node.parts` of the nodes that run part by part, and their shapes to those of a part.

    A part is one image, or as many small ones as have their largest input and output in ``cache_bytes`` together, the
    L2 cache of a core, and leave a part to each of ``threads``. All nodes with a kernel are split up to the last whose
    product has enough rows in a part: a classifier reads its weights once for the whole batch. Where a node reads what
    is computed part by part elsewhere, or the reverse, a node ``whole`` or ``part`` stands between, the same memory.
    """
    sizes = [node.shape[0] for node in graph.inputs if len(node.shape) > 1] or [1]
    n = max(sizes, key=sizes.count)
    if n < 2:
        return

    def is_batch(node: Node) -> bool:
        return len(node.shape) > 1 and node.shape[0] == n and node.dtype == graph.dtype

    def splits(node: Node) -> bool:
        return is_native(node) and all(map(is_batch, (node, *node.inputs)))

    def image_bytes(node: Node) -> int:
        tensors = {node, *node.inputs} if node.op != "cat" else ()
        return sum(torch.Size(tensor.shape).numel() for tensor in tensors) // n * graph.dtype.itemsize

    def rows(node: Node) -> int:
        tensors = (node,) if "weights" in node.attrs else (node, *node.inputs)
        return max(map(_rows, tensors)) // n

    steps = {node for node in graph.nodes if splits(node)}
    largest = max(map(image_bytes, steps), default=0)
    most = min(cache_bytes // max(1, largest), n // threads)
    size = max(d for d in range(1, max(1, most) + 1) if n % d == 0)
    last = max((i for i, node in enumerate(graph.nodes) if node in steps and rows(node) * size >= _ROWS), default=-1)
    if size == n or last < 0:
        return

    # Steps of one run follow each other, with none between them that needs the whole batch.
    run, runs = 1, {}
    for i, node in enumerate(graph.nodes):
        if i <= last and node in steps:
            runs[node] = run
        elif is_alias(node) and is_batch(node) and node.inputs[0] in runs:
            runs[node] = runs[node.inputs[0]]
        elif node.op != "input":
            run += 1
    nodes, bridges = [], {}
    for node in graph.nodes:
        for i, source in enumerate(node.inputs):
            if runs.get(source) == runs.get(node):
                continue
            key = (source, runs.get(node))
            if key not in bridges:
                shape, dtype = (n, *source.shape[1:]), source.dtype
                if node in runs:
                    bridge = Node("part", [source], (size, *shape[1:]), dtype, name=source.name, parts=n // size)
                else:
                    bridge = Node("whole", [source], shape, dtype, name=source.name)
                bridges[key] = bridge
                nodes.append(bridge)
            node.inputs[i] = bridges[key]
        nodes.append(node)
        if node in runs:
            node.shape, node.parts = (size, *node.shape[1:]), n // size
    graph.nodes = nodes


def _rows(node: Node) -> int:
    """Of the matrix that the tensor is in the engine."""
    channels = node.shape[1] if len(node.shape) == 4 else node.shape[-1]
    return torch.Size(node.shape).numel() // max(1, channels)
