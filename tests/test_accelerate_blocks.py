"""Inverted residual blocks that run as one step: whatever is fused, the numbers are those of the layers apart."""

import itertools

import pytest
import torch
from torch import nn

import mobilenet_fast
from mobilenet_fast import _C
from mobilenet_fast.accelerate import plan


class Block(nn.Module):
    def __init__(self, kernel, stride, expand, project, residual, squeeze, channels=10, hidden=37, dilation=1):
        super().__init__()
        inner = hidden if expand else channels
        self.expand = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU6()) if expand else nn.Identity()
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2 * dilation, dilation, groups=inner), nn.Hardswish()
        )
        self.squeeze = mobilenet_fast.nn.SqueezeExcitation(inner, 8) if squeeze else nn.Identity()
        self.project = nn.Conv2d(inner, channels, 1) if project else nn.Identity()
        self.residual = residual and project and stride == 1

    def forward(self, x):
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


BLOCKS = [
    options
    for options in itertools.product((3, 5, 7), (1, 2), (True, False), (True, False), (True, False), (True, False))
    if options[2] or options[3]
]


@pytest.mark.parametrize("kernel, stride, expand, project, residual, squeeze", BLOCKS)
def test_fused_blocks_equal_their_layers(monkeypatch, threads, kernel, stride, expand, project, residual, squeeze):
    torch.manual_seed(0)
    model = Block(kernel, stride, expand, project, residual, squeeze).eval()
    fuse_blocks = plan.fuse_blocks
    monkeypatch.setattr(plan, "fuse_blocks", lambda graph, _: fuse_blocks(graph, plan.by_cache(0, 2**40)))
    fast = mobilenet_fast.accelerate(model, torch.zeros(1, 10, 8, 8))
    exact = Block(kernel, stride, expand, project, residual, squeeze).eval().double()
    exact.load_state_dict(model.state_dict())
    for n, h, w in ((1, 8, 8), (2, 15, 7), (1, 1, 1), (3, 33, 9)):
        x = torch.randn(n, 10, h, w)
        with torch.no_grad():
            y64 = exact(x.double())
            for count in (1, 2, 5):
                threads(count)
                y = fast(x)
                torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5 * y64.abs().max().item())
    fused = [row for row in fast.explain().rows if row.operation.startswith("inverted_residual")]
    assert len(fused) == (1 if expand or not squeeze else 0)


@pytest.mark.parametrize(
    "kernel, stride, dilation, residual", [(3, 1, 1, False), (3, 1, 1, True), (5, 2, 1, False), (3, 1, 2, False)]
)
def test_threads_that_meet_within_a_row_after_several_strips(threads, kernel, stride, dilation, residual):
    """Without an expansion, rows that do not divide by the threads are cut; strips take half of the L2 cache."""
    torch.manual_seed(0)
    channels, width = 256, 21
    rows = _C.l2_cache_bytes() // 2 // (channels * width * 4)
    model = Block(kernel, stride, False, True, residual, False, channels, dilation=dilation).eval()
    exact = Block(kernel, stride, False, True, residual, False, channels, dilation=dilation).eval().double()
    exact.load_state_dict(model.state_dict())
    x = torch.randn(1, channels, stride * (4 * rows + 1), stride * width)
    with torch.no_grad():
        y64 = exact(x.double())
        for count in (1, 2, 5):
            threads(count)
            fast = mobilenet_fast.accelerate(model, x)
            assert [row.operation for row in fast.explain().rows] == ["inverted_residual"]
            torch.testing.assert_close(fast(x).double(), y64, rtol=1e-5, atol=1e-5 * y64.abs().max().item())


def test_blocks_are_fused_where_the_expanded_tensor_leaves_the_cache():
    model = Block(3, 1, True, True, True, False, channels=16, hidden=64).eval()
    side = int((_C.l2_cache_bytes() / (64 * 4)) ** 0.5) + 1
    fast = mobilenet_fast.accelerate(model, torch.zeros(1, 16, 8, 8))
    assert [row.operation for row in fast.explain().rows][0] != "inverted_residual"
    with torch.no_grad():
        fast(torch.zeros(1, 16, side, side))
    assert [row.operation for row in fast.explain().rows] == ["inverted_residual"]
