"""What is run: whole models, each of their convolutions, and single operators in the shapes of MobileNetV3 and V2."""

from benchmarks.cases import layers, networks, operators, zoo  # noqa: F401  they register their cases
from benchmarks.cases.registry import CASES, Case, Problem

__all__ = ["CASES", "SUITES", "Case", "Problem", "cases_of", "find_case"]

SUITES = ("models", "layers", "operators", "demo", "zoo")


def cases_of(suite: str) -> list[Case]:
    """Layers are not in the registry: finding them means importing and building every model."""
    return layers.cases() if suite == "layers" else [case for case in CASES.values() if case.suite == suite]


def find_case(suite: str, name: str) -> Case:
    return layers.Convolution.parse(name).case() if suite == "layers" else CASES[suite, name]
