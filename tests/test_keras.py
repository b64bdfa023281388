"""Keras's weights, from every kind of its files, and what its own networks compute with them."""

import json
import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from model_parity import pictures

from mobilenet_fast import cli, models

# {model: {layer: [shape, …]}}, as Keras 3.15 makes them.
LAYERS = json.loads(Path(__file__).with_name("keras_layers.json").read_text(encoding="utf-8"))
HEADS = ("conv_preds", "conv_2", "logits", "predictions")
PADDING = {"mobilenet_v1": "keras"}


def arrays_of(model):
    """Each layer's arrays, filled with numbers that tell where they were."""
    counter = iter(range(10**6))

    def array(shape):
        return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 2**12 + next(counter)

    return {layer: [array(shape).numpy() for shape in shapes] for layer, shapes in LAYERS[model].items()}


@pytest.mark.parametrize("model", LAYERS)
def test_every_array_finds_its_place(model):
    arrays = arrays_of(model)
    state = models.from_keras(arrays, model)
    network = models.create_model(model, weights=state, same_padding=PADDING.get(model, True))
    numbers = [int(value.min()) for key, value in network.state_dict().items() if value.dim()]
    before = len(arrays.get("normalization", ()))  # EfficientNet's first layer
    assert sorted(numbers) == [before + i for i in range(len(numbers))]
    headless = {layer: values for layer, values in arrays.items() if layer not in HEADS}
    rest = models.from_keras(headless, model)
    assert {key.split(".")[0] for key in state.keys() - rest.keys()} <= {"classifier", "fc"}
    assert len(state) - len(rest) == (4 if "v3" in model else 2)


def test_kernels_are_turned():
    arrays = arrays_of("mobilenet_v1")
    state = {key: value.numpy() for key, value in models.from_keras(arrays, "mobilenet_v1").items()}
    (conv,), (depthwise,), (pointwise,) = (arrays[f"conv{part}"] for part in ("1", "_dw_3", "_pw_2"))
    assert (state["conv_stem.weight"][7, 2] == conv[:, :, 2, 7]).all()
    assert (state["blocks.1.1.conv_dw.weight"][7, 0] == depthwise[:, :, 7, 0]).all()
    assert (state["blocks.1.0.conv_pw.weight"][7, :, 0, 0] == pointwise[0, 0, :, 7]).all()
    assert (state["classifier.weight"][7] == arrays["conv_preds"][0][0, 0, :, 7]).all()
    assert (state["classifier.bias"] == arrays["conv_preds"][1]).all()
    for key, value in zip(("weight", "bias", "running_mean", "running_var"), arrays["conv_dw_3_bn"], strict=True):
        assert (state[f"blocks.1.1.bn1.{key}"] == value).all()
    dense = arrays_of("mobilenet_v2")["predictions"][0]
    assert (
        models.from_keras(arrays_of("mobilenet_v2"), "mobilenet_v2")["classifier.1.weight"].numpy() == dense.T
    ).all()


def write_legacy(path, arrays, root="", suffix=":0", limit=10**6):
    """Groups of layers, whose attributes name what they hold; long lists are cut."""
    import h5py

    with h5py.File(path, "w") as file:
        group = file.require_group(root or "/")
        names = [name.encode() for name in ("input_1", *arrays)]
        for i in range(0, len(names), limit):
            group.attrs["layer_names" if limit > len(names) else f"layer_names{i // limit}"] = names[i : i + limit]
        for layer, values in {"input_1": [], **arrays}.items():
            inner = group.require_group(layer)
            inner.attrs["weight_names"] = [f"{layer}/array_{i}{suffix}".encode() for i in range(len(values))]
            for i, value in enumerate(values):
                inner[f"{layer}/array_{i}{suffix}"] = value


def write_numbered(path, arrays):
    """Groups of layers by class, whose attribute names the layer."""
    import h5py

    with h5py.File(path, "w") as file:
        for i, (layer, values) in enumerate(arrays.items()):
            inner = file.create_group(f"layers/class_{i}/vars")
            inner.attrs["name"] = layer
            for j, value in enumerate(values):
                inner[str(j)] = value


@pytest.fixture
def network():
    pytest.importorskip("h5py")
    arrays = arrays_of("mobilenet_v3_small")
    return arrays, models.from_keras(arrays, "mobilenet_v3_small")


@pytest.mark.parametrize("kind", ["weights", "model", "cut", "scopes", "numbered", "archive"])
def test_every_kind_of_file_is_read(tmp_path, network, kind, capsys):
    arrays, expected = network
    path = tmp_path / "file"
    if kind == "scopes":  # the names of MobileNetV3's layers before Keras 3
        new_and_old = {
            "_bn": "/BatchNorm",
            "_depthwise": "/depthwise",
            "excite_conv": "excite/Conv",
            "logits": "Logits",
        }
        for new, old in new_and_old.items():
            arrays = {name.replace(new, old): values for name, values in arrays.items()}
        assert "expanded_conv_1/depthwise/BatchNorm" in arrays and "expanded_conv_squeeze_excite/Conv_1" in arrays
        write_legacy(path, arrays)
    elif kind in ("numbered", "archive"):
        write_numbered(path, arrays)
        if kind == "archive":
            with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
                archive.write(path, "model.weights.h5")
            path = tmp_path / "archive"
    else:
        write_legacy(path, arrays, "model_weights" if kind == "model" else "", limit=20 if kind == "cut" else 10**6)
    assert cli.main(["convert-keras", str(path), "mobilenet_v3_small", str(tmp_path / "out.pth")]) == 0
    assert capsys.readouterr() == ("", "")
    torch.testing.assert_close(torch.load(tmp_path / "out.pth"), expected, rtol=0, atol=0)
    models.mobilenet_v3_small(tmp_path / "out.pth", same_padding=True)


def test_what_is_wrong_is_said_in_one_line(tmp_path, network, monkeypatch, capsys):
    arrays, _ = network
    path = tmp_path / "weights.h5"

    def refused(model="mobilenet_v3_small"):
        assert cli.main(["convert-keras", str(path), model, str(tmp_path / "out.pth")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "No such file or directory" in refused() and str(path) in refused()
    path.write_bytes(b"not HDF5")
    assert f"from_keras: {path} is not a file of Keras's weights: " in refused()
    write_legacy(path, {})
    assert f"from_keras: {path} is not of mobilenet_v3_small: it has no layer 'conv' with weights" in refused()
    write_legacy(path, arrays)
    assert f"from_keras: {path} is not of mobilenet_v2: it has no layer 'conv1' with weights" in refused("mobilenet_v2")
    assert "from_keras: there is no model 'googlenet'; there are mobilenet_v1, mobilenet_v2, " in refused("googlenet")
    assert "from_keras: there is no model 'mobilenetv2'; did you mean mobilenet_v2 or " in refused("mobilenetv2")
    write_legacy(path, arrays | {"conv_bn": arrays["conv_bn"][1:]})
    assert "from_keras: mobilenet_v3_small has 210 tensors, its layers in" in refused()
    write_legacy(path, arrays | {"conv_bn": [arrays["conv"][0], *arrays["conv_bn"][1:]]})
    assert "from_keras: layer 'conv_bn' has an array of shape (3, 3, 3, 16), not of 1 dimensions" in refused()
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "from_keras: Keras's files are read by h5py; run: pip install h5py" in refused()


NETWORKS = {
    "mobilenet_v1": ("MobileNet", {}),
    "mobilenet_v2": ("MobileNetV2", {}),
    "mobilenet_v3_large": ("MobileNetV3Large", {"include_preprocessing": False}),
    "mobilenet_v3_small": ("MobileNetV3Small", {"include_preprocessing": False}),
    "mobilenet_v3_small minimalistic": (
        "MobileNetV3Small",
        {"include_preprocessing": False, "minimalistic": True},
    ),
    "efficientnet_b0": ("EfficientNetB0", {}),
    "xception": ("Xception", {}),
}


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend")
    monkeypatch.setattr(keras.src.backend, "result_type", lambda *dtypes: "float64")  # else norms are in float32
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float64")  # of inputs
    keras.config.set_dtype_policy("float64")
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side, suffix", [(96, ".h5"), (160, ".weights.h5"), (225, ".keras")])
def test_computes_what_keras_computes(keras, tmp_path, name, side, suffix):
    torch.manual_seed(0)
    function, options = NETWORKS[name]
    arguments = {"weights": None, "classes": 10, "input_shape": (side, side, 3), "classifier_activation": None}
    network = getattr(keras.applications, function)(**arguments, **options)
    norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0  # so that one batch makes the statistics
        gamma, beta, *statistics = map(torch.from_numpy, norm.get_weights())
        norm.set_weights([gamma.uniform_(0.5, 1.5), beta.normal_(0, 0.3), *statistics])
    scale = 255 if name.startswith("efficientnet") else 1  # its first layer divides by that
    network(scale * pictures(8, 3, side, side).double().permute(0, 2, 3, 1), training=True)

    path = tmp_path / f"network{suffix}"
    network.save_weights(path) if suffix == ".weights.h5" else network.save(path)
    name, *variant = name.split()
    kwargs = {"num_classes": 10, "same_padding": PADDING.get(name, True), **dict.fromkeys(variant, True)}
    ours = models.create_model(name, **kwargs).double().eval()
    ours.load_state_dict(models.from_keras(path, name))
    x = pictures(2, 3, side, side, seed=1).double()
    with torch.no_grad():
        expected = network(scale * x.permute(0, 2, 3, 1), training=False).cpu()
        actual = ours(x)
    largest = expected.abs().max().item()
    assert (expected[0] - expected[1]).abs().max() > 0.1 * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)  # some of Keras's steps stay in float32
