"""Layers put into models that others wrote: the same objects, state and numbers, faster, and gone without a trace."""

import copy
import io
import pickle

import pytest
import torch
from helpers import import_timm, import_torchvision, import_transformers
from model_parity import assert_parity, pictures, randomise_batch_norm
from torch import nn
from tutorial_mobilenet_v3 import TutorialMobileNetV3

from mobilenet_fast import _C, functional, reference, replace_layers, restore_layers, training_report
from mobilenet_fast import nn as fast


class OwnBlock(nn.Sequential):
    """A Sequential with a method of its own, which callers use."""

    def __init__(self, channels):
        super().__init__(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardswish(inplace=True),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def with_shortcut(self, x):
        return x + self(x)


class OwnNetwork(nn.Module):
    """Shared parts, a free-standing norm, and functional calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.block = OwnBlock(16)
        self.again = nn.ModuleList([self.block, nn.Conv2d(16, 32, 3, groups=16)])
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.again[0].with_shortcut(self.block.with_shortcut(x))
        return self.head(self.again[1](x).mean((2, 3)))


def torchvision_model(name):
    return lambda: getattr(import_torchvision().models, name)(num_classes=50)


def timm_model(name):
    return lambda: import_timm().create_model(name, num_classes=50)


class Logits(nn.Module):
    """A network of transformers, whose output is its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def transformers_model(version, **options):
    def make():
        package = import_transformers()
        config = getattr(package, f"MobileNetV{version}Config")(num_labels=50, **options)
        return Logits(getattr(package, f"MobileNetV{version}ForImageClassification")(config))

    return make


MODELS = {
    "mobilenet_v3_large": torchvision_model("mobilenet_v3_large"),
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small"),
    "mobilenet_v2": torchvision_model("mobilenet_v2"),
    "efficientnet_b0": torchvision_model("efficientnet_b0"),
    "mnasnet0_5": torchvision_model("mnasnet0_5"),
    "timm-mobilenetv3_large_100": timm_model("mobilenetv3_large_100"),
    "timm-tf_efficientnet_lite0": timm_model("tf_efficientnet_lite0"),
    "timm-mobilenetv4_conv_small": timm_model("mobilenetv4_conv_small"),
    "timm-efficientnet_b0": timm_model("efficientnet_b0"),
    "transformers-mobilenet_v1": transformers_model(1),
    "transformers-mobilenet_v2": transformers_model(2),
    "transformers-mobilenet_v2-symmetric": transformers_model(2, tf_padding=False, output_stride=16),
    "own": OwnNetwork,
    "tutorial": TutorialMobileNetV3,
}


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    torch.manual_seed(0)
    return randomise_batch_norm(MODELS[request.param](), 0, (4, 3, 64, 64))


@pytest.fixture
def model(network):
    return copy.deepcopy(network)


@pytest.fixture
def own():
    torch.manual_seed(0)
    return randomise_batch_norm(OwnNetwork(), 0)


def anatomy(model):
    """All that there is to a model: objects, classes, attributes."""
    return [
        (name, module, type(module), dict(vars(module))) for name, module in model.named_modules(remove_duplicate=False)
    ]


def assert_same_anatomy(model, before):
    for (name, module, kind, state), (old_name, old, old_kind, old_state) in zip(anatomy(model), before, strict=True):
        assert name == old_name and module is old and kind is old_kind
        assert state.keys() == old_state.keys()
        assert all(state[key] is old_state[key] for key in state)


def test_computes_the_same(network, model):
    x = pictures(2, 3, 75, 50, seed=1)
    replaced = replace_layers(model)
    assert replaced is model
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_parity(network, replaced, x.contiguous(memory_format=layout))
    x, exact = x.double(), copy.deepcopy(network).double()
    with torch.no_grad():
        expected = exact(x)
        close = {"rtol": 0, "atol": 1e-11 * expected.abs().max().item()}
        torch.testing.assert_close(replaced.double()(x), expected, **close)
    with_gradients = replaced(x)
    assert with_gradients.requires_grad
    torch.testing.assert_close(with_gradients.detach(), expected, **close)


def test_keeps_what_there_is_and_gives_it_back(model):
    before = anatomy(model)
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    report = []
    replace_layers(model, report=report)
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert report and not [row for row in report if row.reason]
    replaced = {row.name for row in report}
    for name, module, kind, state in before:
        assert model.get_submodule(name) is module and isinstance(module, kind) and vars(module) == state
        assert (type(module) is not kind) == (name in replaced) or name not in dict(model.named_modules())
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            assert isinstance(module, (fast.DepthwiseConv2d, fast.Conv2dSame))
    classes = [type(module) for module in model.modules()]
    again = []
    assert replace_layers(model, report=again) is model and not again
    assert classes == [type(module) for module in model.modules()]
    assert restore_layers(model) is model
    assert_same_anatomy(model, before)
    assert_same_anatomy(restore_layers(model), before)
    with torch.no_grad():
        replace_layers(model)(pictures(1, 3, 64, 64))
    assert_same_anatomy(restore_layers(model), before)


def test_trains_the_same(network, model):
    x, target = pictures(4, 3, 64, 64, seed=2).double(), torch.arange(4)
    models = [copy.deepcopy(network).double(), replace_layers(model).double()]
    for each in models:
        each.train()
        torch.manual_seed(3)  # dropout
        nn.functional.cross_entropy(each(x), target).backward()
    stock, ours = models
    for (name, expected), actual in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for name, expected in stock.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), expected)


def test_copies_and_pickles(model):
    x = pictures(1, 3, 64, 64, seed=1)
    classes = [type(module) for module in model.modules()]
    replace_layers(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        expected = model(x)
        for twin in twins:
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(twin(x), expected)
            next(twin.parameters()).zero_()
            restore_layers(twin)
            assert [type(m) for m in twin.modules()] == classes
        assert torch.equal(model(x), expected)


def test_all_hooks_fire_once_a_call(network, model):
    x = pictures(1, 3, 64, 64, seed=1)

    def first(y):
        return y if isinstance(y, torch.Tensor) else y[0]

    def observed(model):
        seen = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, first(y).clone())))
        with torch.no_grad():
            model(x)
        return seen

    expected, actual = observed(copy.deepcopy(network)), observed(replace_layers(model))
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (name, y), (_, wanted) in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            y, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_blocks_run_as_few_kernels(monkeypatch):
    calls = []
    for name in ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    x = pictures(1, 3, 224, 224)
    for name in ("mobilenet_v3_large", "timm-mobilenetv3_large_100"):
        del calls[:]
        with torch.inference_mode():
            replace_layers(MODELS[name]().eval())(x)
        counts = {name: calls.count(name) for name in set(calls)}
        # 15 blocks; one norm is by itself, behind the stem.
        assert counts["depthwise_conv2d"] == 15 and counts["squeeze_excite"] == 8
        assert counts["pointwise_conv2d"] in (30, 31) and counts["batch_norm_act"] == 1


def test_hooks_are_kept_and_their_handles_work(own):
    seen = []
    handle = own.block[1].register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    x = pictures(2, 3, 32, 32)
    with torch.no_grad():
        expected = own(x)
        assert seen == ["BatchNorm2d"] * 2
        torch.testing.assert_close(replace_layers(own)(x), expected)
        assert seen[2:] == ["BatchNormAct2d"] * 2
        restore_layers(own)
        assert torch.equal(own(x), expected)
        handle.remove()
        own(x)
    assert len(seen) == 6


def test_shared_modules_stay_shared(own):
    replace_layers(own)
    assert own.again[0] is own.block and isinstance(own.block, OwnBlock) and isinstance(own.block, fast.FusedSequential)
    twin = copy.deepcopy(own)
    assert twin.again[0] is twin.block and twin.block is not own.block


def test_the_model_itself_can_be_a_layer():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    assert replace_layers(conv) is conv and isinstance(conv, fast.DepthwiseConv2d)
    assert restore_layers(conv) is conv and type(conv) is nn.Conv2d
    chain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    assert isinstance(replace_layers(chain)[:1], fast.FusedSequential)
    layer = fast.DepthwiseConv2d(4, 4, 3)
    assert type(replace_layers(layer)) is fast.DepthwiseConv2d


def test_filter(own):
    report = []
    replace_layers(own, lambda name, module: not name.startswith("block"), report=report)
    assert type(own.block) is OwnBlock and type(own.block[0]) is nn.Conv2d
    assert isinstance(own.norm, fast.BatchNormAct2d) and isinstance(own.again[1], fast.DepthwiseConv2d)
    reasons = {row.name: row.reason for row in report}
    assert reasons["block"] == reasons["block.0"] == "refused by filter_fn" and reasons["norm"] == ""
    assert "stem" not in reasons and "head" not in reasons


def test_what_stays_is_reported_and_strict_refuses_it():
    class Strange(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    torchvision = import_torchvision()

    def make():
        return nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
            Strange(4, 4, 3, groups=4),
            torchvision.ops.SqueezeExcitation(4, 2, nn.Tanh),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Conv2d(4, 8, 3),
        )

    model, report = make(), []
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(replace_layers(model, report=report)(x), expected)
    assert {row.name: (row.layer, row.replaced_by, row.reason) for row in report} == {
        "0": ("Conv2d", None, "padding_mode is 'reflect'"),
        "1": ("Strange", None, "its class is not known"),
        "2": ("SqueezeExcitation", None, "an activation has no kernel"),
        "2.fc1": ("Conv2d", "PointwiseConv2d", ""),
        "2.fc2": ("Conv2d", "PointwiseConv2d", ""),
        "3": ("Conv2d", "DepthwiseConv2d", ""),
    }
    model = make()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"no faster layer for 0 \(Conv2d\): padding_mode is 'reflect'; 1 \(Strange\)"):
        replace_layers(model, strict=True)
    assert_same_anatomy(model, before)
    replace_layers(model, lambda name, module: name == "3", strict=True)
    assert isinstance(model[3], fast.DepthwiseConv2d) and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("function", [replace_layers, restore_layers])
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match=f"^{function.__name__}: model must be an nn.Module, got str$"):
        function("mobilenet_v2")


def test_changes_after_replacing_count(own):
    x = pictures(2, 3, 32, 32)
    twin = copy.deepcopy(own)
    replace_layers(own)
    with torch.no_grad():
        for model in (own, twin):
            model(x)
            model.block[0].weight.mul_(2)
            model.block[1].running_var.data.mul_(3)
            model.block[2] = nn.ReLU6()
            model.again[1].weight.copy_(
                torch.linspace(-1, 1, model.again[1].weight.numel()).view_as(model.again[1].weight)
            )
        torch.testing.assert_close(own(x), twin(x))
        own.load_state_dict({key: value * 0.5 for key, value in own.state_dict().items()})
        twin.load_state_dict({key: value * 0.5 for key, value in twin.state_dict().items()})
        torch.testing.assert_close(own(x), twin(x))
        own.train(), twin.train()
        torch.testing.assert_close(own(x), twin(x))
        torch.testing.assert_close(own.eval()(x), twin.eval()(x))


def test_timm_activations_and_drops_are_respected():
    layers = import_timm().layers
    x = torch.randn(2, 8, 5, 5)
    for norm in (
        layers.BatchNormAct2d(8, act_layer=nn.Hardswish),
        layers.BatchNormAct2d(8, act_layer=nn.GELU, inplace=False),
        layers.BatchNormAct2d(8, apply_act=False),
        layers.BatchNormAct2d(8, drop_layer=nn.Tanh),
        layers.SqueezeExcite(8, rd_ratio=0.5, gate_layer="hard_sigmoid"),
        layers.SqueezeExcite(8, rd_ratio=0.5, add_maxpool=True),
        layers.SqueezeExcite(8, rd_ratio=0.5, norm_layer=nn.BatchNorm2d),
        layers.ConvNormAct(8, 8, 3, groups=8),
    ):
        norm.eval()
        with torch.no_grad():
            expected = norm(x)
            torch.testing.assert_close(replace_layers(norm)(x), expected)
            if hasattr(norm, "act"):
                norm.act = nn.Tanh()
                expected = restore_layers(norm)(x)
                torch.testing.assert_close(replace_layers(norm)(x), expected)


def test_timm_drops_paths_in_training():
    stock = import_timm().create_model("mobilenetv3_small_050", num_classes=5, drop_path_rate=0.5).double()
    replaced = replace_layers(copy.deepcopy(stock))
    x = pictures(4, 3, 32, 32).double()
    outputs = []
    for model in (stock, replaced):
        torch.manual_seed(0)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(stock.eval()(x), replaced.eval()(x))
    for model in (stock, replaced):
        for block in model.modules():
            if hasattr(block, "drop_path"):
                block.drop_path = nn.Tanh()
    torch.testing.assert_close(stock(x), replaced(x))
    with torch.no_grad():
        torch.testing.assert_close(stock(x), replaced(x))


def test_transformers_padding():
    """What pads is one of both, whatever is refused, restored, or run layer by layer because of a hook."""
    config = import_transformers().MobileNetV2Config(num_labels=5)
    torch.manual_seed(0)
    stock = import_transformers().MobileNetV2ForImageClassification(config).eval()
    name = "mobilenet_v2.layer.0.conv_3x3"
    x = pictures(1, 3, 50, 37, seed=1)

    def logits(model):
        return model(x).logits

    expected = logits(stock)
    for refused in (None, name, f"{name}.convolution", "mobilenet_v2.conv_stem.first_conv"):
        model = replace_layers(copy.deepcopy(stock), filter_fn=lambda n, module, refused=refused: n != refused)
        layer = model.get_submodule(name)
        assert isinstance(layer.convolution, fast.Conv2dSame) == (refused is None or "stem" in refused)
        for with_gradients in (True, False):
            with torch.set_grad_enabled(with_gradients):
                torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        seen = []
        layer.normalization.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].shape))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert seen == [(1, 96, 13, 10)]
        restore_layers(layer)
        assert type(layer.convolution) is nn.Conv2d
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def transformers_layer(*shape, tf_padding=True, **options):
    config = import_transformers().MobileNetV2Config(tf_padding=tf_padding)
    layer = import_transformers().models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ConvLayer
    torch.manual_seed(0)
    return layer(config, *shape, **options).eval()


@pytest.mark.parametrize("kernel", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("stride, dilation", ((1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2)))
def test_transformers_padding_of_any_window(kernel, stride, dilation):
    for groups in (1, 8):
        layer = transformers_layer(8, 8, kernel, stride, groups, dilation=dilation)
        for size in ((9, 10), (12, 7)):
            x = torch.randn(2, 8, *size)
            expected = layer(x)
            with torch.no_grad():
                torch.testing.assert_close(replace_layers(copy.deepcopy(layer))(x), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_transformers_that_are_not_as_usual():
    x = torch.randn(2, 8, 9, 10)
    layer = transformers_layer(8, 8, 3, 1, 8, use_activation=False)
    layer.activation = nn.functional.relu6
    assert torch.equal(replace_layers(copy.deepcopy(layer))(x), replace_layers(layer)(features=x))
    assert (layer(x) >= 0).all()
    for wrong in ({}, {"x": x}, {"features": x, "input": x}):
        with pytest.raises(TypeError, match="argument"):
            layer(**wrong)
    both = nn.ModuleDict({"a": transformers_layer(8, 8, 3, 1, 8), "b": transformers_layer(8, 8, 3, 1, 8)})
    both["b"].convolution = both["a"].convolution
    expected, report = both["b"](x), []
    replace_layers(both, filter_fn=lambda name, module: name != "b", report=report)
    torch.testing.assert_close(both["b"](x), expected, rtol=1e-4, atol=1e-5)
    assert ("a", "its convolution is part of another module too") in [(row.name, row.reason) for row in report]


def test_blocks_of_transformers_train_as_one():
    config = import_transformers().MobileNetV2Config(num_labels=5)
    model = replace_layers(import_transformers().MobileNetV2ForImageClassification(config)).train()
    parts = training_report(model)
    blocks = [part for part in parts if part.is_block]
    assert len(blocks) == 18 and sum(part.adds_input for part in blocks) == 10
    assert blocks == parts


def test_containers_with_an_order_of_their_own_stay():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    x = torch.randn(1, 4, 5, 5)
    for container in (Backwards(nn.ReLU(), nn.Conv2d(4, 4, 1)), Twice(nn.Conv2d(4, 4, 1), nn.ReLU())):
        with torch.no_grad():
            expected = container(x)
            torch.testing.assert_close(replace_layers(container)(x), expected)
        assert not isinstance(container, fast.FusedSequential)


def test_export_and_tracers_see_a_stock_model():
    model = torchvision_model("mobilenet_v3_small")().eval()
    x = pictures(1, 3, 64, 64)

    def targets(model):
        return [str(node.target) for node in torch.export.export(model, (x,)).graph.nodes if node.op == "call_function"]

    expected, traced = targets(model), torch.fx.symbolic_trace(model)
    replace_layers(model)
    assert targets(model) == expected
    assert [
        n.target for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_module" and "block.0" in n.target
    ] == [n.target for n in traced.graph.nodes if n.op == "call_module" and "block.0" in n.target]
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_parametrised_layer_must_be_freed_before_restoring(own):
    replace_layers(own)
    torch.nn.utils.parametrizations.weight_norm(own.block[0])
    x = pictures(2, 3, 32, 32)
    with torch.no_grad():
        own(x)
    with pytest.raises(ValueError, match="restore_layers: block.0 became a ParametrizedDepthwiseConv2d"):
        restore_layers(own)
    torch.nn.utils.parametrize.remove_parametrizations(own.block[0], "weight")
    assert type(restore_layers(own).block[0]) is nn.Conv2d


def test_a_zeroed_tap_shows(own, monkeypatch):
    """The comparison of whole networks sees an error in one tap of one kernel."""
    x = pictures(2, 3, 64, 64)
    stock = copy.deepcopy(own)
    replace_layers(own)

    def broken(input, weight, *args):
        weight = weight.clone()
        weight[:, :, 0, 0] = 0
        return reference.depthwise_conv2d(input, weight, *args)

    assert_parity(stock, own, x)
    monkeypatch.setattr(functional._C, "depthwise_conv2d", broken)
    with pytest.raises(AssertionError, match="errs by"):
        assert_parity(stock, own, x)
