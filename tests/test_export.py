"""What torch.export and ONNX make of models from this package's layers: operators that other runtimes have."""

import io

import pytest
import torch
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn

import mobilenet_fast
from mobilenet_fast.models import create_model

NAMES = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_lite0", "mnasnet_a1")


def network(name):
    return randomise_batch_norm(create_model(name, num_classes=10), 0, (4, 3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_exported_programs_hold_torchs_own_operators(name):
    model = network(name)
    program = torch.export.export(model, (pictures(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [target for target in targets if "mobilenet_fast" in target]
    assert_parity(model, program.module(), pictures(3, 3, 64, 64))


@pytest.mark.parametrize("kind", [*NAMES, "accelerated", "replaced"])
def test_onnx_runtime_runs_an_exported_model(kind):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = network(kind if kind in NAMES else "mobilenet_v3_small")
    given = model
    if kind == "accelerated":
        given = mobilenet_fast.accelerate(model)
    if kind == "replaced":
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8))
        model = randomise_batch_norm(plain, 0, (4, 3, 64, 64))
        given = mobilenet_fast.replace_layers(model)
    file = io.BytesIO()
    torch.onnx.export(given, (pictures(2, 3, 64, 64),), file, dynamo=True, verbose=False)
    assert {opset.domain for opset in onnx.load_from_string(file.getvalue()).opset_import} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    assert_parity(model, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), pictures(2, 3, 64, 64))
