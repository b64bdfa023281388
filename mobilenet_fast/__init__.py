"""Faster layers for the MobileNet family, and one call that makes an existing model fast.

``accelerate(model)`` gives a fast inference version of a model; ``replace_layers(model)`` puts this package's layers
into it. ``functional``, ``nn`` and ``models`` are what their namesakes in torch and torchvision are.
``MOBILENET_FAST_ISA=scalar|avx2|avx512|neon`` caps the instruction set that the CPU kernels use.
"""
# ruff: noqa: E402  the compiled part is checked before anything imports it, so that one clear line tells what is wrong

import importlib
from pathlib import Path

import torch


def _unusable(why: str) -> ImportError:
    # With the package's name, `python -m mobilenet_fast` prints the message in place of a traceback.
    return ImportError(f"mobilenet_fast: {why}", name=__name__)


def _import_compiled():
    checkout = Path(__file__).parents[1]
    if (checkout / "csrc").is_dir():
        rebuild = (
            f"run `pip install --no-build-isolation -e .` in {checkout}, "
            "or leave that folder if the package is installed elsewhere: Python prefers the folder's own sources"
        )
    else:
        rebuild = "in a checkout of mobilenet_fast, with torch installed, run `pip install --no-build-isolation .`"
    missing = f"its compiled part is missing: {rebuild}"
    try:
        from mobilenet_fast._build_info import TORCH_VERSION as built_for
    except ImportError:
        raise _unusable(missing) from None
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise _unusable(f"built for torch {built_for}, found torch {torch.__version__}: {rebuild}")
    try:
        compiled = importlib.import_module("mobilenet_fast._C")
    except ModuleNotFoundError:
        raise _unusable(missing) from None
    except ImportError as error:
        if str(error).startswith("MOBILENET_FAST_ISA"):
            raise _unusable(str(error)) from None
        raise _unusable(f"its compiled part does not load ({error}): {rebuild}") from None
    try:
        compiled.cpu_isa()
    except ValueError as error:  # MOBILENET_FAST_ISA
        raise _unusable(str(error)) from None
    return compiled


cpu_isa = _import_compiled().cpu_isa

from mobilenet_fast import functional, models, nn
from mobilenet_fast.accelerate import AcceleratedModule, accelerate, load
from mobilenet_fast.nn.fusion import training_report
from mobilenet_fast.replace import replace_layers, restore_layers

__version__ = "0.1.0"
__all__ = [
    "AcceleratedModule",
    "accelerate",
    "cpu_isa",
    "functional",
    "load",
    "models",
    "nn",
    "replace_layers",
    "restore_layers",
    "training_report",
]
