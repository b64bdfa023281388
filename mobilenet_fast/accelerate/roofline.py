"""How long a step of a network takes on a GPU, by counting: what the planner chooses fused blocks by, and what
measurements are held against.

A step takes as long as its slowest resource: memory, tensor cores, or the instructions of its threads; and a launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .graph import Node
from .passes import is_depthwise


@dataclass(frozen=True)
class Limits:
    """Of a GPU, as far as the kernels here reach it. Bytes, multiply-adds and instructions of single threads a second;
    the defaults are an H100's.
    """

    copy_bytes: float = 2.0e12
    """Reads and writes together: two thirds of what a copy between two tensors in memory reaches."""
    l2_bytes_a_second: float = 3.7e12
    l2_bytes: int = 50 * 2**20
    half_macs: float = 330e12
    """On tensor cores, two thirds of the nominal 495, as large products reach."""
    tf32_macs: float = 165e12
    instructions: float = 15e12
    """132 multiprocessors of 128 lanes at 1.75 GHz, half of the time: registers leave room for eight or twelve warps,
    which all wait at times.
    """
    multiprocessors: int = 132
    launch_seconds: float = 1.5e-6
    """From the end of one kernel to the start of the next in a CUDA graph."""
    load_seconds: float = 0.7e-6
    """Of a program: what it waits for a load from memory, and does with it before the next."""


H100 = Limits()
H200 = Limits(2.8e12)
A100 = Limits(1.1e12, 2.0e12, 40 * 2**20, 104e12, 52e12, 5.4e12, 108, load_seconds=0.9e-6)


def limits_of(device: torch.device) -> Limits:
    """Those of the chip of the table that is most like the device."""
    if device.type != "cuda":
        return H100
    major, _ = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return A100
    return H100 if "H100" in torch.cuda.get_device_name(device) else H200


# Instructions that threads issue for each element, as an H200 counted them (float16, MobileNetV3-Large at batch 256;
# what programs have too many is in): a bias, an activation, a conversion and a share of the pointers.
EPILOGUE = 14
# For each tap: the multiply-add, and a share of the loads, conversions and pointers of what it reads.
TAP = 1.5
# In a block without an expansion, which loads and converts each column anew for every tap.
_TAP_OF_BLOCK = 6.5
# For each element that a fused block expands anew: the product's operands and result, activation, two conversions, the
# border's zero, the multiply-add.
_EXPANDED = 15


@dataclass(frozen=True)
class Work:
    """What a step asks of a GPU."""

    memory_bytes: float
    cached_bytes: float
    """Of tensors small enough to be in the L2 cache since they were written, and of what is read again."""
    macs: float = 0
    """On tensor cores."""
    instructions: float = 0
    turns: int = 1
    """How often a program loads, works and loads again."""
    programs: int = 1
    """Six of them at a time share a multiprocessor, as far as turns count."""
    dtype: torch.dtype = torch.float16

    def parts(self, limits: Limits = H100) -> dict[str, float]:
        """Seconds that each resource would take alone."""
        if self.dtype.itemsize == 8:
            macs = limits.tf32_macs / 8
        else:
            macs = limits.half_macs if self.dtype.itemsize == 2 else limits.tf32_macs
        rounds = -(-self.programs // (6 * limits.multiprocessors))
        return {
            "memory": self.memory_bytes / limits.copy_bytes + self.cached_bytes / limits.l2_bytes_a_second,
            "tensor cores": self.macs / macs,
            "instructions": self.instructions / limits.instructions,
            "latency": self.turns * limits.load_seconds * rounds,
        }

    def seconds(self, limits: Limits = H100) -> float:
        return limits.launch_seconds + max(self.parts(limits).values())

    def bound(self, limits: Limits = H100) -> str:
        """The resource that it waits for most."""
        parts = self.parts(limits)
        return max(parts, key=parts.__getitem__)


def work_of(node: Node, weights_elements: int = 0, limits: Limits = H100, reads: list[Node] | None = None) -> Work:
    """Of a node as one step, which reads ``weights_elements`` of weights, and its inputs or what else it ``reads``."""
    elements = torch.Size(node.shape).numel()
    size = node.dtype.itemsize
    tensors = [torch.Size(n.shape).numel() * size for n in {node, *(node.inputs if reads is None else reads)}]
    cached = sum(each for each in tensors if each <= limits.l2_bytes // 2)
    memory = sum(tensors) - cached + weights_elements * size
    channels = max(1, node.shape[1] if len(node.shape) > 1 else 1)
    macs = instructions = 0.0
    turns = programs = 1
    if is_depthwise(node):
        instructions = elements * (TAP * math.prod(node.attrs["kernel"]) + EPILOGUE)
    elif node.op == "pool2d":
        instructions = elements * (TAP * math.prod(node.attrs["kernel"]) + EPILOGUE)
    elif node.op in ("conv2d", "linear"):
        macs = weights_elements * elements / channels
        instructions = elements * EPILOGUE
    elif node.op == "inverted_residual":
        macs, instructions, again, turns, programs = _block(node)
        cached += again * size
    else:
        instructions = elements * EPILOGUE
    return Work(memory, cached, macs, instructions, turns, programs, node.dtype)


def _block(node: Node) -> tuple[float, float, float, int, int]:
    """Of triton_kernels/inverted_residual.py: multiply-adds on tensor cores, instructions, elements that are read
    again, turns and programs.
    """
    rows, columns = 2, 16
    a, (n, out_channels, h, w) = node.attrs, node.shape
    (kernel_h, kernel_w), stride = a["kernel"], a["stride"][0]
    pixels, hidden = n * h * w, a["hidden"]
    tap = TAP if a["expand"] else _TAP_OF_BLOCK
    instructions = pixels * hidden * (tap * kernel_h * kernel_w + EPILOGUE)
    macs = 0.0
    if a["expand"]:
        # Each tap expands its pixels anew, for the rows of an output that share them.
        anew = kernel_w * ((rows - 1) * stride + kernel_h) / rows
        macs += pixels * hidden * anew * max(16, node.inputs[0].shape[1])
        instructions += pixels * hidden * anew * _EXPANDED * (-(-w // columns) * columns / w)
    # Of what taps expand, registers hold some four at a time.
    loads = max(1, kernel_w * ((rows - 1) * stride + kernel_h) // 4) if a["expand"] else 1
    turns, programs = -(-hidden // 16), n * -(-h // rows) * -(-w // columns)
    again = ((rows - 1) * stride + kernel_h) / (rows * stride) * torch.Size(node.inputs[0].shape).numel()
    if a["project"]:
        macs += pixels * hidden * max(16, out_channels)
        instructions += pixels * out_channels * EPILOGUE
    else:
        turns, programs = 1, programs * turns
    return macs, instructions, again, turns * loads, programs
