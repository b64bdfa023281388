"""Networks without their heads, which give the maps that dense prediction starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..nn.fusion import Chained, Links
from .sizes import check_size


class Outline(NamedTuple):
    """What of a network makes its feature maps.

    ``names`` are its modules in the order of use, from the stem to the last map; ``before`` is what the input goes
    through first, ``behind`` what each map goes through that is given, but not what the network goes on with.
    """

    names: list[str]
    before: Callable[[Tensor], Tensor] | None = None
    behind: Callable[[Tensor], Tensor] | None = None


class Run(Chained):
    """Modules of a network one after another, by name. They stay the network's: this has no parameters."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["network"] = network  # which must not become a child
        self.names = names

    def links(self) -> Links:
        return Links([self.network.get_submodule(name) for name in self.names])


class FeatureMaps(nn.Module):
    """The last map of a network at each stride, 2, 4, 8, 16 and 32, as timm's ``features_only=True`` gives them.

    Modules and state_dict keys are the network's, without what no map needs: the head, and all behind the last map.

    Args:
        network: of a class with an ``outline()``; it is taken apart.
        out_indices: which maps to give, in this order, from 0 for stride 2; None for all.

    Attributes:
        channels: of each map.
        reductions: the stride of each map.

    Shape:
        (N, in_chans, H, W) → a list of (N, channels[i], H', W') with H' and W' about H and W / reductions[i].

    Raises:
        TypeError: ``out_indices`` is no sequence.
        ValueError: there is no map of such an index.
    """

    def __init__(self, network: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.name = getattr(network, "name", type(network).__name__)
        self.least_size = network.least_size
        names, self.before, self.behind = network.outline()
        stages = _split(network, names)
        if out_indices is None:
            out_indices = range(len(stages))
        if not isinstance(out_indices, Sequence):
            raise TypeError(f"{self.name}: out_indices must be a tuple of integers or None, got {out_indices!r}")
        self.out_indices = tuple(out_indices)
        if not self.out_indices or not all(isinstance(i, int) and i in range(len(stages)) for i in self.out_indices):
            raise ValueError(f"{self.name}: out_indices must be from 0 to {len(stages) - 1}, got {self.out_indices}")
        stages = stages[: max(self.out_indices) + 1]
        _keep(network, [name for stage in stages for name in stage])
        self._modules.update(network._modules)
        self.stages = [Run(self, stage) for stage in stages]
        self.channels = tuple(self._count_channels())
        self.reductions = tuple(2 ** (i + 1) for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        check_size(self, x)
        if self.before is not None:
            x = self.before(x)
        maps = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps[i] = x if self.behind is None else self.behind(x)
        return [maps[i] for i in self.out_indices]

    def _count_channels(self) -> list[int]:
        state = {name: torch.empty_like(value, device="meta") for name, value in self.state_dict().items()}
        stem = next(module.weight for module in self.modules() if isinstance(module, nn.Conv2d))
        x = torch.empty(2, stem.size(1), self.least_size, self.least_size, dtype=stem.dtype, device="meta")
        with torch.no_grad():
            return [y.size(1) for y in functional_call(self, state, (x,))]


def _split(network: nn.Module, names: list[str]) -> list[list[str]]:
    """The names of each stage, which ends before the next module of stride 2."""
    stages: list[list[str]] = []
    for name in names:
        if not stages or _strides(network.get_submodule(name)):
            stages.append([])
        stages[-1].append(name)
    return stages


def _strides(module: nn.Module) -> bool:
    return any(getattr(part, "stride", 1) in (2, (2, 2)) for part in module.modules())


def _keep(module: nn.Module, names: list[str]) -> None:
    """Takes from the module what none of the names leads to. What stays in an `nn.Sequential` keeps its number."""
    for name in list(module._modules):
        if name not in names:
            inside = [other.removeprefix(f"{name}.") for other in names if other.startswith(f"{name}.")]
            if inside:
                _keep(module._modules[name], inside)
            else:
                del module._modules[name]
