"""The operators as PyTorch's machinery sees them: schema, tracing, compilation, export, gradients."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, LAYOUTS, OPERATIONS, arguments, function, operand, vector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from mobilenet_fast import functional, reference

OPTIONAL = {
    "depthwise_conv2d": (2, 7),
    "pointwise_conv2d": (2, 4, 5, 6),
    "batch_norm_act": (3, 4),
    "squeeze_excite": (2, 4),
}


def require_gradients(operation, args):
    constants = (1, 2) if operation == "batch_norm_act" else ()
    return [
        a.detach().clone().requires_grad_(i not in constants) if isinstance(a, torch.Tensor) else a
        for i, a in enumerate(args)
    ]


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation, layout):
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    args = arguments(operation, layout)
    torch.library.opcheck(operator, args)
    torch.library.opcheck(operator, require_gradients(operation, arguments(operation, layout, torch.float64)))
    torch.library.opcheck(operator, [None if i in OPTIONAL[operation] else a for i, a in enumerate(args)])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_batch(operation):
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    args = arguments(operation)
    args = [a[:0] if isinstance(a, torch.Tensor) and a.dim() == 4 and len(a) == 2 else a for a in args]
    if operation == "squeeze_excite":
        args[1] = arguments(operation)[1]
    assert operator(*args).shape[0] == 0
    for layout in (torch.contiguous_format, torch.channels_last):
        args[0] = args[0].contiguous(memory_format=layout)
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    if operation == "batch_norm_act":
        assert operator(*args).stride() == F.batch_norm(*args[:5]).stride()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors_are_refused_where_the_kernels_refuse(operation):
    args = [a.half() if isinstance(a, torch.Tensor) else a for a in arguments(operation)]
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(TypeError, match=f"^{operation}: input must be float32 or float64"):
            getattr(torch.ops.mobilenet_fast, operation)(*args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation, activation):
    args = require_gradients(operation, arguments(operation, dtype=torch.float64, activation=activation, size=(3, 2)))
    assert torch.autograd.gradcheck(function(operation, "cpp"), args)
    if activation in ("none", "silu", "sigmoid"):
        assert torch.autograd.gradgradcheck(function(operation, "cpp"), args)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_gradients_asked_for(operation):
    for index, arg in enumerate(arguments(operation)):
        if not isinstance(arg, torch.Tensor) or (operation == "batch_norm_act" and index in (1, 2)):
            continue
        args = arguments(operation)
        args[index] = args[index].clone().requires_grad_()
        function(operation)(*args).sum().backward()
        assert [isinstance(a, torch.Tensor) and a.grad is not None for a in args].count(True) == 1
        assert args[index].grad.isfinite().all() and args[index].grad.any()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_in_one_graph(operation, layout):
    torch._dynamo.reset()
    args = arguments(operation, layout)
    compiled = torch.compile(function(operation), fullgraph=True, backend="aot_eager")
    expected = function(operation)(*args)
    actual = compiled(*args)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()

    args, same = require_gradients(operation, args), require_gradients(operation, args)
    compiled(*args).square().sum().backward()
    function(operation)(*same).square().sum().backward()
    for a, b in zip(leaves(args), leaves(same), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_with_symbolic_shapes(operation):
    torch._dynamo.reset()
    compiled = torch.compile(function(operation), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 4), (9, 7), (6, 6)):
        args = arguments(operation, size=size)
        assert torch.equal(compiled(*args), function(operation)(*args))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_where_the_reference_runs(operation):
    torch._dynamo.reset()
    compiled = torch.compile(function(operation), fullgraph=True, backend="aot_eager")
    half = arguments(operation, dtype=torch.bfloat16)
    assert torch.equal(compiled(*half), function(operation)(*half))
    with torch.autocast("cpu", torch.bfloat16):
        args = arguments(operation)
        assert torch.equal(compiled(*args), function(operation)(*args))


def block(x, dw, pw, mean, var, w1, w2):
    y = functional.depthwise_conv2d(x, dw, padding="same", activation="relu")
    y = functional.batch_norm_act(y, mean, var, activation="hardswish")
    y = functional.squeeze_excite(y, w1, None, w2, None)
    return functional.pointwise_conv2d(y, pw, residual=x, activation="none")


def block_arguments():
    return (
        operand((2, 8, 9, 7)),
        operand((8, 1, 3, 3), seed=1),
        operand((8, 8, 1, 1), seed=2),
        vector(8, seed=3),
        vector(8, seed=4, positive=True),
        operand((2, 8, 1, 1), seed=5),
        operand((8, 2, 1, 1), seed=6),
    )


def operators_in(graph):
    return [node for node in graph.nodes if node.op == "call_function" and "mobilenet_fast" in str(node.target)]


def test_compiles_by_inductor():
    torch._dynamo.reset()
    args = block_arguments()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(*args), block(*args))


def test_tracing_sees_operators():
    args = block_arguments()
    traced = make_fx(block)(*args)
    assert len(operators_in(traced.graph)) == 4
    torch.testing.assert_close(traced(*(a * 0.5 for a in args)), block(*(a * 0.5 for a in args)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(block, args, check_trace=False)
    torch.testing.assert_close(script(*(a * 0.5 for a in args)), block(*(a * 0.5 for a in args)))


@pytest.mark.parametrize("strict", (False, True))
def test_export_sees_plain_pytorch(strict):
    class Block(torch.nn.Module):
        def forward(self, *args):
            return block(*args)

    args = block_arguments()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Block(), args, dynamic_shapes=((({0: batch},) + (None,) * 6),), strict=strict)
    assert not operators_in(program.graph)
    torch.testing.assert_close(program.module()(*args), block(*args))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors_stay_fake(operation):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        real = arguments(operation, "channels_last")
        args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in real]
        fake = function(operation)(*args)
    outside = function(operation)(*args)
    assert type(fake).__name__ == type(outside).__name__ == "FakeTensor"
    expected = function(operation)(*real)
    assert fake.shape == expected.shape and fake.stride() == expected.stride()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_subclasses_are_heard(operation):
    class Named(torch.Tensor):
        pass

    args = arguments(operation)
    args[1] = args[1].as_subclass(Named)
    assert type(function(operation)(*args)) is Named


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vmap(operation):
    args = arguments(operation)
    mapped = lambda x: function(operation)(x, *args[1:])  # noqa: E731
    inputs = torch.stack([args[0], args[0] * 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torch.func.vmap(mapped)(inputs)
    assert torch.equal(actual, torch.stack([mapped(x) for x in inputs]))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward_mode(operation):
    args = arguments(operation, dtype=torch.float64, activation="silu")
    expected = torch.func.jvp(lambda x: getattr(reference, operation)(x, *args[1:]), (args[0],), (args[0],))[1]
    actual = torch.func.jvp(lambda x: function(operation)(x, *args[1:]), (args[0],), (args[0],))[1]
    torch.testing.assert_close(actual, expected)
    with forward_ad.dual_level():
        output = function(operation)(forward_ad.make_dual(args[0].clone(), args[0].clone()), *args[1:])
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_functional_gradients(operation):
    """`torch.func` knows no gradients of operators that are not PyTorch's own."""
    args, run = arguments(operation, dtype=torch.float64, activation="silu"), function(operation)

    def loss(x):
        return run(x, *args[1:]).square().sum()

    x = args[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(getattr(reference, operation)(x, *args[1:]).square().sum(), x)
    inputs = torch.stack([args[0], args[0]])
    for actual in (
        torch.func.grad(loss)(args[0]),
        torch.func.vjp(loss, args[0])[1](torch.ones((), dtype=torch.float64))[0],
        torch.func.vmap(torch.func.grad(loss))(inputs)[1],
        torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(inputs)[0],
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_that_no_kernel_reads(operation):
    args = require_gradients(operation, arguments(operation, dtype=torch.float64, activation="silu"))
    y = function(operation)(*args)
    grad = operand(tuple(y.shape), dtype=torch.float64, seed=9)
    wanted = torch.autograd.grad(y, leaves(args), grad, retain_graph=True)
    negated = torch.autograd.grad(y, leaves(args), torch._neg_view(-grad), retain_graph=True)
    several = torch.stack([grad, 2 * grad])
    batched = torch.autograd.grad(y, leaves(args), several, retain_graph=True, is_grads_batched=True)
    zeros = torch.autograd.grad(y, leaves(args), torch._efficientzerotensor(y.shape, dtype=torch.float64))
    for expected, *found in zip(wanted, negated, batched, zeros, strict=True):
        torch.testing.assert_close(found[0], expected)
        torch.testing.assert_close(found[1], torch.stack([expected, 2 * expected]))
        assert not found[2].any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_negative_views(operation):
    """A tensor can be minus what its memory holds."""
    args = arguments(operation)
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            negated = list(args)
            negated[index] = torch._neg_view(-arg)
            assert negated[index].is_neg()
            torch.testing.assert_close(function(operation)(*negated), function(operation)(*args))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_dtypes_run_the_reference(operation, dtype):
    args = arguments(operation, dtype=dtype)
    assert torch.equal(function(operation)(*args), getattr(reference, operation)(*args))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_meta_tensors_run_the_reference(operation):
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(operation)]
    output = function(operation)(*args)
    assert output.is_meta and output.shape == function(operation)(*arguments(operation)).shape


@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_as_in_torch(operation):
    args = arguments(operation)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = function(operation)(*args), getattr(reference, operation)(*args)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_inference_mode_and_no_grad(operation):
    args = arguments(operation)
    expected = function(operation)(*args)
    learning = require_gradients(operation, args)
    assert function(operation)(*learning).requires_grad
    with torch.no_grad():
        assert torch.equal(function(operation)(*learning), expected)
    with torch.inference_mode():
        assert torch.equal(function(operation)(*learning), expected)
