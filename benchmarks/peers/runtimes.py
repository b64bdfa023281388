"""Inference runtimes, each with the options at which it is fastest in float32 on a CPU, and by numpy as users call it.

They differ in what they take: ncnn has no batch dimension, and LiteRT's images end with the channels.
"""

import subprocess
import sys

import numpy as np
import torch
from torch import nn

from benchmarks.peers.registry import numpy, peer


def export_onnx(problem, file):
    torch.onnx.export(
        problem.module,
        (problem.inputs[0],),
        file,
        input_names=["x"],
        output_names=["y"],
        dynamo=True,
        external_data=False,
    )


def convert_onnx(problem, folder):
    export_onnx(problem, folder / "model.onnx")


@peer("ONNX Runtime", ("models",), ("onnxruntime", "onnx", "onnxscript"), numpy, convert_onnx)
def onnx_runtime(problem, threads, folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def convert_openvino(problem, folder):
    import openvino

    model = openvino.convert_model(problem.module, example_input=problem.inputs[0], input=list(problem.inputs[0].shape))
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


@peer("OpenVINO", ("models",), ("openvino",), numpy, convert_openvino)
def openvino(problem, threads, folder):
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default it computes in bfloat16 where the CPU can
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": True,
    }
    compiled = openvino.compile_model(folder / "model.xml", "CPU", options)
    return lambda x: compiled(x)[0]


class ChannelsEndAt(nn.Module):
    """Takes (N, H, W, C): converted from (N, C, H, W), models transpose around each layer and are 60 % slower."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.permute(0, 3, 1, 2))


def channels_end(tensor):
    return np.ascontiguousarray(tensor.permute(0, 2, 3, 1).numpy())


def convert_litert(problem, folder):
    import litert_torch

    example = torch.from_numpy(channels_end(problem.inputs[0]))
    litert_torch.convert(ChannelsEndAt(problem.module).eval(), (example,)).export(str(folder / "model.tflite"))


@peer("LiteRT", ("models",), ("ai-edge-litert", "litert-torch"), channels_end, convert_litert)
def litert(problem, threads, folder):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / "model.tflite"), num_threads=threads)  # XNNPACK is its default
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x):
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return run


def convert_ncnn(problem, folder):
    import pnnx

    example = problem.inputs[0][:1]
    names = {"ncnnparam": "model.param", "ncnnbin": "model.bin"}
    pnnx.export(
        problem.module, str(folder / "model.pt"), example, fp16=False, **{k: str(folder / v) for k, v in names.items()}
    )
    for file in folder.iterdir():  # the traced model and pnnx's own form of it
        if file.name not in names.values():
            file.unlink()


# Its Winograd convolutions of 3×3, over tiles of up to 6×6, err more than direct ones do.
@peer("ncnn", ("models",), ("ncnn", "pnnx"), lambda tensor: list(tensor.numpy()), convert_ncnn, tolerance=16)
def ncnn(problem, threads, folder):
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = False
    net.load_param(str(folder / "model.param"))
    net.load_model(str(folder / "model.bin"))

    def infer(image):
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return np.array(extractor.extract("out0")[1])

    return lambda images: np.stack([infer(image) for image in images])


def convert_mnn(problem, folder):
    source, target = folder / "model.onnx", folder / "model.mnn"
    export_onnx(problem, source)
    arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "benchmarks"]
    subprocess.run([sys.executable, "-m", "MNN.tools.mnnconvert", *arguments], check=True)
    source.unlink()


@peer("MNN", ("models",), ("MNN", "onnx", "onnxscript"), numpy, convert_mnn)
def mnn(problem, threads, folder):
    import MNN

    options = {"backend": "CPU", "numThread": threads, "precision": "high", "memory": "high", "power": "high"}
    manager = MNN.nn.create_runtime_manager((options,))
    # By default it takes Winograd tiles so large that Inception v3 errs by a hundredth of its largest output, and
    # Xception by 200 times what eager float32 does: no float32 any more. With fewer sizes of tiles it errs as others.
    winograd_memory_level = 3
    manager.set_hint(winograd_memory_level, 1)
    module = MNN.nn.load_module_from_file(str(folder / "model.mnn"), ["x"], ["y"], runtime_manager=manager)

    def run(x):
        given = MNN.expr.const(x, x.shape, MNN.expr.NCHW)
        return module.forward([given])[0].read()

    return run
