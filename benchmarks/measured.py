"""What a GPU took, from the files that `benchmarks`, `gpu_session`, `gpu_tune` and `training` wrote, by the keys under
which `benchmarks.predict` predicts it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import DTYPES

Key = tuple[str, ...]
# Our peers of the suite's layers, the one first that leaves out the host's time.
OF_LAYERS = ("functional channels_last graph", "functional channels_last", "functional graph", "functional")
OF_TRAINING = ("replace_layers channels_last graph", "replace_layers channels_last")


def name_of(dtype: str) -> str:
    """PyTorch's, of the suite's."""
    return str(DTYPES[dtype]).removeprefix("torch.")


@dataclass
class Measured:
    """Values as written, in the unit of the prediction's column; of two files the later one's."""

    chips: Mapping[str, str]
    """What predictions call a GPU, by PyTorch's name of it; others go by that."""
    layers: dict[Key, str] = field(default_factory=dict)
    """µs, by chip, case, dtype (fp16), batch and direction."""
    steps: dict[Key, str] = field(default_factory=dict)
    """µs, by chip, model, dtype (float16), batch, step, kernel and the output's shape."""
    networks: dict[Key, str] = field(default_factory=dict)
    """ms, by chip, model, dtype (float16), batch and what: inference or training."""

    def add(self, file: Path) -> None:
        """Raises ValueError if it is none of those files, or not of a GPU."""
        try:
            with file.open(newline="", encoding="utf-8-sig") as opened:
                rows = list(csv.DictReader(opened))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"predict: {file} is no CSV file: {error}") from None
        readers = {"suite": self._suite, "is_default": self._steps, "first_loss": self._training}
        reader = next((reader for column, reader in readers.items() if rows and column in rows[0]), None)
        if reader is None:
            raise ValueError(f"predict: {file} is no file of benchmarks, gpu_session, gpu_tune or training")
        if any(row.get("device", "cuda") != "cuda" or not row.get("gpu") for row in rows):
            raise ValueError(f"predict: {file} was not measured on a GPU")
        for row in rows:
            row["chip"] = self.chips.get(row["gpu"], row["gpu"])
        try:
            reader([row for row in rows if row.get("median_ms") or row.get("us")])
        except (KeyError, ValueError) as error:
            raise ValueError(f"predict: {file} is not as it was written: {error!r}") from None

    def _suite(self, rows: list[dict[str, str]]) -> None:
        for row in _by_preference(rows, OF_LAYERS):
            if row["suite"] == "layers":
                key = row["chip"], row["case"], row["dtype"], row["batch"], row["direction"]
                self.layers[key] = f"{1e3 * _time(row['median_ms']):.2f}"
        for row in rows:
            if (row["suite"], row["peer"], row["direction"]) == ("models", "accelerate", "forward"):
                self._network(row["case"], row, "inference")

    def _steps(self, rows: list[dict[str, str]]) -> None:
        for row in rows:
            if row["way"] == "planned" and row["is_default"] == "True":
                shape = row["shape"].replace("x", "×")
                key = row["chip"], row["model"], name_of(row["dtype"]), row["batch"], row["step"], row["kernel"], shape
                self.steps[key] = f"{_time(row['us']):.2f}"

    def _training(self, rows: list[dict[str, str]]) -> None:
        for row in _by_preference(rows, OF_TRAINING):
            self._network(row["network"], row, "training")

    def _network(self, model: str, row: dict[str, str], what: str) -> None:
        self.networks[row["chip"], model, name_of(row["dtype"]), row["batch"], what] = f"{_time(row['median_ms']):.3f}"


def _time(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"no time: {text}")
    return value


def _by_preference(rows: list[dict[str, str]], peers: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of the peers, the first peer's last, so that it is what stays."""
    for peer in reversed(peers):
        yield from (row for row in rows if row["peer"] == peer)
