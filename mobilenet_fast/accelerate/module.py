"""The module that users hold: a network for inference, run by a plan per input shape."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import _C
from .capture import Capture
from .passes import optimise
from .plan import PackedWeights, Plan, Report, build

_MAX_PLANS = 64


class AcceleratedModule(nn.Module):
    """What :func:`accelerate` returns: same inputs and outputs as the model, for inference on CPU.

    A plan is made for each input shape and kept (the 64 used last); they share packed weights. A 4-D output is channels_last if the input
    is, else contiguous. ``state_dict()`` holds the model's own keys with the weights in use, and ``load_state_dict()``
    replaces them; there are no parameters to train, and ``train()`` leaves it in evaluation mode. Copying, pickling and
    ``torch.save`` keep the weights; plans are made again where they are needed.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False):
        super().__init__()
        self.strict = strict
        self._hide("_source", model)  # whose weights refresh() takes
        self._hide("_model", copy.deepcopy(model))  # the weights in use, and what is captured
        self._reset()
        self.training = False

    def _hide(self, name: str, value: Any) -> None:
        # Not a submodule: a larger model's parameters(), to() and train() pass it by.
        object.__setattr__(self, name, value)

    def _reset(self) -> None:
        self._hide("_lock", threading.RLock())
        self._hide("_captures", [])
        self._hide("_packed", PackedWeights())
        self._hide("_plans", OrderedDict())
        self._hide("_last", None)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return self._model(*args, **kwargs)
        return self._run(args, kwargs)

    @torch.compiler.disable
    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        leaves, spec = ([args[0]], None) if _is_single_tensor(args, kwargs) else pytree.tree_flatten((args, kwargs))
        tensors = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if leaf.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(
                        "accelerate: gradients do not flow through an accelerated model, got an input that requires "
                        "grad; call it under torch.no_grad() or train the original model"
                    )
                tensors.append(leaf)
        key = (spec, *[_leaf_key(leaf) for leaf in leaves])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._prepare(args, kwargs, leaves, key)
        self._last = plan
        results = plan.run(tensors)
        if any(isinstance(r, torch.Tensor) and r.dim() == 4 for r in results):
            format_ = _memory_format(tensors)
            results = [
                r.contiguous(memory_format=format_) if isinstance(r, torch.Tensor) and r.dim() == 4 else r
                for r in results
            ]
        return pytree.tree_unflatten(results, plan.out_spec)

    def _prepare(self, args: tuple, kwargs: dict[str, Any], leaves: list[Any], key: tuple) -> Plan:
        with self._lock:
            if key in self._plans:
                return self._plans[key]
            self._check(leaves)
            capture = next((c for c in self._captures if c.serves(leaves)), None)
            if capture is None:
                capture = Capture(self._model, args, kwargs)
                self._captures.append(capture)
            graph = optimise(capture.lower(leaves, _state(self._model)))
            plan = build(graph, self._packed, _C.cpu_isa())
            plan.out_spec = capture.out_spec
            if self.strict and plan.report.fallbacks:
                rows = "; ".join(f"{row.name}: {row.fallback}" for row in plan.report.fallbacks)
                raise NotImplementedError(f"accelerate: strict=True allows no step through ATen, got {rows}")
            self._plans[key] = plan
            while len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
            return plan

    def _check(self, leaves: list[Any]) -> None:
        """Refuses inputs unlike the ones captured first; their batch and image size may differ."""
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu":
                raise ValueError(f"accelerate: inputs must be on the CPU, got {leaf.device}")
        if not self._captures:
            return
        examples = self._captures[0].examples
        if len(examples) != len(leaves):
            raise ValueError(f"accelerate: the model takes {len(examples)} inputs, got {len(leaves)}")
        for i, (example, leaf) in enumerate(zip(examples, leaves, strict=True)):
            what = f"accelerate: input {i}" if len(leaves) > 1 else "accelerate: input"
            if example is None or not isinstance(leaf, torch.Tensor):
                continue
            shape, dtype = example
            if leaf.dtype != dtype:
                raise TypeError(f"{what} must be {dtype}, got {leaf.dtype}")
            if leaf.dim() != len(shape):
                raise ValueError(f"{what} must have {len(shape)} dimensions, got shape {tuple(leaf.shape)}")
            if leaf.dim() == 4 and leaf.shape[1] != shape[1]:
                raise ValueError(f"{what} must be (N, {shape[1]}, H, W), got {tuple(leaf.shape)}")

    # What users ask

    def explain(self) -> Report:
        """The steps of the plan that ran last: operation, output shape, kernel, and why something fell back to ATen.

        Raises RuntimeError before the first call when no example inputs were given.
        """
        if self._last is None:
            raise RuntimeError("accelerate: nothing is planned yet; call the module or give example_inputs")
        return self._last.report

    def refresh(self) -> AcceleratedModule:
        """Takes the original model's weights again; returns self. Plans are made again at the next call."""
        self.load_state_dict(self._source.state_dict())
        return self

    # nn.Module

    def train(self, mode: bool = True) -> AcceleratedModule:
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        with self._lock:
            try:
                result = self._model.load_state_dict(own, strict=False)
            except RuntimeError as error:
                error_msgs.append(str(error))
                return
            missing_keys.extend(prefix + key for key in result.missing_keys)
            if strict:
                unexpected_keys.extend(prefix + key for key in result.unexpected_keys)
            self._reset()

    def _apply(self, fn, recurse: bool = True):
        probe = torch.zeros(1)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise NotImplementedError(
                f"accelerate: an accelerated model stays {probe.dtype} on {probe.device}, asked for {moved.dtype} on "
                f"{moved.device}; convert the original model and accelerate that"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "strict": self.strict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.strict = state["strict"]
        self._hide("_source", state["model"])
        self._hide("_model", state["model"])
        self._reset()
        self.training = False

    def __deepcopy__(self, memo: dict) -> AcceleratedModule:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def extra_repr(self) -> str:
        return f"{type(self._model).__name__}, isa={_C.cpu_isa()}, plans={len(self._plans)}"


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = False,
) -> AcceleratedModule:
    """A fast copy of ``model`` for inference on CPU; the model itself is left as it is.

    Batch norm is folded, activations, squeeze-excite gates and residuals are fused into the convolutions, weights are
    packed once, and the network runs as one call over one reused arena. What has no kernel of ours runs through ATen and
    is named by ``explain()``.

    Args:
        model: any module in evaluation mode that ``torch.export`` can capture, float32 or float64, on CPU. Its weights are taken now;
            ``refresh()`` takes them again.
        example_inputs: a tensor or a tuple of positional inputs. Given, the graph is captured at once (about a second);
            otherwise at the first call.
        example_kwargs: keyword inputs, with ``example_inputs``.
        strict: raise NotImplementedError where something would run through ATen.

    Returns:
        A module with the model's inputs and outputs, held to it within float32 rounding. New batch sizes are planned in
        milliseconds, new image sizes captured again with the weights shared.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is in training mode, or not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            where = f"its '{name}' is" if name else "it is"
            raise ValueError(f"accelerate: model must be in evaluation mode, but {where} in training mode; call eval()")
    for name, tensor in _state(model).items():
        if tensor.device.type != "cpu":
            raise ValueError(f"accelerate: model must be on the CPU, got '{name}' on {tensor.device}")
    fast = AcceleratedModule(model, strict=strict)
    if example_inputs is not None or example_kwargs is not None:
        args = () if example_inputs is None else example_inputs
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        with torch.no_grad():
            leaves, spec = pytree.tree_flatten((args, example_kwargs or {}))
            if _is_single_tensor(args, example_kwargs):
                leaves, spec = [args[0]], None
            key = (spec, *[_leaf_key(leaf) for leaf in leaves])
            fast._last = fast._prepare(args, example_kwargs or {}, leaves, key)
    return fast


def _is_single_tensor(args: tuple, kwargs: dict | None) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.device.type)
    return (type(leaf), leaf)


def _memory_format(tensors: list[torch.Tensor]) -> torch.memory_format:
    last = any(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors
    )
    return torch.channels_last if last else torch.contiguous_format


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they go by, non-persistent buffers too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
