"""LR-ASPP is torchvision's, and DeepLabv3+ the paper's."""

import pytest
import torch
from helpers import import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

import mobilenet_fast
from mobilenet_fast import cost, models
from mobilenet_fast import nn as fast
from mobilenet_fast.models import deeplab_v3plus


def torchvision_lraspp(num_classes=21):
    build = import_torchvision().models.segmentation.lraspp_mobilenet_v3_large
    return build(weights=None, weights_backbone=None, num_classes=num_classes)


@pytest.mark.parametrize("size", [(64, 96), (101, 67)], ids=str)
def test_lraspp_is_torchvisions(size):
    torch.manual_seed(0)
    original = randomise_batch_norm(torchvision_lraspp(), 0, (4, 3, 96, 96))
    state = original.state_dict()
    ours = models.lraspp_mobilenet_v3_large(state).eval()
    assert list(ours.state_dict()) == list(state)
    x = pictures(2, 3, *size, seed=1)
    assert_parity(original, ours, x)
    assert_parity(original, mobilenet_fast.accelerate(ours), x)
    x = x.double()
    with torch.no_grad():
        exact, fused = original.double()(x), ours.double()(x)
    for y in (fused, ours(x)):
        assert y.keys() == exact.keys() == {"out"} and y["out"].shape == (2, 21, *size)
        torch.testing.assert_close(y["out"], exact["out"], rtol=0, atol=1e-12 * exact["out"].abs().max().item())


def test_a_training_step_of_lraspp_is_torchvisions():
    torch.manual_seed(0)
    original = torchvision_lraspp(3).double().train()
    ours = models.lraspp_mobilenet_v3_large(original.state_dict(), num_classes=3).double().train()
    x = pictures(2, 3, 64, 64, seed=1).double()
    for model in (original, ours):
        model(x)["out"].square().mean().backward()
    for (key, expected), actual in zip(original.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-12, msg=key)


def test_lraspp_takes_the_backbones_arguments():
    with torch.device("meta"):
        whole = models.lraspp_mobilenet_v3_large(num_classes=2)
        small = models.lraspp_mobilenet_v3_large(reduced_tail=True, minimalistic=True, in_chans=1, num_classes=2)
        assert small(torch.empty(1, 1, 64, 64))["out"].shape == (1, 2, 64, 64)
    assert small.classifier.cbr[0].in_channels == whole.classifier.cbr[0].in_channels // 2 == 480


def test_deeplab_is_the_papers():
    with torch.device("meta"):
        model = models.deeplab_v3plus_xception()
        maps = models.deeplab_v3plus_xception(features_only=True)
    # Table 5, Xception with decoder and separable convolutions at output stride 16: 54.17 billion on 513 x 513.
    assert cost.count(model, (1, 3, 513, 513)).macs == pytest.approx(54.17e9, rel=0.005)
    assert (maps.channels, maps.reductions) == ((64, 128, 256, 2048), (2, 4, 8, 16))
    rates = [branch[0][0].dilation for branch in model.pyramid.atrous]
    assert rates == [(6, 6), (12, 12), (18, 18)]
    depthwise = [m for m in model.encoder.modules() if isinstance(m, fast.DepthwiseConv2d)]
    assert len(depthwise) == 3 * 20 + 3 and [m.dilation for m in depthwise] == [(1, 1)] * 60 + [(2, 2)] * 3


def tiny_deeplab():
    torch.manual_seed(0)
    return randomise_batch_norm(models.deeplab_v3plus_xception(num_classes=3), 0, (4, 3, 64, 64))


def test_deeplab_is_its_parts(monkeypatch):
    """Called one by one, by PyTorch's layers alone, since parameters ask for gradients. The sixteen modules of the
    middle flow are one here: together they make a change of one bit 1e-12 of the outputs."""
    monkeypatch.setattr(deeplab_v3plus, "_MODULES", tuple(dict.fromkeys(deeplab_v3plus._MODULES)))
    model, interpolate = tiny_deeplab().double(), nn.functional.interpolate
    encoder, pyramid, decoder = model.encoder, model.pyramid, model.decoder
    x = pictures(2, 3, 67, 83, seed=1).double()
    with torch.no_grad():
        actual = model(x)["out"]
    y = encoder.block1(encoder.conv2(encoder.conv1(x)))
    low = decoder.reduce(y.relu())
    for part in list(encoder)[3:]:
        y = part(y)
    assert low.shape[2:] == (17, 21) and y.shape[2:] == (5, 6)
    pooled = pyramid.pooled[1](y.mean((2, 3), keepdim=True)).expand(-1, -1, 5, 6)
    y = pyramid.project(torch.cat([pyramid.pointwise(y), *(branch(y) for branch in pyramid.atrous), pooled], 1))
    y = torch.cat([low, interpolate(y, (17, 21), mode="bilinear")], 1)
    expected = interpolate(decoder.classifier(decoder.refine(y)), (67, 83), mode="bilinear")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_deeplab_accelerates_and_trains():
    model, x = tiny_deeplab().double(), pictures(2, 3, 64, 64, seed=1).double()
    with torch.no_grad():
        expected, actual = model(x)["out"], mobilenet_fast.accelerate(model)(x)["out"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()
    model.float().train()(pictures(2, 3, 32, 32))["out"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tasks():
    assert models.list_models("segmentation") == ["deeplab_v3plus_xception", "lraspp_mobilenet_v3_large"]
    both = models.list_models("segmentation") + models.list_models("classification")
    assert sorted(both) == models.list_models()
    with pytest.raises(RuntimeError, match="^LRASPP: weights are another model's"):
        models.lraspp_mobilenet_v3_large({})


def test_lraspp_has_no_dropout():
    with pytest.raises(TypeError, match="^lraspp_mobilenet_v3_large: there is no dropout in this network"):
        models.lraspp_mobilenet_v3_large(dropout=0.5)
