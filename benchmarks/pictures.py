"""Real pictures that a package ships, in batches: the digits of `mobilenet_fast.search.digits`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilenet_fast.search.digits import scanned_digits

FIFTH = 5  # of the pictures, one in five is for the test


class Pictures:
    """A fixed split, the same for every seed, with as much of each digit in both parts; standardised by the training's.

    Args:
        count: how many of the 5,000 to use, taken evenly from all.
        size: the side that they are scaled to.
    """

    def __init__(self, count: int, size: int) -> None:
        pixels, labels = scanned_digits()
        some = torch.arange(count) * len(labels) // count  # they are sorted
        pixels, self.labels = pixels[some] / 255, labels[some]
        places = torch.arange(count)
        self.test, self.train = places[places % FIFTH == FIFTH - 1], places[places % FIFTH != FIFTH - 1]
        self.mean, self.std = pixels[self.train].mean(), pixels[self.train].std()
        self.pixels, self.size = pixels, size

    def batch(self, places: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pictures as (N, 3, size, size) in channels_last, and their labels.

        With a generator each is turned by up to 10°, scaled by 0.9 to 1.1 and shifted by up to a twentieth of its side.
        """
        count = len(places)
        angle, scale, shift = torch.zeros(count), torch.ones(count), torch.zeros(count, 2)
        if generator is not None:
            draws = 2 * torch.rand(count, 4, generator=generator) - 1
            angle, scale, shift = draws[:, 0] * math.radians(10), 1 + 0.1 * draws[:, 1], 0.1 * draws[:, 2:]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
        grid = F.affine_grid(theta, [count, 1, self.size, self.size], align_corners=False)
        x = (F.grid_sample(self.pixels[places], grid, align_corners=False) - self.mean) / self.std
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), self.labels[places]
