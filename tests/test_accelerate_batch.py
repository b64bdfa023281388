"""Batches that run part by part: whatever is split, over however many threads, the numbers are those of the whole."""

import copy

import pytest
import torch
from helpers import poisoned_memory
from torch import nn

import mobilenet_fast
from mobilenet_fast import _C, accelerate
from mobilenet_fast.accelerate import plan


class Net(nn.Module):
    """Every kind of step, concatenations, a branch that waits, operations of the whole batch after runs of others,
    and outputs of runs and of the classifier."""

    def __init__(self, whole: bool, channels: int = 16):
        super().__init__()
        c = channels
        self.whole = whole
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(c, c, 5, 1, 2, groups=c), nn.ReLU())
        self.squeeze = mobilenet_fast.nn.SqueezeExcitation(c, 8)
        self.project = nn.Conv2d(c, c, 1)
        self.winograd = nn.Conv2d(c, c, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(c, 4 * c, 1), nn.ReLU(), nn.Conv2d(4 * c, 4 * c, 3, 1, 1, groups=4 * c), nn.Conv2d(4 * c, c, 1)
        )
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.reduce = nn.Conv2d(3 * c, c, 1)
        self.widen = nn.Conv2d(c, 5 * c, 1)
        self.classifier = nn.Linear(c, 10)

    def forward(self, x):
        early = self.stem(x)
        y = self.project(self.squeeze(self.depthwise(early))) + early
        y = torch.cat([self.pool(y), self.winograd(y), self.block(y)], 1)
        if self.whole:
            y = y - y.mean(0, keepdim=True)
        maps = self.reduce(y) + early
        wide = torch.relu(self.widen(maps))  # may lie where `early` did, not part by part
        if self.whole:
            wide = wide - wide.mean(0, keepdim=True)
        features = nn.functional.adaptive_avg_pool2d(maps, 1)
        return wide, maps, features, self.classifier(torch.flatten(features, 1))


def image(n, h, w, layout="contiguous"):
    x = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n))
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x


def fitted(model):
    torch.manual_seed(0)
    model = model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    return model.eval()


def parts(report) -> list[int]:
    counts = [row.kernel.split(" × ")[0] for row in report.rows]
    return [int(count) if count.isdigit() else 1 for count in counts]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("whole", [False, True], ids=["one run", "runs"])
def test_parts_are_the_whole(monkeypatch, threads, whole, layout):
    monkeypatch.setattr(_C, "l2_cache_bytes", lambda: 1 << 13)
    monkeypatch.setattr(plan, "winograd_is_faster", lambda *_: True)
    model = fitted(Net(whole))
    exact = copy.deepcopy(model).double()
    fast = accelerate(model)
    for n in (1, 2, 3, 8, 11):
        x = image(n, 18, 14, layout)
        with torch.no_grad(), poisoned_memory():
            fast(torch.full_like(x, float("nan")))  # what the next call finds in the arena
            expected = exact(x.double())
            results = []
            for count in (1, 2, 3, 7):
                threads(count)
                results.append(fast(x))
        for result in results:
            for y, first, y64 in zip(result, results[0], expected, strict=True):
                torch.testing.assert_close(y.double(), y64, rtol=0, atol=4e-6 * y64.abs().max().item())
                assert torch.equal(y, first)
        kernels = " ".join(f"{row.operation} {row.kernel}" for row in fast.explain().rows)
        assert "inverted_residual" in kernels and "F(4, 3)" in kernels
        split, head = parts(fast.explain())[:-2], parts(fast.explain())[-2:]
        assert set(split) == ({1, n} if whole else {n})
        assert head == [1, 1]  # classifier, and a copy of the features


@pytest.mark.parametrize("images, count, size", [(12, 1, 4), (12, 2, 4), (12, 4, 3), (7, 1, 1), (4, 1, 4)])
def test_a_part_is_as_many_images_as_the_cache_holds(monkeypatch, threads, images, count, size):
    largest = (64 + 64) * 8 * 8 * 4  # input and output of the second depthwise convolution
    monkeypatch.setattr(_C, "l2_cache_bytes", lambda: 5 * largest)
    threads(count)
    model = fitted(Net(False))
    fast = accelerate(model, image(images, 16, 16))
    assert set(parts(fast.explain())[:-2]) == {images // size}


def test_small_maps_at_the_end_run_as_one_batch(monkeypatch):
    monkeypatch.setattr(_C, "l2_cache_bytes", lambda: 0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), *(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(3)), nn.Conv2d(16, 8, 1)]
    fast = accelerate(nn.Sequential(*layers).eval(), image(6, 32, 32))
    assert parts(fast.explain()) == [6, 6, 6, 1, 1]  # to 16², 8², 4², 2², 2²


def test_memory_is_that_of_the_parts_under_way(threads):
    threads(1)
    model = mobilenet_fast.models.mobilenet_v2(weights=None).eval()
    fast = accelerate(model, image(1, 224, 224))
    alone = fast.explain().arena_bytes
    with torch.no_grad():
        fast(image(8, 224, 224))
        assert fast.explain().arena_bytes < 1.1 * alone
        threads(2)
        assert alone < fast.explain().arena_bytes < 2.1 * alone


@pytest.mark.parametrize("count", [1, 2, 5])
def test_profile_of_parts(threads, count):
    threads(count)
    fast = accelerate(mobilenet_fast.models.mobilenet_v2(weights=None).eval(), image(3, 64, 64))
    profile = fast.profile(image(3, 64, 64), runs=2)
    assert all(second > 0 for second in profile.seconds)
    assert profile.rows[0].shape[0] == 3 and profile.rows[0].macs == 3 * 27 * 32 * 32 * 32


@pytest.mark.parametrize(
    "forward, shape",
    [
        (lambda x: torch.cat([x, x.flip(1)], 1), (6, 8, 5, 5)),
        (torch.relu, (4, 3, 0, 5)),
        (lambda x: torch.cat([x, x], 1), (4, 0, 3, 5)),
    ],
    ids=["only a concatenation", "no pixels", "no channels"],
)
def test_batches_with_nothing_to_split(forward, shape):
    class Model(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(accelerate(Model().eval())(x), forward(x))


def test_bytes_are_those_of_the_whole_batch(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1)

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x)], 1)

    sizes = []
    for cache in (0, 1 << 30):
        monkeypatch.setattr(_C, "l2_cache_bytes", lambda cache=cache: cache)
        report = accelerate(Model().eval(), torch.randn(8, 8, 16, 16)).explain()
        sizes.append([row.bytes for row in report.rows if "conv" in row.operation])
    assert sizes[0] == sizes[1]
