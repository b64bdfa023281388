"""Chains of modules run as few kernel calls.

A chain is planned once, from its structure: which modules there are, of which classes, with which attributes, modes and
hooks. At every call the structure is compared with the plan's, in a third of a microsecond a module, and a plan that no
longer holds is made anew; parameters and statistics are read at every call. So whatever is changed, in whatever way,
counts from the next call on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import _PLAIN_TYPES
from .dispatch import HOOKS, activation_of, has_global_hooks, is_eager, is_known_type, known, takes_input, unhooked
from .squeeze_excite import SqueezeExcitation
from .steps import Shortcut, Step, make_step
from .training import TrainingBlock, suggests_channels_last, training_parts, why_not_trained


class Links(NamedTuple):
    """What a chain runs: its modules in the order of use; whether what goes into the first is added in the end."""

    modules: list[nn.Module]
    adds_input: bool = False


class RunsChains(nn.Module):
    """A module whose calls run chains by `run_chain`."""

    def chains(self) -> list[Links]:
        raise NotImplementedError


class Chained(RunsChains):
    """A module that runs others one after another, as few kernel calls where that makes no other difference.

    That is in eager mode, for tensors that `mobilenet_fast.functional` has kernels for, and with modules that have no
    hooks. Where no gradient is needed and batch norm uses its running statistics, a convolution with what follows is
    one call. Where gradients are needed, on the CPU, neighbouring depthwise and 1x1 convolutions, batch norms and
    activations are one function of autograd, which keeps what its convolutions gave and no more, in float32 under
    autocast; on GPUs batch norms take the activations behind them. Everything else, inference under autocast among it,
    runs module by module. Chains in chains become one, which works on channels_last tensors whatever it takes and
    gives.
    """

    def links(self) -> Links | None:
        """Asked at every call; None if `plain_forward` is to run."""
        raise NotImplementedError

    def chains(self) -> list[Links]:
        links = self.links()
        return [] if links is None else [links]

    def plain_forward(self, input):
        modules, adds_input = self.links()
        x = input
        for module in modules:
            x = module(x)
        return x + input if adds_input else x

    def forward(self, input):
        return run_chain(self, self.links, self.plain_forward, input)


PLANS = ("_plan", "_training_plan")
"""The attributes of modules that chains keep their plans in, without the prefix that a second chain's have."""


def run_chain(owner: nn.Module, links: Callable[[], Links | None], plain: Callable, input, prefix: str = ""):
    """The chain of ``links()``, all of them modules of ``owner``, or ``plain(input)`` where that is None, or no kernel
    serves. Its plans are kept in the owner's `PLANS`.
    """
    if is_eager(casts=True) and type(input) in _PLAIN_TYPES and not has_global_hooks():
        chain = links()
        learns = _learns(owner, input)
        if chain is not None and (learns or is_eager()):
            name, kind = (prefix + PLANS[learns], TrainingPlan if learns else Plan)
            plan = owner.__dict__.get(name)
            if plan is None or not plan.holds(chain):
                plan = owner.__dict__[name] = kind(chain)
            if plan.fuses:
                return plan(input)
    return plain(input)


@known
class FusedSequential(Chained, nn.Sequential):
    """An `nn.Sequential` that runs neighbouring convolution (depthwise or 1x1), batch norm and activation as one
    kernel call, and whatever it finds of these in the `FusedSequential`s and blocks inside it.

    It does so as `Chained` says, and runs everything else child after child. In half precision on
    GPUs, batch norms may keep their parameters and statistics in float32.

    Args:
        *args: as `nn.Sequential` takes them.
    """

    def links(self) -> Links:
        return Links(list(self._modules.values()))


class Plan:
    """A chain's steps, and the structure that they were made for. Copies and pickles are None."""

    def __init__(self, links: Links) -> None:
        _keep_freed_memory()
        self.links = links
        self.watched: list[nn.Module] = []
        self.states: list[dict] = []
        self.hooked: list[nn.Module] = []
        self.foreign: list[nn.Module] = []
        self.parts = self.arrange(list(self._flatten(links.modules)))
        if links.adds_input:
            self.parts = [self.whole(self.parts) or Shortcut(self.parts)]
        self.kinds = list(map(type, self._seen()))
        self.fuses = any(part.fuses for part in self.parts)

    def arrange(self, modules: list[nn.Module | Step]) -> list[Step]:
        """Modules, and blocks that `whole` made, as the parts that are called one after another."""
        return _parts(modules)

    def whole(self, parts: list[Step]) -> Step | None:
        """A block, which adds its input to what the parts give, if one step can do that."""
        return _whole(parts)

    def __reduce__(self):
        return type(None), ()

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def holds(self, links: Links) -> bool:
        """Whether this is still the plan for a chain of these links."""
        try:
            return (
                links == self.links
                and list(map(type, self._seen())) == self.kinds
                and list(map(vars, self.watched)) == self.states
                and not any(map(unhooked, self.hooked))
            )
        except Exception:
            # Someone's attributes that can't be compared, such as tensors.
            return False

    def _seen(self) -> list[nn.Module]:
        return self.watched + self.hooked + self.foreign

    def _watch(self, module: nn.Module) -> None:
        """The plan holds while the module's attributes stay: each the same, children and hooks one by one."""
        state = dict(vars(module))
        for name in ("_modules", *HOOKS):
            state[name] = dict(state[name])
        self.watched.append(module)
        self.states.append(state)

    def _flatten(self, modules: list[nn.Module]) -> Iterator[nn.Module | Step]:
        """The modules in the order of use, with those of chains in the place of the chains."""
        for module in modules:
            if not (is_known_type(type(module)) or activation_of(type(module)) is not None):
                self.foreign.append(module)
                yield module
            elif not unhooked(module):
                self.hooked.append(module)
                yield module
            elif isinstance(module, Chained):
                yield from self._flatten_chain(module)
            else:
                for part in module.modules():
                    self._watch(part)
                if type(module) is not nn.Identity:
                    yield module

    def _flatten_chain(self, chain: Chained) -> Iterator[nn.Module | Step]:
        links = chain.links()
        self._watch(chain)
        for child in chain.children():
            # What is not run may decide about the rest.
            if links is None or child not in links.modules:
                self._watch(child)
        modules = [chain] if links is None else list(self._flatten(links.modules))
        if links is None or not links.adds_input:
            yield from modules
        else:
            # Among foreign modules a block is run by its own plan.
            block = self.whole(self.arrange(modules))
            yield chain if block is None else block


class _Segment(Step):
    """Neighbouring steps on tensors that nobody else sees."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.fuses = any(step.fuses for step in steps)
        self.convs = [m for step in _unrolled(steps) for m in step.modules if isinstance(m, nn.Conv2d)]
        self.converts = any(step.fuses and isinstance(step.modules[0], nn.Conv2d) for step in _unrolled(steps))

    def plain(self, x, residual: Tensor | None = None):
        y = x
        for step in self.steps:
            y = step.plain(y)
        return y if residual is None else y + residual

    def __call__(self, x, residual: Tensor | None = None):
        # Under autocast of CUDA, layers run one by one, for the casts between them.
        if not takes_input(x) or x.numel() == 0 or (x.is_cuda and torch.is_autocast_enabled("cuda")):
            return self.plain(x, residual)
        # The layout that F.conv2d gives is channels_last if any operand's is; inside, it always is.
        stays = not self.converts or x.is_contiguous(memory_format=torch.channels_last) or torch.is_grad_enabled()
        y = x if stays else x.contiguous(memory_format=torch.channels_last)
        for step in self.steps:
            y = step(y)
        if not stays and not any(map(suggests_channels_last, (x, *(conv.weight for conv in self.convs)))):
            y = y.contiguous()
        return y if residual is None else y + residual


class TrainingPlan(Plan):
    """The plan where gradients are needed: its steps are whole blocks of convolutions, norms and activations."""

    def arrange(self, modules: list[nn.Module | Step]) -> list[Step]:
        return training_parts(modules)

    def whole(self, parts: list[Step]) -> Step | None:
        return parts[0].plus_input() if len(parts) == 1 and isinstance(parts[0], TrainingBlock) else None


class TrainingPart(NamedTuple):
    """One line of `training_report`: modules that run one after another in training on the CPU."""

    modules: tuple[str, ...]
    """as in ``model.named_modules()``, in the order of use"""
    is_block: bool
    """whether one function of autograd runs them"""
    adds_input: bool
    """whether that also adds the block's input"""
    reason: str
    """why a module is part of no block; empty for blocks"""


def training_report(model: nn.Module) -> list[TrainingPart]:
    """What would train as blocks if ``model`` were called now, and what module by module, and why.

    That is on the CPU in float32 or float64, in eager mode; it depends on hooks, modes and frozen
    parameters, which are looked at again at every call. Modules inside of those that are not known are reported too.

    Args:
        model: with layers of `mobilenet_fast.nn`, its own or by `replace_layers`.

    Returns:
        A line for each block, and for each layer outside of blocks that has parameters or a kernel, or is an activation
        in a chain.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"training_report: model must be an nn.Module, got {type(model).__name__}")
    names = {id(module): name for name, module in model.named_modules()}
    rows: list[TrainingPart] = []

    def alone(module: nn.Module, reason: str) -> None:
        if reason and (module._parameters or isinstance(module, SqueezeExcitation) or _may_be_activation(module)):
            rows.append(TrainingPart((names[id(module)],), False, False, reason))

    def visit_parts(parts: list[Step]) -> None:
        for part in parts:
            if isinstance(part, TrainingBlock):
                rows.append(TrainingPart(tuple(names[id(m)] for m in part.modules), True, part.adds_input, ""))
            elif isinstance(part, Shortcut):
                visit_parts([*part.first, part.last])
            else:
                for module in part.modules:
                    visit(module, True)

    def visit(module: nn.Module, in_chain: bool) -> None:
        chains = module.chains() if isinstance(module, RunsChains) and "forward" not in vars(module) else []
        if chains:
            run = [part for links in chains for part in links.modules]
            for links in chains:
                visit_parts(TrainingPlan(links).parts)
            for child in module.children():
                if child not in run:
                    visit(child, False)
        elif is_known_type(type(module)) and not isinstance(module, RunsChains):
            alone(module, why_not_trained(module) if in_chain else "it is called by a module that is not known")
        else:
            if in_chain and not isinstance(module, RunsChains):
                alone(module, why_not_trained(module))
            for child in module.children():
                visit(child, False)

    visit(model, False)
    return rows


def _may_be_activation(module: nn.Module) -> bool:
    """One of PyTorch's that no kernel has, or a leaf of one's own."""
    where = type(module).__module__
    own = not where.startswith(("torch.", "torchvision.", "timm.", "mobilenet_fast.")) and not module._modules
    return own or where == "torch.nn.modules.activation"


def _learns(chain: nn.Module, input: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in chain.parameters()))


def _parts(modules: list[nn.Module | _Segment]) -> list[Step]:
    """Segments, and between them what a chain knows nothing about."""
    parts: list[Step] = []
    steps: list[Step] = []
    position = 0
    while position < len(modules):
        module = modules[position]
        if isinstance(module, _Segment):
            step = module.steps[0]
            position += 1
        else:
            step, position = make_step(modules, position)
        if step is not None:
            steps.append(step)
            continue
        if steps:
            parts.append(_Segment(steps))
            steps = []
        parts.append(Step(module))
    return [*parts, _Segment(steps)] if steps else parts


def _whole(parts: list[Step]) -> _Segment | None:
    """A block, which adds its input to what the parts give, if they are one segment."""
    return _Segment([Shortcut(parts[0].steps)]) if len(parts) == 1 and isinstance(parts[0], _Segment) else None


def _unrolled(steps: list[Step]) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, Shortcut):
            yield from _unrolled([*step.first, step.last])
        else:
            yield step


@functools.cache
def _keep_freed_memory() -> None:
    """Stops a forward from getting its memory anew from the system, page by page, which takes a quarter of its time.

    glibc hands back the heap's free end when it exceeds twice the largest block that was ever freed, at most 32 MiB. So
    one such block is freed; it is never touched, and elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)
