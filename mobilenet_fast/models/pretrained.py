"""Weights by name, fetched by the libraries that publish them, which know the addresses and keep what they fetched."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from ..messages import first_line

StateDict = Mapping[str, Tensor]
Fetch = Callable[[], StateDict]

DEFAULT = "DEFAULT"


def named_weights(
    plain: Mapping[str, Fetch], same_padded: Mapping[str, Fetch] | None = None, **defaults
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Lets the function that builds a model take names for ``weights``, its first argument.

    Args:
        plain: what fetches the state_dict of each name.
        same_padded: the same, with ``same_padding``: weights that were trained with one padding are wrong with another.
        **defaults: other arguments of the function that weights by name ask for.

    Raises:
        ValueError: there is neither a file nor weights of that name.
        ImportError: the library that the weights come from is not installed, or does not import.
        OSError: the library could not fetch them.
    """

    def decorate(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        @functools.wraps(build)
        def named(weights=None, *args, **kwargs) -> nn.Module:
            known = named.weights[bool(kwargs.get("same_padding"))]
            if isinstance(weights, str) and (weights in known or not (os.path.isfile(weights) or is_url(weights))):
                weights = _fetch(build.__name__, weights, known)
                kwargs = defaults | kwargs
            return build(weights, *args, **kwargs)

        named.weights = plain, same_padded or {}
        return named

    return decorate


def torchvision(**models: tuple[str, ...]) -> dict[str, Fetch]:
    """What torchvision publishes for these of its models, by the names of its `WeightsEnum` of each.

    Those of the first model, and its "DEFAULT", need no more than their own name; "torchvision/MODEL.NAME" is the
    name of all.
    """
    return _names("torchvision", _from_torchvision, models)


def timm(**models: tuple[str, ...]) -> dict[str, Fetch]:
    """What timm publishes for these of its models, by their tags.

    Those of the first model, and "DEFAULT", which is timm's choice for it, need no more than their own name;
    "timm/MODEL.TAG" is the name of all.
    """
    return _names("timm", _from_timm, models)


def _names(library: str, fetch: Callable[[str, str], StateDict], models: Mapping[str, tuple[str, ...]]):
    first = next(iter(models))
    known = {name: functools.partial(fetch, first, name) for name in (*models[first], DEFAULT)}
    for model, names in models.items():
        known |= {f"{library}/{model}.{name}": functools.partial(fetch, model, name) for name in names}
    return known


def _fetch(model: str, name: str, known: Mapping[str, Fetch]) -> StateDict:
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        choices = f", or one of {', '.join(map(repr, known))}" if known else " (none have a name here)"
        raise ValueError(f"{model}: weights must be a state_dict, the path of one{choices}; {hint}got {name!r}")
    try:
        return known[name]()
    except ImportError as error:
        raise ImportError(f"{model}: weights {name!r} {error}") from None
    except Exception as error:  # what a library makes of a network that isn't there can be anything
        raise OSError(
            f"{model}: weights {name!r} could not be fetched: {first_line(error)}; the path of their file does as well"
        ) from None


def is_url(weights: str | os.PathLike) -> bool:
    return isinstance(weights, str) and weights.startswith(("https://", "http://"))


def fetch_url(model: str, url: str) -> StateDict:
    """What lies at an address, or was fetched from there before, by torch.hub."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, or of what came
        raise OSError(
            f"{model}: weights {url!r} could not be fetched: {first_line(error)}; the path of their file does as well"
        ) from None


def _from_torchvision(model: str, name: str) -> StateDict:
    weights = _library("torchvision").models.get_model_weights(model)[name]
    return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)


def _from_timm(model: str, tag: str) -> StateDict:
    models = _library("timm").models
    entry = models.get_pretrained_cfg(model if tag == DEFAULT else f"{model}.{tag}")
    if entry.hf_hub_id:
        return models.load_state_dict_from_hf(entry.hf_hub_id, weights_only=True)
    return torch.hub.load_state_dict_from_url(entry.url, map_location="cpu", weights_only=True)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision's is a RuntimeError beside a torch that it wasn't built for
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            reason = f"is not installed; run: pip install {name}"
        else:
            reason = f"can't be imported beside torch {torch.__version__}: {first_line(error)}"
        raise ImportError(f"come from {name}, which {reason}") from None
