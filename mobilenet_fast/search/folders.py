"""Pictures to fine-tune with, from a folder that has one of each class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM, DECAY = 0.9, 1e-5
FIFTH = 5  # of a class's pictures, one in five is to evaluate with


class PictureFolder:
    """All pictures of a folder's folders, in memory; the folders in the order of their names are the classes.

    Args:
        folder: whose folders have the pictures, at least five each.
        read: makes a picture's file a (3, H, W) tensor, all of one size.
        batch: pictures a step.
        rate: of SGD with momentum; it falls to zero over a training, by half a cosine.
        device: that of the model.

    Raises:
        ValueError: there are fewer than two classes, or one has fewer than five pictures.
        OSError: a file is no picture; ``read`` may raise others.
    """

    def __init__(
        self, folder: Path, read: Callable[[Path], Tensor], batch: int = 32, rate: float = 0.01, device: str = "cpu"
    ) -> None:
        self.batch, self.rate, self.device = batch, rate, device
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if len(self.classes) < 2:
            raise ValueError(f"{folder} must have a folder of pictures for each class, it has {len(self.classes)}")
        self.parts: dict[str, list[tuple[Tensor, int]]] = {"train": [], "validation": []}
        for label, name in enumerate(self.classes):
            files = sorted(path for path in (folder / name).iterdir() if path.is_file())
            if len(files) < FIFTH:
                raise ValueError(f"{folder / name} must have at least {FIFTH} pictures, it has {len(files)}")
            for i, file in enumerate(files):
                part = "validation" if i % FIFTH == FIFTH - 1 else "train"
                self.parts[part].append((read(file), label))

    def _batch(self, part: str, places: list[int]) -> tuple[Tensor, Tensor]:
        pictures, labels = zip(*(self.parts[part][i] for i in places), strict=True)
        x = torch.stack(pictures).to(self.device, memory_format=torch.channels_last)
        return x, torch.tensor(labels, device=self.device)

    def fit(self, model: nn.Module, steps: int) -> None:
        """Trains in place; each picture is mirrored half of the time."""
        optimizer = torch.optim.SGD(model.parameters(), self.rate, MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        count = len(self.parts["train"])
        model.train()
        order: list[int] = []
        for _ in range(steps):
            if len(order) < min(self.batch, count):
                order = torch.randperm(count).tolist()
            x, labels = self._batch("train", order[: self.batch])
            order = order[self.batch :]
            mirrored = torch.rand(len(x)).to(self.device) < 0.5
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the pictures kept apart that is named rightly."""
        model.eval()
        places = list(range(len(self.parts["validation"])))
        right = 0
        for start in range(0, len(places), self.batch):
            x, labels = self._batch("validation", places[start : start + self.batch])
            right += (model(x).argmax(1) == labels).sum().item()
        return right / len(places)
