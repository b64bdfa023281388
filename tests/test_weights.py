"""Weights by name: each is its library's, and what can't be fetched is said in one line. And the padding that those
from TensorFlow need."""

import importlib
import sys
from urllib.error import URLError

import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

from mobilenet_fast import accelerate, models
from mobilenet_fast.models import registry

NAMED = [name for name in models.list_models() if name not in ("efficientnet", "deeplab_v3plus_xception")]


@pytest.fixture
def addresses(monkeypatch):
    """Instead of what lies there, fetching gives an address."""
    models_of_torchvision, models_of_timm = import_torchvision().models, import_timm().models

    def fetch(address, **how):
        assert how["weights_only"] is True
        return address

    monkeypatch.setattr(models_of_torchvision._api, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(models_of_timm, "load_state_dict_from_hf", fetch)


@pytest.mark.parametrize("name", NAMED)
def test_every_name_is_known_to_its_library(addresses, name):
    for known in registry._BUILDERS[name].weights:
        found = {key: fetch() for key, fetch in known.items() if key != "imagenet"}
        for key, address in found.items():
            library, _, entry = key.rpartition("/")
            model = entry.rpartition(".")[0]
            if library == "timm":
                assert address == f"timm/{entry}" or address.endswith(".pth")
            elif library == "torchvision":
                assert address == import_torchvision().models.get_model_weights(model)[entry.rpartition(".")[2]].url
            else:
                assert address in [found[k] for k in found if "/" in k]
    assert models.list_weights(name), name


@pytest.mark.parametrize("name", NAMED)
def test_no_name_is_left_out(name):
    for known in registry._BUILDERS[name].weights:
        full = [key.partition("/")[::2] for key in known if "/" in key]
        for library, model in {(library, entry.rpartition(".")[0]) for library, entry in full}:
            listed = {entry for _, entry in full if entry.rpartition(".")[0] == model}
            if library == "timm":
                assert listed == set(import_timm().list_pretrained(f"{model}.*"))
            else:
                entries = import_torchvision().models.get_model_weights(model)
                assert listed == {f"{model}.{entry.name}" for entry in entries}


TENSORFLOWS = {
    "mobilenet_v3_large": ("tf_mobilenetv3_large_100", 64),
    "mobilenet_v3_small": ("tf_mobilenetv3_small_100", 64),
    "efficientnet_b0": ("tf_efficientnet_b0", 144),
}


@pytest.mark.parametrize("name", TENSORFLOWS)
@pytest.mark.parametrize("wider", [(0, 0), (11, -13)], ids=("even", "odd"))
def test_same_padding_is_timms(monkeypatch, name, wider):
    theirs, side = TENSORFLOWS[name]
    torch.manual_seed(0)
    original = randomise_batch_norm(import_timm().create_model(theirs, drop_rate=0.2), 0, (8, 3, side, side))
    state = dict(sorted(original.state_dict().items()))  # as safetensors has them
    monkeypatch.setattr(import_timm().models, "load_state_dict_from_hf", lambda *args, **kwargs: state)
    ours = models.create_model(name, weights="in1k", same_padding=True).eval()
    x = pictures(2, 3, *(side + pixels for pixels in wider), seed=1)
    assert_parity(original, ours, x)
    if wider != (0, 0) and name != "mobilenet_v3_large":  # which has nothing that the small one lacks
        assert_parity(original, accelerate(ours, (x,)), x)
    x = x.double()
    with torch.no_grad():
        exact, actual = original.double()(x), ours.double()(x)
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12 * exact.abs().max().item())


def pad_as_tensorflow(model, below_right=lambda module: False):
    """Lets a model's strided 3x3 layers pad as TensorFlow does: on all sides of odd images, below and to the right of
    even ones, and some there in any case."""

    def pad(module, inputs):
        (x,) = inputs
        top, left = (0 if below_right(module) else size % 2 for size in x.shape[-2:])
        value = 0.0 if isinstance(module, nn.Conv2d) else -torch.inf
        return (nn.functional.pad(x, (left, 1, top, 1), value=value),)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
        elif isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and (module.stride, module.padding) in (
            ((2, 2), (1, 1)),
            (2, 1),
        ):
            module.padding = 0 if isinstance(module, nn.MaxPool2d) else (0, 0)
            module.register_forward_pre_hook(pad)
    return model


@pytest.mark.parametrize("size", [(96, 96), (75, 97)], ids=str)
@pytest.mark.parametrize(
    "name, same_padding",
    [("mobilenet_v1", True), ("mobilenet_v1", "keras"), ("mobilenet_v2", True), ("xception", True)],
)
def test_same_padding_is_tensorflows(name, same_padding, size):
    torch.manual_seed(0)
    original = pad_as_tensorflow(
        models.create_model(name, num_classes=10), lambda module: same_padding == "keras" and module.groups > 1
    )
    original = randomise_batch_norm(original, 0, (4, 3, *size))
    ours = models.create_model(name, weights=original.state_dict(), num_classes=10, same_padding=same_padding).eval()
    x = pictures(2, 3, *size, seed=1)
    assert_parity(original, ours, x)
    if size == (75, 97):
        assert_parity(original, accelerate(ours, (x,)), x)
    with torch.no_grad():
        plain = models.create_model(name, weights=original.state_dict(), num_classes=10).eval()(x)
    assert (plain - ours(x)).abs().max() > 1e-3 * plain.abs().max()  # else there is nothing to see


def test_weights_with_a_name_are_loaded(monkeypatch):
    torch.manual_seed(0)
    saved = models.mobilenet_v3_small(num_classes=3).state_dict()
    api = import_torchvision().models._api
    asked = []
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda address, **how: asked.append(address) or saved)
    for name in ("IMAGENET1K_V1", "DEFAULT", "torchvision/mobilenet_v3_small.IMAGENET1K_V1"):
        loaded = models.create_model("mobilenet_v3_small", weights=name, num_classes=3)
        torch.testing.assert_close(loaded.state_dict(), saved, rtol=0, atol=0)
    assert len(asked) == 3 and len(set(asked)) == 1
    with pytest.raises(
        RuntimeError, match="^MobileNetV3: weights are another model's: they differ in shape at 'classi"
    ):
        models.mobilenet_v3_small("DEFAULT")


def test_a_file_goes_before_a_name_that_is_unknown(tmp_path, monkeypatch):
    saved = models.mobilenet_v3_small(num_classes=3).state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save(saved, "IMAGENET1K")
    loaded = models.mobilenet_v3_small(weights="IMAGENET1K", num_classes=3)
    torch.testing.assert_close(loaded.state_dict(), saved, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, kwargs, said",
    [
        (
            "mobilenet_v2",
            {"weights": "IMAGENET1K_V3"},
            "mobilenet_v2: weights must be a state_dict, the path of one, or one of 'IMAGENET1K_V1', 'IMAGENET1K_V2', "
            "'DEFAULT', .*; did you mean 'IMAGENET1K_V.' or .*[?] got 'IMAGENET1K_V3'$",
        ),
        ("mobilenet_v2", {"weights": "a.pth"}, "mobilenet_v2: weights must be .*V2'; got 'a.pth'$"),
        (
            "mobilenet_v2",
            {"weights": "DEFAULT", "same_padding": True},
            "mobilenet_v2: .* path of one .none have a name ",
        ),
        ("efficientnet_b0", {"weights": "IMAGENET1K_V1", "same_padding": True}, "efficientnet_b0: .* 'ns_jft_in1k', "),
        (
            "efficientnet_lite0",
            {"weights": "imagenet21k"},
            ".*one of 'imagenet', 'in1k', .* did you mean 'imagenet'[?]",
        ),
        (
            "efficientnet",
            {"weights": "DEFAULT"},
            "weights must be a state_dict or the path of one, got 'DEFAULT', where",
        ),
        ("mobilenet_v1", {"same_padding": "valid"}, 'mobilenet_v1: same_padding must be False, True or "keras", got'),
    ],
)
def test_unknown_names_are_told_from_known_ones(name, kwargs, said):
    with pytest.raises(ValueError, match=f"^{said}") as raised:
        models.create_model(name, **kwargs)
    assert "\n" not in str(raised.value)


def test_list_weights():
    assert models.list_weights("mobilenet_v2")[:3] == ["IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"]
    assert models.list_weights("mobilenet_v2", same_padding=True) == models.list_weights("efficientnet") == []
    with pytest.raises(ValueError, match="^list_weights: there is no model 'resnet50'; there are .*mobilenet_v2"):
        models.list_weights("resnet50")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_inception_networks_by_name_are_torchvisions(monkeypatch, name):
    torchvision = import_torchvision().models
    state = getattr(torchvision, name)(aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(torchvision._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    ours = models.create_model(name, weights="IMAGENET1K_V1")
    assert ours.transform_input and getattr(torchvision, name)(weights="IMAGENET1K_V1").transform_input
    plain = models.create_model(name, weights="IMAGENET1K_V1", aux_logits=False, transform_input=False)
    assert not plain.transform_input and torch.equal(plain.fc.weight, state["fc.weight"])
    assert not any("aux" in key.lower() for key in plain.state_dict())


def test_weights_at_an_address(monkeypatch):
    model = models.mobilenet_v3_small(width_mult=0.25)
    asked = []

    def fetch(url, **how):
        asked.append((url, how))
        if "missing" in url:
            raise URLError("no route")
        return model.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    ours = models.mobilenet_v3_small("https://example.org/small.pth", width_mult=0.25)
    assert torch.equal(ours.features[0][0].weight, model.features[0][0].weight)
    assert asked == [("https://example.org/small.pth", {"map_location": "cpu", "weights_only": True})]
    with pytest.raises(OSError, match="could not be fetched: .*no route.*; the path of their file does as well$"):
        models.efficientnet(weights="https://example.org/missing.pth")


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model, path = models.mobilenet_v3_small(width_mult=0.25), tmp_path / "small.safetensors"
    safetensors.save_file(model.state_dict(), path)
    ours = models.mobilenet_v3_small(path, width_mult=0.25)
    assert torch.equal(ours.features[0][0].weight, model.features[0][0].weight)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="^weights: .* is not a state_dict: "):
        models.mobilenet_v3_small(path, width_mult=0.25)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="^weights: .safetensors files take a package: pip install safetensors$"):
        models.mobilenet_v3_small(path, width_mult=0.25)


def test_old_checkpoints_count_no_batches():
    model = models.mobilenet_v3_small(width_mult=0.25)
    state = model.state_dict()  # with the metadata that new ones have
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    ours = models.mobilenet_v3_small(state, width_mult=0.25)
    assert torch.equal(ours.features[0][0].weight, model.features[0][0].weight)


@pytest.mark.parametrize("library, model", [("torchvision", "mobilenet_v2"), ("timm", "mobilenet_v1")])
@pytest.mark.parametrize("missing", [True, False])
def test_without_the_library(monkeypatch, library, model, missing):
    if missing:
        monkeypatch.setitem(sys.modules, library, None)
        said = f"is not installed; run: pip install {library}"
    else:

        def broken(name):
            raise RuntimeError("operator torchvision::nms does not exist\nand more")

        monkeypatch.setattr(importlib, "import_module", broken)
        said = f"can't be imported beside torch {torch.__version__}: operator torchvision::nms does not exist"
    with pytest.raises(ImportError) as raised:
        models.create_model(model, weights="DEFAULT")
    assert str(raised.value) == f"{model}: weights 'DEFAULT' come from {library}, which {said}"


@pytest.mark.parametrize("model, name", [("mobilenet_v2", "IMAGENET1K_V1"), ("mnasnet_a1", "rmsp_in1k")])
def test_without_a_network(monkeypatch, model, name):
    def fails(*args, **kwargs):
        raise URLError("no route\nto host")

    monkeypatch.setattr(import_torchvision().models._api, "load_state_dict_from_url", fails)
    monkeypatch.setattr(import_timm().models, "load_state_dict_from_hf", fails)
    with pytest.raises(OSError) as raised:
        models.create_model(model, weights=name)
    assert str(raised.value) == (
        f"{model}: weights {name!r} could not be fetched: <urlopen error no route; the path of their file does as well"
    )
    assert raised.value.__suppress_context__
