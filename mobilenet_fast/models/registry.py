"""Models by name, and weights from wherever they are."""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from ..messages import first_line, no_such
from .features import FeatureMaps
from .pretrained import StateDict, fetch_url, is_url

Weights = str | os.PathLike | StateDict

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module], task: str = "classification") -> Callable[..., nn.Module]:
    """Lets `create_model` find the function by its name, checks what all models take, and makes `FeatureMaps` of the
    model under ``features_only=True``."""

    @functools.wraps(build)
    def checked(
        *args, features_only: bool = False, out_indices: Sequence[int] | None = None, **kwargs
    ) -> nn.Module | FeatureMaps:
        if out_indices is not None and not features_only:
            raise ValueError(f"{build.__name__}: out_indices is for features_only=True, got {out_indices}")
        for name in ("num_classes", "in_chans"):
            value = kwargs.get(name, 1)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{build.__name__}: {name} must be a positive integer, got {value!r}")
            if name in kwargs:
                kwargs[name] = int(value)
        model = build(*args, **kwargs)
        model.name = build.__name__
        return FeatureMaps(model, out_indices) if features_only else model

    checked.task = task
    _BUILDERS[build.__name__] = checked
    return checked


def list_models(task: str | None = None) -> list[str]:
    """The names that `create_model` takes, of models for "classification" or "segmentation", or of all.

    Raises:
        ValueError: there are no models for such a task.
    """
    tasks = {build.task for build in _BUILDERS.values()}
    if task is not None and task not in tasks:
        raise ValueError(f"list_models: {no_such('task', task, sorted(tasks))}")
    return sorted(name for name, build in _BUILDERS.items() if task in (None, build.task))


def list_weights(name: str, same_padding: bool = False) -> list[str]:
    """The names that the model takes for ``weights``, besides paths; it takes a network to fetch what they name.

    Args:
        name: one of `list_models`.
        same_padding: the names that the model takes with that.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is no such model.
    """
    if not isinstance(name, str):
        raise TypeError(f"list_weights: name must be a string, got {type(name).__name__}")
    if name not in _BUILDERS:
        raise ValueError(f"list_weights: {no_such('model', name, list_models())}")
    return list(getattr(_BUILDERS[name], "weights", ({}, {}))[same_padding])


def create_model(name: str, **kwargs) -> nn.Module:
    """``mobilenet_fast.models.<name>(**kwargs)``

    Args:
        name: one of `list_models`.
        **kwargs: the model's own, among them ``weights``, ``num_classes`` and ``in_chans``; and, for every model,
            ``features_only=True`` with ``out_indices``, a tuple of integers or None, for its `FeatureMaps` in its
            place. ``weights`` are those of the whole model then, too.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is no such model, or it has no map of such an index.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a string, got {type(name).__name__}")
    if name not in _BUILDERS:
        raise ValueError(f"create_model: {no_such('model', name, list_models())}")
    return _BUILDERS[name](**kwargs)


def _read_state_dict(path: str | os.PathLike) -> StateDict:
    try:
        if os.fspath(path).endswith(".safetensors"):
            state = _safetensors().load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):  # say themselves what is wrong
        raise
    except Exception as error:  # what a file of another kind makes of torch's reader can be anything
        reason = first_line(error).split(". ")[0]  # advice on how to load it unsafely follows
        raise ValueError(f"weights: {path} is not a state_dict: {type(error).__name__}: {reason}") from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise ValueError(f"weights: {path} must hold a state_dict, got a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"weights: {path} must hold a state_dict, tensors by name, got a {type(value).__name__} for {key!r}"
            )
    return state


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights: .safetensors files take a package: pip install safetensors") from None
    return safetensors.torch


def load_weights(
    model: nn.Module,
    weights: Weights | None,
    rename: Callable[[StateDict], StateDict] = lambda state: state,
) -> nn.Module:
    """Loads a state_dict, or the file that holds one, into ``model``, strictly; returns ``model``.

    Args:
        model: the network.
        weights: None, a state_dict, or the path or address of one.
        rename: brings a state_dict of another origin to the model's keys.

    Raises:
        TypeError: ``weights`` is something else.
        ValueError: there is no such file, or it holds something else.
        ImportError: a .safetensors file without that package.
        OSError: an address could not be fetched.
        RuntimeError: the state_dict isn't this model's.
    """
    if weights is None:
        return model
    if not isinstance(weights, (str, os.PathLike, Mapping)):
        raise TypeError(f"weights must be a state_dict, the path of one, or a name, got a {type(weights).__name__}")
    if isinstance(weights, Mapping):
        state = weights
    elif os.path.isfile(weights):
        state = _read_state_dict(weights)
    elif is_url(weights):
        state = fetch_url(type(model).__name__, weights)
    else:
        raise ValueError(f"weights must be a state_dict or the path of one, got {weights!r}, where there is no file")
    state = rename(state)
    _check_fit(type(model).__name__, model.state_dict(), state)
    wrong = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"weights must be tensors by name, got a {type(state[wrong]).__name__} for {wrong!r}")
    model.load_state_dict(state, strict=False)  # which has been checked, and may lack what counts batches
    return model


def _check_fit(network: str, expected: StateDict, state: StateDict) -> None:
    def first(what: str, keys: list[str]) -> str:
        return f"{what} {keys[0]!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")

    # Nothing counts batches in old checkpoints; load_state_dict does without.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and expected[k].shape != getattr(state[k], "shape", None)]
    said = [first(what, keys) for what, keys in (("lack", missing), ("have", unexpected)) if keys]
    if shapes:
        theirs, ours = getattr(state[shapes[0]], "shape", None), expected[shapes[0]].shape
        said.append(first("differ in shape at", shapes) + f": {theirs and tuple(theirs)}, not {tuple(ours)}")
    if said:
        raise RuntimeError(f"{network}: weights are another model's: they {'; '.join(said)}")
