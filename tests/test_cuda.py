"""All of it on an NVIDIA GPU: ``pytest -m gpu``.

What needs no GPU runs in Triton's interpreter as well, on CPU tensors:
``TRITON_INTERPRET=1 pytest tests/test_cuda.py``.
"""

import itertools
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import ACTIVATIONS, LAYOUTS, OPERATIONS, arguments, check, function, operand, strides, vector
from torch import nn

from mobilenet_fast import cuda, functional, reference
from mobilenet_fast import nn as fast

if cuda.INTERPRETED:
    from test_triton_kernels import bfloat16_arithmetic  # noqa: F401

DEVICE = "cpu" if cuda.INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
pytestmark = [pytest.mark.gpu]
if not cuda.INTERPRETED:
    pytestmark.append(pytest.mark.skipif(cuda.missing() is not None, reason=f"{cuda.missing()}"))
SIZE = (5, 6) if cuda.INTERPRETED else (29, 31)


def needs_gpu(test):
    return pytest.mark.gpu_alone(pytest.mark.skipif(cuda.INTERPRETED, reason="needs a GPU")(test))


@pytest.fixture(autouse=True)
def kernels():
    """Without TF32, which has 10 bits."""
    context = nullcontext()
    if cuda.INTERPRETED:
        from triton_on_cpu import triton_on_cpu

        context = triton_on_cpu()
    with context, torch.backends.cudnn.flags(allow_tf32=False):
        yield


def moved(args, device=DEVICE):
    """The same tensors, strides and surroundings on a device."""

    def move(value):
        if not isinstance(value, torch.Tensor) or value.device == torch.device(device):
            return value
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
        return memory.as_strided(value.size(), value.stride(), value.storage_offset())

    return [move(a) for a in args]


def learning(operation, args):
    constants = (1, 2) if operation == "batch_norm_act" else ()
    return [
        a.detach().clone().requires_grad_(i not in constants) if isinstance(a, torch.Tensor) else a
        for i, a in enumerate(args)
    ]


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


# Functions and operators


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_functions(operation, layout, dtype):
    args = arguments(operation, layout, dtype)
    for backend in (None, "triton"):
        actual = function(operation, backend)(*moved(args))
        assert actual.device.type == DEVICE and actual.dtype == dtype
        check(operation, actual.cpu(), args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_activations(operation, activation):
    args = arguments(operation, activation=activation)
    args[0].mul_(8)
    check(operation, function(operation)(*moved(args)).cpu(), args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation, layout):
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    torch.library.opcheck(operator, learning(operation, moved(arguments(operation, layout, size=(3, 2)))))
    for dtype in DTYPES:
        args = moved(arguments(operation, layout, dtype))
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation):
    args = arguments(operation, dtype=torch.float64, activation="silu", channels=2, size=(3, 2))
    args = learning(operation, moved(args))
    assert torch.autograd.gradcheck(function(operation), args, fast_mode=cuda.INTERPRETED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients(operation, layout, dtype):
    args = arguments(operation, layout, dtype)
    actual, exact = learning(operation, moved(args)), learning(operation, doubled(args))
    function(operation)(*actual).sum().backward()
    getattr(reference, operation)(*exact).sum().backward()
    for leaf, wanted in zip(leaves(actual), leaves(exact), strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.cpu().double() - wanted.grad).abs().max()
        # hardswish's derivative leaps at -3 and 3, which no argument comes near.
        assert error <= 32 * torch.finfo(dtype).eps * wanted.grad.abs().max()


@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_deterministic(operation):
    results = []
    for _ in range(3):
        args = learning(operation, moved(arguments(operation, size=(33, 29))))
        function(operation)(*args).square().sum().backward()
        results.append([leaf.grad for leaf in leaves(args)])
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast(operation, dtype):
    """Dtypes are PyTorch's, and results as near to the truth."""
    for image in (dtype, torch.float32):
        args = moved(arguments(operation))
        args[0] = args[0].to(image)
        mine, stock, exact = (learning(operation, a) for a in (args, args, doubled(args)))
        with torch.autocast(DEVICE, dtype):
            actual, expected = function(operation)(*mine), getattr(reference, operation)(*stock)
        wanted = getattr(reference, operation)(*exact)
        assert actual.dtype == expected.dtype
        near(actual, expected, wanted, dtype)
        for output in (actual, expected, wanted):
            output.double().sum().backward()
        for a, b, c in zip(leaves(mine), leaves(stock), leaves(exact), strict=True):
            assert a.grad.dtype == b.grad.dtype == a.dtype
            near(a.grad, b.grad, c.grad, dtype)


def near(actual, stock, exact, dtype):
    """As near to the truth as PyTorch is, or within what rounds once each: operands, sum, activation, gradient."""
    allowed = 2 * (stock.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("operation", OPERATIONS)
def test_zero_batch(operation):
    args = arguments(operation)
    args = [a[:0] if isinstance(a, torch.Tensor) and a.dim() == 4 and i in (0, 4, 5) else a for i, a in enumerate(args)]
    args = learning(operation, moved(args))
    output = function(operation)(*args)
    output.sum().backward()
    assert output.shape[0] == 0
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves(args))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operands_elsewhere_are_refused(operation):
    args = moved(arguments(operation))
    elsewhere = "meta" if cuda.INTERPRETED else "cpu"
    with pytest.raises(ValueError, match=rf"^{operation}: \w+ must be on {DEVICE}.* as input is, got {elsewhere}"):
        function(operation)(args[0], args[1].to(elsewhere), *args[2:])


@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cpu_keeps_its_kernels(operation):
    args = arguments(operation)
    assert torch.equal(function(operation)(*args), function(operation, "cpp")(*args))
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'cpp' .* on cuda:0"):
        function(operation, "cpp")(*moved(args))
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'triton' .* on cpu"):
        function(operation, "triton")(*args)


# Streams, devices, graphs, processes


@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_stream(operation):
    """Launches go to the current stream: behind what fills the input there, which takes a while."""
    args = moved(arguments(operation, size=(64, 64)))
    expected = function(operation)(*args)
    late = torch.zeros_like(args[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(args[0])
        actual = function(operation)(late, *args[1:])
    stream.synchronize()
    assert torch.equal(actual, expected)


@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_device_that_is_not_current(operation):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = arguments(operation)
    assert torch.cuda.current_device() == 0
    actual = function(operation)(*moved(args, "cuda:1"))
    assert actual.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    check(operation, actual.cpu(), args)
    learned = learning(operation, moved(args, "cuda:1"))
    function(operation)(*learned).sum().backward()
    assert all(leaf.grad.device == leaf.device for leaf in leaves(learned))


@needs_gpu
@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_graphs(operation, backward):
    """Captured once, replayed on other values."""
    static = learning(operation, moved(arguments(operation)))

    def step(args):
        output = function(operation)(*args)
        return (output, *torch.autograd.grad(output.sum(), leaves(args))) if backward else (output,)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    graph.replay()
    before = results[0].clone()
    with torch.no_grad():
        static[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(results[0], before)
    for actual, expected in zip(results, step(learning(operation, static)), strict=True):
        assert torch.equal(actual, expected)


@needs_gpu
def test_two_processes_on_one_gpu():
    """Each compiles, or finds compiled, and runs the same kernels at once."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors


@needs_gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer(tool):
    """No kernel reads or writes outside its tensors, or races."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    # Else PyTorch's allocator would give one large block, in which nothing is outside.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def every_kernel():
    """One call of each, with sizes that no tile divides, within one tile and over several."""
    sizes = (13, (7, 9)), (70, (30, 33))
    for operation, layout, (channels, size) in itertools.product(OPERATIONS, ("contiguous", "channels_last"), sizes):
        args = learning(operation, moved(arguments(operation, layout, channels=channels, size=size)))
        output = function(operation)(*args)
        torch.autograd.grad(output.sum(), leaves(args))
        check(operation, output.detach().cpu(), [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args])
    layer = fast.ConvNormAct(13, 13, groups=13).to(DEVICE).eval()
    with torch.no_grad():
        assert layer(torch.randn(2, 13, 7, 9, device=DEVICE)).isfinite().all()
    from mobilenet_fast import triton_kernels

    calls = steps_of_networks(triton_kernels)
    of_operators = {*OPERATIONS, "squeeze_excite_gate", "sums_of_products"}
    of_operators |= {"depthwise_conv2d_backward", "batch_norm_act_backward"}
    assert set(triton_kernels.__all__) <= set(calls) | of_operators
    for name, call in calls.items():
        results = call()
        for result in results if isinstance(results, tuple) else [results]:
            assert result.isfinite().all(), name
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def steps_of_networks(kernels):
    """Calls of what operators do not use."""

    def made(*shape):
        return torch.rand(shape, device=DEVICE).contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )

    x, gate, vector = made(2, 13, 7, 9), made(2, 13, 1, 1), made(13)
    pointwise, depthwise, dense = made(13, 13, 1, 1), made(13, 1, 3, 3), made(13, 13, 3, 3)
    window, same = ((1, 1), (1, 1), (1, 1)), torch.empty_like
    return {
        "batch_norm_act_training": lambda: kernels.batch_norm_act_training(
            x, made(13), made(13), vector, vector, 0.1, 1e-3, "silu"
        ),
        "sums": lambda: kernels.depthwise_conv2d(x, depthwise, vector, *window, with_sums=True),
        "multiplier": lambda: kernels.depthwise_conv2d(x, made(26, 1, 3, 3), None, *window),
        "gated": lambda: kernels.pointwise_conv2d(x, pointwise, vector, "relu6", gate, x),
        "sum_pixels": lambda: kernels.sum_pixels(x),
        "mean_of_sums": lambda: kernels.mean_of_sums(kernels.sum_pixels(x), 63, out=same(gate)),
        "global_avg_pool": lambda: kernels.global_avg_pool(x, out=same(gate)),
        "epilogue": lambda: kernels.epilogue(x, vector, x, gate, "hardswish"),
        "pool2d": lambda: kernels.pool2d(x, (3, 3), (2, 2), (1, 1), out=made(2, 13, 4, 5)),
        "fold_batch_norm": lambda: kernels.fold_batch_norm(vector, vector, vector, vector, 1e-3),
        "pack_conv2d": lambda: kernels.pack_conv2d(dense),
        "conv2d": lambda: kernels.conv2d(
            x, kernels.pack_conv2d(dense), vector, (3, 3), *window, "relu", x, out=same(x)
        ),
        "inverted_residual": lambda: kernels.inverted_residual(
            x, (pointwise, vector), (depthwise, vector), (pointwise, vector), *window, ("relu6",) * 3, x, out=same(x)
        ),
    }


def test_every_kernel():
    every_kernel()


# Sizes


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_elements_than_32_bits_count(operation, layout):
    """The last image, whose elements lie beyond 2**31, comes out as it does alone."""
    x, channels = large(layout), 32
    parameters = {
        "depthwise_conv2d": (operand((channels, 1, 3, 3), dtype=x.dtype), None, 1, 1),
        "pointwise_conv2d": (operand((channels, channels, 1, 1), dtype=x.dtype),),
        "batch_norm_act": (vector(channels), vector(channels, positive=True)),
        "squeeze_excite": (
            *(operand((8, channels, 1, 1), dtype=x.dtype), None),
            *(operand((channels, 8, 1, 1), dtype=x.dtype), None),
        ),
    }[operation]
    call, parameters = getattr(functional, operation), moved(parameters)
    with torch.no_grad():
        actual = call(x, *parameters)[-1:].clone()
        torch.testing.assert_close(actual, call(x[-1:].clone(memory_format=torch.preserve_format), *parameters))


def large(layout, count=1):
    """An image of more elements than 32 bits count, where there is memory for ``count`` more of them."""
    channels, size = 32, 1024
    images = 2**31 // (channels * size * size) + 2
    bytes_needed = (1 + count) * 2 * images * channels * size * size
    if torch.cuda.mem_get_info()[0] < bytes_needed * 1.3:
        pytest.skip(f"needs {bytes_needed * 1.3 / 2**30:.0f} GiB of GPU memory")
    x = torch.empty((images, channels, size, size), dtype=torch.float16, device=DEVICE, memory_format=layout)
    assert x.numel() > 2**31
    return x.normal_()


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
@pytest.mark.parametrize("operation", ("depthwise_conv2d", "batch_norm_act"))
def test_gradients_of_more_elements_than_32_bits_count(operation):
    x = large(torch.contiguous_format, count=3).requires_grad_()
    weight = operand((32, 1, 3, 3), dtype=x.dtype).to(DEVICE)
    mean, variance = vector(32).to(DEVICE), vector(32, positive=True).to(DEVICE)
    grads = []
    for part in (x, x[-1:].detach().clone().requires_grad_()):
        if operation == "depthwise_conv2d":
            output = functional.depthwise_conv2d(part, weight, padding=1)
        else:
            output = functional.batch_norm_act(part, mean, variance, activation="silu")
        (grad,) = torch.autograd.grad(output, part, torch.ones((), dtype=x.dtype, device=DEVICE).expand_as(output))
        grads.append(grad[-1:])
    torch.testing.assert_close(*grads)


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("name", ("epilogue", "pool2d", "conv2d", "sum_pixels"))
def test_steps_of_more_elements_than_32_bits_count(name, layout):
    """As `test_more_elements_than_32_bits_count`, of what operators do not use."""
    from mobilenet_fast import triton_kernels as kernels

    x, window = large(layout), ((1, 1), (1, 1), (1, 1))
    weight = operand((32, 32, 3, 3), dtype=x.dtype).to(DEVICE)
    call = {
        "epilogue": lambda x: kernels.epilogue(x, vector(32).to(DEVICE), None, None, "hardswish"),
        "pool2d": lambda x: kernels.pool2d(x, (3, 3), (1, 1), (1, 1), out=torch.empty_like(x)),
        "conv2d": lambda x: kernels.conv2d(
            x, kernels.pack_conv2d(weight), None, (3, 3), *window, "relu", out=torch.empty_like(x)
        ),
        "sum_pixels": lambda x: kernels.sum_pixels(x).sum(1),
    }[name]
    # A million normal numbers sum up to some thousand, in an order that follows from the number of images.
    tolerance = {"rtol": 1e-5, "atol": 0.05} if name == "sum_pixels" else {}
    torch.testing.assert_close(call(x)[-1:], call(x[-1:].clone(memory_format=layout)), **tolerance)


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
def test_fused_blocks_of_more_elements_than_32_bits_count():
    from mobilenet_fast import triton_kernels as kernels

    x = large(torch.channels_last, count=2)
    weight, depthwise = (operand(shape, dtype=x.dtype).to(DEVICE) for shape in ((32, 32, 1, 1), (32, 1, 3, 3)))
    layers = ((weight, vector(32).to(DEVICE)), (depthwise, vector(32).to(DEVICE)), (weight, vector(32).to(DEVICE)))
    window = ((1, 1), (1, 1), (1, 1))

    def call(x):
        return kernels.inverted_residual(x, *layers, *window, ("relu6",) * 3, x, out=torch.empty_like(x))

    torch.testing.assert_close(call(x)[-1:], call(x[-1:].clone(memory_format=torch.channels_last)))


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
def test_a_stem_of_more_pixels_than_32_bits_count():
    from mobilenet_fast import triton_kernels as kernels

    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.empty((2050, 1, 1024, 1024), dtype=torch.float16, device=DEVICE).normal_()
    weight = operand((1, 1, 3, 3), dtype=x.dtype).to(DEVICE)

    def call(x):
        window = ((1, 1), (1, 1), (1, 1))
        return kernels.conv2d(x, kernels.pack_conv2d(weight), None, (3, 3), *window, "none", out=torch.empty_like(x))

    torch.testing.assert_close(call(x)[-1:], call(x[-1:].clone()))


@needs_gpu
@pytest.mark.xdist_group("all of the memory")
def test_a_stem_of_a_huge_transposed_view():
    """Columns lie so far apart that 32 bits do not count how far."""
    from mobilenet_fast import triton_kernels as kernels

    columns, rows = 3000, 2**20
    if torch.cuda.mem_get_info()[0] < 1.3 * 2 * columns * rows:
        pytest.skip("needs 8 GiB of GPU memory")
    x = torch.zeros((1, 1, columns, rows), dtype=torch.float16, device=DEVICE).transpose(2, 3)[:, :, :5]
    x.normal_()
    weight = operand((4, 1, 3, 3), dtype=x.dtype).to(DEVICE)

    def call(x):
        out = torch.empty((1, 4, *x.shape[2:]), dtype=x.dtype, device=DEVICE, memory_format=torch.channels_last)
        return kernels.conv2d(x, kernels.pack_conv2d(weight), None, (3, 3), (1, 1), (1, 1), (1, 1), "none", out=out)

    torch.testing.assert_close(call(x), call(x.contiguous()))


# Layers


def block(activation="hardswish"):
    torch.manual_seed(0)
    layer = fast.InvertedResidual(16, 40, 16, 5, squeeze_channels=8, activation_layer=activation)
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            value.copy_(operand(tuple(value.shape), seed=len(name)) * 0.5)
            if name.endswith("running_var"):
                value.abs_().add_(0.1)
    return layer.eval().to(DEVICE)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", DTYPES)
def test_block(dtype, layout):
    """A chain of kernels; norms of half precision in float32."""
    layer = block()
    x = operand((2, 16, *SIZE)).to(DEVICE)
    exact = layer.double()(x.double()).detach()
    layer.to(dtype)
    if dtype in HALF:
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    x = x.to(dtype).to(memory_format=layout)
    expected = layer(x).detach()
    with torch.no_grad():
        actual = layer(x)
    assert actual.dtype == dtype and strides(actual) == strides(expected)
    near(actual, expected, exact, dtype)


@needs_gpu
def test_training_a_block_as_pytorch_does():
    """Depthwise convolutions, batch norms and squeeze-excite learn by their kernels, under autocast too."""
    for autocast in (nullcontext(), torch.autocast("cuda", torch.bfloat16)):
        results = []
        for ours in (True, False):
            layer = block("silu").train()
            x = operand((4, 16, 14, 14)).to(DEVICE).requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                if not ours:
                    patch.setattr(functional, "_triton_serves", lambda input: False)
                    patch.setattr(fast.dispatch, "takes_input", lambda input: False)
                with autocast:
                    y = layer(x)
                y.float().square().sum().backward()
            results.append((y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()))
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            size = expected.float().abs().max().item()
            tolerance = 1e-3 if isinstance(autocast, nullcontext) else 0.1
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_in_one_graph(backend):
    layer, x = block(), operand((2, 16, *SIZE), "channels_last").to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@needs_gpu
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_training(backend):
    results = []
    for compiles in (True, False):
        layer = block().train()
        run = torch.compile(layer, fullgraph=True, backend=backend) if compiles else layer
        x = operand((2, 16, *SIZE), "channels_last").to(DEVICE).requires_grad_()
        run(x).square().sum().backward()
        results.append((x.grad, *(p.grad for p in layer.parameters())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    torch._dynamo.reset()


@needs_gpu
def test_export_sees_plain_pytorch():
    layer, x = block(), operand((2, 16, *SIZE)).to(DEVICE)
    program = torch.export.export(layer, (x,))
    assert not [node for node in program.graph.nodes if "mobilenet_fast" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


def accelerated_block():
    from mobilenet_fast import accelerate

    layer, x = block(), operand((2, 16, 29, 31)).to(DEVICE)
    accelerated = accelerate(layer, (x,))
    with torch.no_grad():
        for _ in range(20):
            torch.testing.assert_close(accelerated(x), layer(x), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    every_kernel()
    accelerated_block()
