"""Models by name, and weights from wherever they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]
Weights = str | os.PathLike | StateDict

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Lets `create_model` find the function by its name."""
    _BUILDERS[build.__name__] = build
    return build


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return sorted(_BUILDERS)


def create_model(name: str, **kwargs) -> nn.Module:
    """``mobilenet_fast.models.<name>(**kwargs)``

    Args:
        name: one of `list_models`.
        **kwargs: the model's own, among them ``weights``, ``num_classes`` and ``in_chans``.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _BUILDERS:
        raise ValueError(f"create_model: name must be one of {', '.join(list_models())}, got {name!r}")
    return _BUILDERS[name](**kwargs)


def load_weights(
    model: nn.Module,
    weights: Weights | None,
    named: Mapping[str, Callable[[], StateDict]] | None = None,
    rename: Callable[[StateDict], StateDict] = lambda state: state,
) -> nn.Module:
    """Loads a state_dict, or the file or the named weights that hold one, into ``model``, strictly; returns ``model``.

    Args:
        model: the network.
        weights: None, a state_dict, a path of one, or a key of ``named``.
        named: what gets the weights that have a name.
        rename: brings a state_dict of another origin to the model's keys.

    Raises:
        ValueError: there is neither a file nor named weights of that name.
        RuntimeError: the state_dict isn't this model's.
    """
    if weights is None:
        return model
    named = named or {}
    if isinstance(weights, Mapping):
        state = weights
    elif weights in named:
        state = named[weights]()
    elif os.path.isfile(weights):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    else:
        choices = f"one of {', '.join(map(repr, named))}, or " if named else "(none are known here by name) "
        raise ValueError(f"weights must be {choices}the path of a state_dict, or a state_dict; got {weights!r}")
    model.load_state_dict(rename(state))
    return model
