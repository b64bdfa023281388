"""What trainers do with a model whose layers are replaced: held to the same with stock layers."""

import copy
import multiprocessing
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import import_timm, import_torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import mobilenet_fast
from mobilenet_fast import nn as fast
from mobilenet_fast import replace_layers, restore_layers, training_report


def network(seed=0, activation=nn.SiLU):
    """Inverted residuals by stock layers, with activations of one slope, so that rounding decides nothing."""
    torch.manual_seed(seed)

    def norm_act(*layers, channels):
        return [*layers, nn.BatchNorm2d(channels), activation()]

    blocks = [nn.Sequential(*norm_act(nn.Conv2d(3, 16, 3, 2, 1, bias=False), channels=16))]
    for channels, hidden, out, stride in ((16, 32, 24, 2), (24, 72, 24, 1)):
        blocks.append(
            nn.Sequential(
                *norm_act(nn.Conv2d(channels, hidden, 1, bias=False), channels=hidden),
                *norm_act(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), channels=hidden),
                fast.SqueezeExcitation(hidden, 8),
                nn.Conv2d(hidden, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )
        )
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


def batches(count=4, size=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, 24, 24, generator=generator)
        yield images.contiguous(memory_format=torch.channels_last), torch.randint(5, (size,), generator=generator)


def both():
    stock = network()
    return stock, replace_layers(copy.deepcopy(stock))


def assert_same(stock, ours, size=1e-4):
    for (name, a), (other, b) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(b, a, rtol=size, atol=size)


def train(model, forward=None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy((forward or model)(images), labels).backward()
        optimizer.step()


def test_an_optimizer_made_before():
    stock, ours = both()
    train(stock)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(replace_layers(model), optimizer=optimizer)
    assert_same(stock, model)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant):
    stock, ours = both()
    for model in (stock, ours):
        train(model, lambda x, m=model: checkpoint_sequential(m, 2, x.requires_grad_(), use_reentrant=reentrant))
    assert_same(stock, ours)


def test_gradient_accumulation():
    stock, ours = both()
    for model in (stock, ours):
        for images, labels in batches():
            for part, wanted in zip(images.split(3), labels.split(3), strict=True):
                F.cross_entropy(model(part), wanted).backward()
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_an_exponential_moving_average():
    stock, ours = both()
    averages = []
    for model in (stock, ours):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        for images, labels in batches():
            F.cross_entropy(model(images), labels).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
            average.update_parameters(model)
        averages.append(average.eval())
    assert_same(*averages)
    images, _ = next(batches())
    torch.testing.assert_close(averages[1](images), averages[0](images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", (nn.BatchNorm2d, nn.Conv2d))
def test_frozen_layers(frozen):
    stock, ours = both()
    for model in (stock, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, frozen):
                module.eval().requires_grad_(False)
        train(model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert_same(stock, ours)


def test_unused_parameters():
    ours = replace_layers(network())
    ours.append(nn.Linear(5, 5))
    images, labels = next(batches())
    F.cross_entropy(ours[:-1](images), labels).backward()
    assert ours[-1].weight.grad is None
    assert all(p.grad is not None for p in ours[:-1].parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_with_a_scaler(dtype):
    """The losses of half precision fall as float32's do, and nothing is lost to infinities."""
    stock, ours = both()
    losses = []
    for model, lowers in ((stock, False), (ours, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=lowers)
        found = []
        for images, labels in batches(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=lowers):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.05)


def test_torchs_conversion_to_sync_batch_norm_keeps_activations():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), fast.BatchNormAct2d(8, activation="relu"), nn.Sequential(fast.BatchNormAct2d(8))
    )
    expected = copy.deepcopy(model)
    keys = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm) and isinstance(converted[2][0], nn.SyncBatchNorm)
    assert list(converted.state_dict()) == keys and "activation=relu" in repr(converted)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        torch.testing.assert_close(converted(x), expected(x))
        converted = copy.deepcopy(converted)
    converted.eval(), expected.eval()
    torch.testing.assert_close(converted(x), expected(x))
    assert list(dict(fast.BatchNormAct2d(8).named_children())) == []


def test_sync_batch_norm_of_a_replaced_model():
    stock, ours = both()
    stock, ours = (nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in (stock, ours))
    train(stock)
    train(ours)
    assert_same(stock, ours)
    assert not any("norm" in part.reason and part.is_block for part in training_report(ours))


def _distributed(rank, store, replaced, frozen, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model = network()
    if replaced:
        replace_layers(model)
    _freeze(model, frozen)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(parallel(images[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    if rank == 0:
        results.put({name: tensor.numpy() for name, tensor in model.state_dict().items()})
        results.close()
        results.join_thread()
    torch.distributed.barrier()
    # Not by way of destructors: PyTorch 2.13's gloo process group waits for its thread while it holds the interpreter's
    # lock, which that thread now and then needs for what it still has of a gradient's exchange.
    os._exit(0)


def _freeze(model, frozen):
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()


def _run_distributed(replaced, frozen, store):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_distributed, args=(r, store, replaced, frozen, results)) for r in range(2)]
    for process in processes:
        process.start()
    try:
        state = results.get(timeout=120)
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return {name: torch.from_numpy(value) for name, value in state.items()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("frozen", (False, True))
def test_two_processes(frozen, tmp_path):
    ours = _run_distributed(True, frozen, tmp_path / "ours")
    if frozen:  # one process on the whole batch does the same
        model = network()
        _freeze(model, frozen)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer=optimizer)
        expected = model.state_dict()
    else:
        expected = _run_distributed(False, frozen, tmp_path / "stock")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)


def test_report():
    model = replace_layers(network())
    model[1][3].register_forward_hook(lambda *a: None)
    model[2][7] = nn.GroupNorm(1, 72)
    rows = training_report(model)
    reasons = {row.modules[0]: row.reason for row in rows if not row.is_block}
    assert reasons == {
        "1.3": "a hook wants to see it called",
        "2.6": "it stands before no 1x1 convolution",
        "2.7": "GroupNorm is not known",
        "5": "Linear is not known",
    }
    assert [row.modules for row in rows if row.is_block][0] == ("0.0", "0.1", "0.2", "1.0", "1.1", "1.2")
    named = [name for row in rows for name in row.modules]
    assert len(set(named)) == len(named)
    with pytest.raises(TypeError, match="training_report: model must be an nn.Module, got int"):
        training_report(3)


@pytest.mark.parametrize(("name", "blocks", "size"), (("mobilenetv1_100", 1, 64), ("legacy_xception", 18, 96)))
def test_timm_networks_are_chains(name, blocks, size):
    """The stem and what stands between blocks train in blocks too, and hooks and checkpoints still count."""
    stock = import_timm().create_model(name, num_classes=5).double()
    ours = replace_layers(copy.deepcopy(stock))
    rows = training_report(ours)
    assert sum(row.is_block for row in rows) == blocks
    assert all(row.is_block for row in rows if row.modules != ("fc",) and row.modules != ("classifier",))
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def compare():
        for model in (stock, ours):
            model.zero_grad()
            model(x).square().sum().backward()
        largest = max(parameter.grad.abs().max() for parameter in stock.parameters())
        for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() <= 1e-9 * largest

    compare()
    fired = []
    ours.bn1.register_forward_hook(lambda *a: fired.append("bn1"))
    compare()
    assert fired == ["bn1"]
    if name == "mobilenetv1_100":
        ours.set_grad_checkpointing()
        assert sum(row.is_block for row in training_report(ours)) > 0
        compare()
    restored = restore_layers(ours)
    assert type(restored) is type(stock)
    assert not any("_plan" in attribute for module in restored.modules() for attribute in vars(module))


def test_report_names_what_runs(monkeypatch):
    """As many blocks as run, in torchvision's network and ours."""
    tv = import_torchvision()
    ran = []
    apply = fast.training._Block.apply
    monkeypatch.setattr(fast.training._Block, "apply", lambda *a: (ran.append(a[0]), apply(*a))[1])
    for model in (replace_layers(tv.models.mobilenet_v3_small()), mobilenet_fast.models.efficientnet_b0()):
        rows = training_report(model)
        ran.clear()
        model(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        assert len(ran) == sum(row.is_block for row in rows) > 10
