"""Outputs that hold dataclasses, which torch.export and pytrees do not look into."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree


def holds_dataclass(value: Any) -> bool:
    return any(map(_is_dataclass, pytree.tree_leaves(value)))


class Structure:
    """How a value's leaves are arranged, those in dataclasses too; to that extent, a ``pytree.TreeSpec``."""

    def __init__(self, value: Any):
        leaves, self._spec = pytree.tree_flatten(value)
        self._parts = [(type(leaf), Structure(_fields(leaf))) if _is_dataclass(leaf) else None for leaf in leaves]
        self.num_leaves = sum(1 if part is None else part[1].num_leaves for part in self._parts)

    def is_leaf(self) -> bool:
        return False

    def unflatten(self, leaves: list[Any]) -> Any:
        rest = iter(leaves)
        values = []
        for part in self._parts:
            if part is None:
                values.append(next(rest))
                continue
            kind, fields = part
            value = object.__new__(kind)  # a frozen one, or one that computes fields, as it was
            for name, field in fields.unflatten([next(rest) for _ in range(fields.num_leaves)]).items():
                object.__setattr__(value, name, field)
            values.append(value)
        return self._spec.unflatten(values)


class Flattened(nn.Module):
    """A model that returns the leaves of its outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        return _leaves(self.model(*args, **kwargs))


def _leaves(value: Any) -> list[Any]:
    leaves = []
    for leaf in pytree.tree_leaves(value):
        leaves += _leaves(_fields(leaf)) if _is_dataclass(leaf) else [leaf]
    return leaves


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
