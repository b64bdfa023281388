"""Models without their heads give the maps of the originals, and those of timm."""

import copy
import io
import math

import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

import mobilenet_fast
from mobilenet_fast import models

# timm's name of the same network with the same keys.
TIMM = {
    "mobilenet_v1": "mobilenetv1_100",
    "mnasnet_a1": "mnasnet_a1",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "xception": "legacy_xception",
    "inception_v3": "inception_v3",
}
# torchvision's name, the modules there that make the maps, and timm's name of a network of the same shape.
TORCHVISION = {
    "mobilenet_v2": ("mobilenet_v2", "features", (1, 3, 6, 13, 17), "mobilenetv2_100"),
    "mobilenet_v3_large": ("mobilenet_v3_large", "features", (1, 3, 6, 12, 16), "mobilenetv3_large_100"),
    "mobilenet_v3_small": ("mobilenet_v3_small", "features", (0, 1, 3, 8, 12), "mobilenetv3_small_100"),
    "mnasnet_b1": ("mnasnet1_0", "layers", (7, 8, 9, 11, 13), "mnasnet_100"),
    "efficientnet_b0": ("efficientnet_b0", "features", (1, 2, 3, 5, 7), "efficientnet_b0"),
    "googlenet": ("googlenet", "", ("conv1", "conv3", "inception3b", "inception4e", "inception5b"), None),
}
SIDES = {"inception_v3": 107, "xception": 96, "efficientnet_b0": 144}


def original_maps(name):
    """A network of others with statistics, its state_dict, and what gives its maps."""
    torch.manual_seed(0)
    side = SIDES.get(name, 64)
    if name in TIMM:
        timm = import_timm()
        model = randomise_batch_norm(timm.create_model(TIMM[name], num_classes=5), 0, (4, 3, side, side))
        maps = timm.create_model(TIMM[name], features_only=True).eval()
        assert not getattr(maps, "body", maps).load_state_dict(model.state_dict(), strict=False).missing_keys
        return model.state_dict(), maps
    build, trunk, ends, _ = TORCHVISION[name]
    kwargs = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = getattr(import_torchvision().models, build)(num_classes=5, **kwargs)
    return randomise_batch_norm(model, 0, (4, 3, side, side)).state_dict(), Seen(model, trunk, ends)


class Seen(nn.Module):
    """What some modules of a network give."""

    def __init__(self, model, trunk, ends):
        super().__init__()
        self.model, self.ends = model, [f"{trunk}.{end}".removeprefix(".") for end in ends]

    def forward(self, x):
        seen = []
        handles = [
            self.model.get_submodule(end).register_forward_hook(lambda module, args, output: seen.append(output))
            for end in self.ends
        ]
        self.model(x)
        for handle in handles:
            handle.remove()
        return seen


@pytest.mark.parametrize("name", [*TIMM, *TORCHVISION])
def test_maps_are_the_originals(name):
    state, original = original_maps(name)
    kwargs = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    maps = models.create_model(name, weights=state, num_classes=5, features_only=True, **kwargs).eval()
    assert set(maps.state_dict()) < set(state)
    for key, value in maps.state_dict().items():
        assert torch.equal(value, state[key]), key
    side = SIDES.get(name, 64)
    x = pictures(2, 3, side + 5, side, seed=1)
    if name == "mobilenet_v3_small":
        fast = mobilenet_fast.accelerate(maps)
        assert isinstance(fast(x), list)
        assert_parity(original, fast, x)
    original, maps, x = original.double(), maps.double(), x.double()
    with torch.no_grad():
        expected, fused = original(x), maps(x)
    assert any(stage.__dict__["_plan"].fuses for stage in maps.stages)
    for actual in (fused, maps(x)):
        assert len(actual) == len(expected) == 5
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    assert maps.channels == tuple(y.size(1) for y in expected) and maps.reductions == (2, 4, 8, 16, 32)
    theirs = TIMM[name] if name in TIMM else TORCHVISION[name][3]
    if theirs:
        info = import_timm().create_model(theirs, features_only=True).feature_info
        assert maps.channels == tuple(info.channels()) and maps.reductions == tuple(info.reduction())


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_gives_maps(name):
    with torch.device("meta"):
        maps = models.create_model(name, features_only=True)
        x = torch.empty(1, 3, 224, 320)
    with torch.no_grad():
        found = maps.eval()(x)
    assert tuple(y.size(1) for y in found) == maps.channels
    last = 16 if name in models.list_models("segmentation") else 32
    assert maps.reductions == tuple(2**i for i in range(1, last.bit_length()))
    for y, reduction in zip(found, maps.reductions, strict=True):
        for n, pixels in zip(x.shape[2:], y.shape[2:], strict=True):
            assert round(math.log2(n / pixels)) == math.log2(reduction)


@pytest.mark.parametrize(
    "name, kwargs, channels",
    [
        ("mobilenet_v3_large", {"dilated": True, "width_mult": 0.5}, (8, 16, 24, 480)),
        ("mobilenet_v3_large", {"efficient_last_stage": False}, (16, 24, 40, 112, 320)),
        ("mobilenet_v2", {"width_mult": 0.35, "in_chans": 1}, (8, 8, 16, 32, 112)),
        ("mnasnet_b1", {"out_indices": (1,)}, (24,)),
        ("inception_v3", {"out_indices": [3, 0], "transform_input": True}, (768, 64)),
    ],
    ids=str,
)
def test_channels_of_variants(name, kwargs, channels):
    with torch.device("meta"):
        assert models.create_model(name, features_only=True, **kwargs).channels == channels


def test_out_indices():
    torch.manual_seed(0)
    whole = models.mobilenet_v3_small()
    every = models.mobilenet_v3_small(whole.state_dict(), features_only=True).eval()
    some = models.mobilenet_v3_small(whole.state_dict(), features_only=True, out_indices=(3, 1)).eval()
    assert (some.channels, some.reductions) == ((48, 16), (16, 4))
    assert set(some.state_dict()) < set(every.state_dict()) and "features.9.block.0.0.weight" not in some.state_dict()
    x = pictures(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = every(x), some(x)
    assert torch.equal(actual[0], expected[3]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    "name, kwargs, error, said",
    [
        ("mobilenet_v2", {"out_indices": (5,)}, ValueError, r"out_indices must be from 0 to 4, got \(5,\)"),
        ("xception", {"out_indices": (0, -1)}, ValueError, r"out_indices must be from 0 to 4, got \(0, -1\)"),
        ("mobilenet_v2", {"out_indices": ("a",)}, ValueError, r"out_indices must be from 0 to 4, got \('a',\)"),
        ("mobilenet_v2", {"out_indices": (1.0,)}, ValueError, r"out_indices must be from 0 to 4, got \(1.0,\)"),
        ("mobilenet_v2", {"out_indices": ()}, ValueError, r"out_indices must be from 0 to 4, got \(\)"),
        ("mobilenet_v3_large", {"dilated": True, "out_indices": (4,)}, ValueError, r"out_indices must be from 0 to 3"),
        ("mobilenet_v2", {"out_indices": 3}, TypeError, "out_indices must be a tuple of integers or None, got 3"),
        ("mobilenet_v2", {"out_indices": (1,), "features_only": False}, ValueError, "out_indices is for features_only"),
        ("mobilenet_v2", {"weights": {}}, RuntimeError, "weights are another model's"),
    ],
    ids=str,
)
def test_wrong_arguments(name, kwargs, error, said):
    with torch.device("meta"), pytest.raises(error, match=said) as raised:
        models.create_model(name, **{"features_only": True} | kwargs)
    assert "\n" not in str(raised.value)


def test_export_compile_copy_and_pickle():
    maps = models.mobilenet_v3_small(features_only=True).eval()
    x = pictures(2, 3, 64, 64)
    with torch.no_grad():
        expected = maps(x)
        saved = io.BytesIO()
        torch.save(maps, saved)
        saved.seek(0)
        dynamic = ({0: torch.export.Dim("n"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
        ways = {
            "export": torch.export.export(maps, (x,), dynamic_shapes=dynamic).module(),
            "strict export": torch.export.export(maps, (x,), strict=True).module(),
            "compile": torch.compile(maps, backend="eager", fullgraph=True),
            "copy": copy.deepcopy(maps),
            "pickle": torch.load(saved, weights_only=False),
            "trace": torch.jit.trace(maps, x, strict=False),
        }
        for name, way in ways.items():
            for a, b in zip(way(x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=name)
        nn.init.zeros_(ways["copy"].features[0][0].weight)
        assert torch.equal(maps(x)[0], expected[0])
        assert not torch.equal(ways["copy"](x)[0], expected[0])


def test_replaced_modules_count():
    maps = models.mobilenet_v2(features_only=True, out_indices=(0,)).eval()
    x = pictures(1, 3, 32, 32)
    with torch.no_grad():
        before = maps(x)[0]
        maps.features[1] = nn.Identity()
        after = maps(x)[0]
    assert (before.size(1), after.size(1)) == (16, 32)


def test_maps_train():
    maps = models.efficientnet_b0(features_only=True, out_indices=(2, 3)).train()
    sum(y.mean() for y in maps(pictures(2, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in maps.parameters())
