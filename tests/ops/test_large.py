"""Operators on more than 2^31 elements, where there is memory for them, and on more than 2^16 tiny samples.

Inputs repeat one small volume along a batch axis of stride 0, or are zeros that a CPU never writes: what takes memory
are the outputs. The reference would take far more of it, and Triton's interpreter far too long.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from devices import DEVICE

from spss_fast.ops import (
    accumulate_softmax,
    backend,
    batch_norm_relu,
    contrastive_loss,
    masked_ce_dice,
    propagate,
    uncertainty_mask,
    warp,
)
from spss_fast.ops.backends import available

COPIES = 2**15 + 1  # of a volume of 2^16 elements or more
LIMITS = [  # of a container's memory: cgroups 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]
NONE = [pytest.param(None, marks=pytest.mark.skip(reason="the compiled extension is not built"))]


def backends(operator: str):
    fast = [n for n in available(operator, DEVICE) if n != "reference" and (n, DEVICE) != ("triton", "cpu")]
    return pytest.mark.parametrize("name", fast or NONE)


def needs(gib: int) -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of the last test is free as well
        free = torch.cuda.mem_get_info()[0]
    else:
        meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
        free = 1024 * sum(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable"))
        for limit, used in LIMITS:
            if limit.exists() and limit.read_text().strip() != "max":
                free = min(free, int(limit.read_text()) - int(used.read_text()))
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory, there are {free / 2**30:.0f}")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if DEVICE == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    return torch.from_numpy(np.zeros(shape, f"u{dtype.itemsize}")).view(dtype)  # pages that exist once written


def volume(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def copies(one: torch.Tensor, count: int = COPIES) -> torch.Tensor:
    return one.expand(count, *one.shape[1:])


@backends("warp")
def test_warp(name):
    needs(12 if DEVICE == "cpu" else 40)
    sides = 1290, 1290, 1291
    marked = torch.tensor([5, 2**31 - 1, 2**31, 1290 * 1290 * 1291 - 2], device=DEVICE)
    values = torch.arange(1.0, 5.0, device=DEVICE)
    image = zeros(1, 1, *sides)
    image.view(-1)[marked] = values
    shift = torch.tensor([0.0, 0, 1], device=DEVICE).view(1, 3, 1, 1, 1).expand(1, 3, *sides)
    with backend(name):
        warped = warp(image, shift, "nearest")
        assert torch.equal(warped.view(-1)[marked - 1], values) and warped.sum() == values.sum()
        del warped
        grad, _ = torch.ops.spss_fast.warp_backward(image, image, shift, "nearest", "zeros", True, False)
        assert torch.equal(grad.view(-1)[marked + 1], values) and grad.sum() == values.sum()


@backends("uncertainty")
def test_accumulate_softmax(name):
    needs(12)
    logits = copies(volume(2, 2**15).bfloat16())
    total = torch.zeros(logits.shape, device=DEVICE)
    with backend(name):
        accumulate_softmax(total, logits)
    torch.testing.assert_close(total[0], logits[0].float().softmax(0))
    assert torch.equal(total[1:], total[:-1])


@backends("uncertainty")
def test_uncertainty_mask(name):
    needs(14)
    one = volume(2, 2**16).softmax(1)
    each, more = 1000, 20001  # the 1000 least uncertain of every copy, and of the first copies one more
    with backend(name):
        entropy, mask = uncertainty_mask(copies(one), 1, COPIES * each + more)
    order = entropy[0].argsort(stable=True)
    assert entropy[0][order[each - 1]] < entropy[0][order[each]] < entropy[0][order[each + 1]]
    expected = torch.zeros(2, 2**16, dtype=torch.bool, device=DEVICE)
    expected[0, order[: each + 1]], expected[1, order[:each]] = True, True
    assert (mask[:more] == expected[0]).all() and (mask[more:] == expected[1]).all()


@backends("losses")
def test_losses(name):
    needs(12)
    one = volume(4, 2**14).bfloat16().requires_grad_()
    target, mask = volume(2**14).gt(1).long(), volume(2**14).lt(0.3)
    with backend(name):
        expected = masked_ce_dice(one, target, mask)
        (of_expected,) = torch.autograd.grad(sum(expected), one)
        losses = masked_ce_dice(copies(one), copies(target), copies(mask))
        (grad,) = torch.autograd.grad(sum(losses), one)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, of_expected, rtol=1.6e-2, atol=1e-7)


@backends("contrastive")
@pytest.mark.parametrize("with_gradients", [False, True])
def test_contrastive_loss(name, with_gradients):
    needs(52 if with_gradients else 6)  # three maps of 8 GiB of gradients, and three of what follows from them
    features = [volume(64, 2**10).roll(i, 1).requires_grad_(with_gradients) for i in range(3)]
    logits = [volume(3, 2**10).roll(i, 2) for i in range(2)]
    with backend(name):
        expected = contrastive_loss(*features, *logits, 1)
        loss = contrastive_loss(*map(copies, features), *map(copies, logits), 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    if with_gradients:
        for grad, e in zip(torch.autograd.grad(loss, features), torch.autograd.grad(expected, features)):
            torch.testing.assert_close(grad, e, rtol=1e-3, atol=1e-7)


@backends("propagate")
def test_propagate(name):
    needs(6 if DEVICE == "cpu" else 16)
    labels = zeros(1, 256, 256, dtype=torch.uint8)
    labels[0, 100:104, 30:70] = 1
    depth = 2**14 + 2
    flow = zeros(1, depth - 1, 2, 256, 256, dtype=torch.bfloat16)
    with backend(name):
        out = propagate(labels, torch.tensor([depth // 2], device=DEVICE), flow, flow, opening=1, closing=1)
    assert out.sum() == depth * labels.sum() and torch.equal(out[..., 0], labels) and torch.equal(out[..., -1], labels)


SAMPLES = 2**16 + 1  # CUDA has fewer programs along the second axis of a grid


@backends("uncertainty")
def test_uncertainty_of_many_samples(name):
    one = volume(2, 3)
    logits = copies(one, SAMPLES)
    total = torch.zeros(logits.shape, device=DEVICE)
    with backend(name):
        accumulate_softmax(total, logits)
        entropy, mask = uncertainty_mask(total, 1, SAMPLES)
    torch.testing.assert_close(total, logits.softmax(1))
    assert torch.equal(mask, copies(entropy[:1] == entropy[0].min(), SAMPLES))


@backends("losses")
def test_losses_of_many_samples(name):
    one = volume(4, 30).requires_grad_()
    target, mask = volume(30).gt(1).long(), volume(30).lt(0.3)
    with backend(name):
        expected = masked_ce_dice(one, target, mask)
        (of_expected,) = torch.autograd.grad(sum(expected), one)
        losses = masked_ce_dice(copies(one, SAMPLES), copies(target, SAMPLES), copies(mask, SAMPLES))
        (grad,) = torch.autograd.grad(sum(losses), one)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, of_expected, rtol=1e-3, atol=1e-5)


@backends("contrastive")
def test_contrastive_loss_of_many_samples(name):
    features = [volume(4, 3).roll(i, 1) for i in range(3)]
    logits = [volume(3, 3).roll(i, 2) for i in range(2)]
    with backend(name):
        expected = contrastive_loss(*features, *logits, 1)
        loss = contrastive_loss(*(copies(x, SAMPLES) for x in (*features, *logits)), 1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@backends("norm")
def test_norm_of_many_samples(name):
    x, weight, bias = volume(4, 3).requires_grad_(), torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    with backend(name):
        expected = batch_norm_relu(x, weight, bias, None, None, True)
        (of_expected,) = torch.autograd.grad(expected.square().mean(), x)
        y = batch_norm_relu(copies(x, SAMPLES), weight, bias, None, None, True)
        (grad,) = torch.autograd.grad(y.square().mean(), x)
    torch.testing.assert_close(y, copies(expected, SAMPLES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, of_expected, rtol=1e-3, atol=1e-5)
