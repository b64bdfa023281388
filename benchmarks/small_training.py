"""Short trainings on a part of the real pictures, for what compares many networks: see benchmarks/pictures.py."""

import torch
import torch.nn.functional as F
from torch import nn

import mobilenet_fast
from benchmarks.pictures import Pictures
from benchmarks.train_run import DECAY, MOMENTUM, NORM_MOMENTUM, RATE, rate
from mobilenet_fast.search.digits import COUNT

BATCH = 32


class SmallData:
    """Training's and validation's pictures, of those that are not the test's, and all of the test's.

    Args:
        count: pictures to train with, and half as many to validate; taken evenly from all.
        size: the side that they are scaled to.
    """

    def __init__(self, count: int, size: int) -> None:
        self.pictures = Pictures(COUNT, size)
        spread = self.pictures.train[torch.arange(3 * count // 2) * len(self.pictures.train) * 2 // (3 * count)]
        is_validation = torch.arange(len(spread)) % 3 == 2
        self.train = spread[~is_validation]
        self.parts = {"validation": spread[is_validation], "test": self.pictures.test}
        self.batches: dict[str, list] = {}

    def fit(self, model: nn.Module, steps: int, seed: int, highest: float = RATE, decays: bool = True) -> None:
        """Trains by SGD, with the warmup and cosine of ``benchmarks train``, or at one rate."""
        optimizer = torch.optim.SGD(model.parameters(), highest, MOMENTUM, weight_decay=DECAY)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        order = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            if len(order) < BATCH:
                order = self.train[torch.randperm(len(self.train), generator=generator)]
            x, labels = self.pictures.batch(order[:BATCH], generator)
            order = order[BATCH:]
            optimizer.param_groups[0]["lr"] = highest * (rate(step, steps) if decays else 1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str = "test") -> float:
        """In % of a part's pictures."""
        if part not in self.batches:
            self.batches[part] = [self.pictures.batch(places) for places in self.parts[part].split(100)]
        model.eval()
        right = sum((model(x).argmax(1) == labels).sum().item() for x, labels in self.batches[part])
        return 100 * right / len(self.parts[part])


def prepared(model: nn.Module) -> nn.Module:
    """In channels_last, with this package's layers, and norms whose statistics follow a short training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = NORM_MOMENTUM
    return mobilenet_fast.replace_layers(model.to(memory_format=torch.channels_last))
