"""A problem as a GPU's peers get it: on the device, in the dtype and batch, and with gradients where they are wanted.

What they are held to is float64 from the float32 weights, computed on the device as well, a few images at a time, and
kept nowhere: the processes of all peers share the device's memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import DTYPES, Problem, Setting, traffic

# Of all inputs together, or two of them where that is more: caches shall not hold them, memory shall.
INPUT_BYTES = 512 * 2**20
# Of the part of an input that float64 takes at once.
CHUNK_ELEMENTS = 2**24


@contextmanager
def not_searched() -> Iterator[None]:
    """Without cuDNN's search for the fastest kernel, which takes seconds a layer in float64."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class PlacedProblem:
    """`Problem` with the same names: ``module`` and ``inputs`` in the setting's dtype, ``original`` in float32."""

    def __init__(self, problem: Problem, setting: Setting, device: torch.device | str):
        self.setting, self.dtype = setting, DTYPES[setting.dtype]
        self.trains = setting.direction == "training"
        self.wants_input = setting.direction in ("forward+input", "forward+both", "training")
        self.wants_weight = setting.direction in ("forward+weight", "forward+both", "training")
        # What the functions of `fused` read are the tensors of this very module.
        self.module = problem.module.to(device).train(self.trains).requires_grad_(False)
        self.original = copy.deepcopy(self.module)
        self.module.to(self.dtype)
        self.fused, self.layer = problem.fused, problem.layer
        if self.wants_weight:
            for module in (self.module, self.original):
                for name, parameter in module.named_parameters():
                    # A convolution with a batch norm behind it has no bias.
                    parameter.requires_grad_(self.trains or name.endswith("weight"))
        self.double = copy.deepcopy(self.original).double()
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        shape = setting.batch, *problem.inputs[0].shape[1:]
        size = self.dtype.itemsize * torch.Size(shape).numel()
        self.inputs = [noise(*shape) for _ in range(min(4, max(2, INPUT_BYTES // size)))]
        with torch.no_grad():
            output = copy.deepcopy(self.module)(self.inputs[0])
        self.grad_output = noise(*output.shape) if self.wants_input or self.wants_weight else None
        self.macs, self.bytes = self._cost(output)
        errors = [self._error(x, self.call(self.module, x)) for x in self.leaves(self.inputs[:2])]
        self.eager_error = torch.stack(errors).amax().item()

    def _cost(self, output: Tensor) -> tuple[int, int]:
        """Multiply-adds, and bytes of memory traffic if nothing is read or written twice.

        Of a network, those of its convolutions and linear layers, each of which reads its input and weight and writes
        its output; of a layer, those of its input, weights and output, and of their gradients.
        """
        macs, layers = traffic(copy.deepcopy(self.module), self.inputs[0])
        if self.is_network:
            return macs, layers
        x, y = (t.numel() * t.element_size() for t in (self.inputs[0], output))
        weights = sum(t.numel() * t.element_size() for t in self.module.state_dict().values() if t.dim())
        size = x + weights + y
        if self.trains:  # x, and the output's gradient; the input's
            return macs, size + x + y + x
        if self.wants_input or self.wants_weight:
            size += y
        if self.wants_input:
            size += weights + x
        if self.wants_weight:
            size += x + weights
        return macs * (1 + self.wants_input + self.wants_weight), size

    @property
    def is_network(self) -> bool:
        return self.fused is None and sum(isinstance(m, nn.Conv2d) for m in self.module.modules()) > 1

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs as leaves that gradients are asked of, if they are."""
        return [x.detach().requires_grad_(self.wants_input) for x in inputs]

    def call(self, run: Callable[[Any], Any], x: Tensor, grad_output: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is timed: the output and the gradients of the setting's direction, the input's before the weights'."""
        if not (self.wants_input or self.wants_weight):
            with torch.no_grad():
                return (run(x),)
        grad_output = self.grad_output if grad_output is None else grad_output
        module = run if isinstance(run, nn.Module) else self.module
        with torch.enable_grad():
            y = run(x)
            wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
            return (y.detach(), *torch.autograd.grad(y, wanted, grad_output))

    def _exact(self, x: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """For some images after others, what `call` gives in float64."""
        count = len(x) if self.trains else max(1, CHUNK_ELEMENTS // x[0].numel())
        for start in range(0, len(x), count):
            here = slice(start, start + count)
            (part,) = self.leaves([x[here].double()])
            grad_output = None if self.grad_output is None else self.grad_output[here].double()
            with not_searched():
                exact = self.call(self.double, part, grad_output)
            yield here, exact

    def _error(self, x: Tensor, output: tuple[Tensor, ...]) -> Tensor:
        of_images = 1 + self.wants_input  # the others are sums over all
        difference, largest = torch.zeros(2, len(output), dtype=torch.float64, device=x.device)

        def compare(i: int, got: Tensor, exact: Tensor) -> None:
            if got.shape != exact.shape:
                raise AssertionError(f"wrong shape: {tuple(got.shape)}, not {tuple(exact.shape)}")
            for values, new in ((difference, got - exact), (largest, exact)):
                values[i] = torch.maximum(values[i], new.abs().amax())

        sums: list[Tensor] = []
        for here, exact in self._exact(x):
            for i in range(of_images):
                compare(i, output[i][here], exact[i])
            sums = [a + b for a, b in zip(sums, exact[of_images:], strict=True)] if sums else list(exact[of_images:])
        for i, exact in enumerate(sums, of_images):
            compare(i, output[i], exact)
        return (difference / largest).amax()

    def error_of(self, outputs: list[Tensor | tuple[Tensor, ...]]) -> float:
        """The largest error of what `call` gave for the first inputs, as a share of the largest; NaN if any is."""
        outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
        return torch.stack([self._error(x, y) for x, y in zip(self.inputs, outputs, strict=False)]).amax().item()

    def allowed(self, tolerance: float = 4) -> float:
        return max(1e-5, tolerance * self.eager_error)

    def release(self) -> None:
        """Gives back what only set-up and comparison need."""
        self.original = self.double = None
        self.inputs = []
