"""The module that users hold: a network for inference, run by a plan per set of input shapes."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree

from .. import _C
from ..messages import first_line
from . import cuda
from .capture import Capture
from .outputs import Structure, holds_dataclass
from .passes import optimise
from .plan import PackedWeights, Plan, Report, build
from .profile import Profile, measure, measure_cuda

_MAX_PLANS = 64
_CPU_DTYPES = (torch.float32, torch.float64)
_GLOBAL_HOOKS = tuple(
    vars(nn_module)[f"_global_{when}_hooks"] for when in ("forward", "forward_pre", "backward", "backward_pre")
)
_own_lock = threading.RLock()


@dataclass
class _Entry:
    """A plan, the capture that it comes from, and when it ran last."""

    plan: Plan | cuda.CudaPlan
    capture: Capture
    used: int = 0


class AcceleratedModule(nn.Module):
    """What :func:`accelerate` returns: same inputs and outputs as the model, for inference on its device.

    A plan is made for each set of input shapes, and the 64 used last are kept; they share packed weights and
    memory. Numbers and strings among the inputs are part of the plan. Strides are not: a model that asks for its
    input's layout goes the way that it went when it was captured. Inputs are only read, even where the model writes
    to its own. A 4-D output is channels_last if an input is, else contiguous. Any number of threads may call it at
    once. Autocast does not change what it computes.

    On CUDA a plan is recorded as a CUDA graph at its first call. Graphs share their memory, so calls on several streams
    wait for each other; within a caller's own CUDA graph the plan's kernels become a part of that, if such a call was
    made before, and read the weights of then. Products of float32 are rounded to TF32 if PyTorch's convolutions may be
    at the first call.

    ``state_dict()`` holds the model's own keys with the weights in use, and ``load_state_dict()`` replaces them; there
    are no parameters to train, and ``train()`` leaves it in evaluation mode. Copies, pickles and files (:meth:`save`)
    keep the weights; plans are made again where they are needed. ``torch.export`` and ``torch.jit.trace`` of a larger
    model, the transforms of ``torch.func`` and forward-mode derivatives see the original's operations;
    ``torch.compile`` of a larger model calls the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strict: bool = False,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self._set_up(_frozen_copy(model), strict, dtype, backend)
        self._hide("_source", model)  # whose weights refresh() takes

    def _set_up(self, model: nn.Module, strict: bool, dtype: torch.dtype | None, backend: str | None) -> None:
        self.strict, self.dtype, self.device = strict, dtype, _device(model)
        self.backend = _backend(self.device, dtype, backend)
        self.training = False
        self._hide("_source", None)
        self._hide("_lock", threading.RLock())
        self._hide("_last_lock", threading.Lock())  # never held for long
        self._hide("_clock", itertools.count(1))
        self._hide("_captures", [])
        self._hide("_examples", {})  # by structure of the inputs, those captured first
        self._use(model)

    def _use(self, model: nn.Module) -> None:
        """Takes ``model`` for its own. Captures that hold no tensors stay; a call under way ends on its old plan."""
        self._hide("_model", model)
        self._captures[:] = [capture for capture in self._captures if not capture.tensors]
        with self._last_lock:
            self._hide("_packed", PackedWeights() if self.backend == "cpp" else cuda.CudaWeights())
            self._hide("_plans", {})
            self._hide("_last", None)
            self._hide("_usual", None)  # the last plan's run_usual(), if it was called with one tensor alone

    def _take_captures(self, other: AcceleratedModule) -> None:
        """Those of a module of the same network with other weights, as far as they hold no tensors."""
        with other._lock:
            self._captures[:] = [capture for capture in other._captures if not capture.tensors]
            self._examples.update(other._examples)

    def _hide(self, name: str, value: Any) -> None:
        # Not a submodule: a larger model's parameters(), to() and train() pass it by.
        object.__setattr__(self, name, value)

    # Running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A call like the last one goes to the engine at once: between two calls a network fills the caches, and
        # nn.Module's way to forward() and from there takes 2 % of a MobileNet's time to come back.
        if not torch.compiler.is_dynamo_compiling():
            usual = self._usual
            if usual is not None and len(args) == 1 and not kwargs:
                result = usual(args[0], self.__dict__, _GLOBAL_HOOKS)
                if result is not None:
                    return result
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_traced():
            return self._model(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return self._run_uncompiled(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors, entry = self._plan(args, kwargs)
        kind = self.device.type
        if torch.is_autocast_enabled(kind):  # steps through ATen would see it
            with torch.autocast(kind, enabled=False):
                return entry.plan.run(tensors)
        return entry.plan.run(tensors)

    _run_uncompiled = torch.compiler.disable(_run)

    def _plan(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], _Entry]:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            leaves, spec = args, None  # spares the usual call 5 us
        else:
            kwargs = dict(sorted(kwargs.items()))
            leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
            raise RuntimeError(
                "accelerate: gradients do not flow through an accelerated model, got an input that requires grad; call "
                "it under torch.no_grad() or train the original model"
            )
        key = (spec, *map(self._leaf_key, leaves))
        entry = self._plans.get(key)
        if entry is None:
            off = torch.autocast(self.device.type, enabled=False)
            with self._lock, torch.inference_mode(False), torch.no_grad(), off:
                entry = self._plans.get(key) or self._prepare(args, kwargs, leaves, key)
        entry.used = next(self._clock)
        if entry is not self._last:
            alone = spec is None and type(self).forward is AcceleratedModule.forward
            with self._last_lock:
                if self._plans.get(key) is entry:  # and no refresh() has come between
                    self._hide("_last", entry)
                    self._hide("_usual", entry.plan.run_usual if alone else None)
        return tensors, entry

    def _prepare(self, args: tuple, kwargs: dict[str, Any], leaves: Any, key: tuple) -> _Entry:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(cuda.CALL_FIRST)
        spec = pytree.tree_structure((args, kwargs))
        mismatch = self._check(leaves, self._examples.get(spec))
        if self.dtype is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._converted, (args, kwargs))
            leaves = [self._converted(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        capture = next((c for c in self._captures if c.spec == spec and c.serves(leaves)), None)
        known = capture is not None
        if not known:
            # What torch.compile made of a part reads the memory of its inputs, which those of a capture do not have.
            try:
                with _capture_lock(), torch.compiler.set_stance("force_eager"):
                    model = _frozen_copy(self._model)
                    capture = _capture(model if self.dtype is None else model.to(self.dtype), args, kwargs)
            except ValueError as error:
                raise ValueError(mismatch or str(error)) from error
        plan = self._build(capture, leaves)
        if self.strict and plan.report.fallbacks:
            rows = "; ".join(f"{row.name}: {row.fallback}" for row in plan.report.fallbacks)
            raise NotImplementedError(f"accelerate: strict=True allows no step through ATen, got {rows}")
        # Nothing has changed until here.
        if len(self._plans) >= _MAX_PLANS:
            del self._plans[min(self._plans, key=lambda k: self._plans[k].used)]
            self._captures[:] = [c for c in self._captures if any(e.capture is c for e in self._plans.values())]
        if not known:
            self._captures.append(capture)
        self._examples.setdefault(spec, [_example(leaf) for leaf in leaves])
        entry = self._plans[key] = _Entry(plan, capture)
        return entry

    def _build(self, capture: Capture, leaves: Any) -> Plan | cuda.CudaPlan:
        dtypes = _CPU_DTYPES if self.backend == "cpp" else cuda.KERNEL_DTYPES
        graph = optimise(capture.lower(leaves, _state(self._model), dtypes))
        if self.backend == "cpp":
            return build(graph, self._packed, _C.cpu_isa())
        return cuda.build(graph, self._packed, self.device)

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _leaf_key(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            dtype = leaf.dtype if self.dtype is None or not leaf.is_floating_point() else self.dtype
            return (leaf.shape, dtype, leaf.is_cpu or leaf.device, leaf.layout, type(leaf))
        if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return (type(leaf), repr(leaf))  # repr tells -0.0 from 0.0, and finds NaN again
        raise TypeError(f"accelerate: inputs must be tensors, numbers or strings, got {type(leaf).__name__}")

    def _check(self, leaves: Any, examples: list[Any] | None) -> str | None:
        """Refuses inputs unlike the ones captured first; their batch and image size may differ. Few models take images
        of other channels: what to say if this one does not is returned.
        """
        mismatch = None
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            what = f"accelerate: input {i}" if len(leaves) > 1 else "accelerate: input"
            if leaf.device != self.device:
                raise ValueError(f"{what} must be on {_place(self.device)}, got {_place(leaf.device)}")
            if leaf.layout != torch.strided:
                raise ValueError(f"{what} must be strided, got {leaf.layout}")
            if type(leaf).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                raise TypeError(f"{what} must be a plain tensor, got {type(leaf).__name__}")
            if examples is None or examples[i] is None:
                continue
            shape, dtype = examples[i]
            if leaf.dtype != dtype and (self.dtype is None or not leaf.is_floating_point()):
                raise TypeError(f"{what} must be {dtype}, got {leaf.dtype}")
            if leaf.dim() != len(shape):
                raise ValueError(f"{what} must have {len(shape)} dimensions, got shape {tuple(leaf.shape)}")
            if leaf.dim() == 4 and leaf.shape[1] != shape[1]:
                mismatch = f"{what} must be (N, {shape[1]}, H, W), got {tuple(leaf.shape)}"
        return mismatch

    # What users ask

    def explain(self) -> Report:
        """The steps of the plan that ran last: operation, output shape, kernel, and why something fell back to ATen.

        Raises RuntimeError before the first call when no example inputs were given.
        """
        if self._last is None:
            raise RuntimeError("accelerate: nothing is planned yet; call the module or give example_inputs")
        return self._last.plan.report

    def profile(self, *args: Any, runs: int = 30, **kwargs: Any) -> Profile:
        """Times each step of the plan for these inputs, ``runs`` times, on torch's current number of threads.

        Args:
            args, kwargs: the inputs of a call.
            runs: how often; medians are kept.

        Returns:
            A :class:`Profile`: ``print(fast.profile(x))`` shows each step's time, GFLOP/s, GB/s, share of the peak and
            a bar, and the share of the peak that the whole model reaches.

        Raises:
            ValueError: ``runs`` is less than 1; and whatever a call with these inputs raises.
        """
        if runs < 1:
            raise ValueError(f"accelerate: runs must be at least 1, got {runs}")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tensors, entry = self._plan(args, kwargs)
            if self.backend == "triton":
                return measure_cuda(entry.plan, tensors, runs)
            return measure(entry.plan, tensors, entry.plan.report.isa, runs)

    def refresh(self) -> AcceleratedModule:
        """Takes the original model's weights again, as they are now, and returns self.

        Plans are made again, in milliseconds, at the next call of each shape. Raises RuntimeError for a copy and for
        what came from a file, which have no original, and ValueError if the original's parameters or buffers have other
        names or shapes by now.
        """
        if self._source is None:
            raise RuntimeError(
                "accelerate: a copy has no original to refresh from; load_state_dict() replaces its weights"
            )
        if _signature(self._source) != _signature(self._model):
            raise ValueError("accelerate: the original's parameters or buffers have changed shape; accelerate it again")
        model = _frozen_copy(self._source)
        with self._lock:
            self._use(model)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Writes the network with its weights to a file that :func:`load` reads.

        The file is a pickle: it names the model's Python classes, which must be importable where it is read.
        """
        torch.save(self, path)

    # nn.Module

    def train(self, mode: bool = True) -> AcceleratedModule:
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        model = _frozen_copy(self._model)
        try:
            result = model.load_state_dict(own, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys.extend(prefix + key for key in result.missing_keys)
        if strict:
            unexpected_keys.extend(prefix + key for key in result.unexpected_keys)
        with self._lock:
            self._use(model)

    def _apply(self, fn, recurse: bool = True):
        dtype = next((t.dtype for t in _state(self._model).values() if t.is_floating_point()), torch.float32)
        probe = torch.zeros(1, dtype=dtype, device=self.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise NotImplementedError(
                f"accelerate: an accelerated model stays {probe.dtype} on {probe.device}, asked for {moved.dtype} on "
                f"{moved.device}; convert the original model and accelerate that"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "strict": self.strict, "dtype": self.dtype, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self._set_up(state["model"], state["strict"], state["dtype"], state["backend"])

    def __deepcopy__(self, memo: dict) -> AcceleratedModule:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def extra_repr(self) -> str:
        runs_on = f"isa={_C.cpu_isa()}" if self.backend == "cpp" else f"backend=triton, device={self.device}"
        return f"{type(self._model).__name__}, {runs_on}, plans={len(self._plans)}"


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> AcceleratedModule:
    """A fast copy of ``model`` for inference on the device that it is on; the model itself is left as it is.

    Batch norm is folded, activations, squeeze-excite gates and residuals are fused into the convolutions, weights are
    packed once, and the network runs as one call over one reused arena: of C++ kernels on CPU, of Triton kernels in a
    CUDA graph on an NVIDIA GPU. What has no kernel of ours runs through ATen and is named by ``explain()``.

    Args:
        model: any module in evaluation mode that ``torch.export`` can capture, on CPU or one CUDA device. Kernels serve
            float32 and float64, on CUDA float16 and bfloat16 as well; other dtypes run through ATen. Its weights are
            taken now; ``refresh()`` takes them again.
        example_inputs: a tensor or a tuple of positional inputs. Given, the graph is captured at once (a second or
            two); otherwise at the first call.
        example_kwargs: keyword inputs, with or without ``example_inputs``.
        strict: raise NotImplementedError where something would run through ATen.
        dtype: on CUDA, the floating-point dtype to compute in: weights are folded from those of the model in float64,
            then converted; inputs of any floating-point dtype are; outputs are what ``model.to(dtype)`` gives.
        backend: None for what serves the device: "cpp" or "triton", which raises NotImplementedError where it can't.

    Returns:
        A module with the model's inputs and outputs, held to it within the dtype's rounding. New batch sizes are
        planned in milliseconds (on CUDA a second or so, for kernels are compiled), new image sizes captured again with
        the weights shared.

    Raises:
        TypeError: ``model`` is no module; at a call, an input is of another dtype than the model takes.
        ValueError: the model is in training mode, cannot be copied, or is on several devices or on one that is neither
            a CPU nor CUDA; at a call, an input is on another device, or has another rank or channel count than the
            model takes.
        NotImplementedError: ``torch.export`` cannot capture the model, the model changes its own weights, a part of it
            is TorchScript, ``dtype`` is given on CPU, or ``backend`` does not serve the device.
        RuntimeError: at a call with gradients enabled, an input requires grad.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    # What torch.export made refuses eval() by a method of its own: its mode was settled then, whatever its flags say.
    exported = isinstance(model, torch.fx.GraphModule) and "eval" in vars(model)
    for name, module in model.named_modules():
        where = f"its '{name}' is" if name else "it is"
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"accelerate: model must be Python, but {where} TorchScript; accelerate what that was made from"
            )
        if module.training and not exported:
            raise ValueError(f"accelerate: model must be in evaluation mode, but {where} in training mode; call eval()")
    fast = AcceleratedModule(model, strict=strict, dtype=dtype, backend=backend)
    if example_inputs is not None or example_kwargs is not None:
        args = () if example_inputs is None else example_inputs
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        fast._plan(args, example_kwargs or {})
    return fast


def load(path: str | os.PathLike) -> AcceleratedModule:
    """The accelerated module that :meth:`AcceleratedModule.save` wrote to ``path``; plans are made at its first calls.

    The file is a pickle, and reading one runs code from it: load only files that you trust. Raises TypeError if it
    holds something else.
    """
    fast = torch.load(path, weights_only=False)
    if not isinstance(fast, AcceleratedModule):
        raise TypeError(f"load: '{os.fspath(path)}' holds no accelerated module, got {type(fast).__name__}")
    return fast


def _frozen_copy(model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):  # tensors made under it could not be captured
        try:
            clone = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(f"accelerate: {type(model).__name__} cannot be copied: {first_line(error)}") from error
        return clone.eval().requires_grad_(False)


def _capture(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Capture:
    """Captures a model that nobody else uses: tracing leaves fake tensors in what a model makes at its first call and
    keeps, so that it is called once before.
    """
    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))  # for the model to write to
    try:
        with torch.random.fork_rng(devices=()):
            outputs = model(*own_args, **own_kwargs)
    except Exception as error:
        dtypes = {tensor.dtype for tensor in _state(model).values() if tensor.is_floating_point()}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor) or len(dtypes) != 1 or leaf.dtype in dtypes:
                continue
            # Integers may be right beside something that is not; torch names types where they are to blame.
            if leaf.is_floating_point() or "type" in first_line(error):
                raise TypeError(f"accelerate: input must be {dtypes.pop()}, got {leaf.dtype}") from error
        raise ValueError(f"accelerate: the model does not take these inputs: {first_line(error)}") from error
    try:
        with _one_precision():
            return Capture(model, args, kwargs, Structure(outputs) if holds_dataclass(outputs) else None)
    except Exception as error:
        what, why = type(model).__name__, first_line(error).removeprefix("accelerate: ")
        raise NotImplementedError(f"accelerate: {what} cannot be captured: {why}") from error


@contextmanager
def _one_precision() -> Iterator[None]:
    """torch.export asks for ``cudnn.allow_tf32``, an error where ``fp32_precision`` says more than that can. Nothing is
    computed meanwhile.
    """
    cudnn = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        with torch.backends.__allow_nonbracketed_mutation():
            cudnn.allow_tf32 = True
        try:
            yield
        finally:
            with torch.backends.__allow_nonbracketed_mutation():
                cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
    else:
        yield


def _capture_lock() -> threading.RLock:
    """torch.export runs once at a time in a process, and not while Dynamo traces in another thread, which would take
    what it traces for exported.
    """
    from torch._dynamo import convert_frame  # which torch.export imports anyway, and takes a second

    return getattr(convert_frame, "compile_lock", _own_lock)


def _is_traced() -> bool:
    """Whether someone wants to see the operations, or calls with tensors that hold no, or more than, numbers."""
    return (
        torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _device(model: nn.Module) -> torch.device:
    """Where the model is: on the CPU if it has no tensors."""
    device = torch.device("cpu")
    for i, (name, tensor) in enumerate(_state(model).items()):
        if i > 0 and tensor.device != device:
            raise ValueError(
                f"accelerate: model must be on one device, got '{name}' on {tensor.device} and others on {device}"
            )
        device = tensor.device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"accelerate: model must be on the CPU or a CUDA device, got '{name}' on {device}")
    return device


def _place(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)


def _backend(device: torch.device, dtype: torch.dtype | None, backend: str | None) -> str:
    if backend not in (None, "cpp", "triton"):
        raise ValueError(f"accelerate: backend must be None, 'cpp' or 'triton', got {backend!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"accelerate: dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in cuda.KERNEL_DTYPES:
        names = ", ".join(map(str, cuda.KERNEL_DTYPES))
        raise ValueError(f"accelerate: dtype must be one of {names}, got {dtype}")
    if backend is None:
        backend = "cpp" if device.type == "cpu" else "triton"
    if backend == "cpp" and device.type != "cpu":
        raise NotImplementedError(f"accelerate: backend 'cpp' takes models on the CPU, got one on {device}")
    if backend == "cpp" and dtype is not None:
        raise NotImplementedError(
            f"accelerate: dtype is for models on CUDA, got {dtype} for one on the CPU; accelerate model.to({dtype})"
        )
    if backend == "triton" and (why := cuda.why_unavailable(device)):
        raise NotImplementedError(f"accelerate: {why}")
    return backend


def _example(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else None


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they go by, non-persistent buffers too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _signature(model: nn.Module) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in _state(model).items()}
