"""What is run: whole models, each of their layers, and single operators in the shapes of MobileNetV3 and V2."""

from benchmarks.cases import layers, networks, operators, zoo  # noqa: F401  they register their cases
from benchmarks.cases.registry import CASES, DIRECTIONS, DTYPES, Case, Problem, Setting

__all__ = ["CASES", "DIRECTIONS", "DTYPES", "SUITES", "Case", "Problem", "Setting", "cases_of", "find_case"]

SUITES = ("models", "layers", "operators", "demo", "zoo")


def cases_of(suite: str, device: str = "cpu") -> list[Case]:
    """Layers are not in the registry: finding them means importing and building every model."""
    cases = layers.cases() if suite == "layers" else [case for case in CASES.values() if case.suite == suite]
    return [case for case in cases if device in case.devices]


def find_case(suite: str, name: str) -> Case:
    return layers.parse(name).case() if suite == "layers" else CASES[suite, name]
