"""Widths of networks of inverted residuals: which channels change together, and what is left when some go."""

import copy
import functools

import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import pictures, randomise_batch_norm
from torch import nn

import mobilenet_fast
from mobilenet_fast import models
from mobilenet_fast.nn import ConvNormAct, InvertedResidual
from mobilenet_fast.search.blocks import ChannelGroup, channel_groups, shrink, with_widths

SIDE = 32


def torchvision_model(name):
    return import_torchvision().models.get_model(name, weights=None)


def timm_model(name):
    return import_timm().create_model(name)


BUILDERS = {
    "mobilenet_v1": functools.partial(models.mobilenet_v1, width_mult=0.25),
    "mobilenet_v2": functools.partial(models.mobilenet_v2, width_mult=0.35),
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "mobilenet_v3_large": functools.partial(models.mobilenet_v3_large, width_mult=0.35, efficient_last_stage=False),
    "mnasnet_a1": functools.partial(models.mnasnet_a1, width_mult=0.35),
    "mnasnet_b1": functools.partial(models.mnasnet_b1, width_mult=0.5),
    "efficientnet_b0": models.efficientnet_b0,
    "efficientnet_lite0": models.efficientnet_lite0,
    "torchvision mobilenet_v2": functools.partial(torchvision_model, "mobilenet_v2"),
    "torchvision mobilenet_v3_small": functools.partial(torchvision_model, "mobilenet_v3_small"),
    "timm tf_mobilenetv3_small_100": functools.partial(timm_model, "tf_mobilenetv3_small_100"),
    "timm mobilenetv4_conv_small_035": functools.partial(timm_model, "mobilenetv4_conv_small_035"),
}
# Of expansion and bottleneck: as the papers' tables have them, MobileNetV1 with a width for each depthwise convolution.
COUNTS = {
    "mobilenet_v1": (13, 1),
    "mobilenet_v2": (17, 7),
    "mobilenet_v3_small": (11, 5),
    "mobilenet_v3_large": (15, 7),  # one more block, whose channels the head reads; the stem is as wide as block 1
    "mnasnet_a1": (16, 7),
    "mnasnet_b1": (17, 7),
    "efficientnet_b0": (16, 7),
    "efficientnet_lite0": (16, 7),
}


@functools.cache
def network(name):
    torch.manual_seed(0)
    return randomise_batch_norm(BUILDERS[name](), 0, (4, 3, SIDE, SIDE))


@functools.cache
def groups_of(name):
    return channel_groups(network(name), pictures(2, 3, SIDE, SIDE))


def with_zeros(model, group, kept):
    """A copy in which nobody reads the channels behind the first ``kept``."""
    model = copy.deepcopy(model)
    for name in (*group.readers, *group.squeeze_excite[::2]):
        model.get_submodule(name).weight.data[:, kept:] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_kept_channels_compute_what_they_did(name):
    model, x = network(name), pictures(2, 3, SIDE, SIDE)
    before, known = copy.deepcopy(model.state_dict()), model(x)
    groups = groups_of(name)
    chosen = [*groups[:3], *groups[3::6]]
    for group in chosen:
        kept = max(1, group.width(model) // 3)
        original = with_zeros(model, group, kept)
        expected, narrow = original(x), shrink(original, group, kept)
        assert group.width(narrow) == kept
        assert not torch.equal(expected, known)
        assert (narrow(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    widths = {group.name: max(1, group.width(model) // 2) for group in groups}
    assert with_widths(model, groups, widths)(x).shape == known.shape
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(x), known)


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_is_there(name):
    kinds = [group.kind for group in groups_of(name)]
    assert (kinds.count("expansion"), kinds.count("bottleneck")) == COUNTS[name]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision mobilenet_v3_small"])
def test_layers_of_mobilenet_v3_small(name):
    model = network(name)
    groups = groups_of(name)
    # In the order of use: stem and block 1, which does not expand, its output, block 2's expansion, ….
    widths = [16, 16, 72, 24, 88, 96, 40, 240, 240, 120, 48, 144, 288, 96, 576, 576]
    assert [group.width(model) for group in groups] == widths
    stem, residual, last = groups[0], groups[6], groups[-1]
    assert stem.writers == ("features.0.0",)
    assert stem.depthwise == ("features.1.block.0.0",)
    assert stem.squeeze_excite == ("features.1.block.1.fc1", "features.1.block.1.fc2")
    assert stem.readers == ("features.1.block.2.0",)
    assert residual == ChannelGroup(
        "bottleneck",
        ("features.4.block.3.0", "features.5.block.3.0", "features.6.block.3.0"),
        (),
        ("features.4.block.3.1", "features.5.block.3.1", "features.6.block.3.1"),
        (),
        ("features.5.block.0.0", "features.6.block.0.0", "features.7.block.0.0"),
        residual.tensors,
    )
    assert len(residual.tensors) == 3 + 3 * 4 + 3
    assert last.name == "features.11.block.0.0"
    assert last.readers == ("features.11.block.3.0",)
    assert groups[13].readers[-1] == "features.12.0"  # the head


def test_the_stem_of_mobilenet_v3_large_is_as_wide_as_its_first_block():
    groups = groups_of("mobilenet_v3_large")
    assert (groups[0].kind, groups[0].writers) == ("bottleneck", ("features.0.0", "features.1.block.1.0"))
    assert groups[0].depthwise == ("features.1.block.0.0",)


@torch.no_grad()
def test_the_largest_norm_is_of_all_filters_that_make_a_channel():
    model = nn.Sequential(ConvNormAct(3, 4), InvertedResidual(4, 4, 8, squeeze_channels=None), ConvNormAct(8, 5, 1))
    stem, depthwise = model[0][0], model[1].block[0][0]
    for conv, sizes in ((stem, [3, 1, 2, 0]), (depthwise, [0, 1, 0, 4])):
        conv.weight.copy_(torch.tensor(sizes).view(4, 1, 1, 1).expand_as(conv.weight))
    group = channel_groups(model, torch.zeros(1, 3, 8, 8))[0]
    # Sums of squares: 27 weights of the stem, 9 of the depthwise convolution a channel.
    sums = 27 * torch.tensor([3, 1, 2, 0]) ** 2 + 9 * torch.tensor([0, 1, 0, 4]) ** 2
    assert sums.tolist() == [243, 36, 108, 144]
    assert shrink(model, group, 2, "largest norm")[0][0].weight[:, 0, 0, 0].tolist() == [3, 0]
    assert shrink(model, group, 3, "largest norm")[1].block[0][0].weight[:, 0, 0, 0].tolist() == [0, 0, 4]
    assert shrink(model, group, 2)[0][0].weight[:, 0, 0, 0].tolist() == [3, 1]


class Branches(nn.Module):
    """Blocks whose channels are joined, split into groups, weighed by a parameter, and returned."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNormAct(3, 16)
        self.blocks = nn.ModuleList(InvertedResidual(16, 32, 8) for _ in range(2))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.free, self.last = InvertedResidual(16, 24, 12), InvertedResidual(12, 40, 20)
        self.weight = nn.Parameter(torch.ones(20, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        joined = torch.cat([block(x) for block in self.blocks], 1)
        y = self.free(self.grouped(joined))
        return joined, self.last(y) * self.weight


def test_widths_that_others_depend_on_stay():
    model = Branches().eval()
    groups = channel_groups(model, torch.zeros(1, 3, 16, 16))
    assert [(group.kind, group.width(model)) for group in groups] == [
        ("expansion", 32),
        ("expansion", 32),
        ("expansion", 24),
        ("bottleneck", 12),
        ("expansion", 40),
    ]
    narrow = with_widths(model, groups, {group.name: 4 for group in groups})
    assert [y.shape[1] for y in narrow(torch.zeros(1, 3, 16, 16))] == [16, 20]


@torch.no_grad()
def test_blocks_that_share_weights():
    block = InvertedResidual(16, 32, 16)
    model = nn.Sequential(ConvNormAct(3, 16), block, block, ConvNormAct(16, 5, 1)).eval()
    x = pictures(2, 3, SIDE, SIDE)
    groups = channel_groups(model, x)
    assert [(group.kind, group.width(model)) for group in groups] == [("bottleneck", 16), ("expansion", 32)]
    for group in groups:
        original = with_zeros(model, group, 8)
        narrow = shrink(original, group, 8)
        assert narrow[1] is narrow[2]
        torch.testing.assert_close(narrow(x), original(x))


def test_a_model_with_replaced_layers_trains_narrower():
    model = mobilenet_fast.replace_layers(torchvision_model("mobilenet_v3_small").to(memory_format=torch.channels_last))
    x = pictures(4, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    model.train()(x).sum().backward()  # plans are made
    groups = channel_groups(model, x)
    assert len(groups) == 16
    narrow = with_widths(model, groups, {group.name: 8 for group in groups})
    narrow.train()(x).sum().backward()
    stock = mobilenet_fast.restore_layers(copy.deepcopy(narrow)).eval()
    with torch.no_grad():
        torch.testing.assert_close(narrow.eval()(x), stock(x))
    assert narrow.features[4].block[1][0].groups == narrow.features[4].block[1][0].in_channels == 8
    assert narrow.features[4].block[1][1].num_features == narrow.features[4].block[1].out_channels == 8
    assert narrow.features[4].out_channels == 8
    assert narrow.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.training


def test_one_channel_is_no_depthwise_convolution():
    """Of a grey picture's stem, and of whatever is made as narrow as that."""
    grey = models.mobilenet_v3_small(num_classes=10).eval()
    grey.features[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
    x = torch.randn(2, 1, SIDE, SIDE)
    groups = channel_groups(grey, x)
    stem = shrink(grey, groups[0], 8).features[0][0]
    assert (stem.in_channels, stem.out_channels, stem.groups) == (1, 8, 1)
    for first, then in ((1, 1), (8, 1)):
        smaller = grey
        for group in groups:
            smaller = shrink(smaller, group, first if group.kind == "expansion" else then)
        assert smaller(x).shape == (2, 10)


def test_a_residual_sum_is_of_bottlenecks():
    """Also in MobileNetV4, where a depthwise convolution before the expansion reads them."""
    groups = groups_of("timm mobilenetv4_conv_small_035")
    shared = [group for group in groups if len(group.writers) > 2]
    assert len(shared) >= 2 and all(group.kind == "bottleneck" for group in shared)


def test_an_error_that_says_nothing():
    class Silent(nn.Module):
        def forward(self, x):
            raise LookupError

    with pytest.raises(ValueError, match="the model can't be captured: LookupError"):
        channel_groups(Silent(), torch.zeros(1, 3, SIDE, SIDE))


def test_errors():
    model, x = network("mobilenet_v3_small"), torch.zeros(1, 3, SIDE, SIDE)
    group = groups_of("mobilenet_v3_small")[2]
    with pytest.raises(TypeError, match="channel_groups: model must be an nn.Module, got str"):
        channel_groups("mobilenet", x)
    with pytest.raises(ValueError, match="channel_groups: the model can't be captured: "):
        channel_groups(model, torch.zeros(1, 4, SIDE, SIDE))
    for channels in (0, 73, 8.0):
        with pytest.raises(ValueError, match=rf"has 72 channels, channels must be from 1 to that, got {channels}"):
            shrink(model, group, channels)
    with pytest.raises(ValueError, match="shrink: keep must be .* got 'last'"):
        shrink(model, group, 8, "last")
