"""The rewrites between capture and plan, each a small function over :class:`~mobilenet_fast.accelerate.graph.Graph`.

After :func:`optimise` every node is one step of the plan, or an alias. A node that took others in has lost its
``call``: it can no longer run through ATen, so a pass only builds what the kernels serve.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .graph import BatchNorm, Call, Graph, Node, Weights


def optimise(graph: Graph) -> Graph:
    for rewrite in (
        drop_neutral_numbers,
        recognise_activations,
        fuse_padding,
        split_groups,
        distribute_over_cat,
        fold_into_weights,
        recognise_squeeze_excite,
        recognise_gates,
        fuse_residual_and_activation,
        fuse_gate,
        own_outputs,
    ):
        rewrite(graph)
        graph.remove_dead()
    return graph


def is_depthwise(node: Node) -> bool:
    """Whether this is a depthwise convolution of multiplier one."""
    return node.op == "conv2d" and node.attrs["groups"] == node.inputs[0].shape[1] == node.shape[1] > 1


def is_dense(node: Node) -> bool:
    return node.op == "conv2d" and node.attrs["groups"] == 1


def is_pointwise(node: Node) -> bool:
    a = node.attrs
    return is_dense(node) and a["kernel"] == (1, 1) and a["stride"] == (1, 1) and not any(a["padding"])


def has_kernel(node: Node) -> bool:
    """Whether this is a convolution or linear layer that runs on a kernel of ours."""
    return node.op == "linear" or is_dense(node) or is_depthwise(node)


def only_user(graph: Graph, users: dict[Node, list[Node]], node: Node) -> Node | None:
    """The one reader of a node that is no output."""
    if len(users[node]) != 1 or node in graph.output_nodes():
        return None
    return users[node][0]


def drop_neutral_numbers(graph: Graph) -> None:
    """x + 0 and x · 1 are x."""
    for node in graph.nodes:
        if (node.op, node.attrs.get("value")) in (("add_scalar", 0), ("mul_scalar", 1)):
            graph.replace(node, node.inputs[0])


def recognise_activations(graph: Graph) -> None:
    """x·relu6(x + 3)/6, relu6(x + 3)/6 in whatever order they are written, x·hardsigmoid(x) and x·sigmoid(x)."""

    def sixth(node: Node) -> bool:
        return node.op == "mul_scalar" and math.isclose(node.attrs["value"], 1 / 6, rel_tol=1e-6)

    def relu6_of_plus_3(node: Node) -> Node | None:
        if node.op == "activation" and node.activation == "relu6":
            inner = node.inputs[0]
            if inner.op == "add_scalar" and inner.attrs["value"] == 3:
                return inner.inputs[0]
        return None

    def become(node: Node, activation: str, x: Node) -> None:
        node.op, node.inputs, node.attrs = "activation", [x], {"activation": activation}

    for node in graph.nodes:
        if sixth(node):
            inner = node.inputs[0]
            x = relu6_of_plus_3(inner)
            if x is not None:
                become(node, "hardsigmoid", x)
            elif inner.op == "mul":
                for a, b in (inner.inputs, inner.inputs[::-1]):
                    if relu6_of_plus_3(b) is a:
                        become(node, "hardswish", a)
        elif node.op == "mul":
            for a, b in (node.inputs, node.inputs[::-1]):
                if b.op == "activation" and b.inputs[0] is a and b.activation in ("hardsigmoid", "sigmoid"):
                    become(node, "hardswish" if b.activation == "hardsigmoid" else "silu", a)
                    break
                if sixth(a) and relu6_of_plus_3(b) is a.inputs[0]:  # (x / 6) · relu6(x + 3)
                    become(node, "hardswish", a.inputs[0])
                    break


def fuse_padding(graph: Graph) -> None:
    """Zero padding before a convolution becomes the convolution's own."""
    for node in graph.nodes:
        if has_kernel(node) and node.inputs[0].op == "pad":
            pad = node.inputs[0]
            node.attrs["padding"] = tuple(
                a + b for a, b in zip(node.attrs["padding"], pad.attrs["padding"], strict=True)
            )
            node.inputs = [pad.inputs[0]]
            del node.attrs["call"]


# Of a group's inputs and outputs: with fewer, vectors of a product would be mostly empty.
_LEAST_CHANNELS = 16


def split_groups(graph: Graph) -> None:
    """A convolution in wide groups becomes one for each, of some of the channels."""
    for conv in graph.matches(lambda n: n.op == "conv2d" and not has_kernel(n)):
        x, weights, groups = conv.inputs[0], conv.attrs["weights"], conv.attrs["groups"]
        c, k = x.shape[1] // groups, conv.shape[1] // groups
        if min(c, k) < _LEAST_CHANNELS:
            continue
        attrs = {name: value for name, value in conv.attrs.items() if name != "call"} | {"groups": 1}
        position, parts = graph.nodes.index(conv), []
        for i in range(groups):
            call = Call(torch.ops.aten.slice.Tensor, [x, 1, i * c, (i + 1) * c, 1])
            shape = (x.shape[0], c, *x.shape[2:])
            channels = Node("channels", [x], shape, x.dtype, {"call": call, "start": i * c}, f"{x.name}_{i}")
            own = [_some(graph, name, i * k, (i + 1) * k) for name in (weights.weight, weights.bias)]
            shape = (conv.shape[0], k, *conv.shape[2:])
            part = Node("conv2d", [channels], shape, conv.dtype, attrs | {"weights": Weights(*own)}, f"{conv.name}_{i}")
            graph.nodes[position:position] = channels, part
            position += 2
            parts.append(part)
        cat = Node("cat", parts, conv.shape, conv.dtype, name=conv.name)
        graph.nodes[position] = cat
        graph.replace(conv, cat)


def distribute_over_cat(graph: Graph) -> None:
    """A batch norm or an activation of concatenated convolutions goes to each of them."""
    users = graph.users()

    def is_distributed(node: Node) -> bool:
        cat = node.inputs[0] if node.inputs else None
        return (
            (node.op == "activation" or is_affine(node))
            and cat.op == "cat"
            and only_user(graph, users, cat) is node
            and all(only_user(graph, users, s) is cat and (has_kernel(s) or is_affine(s)) for s in cat.inputs)
        )

    for node in graph.matches(is_distributed):
        cat, start = node.inputs[0], 0
        position = graph.nodes.index(cat)
        for i, source in enumerate(cat.inputs):
            end = start + source.shape[1]
            attrs = {"activation": node.activation}
            if node.op == "batch_norm":
                attrs = {"batch_norm": _some_channels(graph, node.attrs["batch_norm"], start, end)}
            part = Node(node.op, [source], source.shape, source.dtype, attrs, f"{node.name}_{i}")
            graph.nodes.insert(position + i, part)
            cat.inputs[i] = part
            start = end
        graph.replace(node, cat)
        graph.nodes.remove(node)
        users = graph.users()


def _some_channels(graph: Graph, norm: BatchNorm, start: int, end: int) -> BatchNorm:
    names = (norm.weight, norm.bias, norm.mean, norm.var)
    return BatchNorm(*(_some(graph, name, start, end) for name in names), norm.eps)


def _some(graph: Graph, name: str | None, start: int, end: int) -> str | None:
    """The name that some rows of a constant get."""
    if name is None:
        return None
    part = f"{name}[{start}:{end}]"
    graph.constants[part] = graph.constants[name][start:end]
    return part


def fold_into_weights(graph: Graph) -> None:
    """A batch norm or a factor after a convolution or linear layer goes into its weights."""
    users = graph.users()
    for conv in graph.matches(has_kernel):
        while (after := only_user(graph, users, conv)) is not None:
            if after.op == "batch_norm" and len(conv.shape) != 3:
                factor = after.attrs["batch_norm"]
            elif after.op == "mul_scalar" and after.dtype == conv.dtype:
                factor = after.attrs["value"]
            else:
                break
            weights = conv.attrs["weights"]
            conv.attrs["weights"] = replace(weights, folded=(*weights.folded, factor))
            _absorb(graph, conv, after)
            users = graph.users()


def recognise_squeeze_excite(graph: Graph) -> None:
    """pool → layer → activation → layer → activation, however the layers are written, becomes one node: the gate."""
    users = graph.users()

    def next_of(node: Node) -> Node | None:
        """The only reader, past reshapes among (N, C), (N, C, 1) and (N, C, 1, 1)."""
        following = only_user(graph, users, node)
        while following is not None and following.op == "reshape" and _is_vector(following, node.shape[:2]):
            following = only_user(graph, users, following)
        return following

    def is_layer(node: Node | None) -> bool:
        if node is None or len(node.inputs[0].shape) == 3:  # whose last dimension a layer takes for channels
            return False
        return is_pointwise(node) or node.op == "linear"

    for pool in graph.matches(lambda n: n.op == "global_avg_pool"):
        chain = [pool]
        while len(chain) < 5:
            node = next_of(chain[-1])
            wanted = is_layer(node) if len(chain) % 2 else node is not None and node.op == "activation"
            if not wanted:
                break
            chain.append(node)
        if len(chain) < 5:
            continue
        _, first, squeeze, second, gate = chain
        if gate.shape[1] != pool.shape[1]:
            continue  # a classifier
        gate.attrs = {
            "weights1": first.attrs["weights"],
            "weights2": second.attrs["weights"],
            "squeeze_activation": squeeze.activation,
            "gate_activation": gate.activation,
        }
        gate.op, gate.inputs = "squeeze_excite", [pool.inputs[0]]


def _is_vector(node: Node, shape: tuple[int, ...]) -> bool:
    """(N, C), (N, C, 1) or (N, C, 1, 1), which are the same in memory."""
    return node.shape[:2] == shape and all(size == 1 for size in node.shape[2:])


def is_alias(node: Node) -> bool:
    """Whether a reshape leaves memory as it is: neither side is an image of several pixels, which is channels_last."""
    if node.op != "reshape":
        return False
    return all(len(n.shape) != 4 or n.shape[2:] == (1, 1) for n in (node, node.inputs[0]))


def recognise_gates(graph: Graph) -> None:
    """A product of (N, C, H, W) with (N, C, 1, 1) is a gate."""
    for node in graph.matches(lambda n: n.op == "mul" and len(n.shape) == 4):
        for x, gate in (node.inputs, node.inputs[::-1]):
            if gate.op == "expand":
                gate = gate.inputs[0]
            if x.shape == node.shape and gate.shape == (*node.shape[:2], 1, 1):
                node.op, node.inputs, node.attrs = "gate", [x, gate], {}
                break


def fuse_residual_and_activation(graph: Graph) -> None:
    """The sum with a residual and the activation go into the epilogue of what computes their input."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    users = graph.users()
    for node in list(graph.nodes):
        if node.op == "add" and node.inputs[0].shape == node.inputs[1].shape:
            # The later of the two computes the sum, when the other is there already.
            for host, other in sorted((node.inputs, node.inputs[::-1]), key=lambda pair: -position[pair[0]]):
                takes_residual = is_dense(host) or (host.op == "linear" and len(host.shape) == 2)
                if not takes_residual or host is other or position[other] > position[host]:
                    continue
                if only_user(graph, users, host) is not node or host.activation != "none" or len(host.inputs) > 1:
                    continue
                host.inputs = [*host.inputs, other]
                host.attrs["residual"] = True
                _absorb(graph, host, node)
                users = graph.users()
                break
        elif node.op == "activation":
            host = node.inputs[0]
            takes_activation = has_kernel(host) or host.op == "gate" or is_affine(host) or is_sum(host)
            if takes_activation and host.activation == "none" and only_user(graph, users, host) is node:
                host.attrs["activation"] = node.activation
                _absorb(graph, host, node)
                users = graph.users()


def is_affine(node: Node) -> bool:
    """A batch norm on images that is a step of its own."""
    return node.op == "batch_norm" and len(node.shape) == 4


def is_sum(node: Node) -> bool:
    return node.op == "add" and node.inputs[0].shape == node.inputs[1].shape


def _absorb(graph: Graph, host: Node, node: Node) -> None:
    host.attrs.pop("call", None)
    graph.replace(node, host)
    graph.nodes.remove(node)


def fuse_gate(graph: Graph) -> None:
    """A gated tensor that only a pointwise convolution reads is multiplied as that reads it."""
    users = graph.users()
    for gate in graph.matches(lambda n: n.op == "gate" and n.activation == "none"):
        conv = only_user(graph, users, gate)
        if conv is None or not is_pointwise(conv) or conv.inputs[0] is not gate:
            continue
        if gate in conv.inputs[1:]:
            continue
        conv.inputs = [gate.inputs[0], *conv.inputs[1:], gate.inputs[1]]
        conv.attrs["gate"] = True
        conv.attrs.pop("call", None)
        users = graph.users()


def own_outputs(graph: Graph) -> None:
    """No output is an input, nor another output: they are the caller's to write to."""
    seen = set(graph.inputs)
    for i, output in enumerate(graph.outputs):
        if not isinstance(output, Node):
            continue
        if output in seen:
            call = Call(torch.ops.aten.clone.default, [output, None])
            output = Node("aten", list(call.inputs), output.shape, output.dtype, {"call": call}, f"{output.name}_copy")
            graph.nodes.append(output)
            graph.outputs[i] = output
        seen.add(output)
