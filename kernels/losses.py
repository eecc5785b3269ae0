"""The segmentation losses in Triton: one program a block of voxels, classes in turn, any number of them.

The functions have the signatures of ``torch.ops.spss_fast.*``: spss_fast/ops/losses.py. A block's sums are float32,
those over blocks float64 and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import block_of, grid_of, merge, plane, probability, softmax
from torch import Tensor

from spss_fast.ops import checks

BLOCK = 1024
SMOOTH = 1e-5


@triton.jit
def _forward(
    logits, target, weight, partial, voxels, logits_b, logits_c, logits_v,
    CHANNELS: tl.constexpr, ON_PROBABILITIES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Per block: sum of weighted CE, sum of weights, then per class (hit, size) under the mask and without it."""
    batch, voxel, inside = block_of(voxels, BLOCK)
    source = logits + batch * logits_b + voxel * logits_v
    out = partial + tl.program_id(0).to(tl.int64) * (2 + 4 * CHANNELS)
    label = tl.load(target + batch * voxels + voxel, inside, 0)
    w = tl.load(weight + batch * voxels + voxel, inside, 0).to(tl.float32)
    top, norm, _ = softmax(source, logits_c, inside, CHANNELS)
    # A label that is no class makes the loss NaN: the host learns of it without waiting.
    is_class = (label >= 0) & (label < CHANNELS)
    at_label = tl.load(plane(source, label, logits_c), inside & is_class, 0.0).to(tl.float32)
    at_label = tl.where(is_class, at_label, float("nan"))
    if ON_PROBABILITIES:
        second = tl.zeros_like(top)
        for c in range(CHANNELS):
            second += tl.exp(probability(source, c, logits_c, inside, top, norm))
        ce = tl.log(second) - tl.exp(at_label - top) / norm
    else:
        ce = top + tl.log(norm) - at_label
    tl.store(out, tl.sum(tl.where(inside, w * ce, 0.0)))
    tl.store(out + 1, tl.sum(w))
    for c in range(CHANNELS):
        p = probability(source, c, logits_c, inside, top, norm)
        here = (label == c).to(tl.float32)
        hit = tl.where(inside, p * here, 0.0)
        size = tl.where(inside, p * p + here, 0.0)
        if MASKED:
            tl.store(out + 2 + 4 * c, tl.sum(w * hit))
            tl.store(out + 3 + 4 * c, tl.sum(w * size))
        else:
            tl.store(out + 2 + 4 * c, 0.0)
            tl.store(out + 3 + 4 * c, 0.0)
        tl.store(out + 4 + 4 * c, tl.sum(hit))
        tl.store(out + 5 + 4 * c, tl.sum(size))


@triton.jit
def _slope(p, here, w, q, ce, slopes, c, ON_PROBABILITIES: tl.constexpr):
    """dL/dp_c."""
    at = slopes + 4 * c
    slope = here * (tl.load(at + 2) + w * tl.load(at)) + p * (tl.load(at + 3) + w * tl.load(at + 1))
    if ON_PROBABILITIES:
        slope += ce * (q - here)
    return slope


@triton.jit
def _backward(
    logits, target, weight, ce_slope, slopes, grad, voxels, logits_b, logits_c, logits_v, grad_b, grad_c, grad_v,
    CHANNELS: tl.constexpr, ON_PROBABILITIES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):
    batch, voxel, inside = block_of(voxels, BLOCK)
    source = logits + batch * logits_b + voxel * logits_v
    target_grad = grad + batch * grad_b + voxel * grad_v
    label = tl.load(target + batch * voxels + voxel, inside, 0)
    w = tl.load(weight + batch * voxels + voxel, inside, 0).to(tl.float32)
    ce = tl.load(ce_slope + batch) * w
    top, norm, _ = softmax(source, logits_c, inside, CHANNELS)
    second = tl.full([BLOCK], 1.0, tl.float32)
    if ON_PROBABILITIES:
        second -= 1.0
        for c in range(CHANNELS):
            second += tl.exp(probability(source, c, logits_c, inside, top, norm))
    mean = tl.zeros_like(top)
    for c in range(CHANNELS):
        p = probability(source, c, logits_c, inside, top, norm)
        here = (label == c).to(tl.float32)
        mean += p * _slope(p, here, w, tl.exp(p) / second, ce, slopes, c, ON_PROBABILITIES)
    for c in range(CHANNELS):
        p = probability(source, c, logits_c, inside, top, norm)
        here = (label == c).to(tl.float32)
        result = p * (_slope(p, here, w, tl.exp(p) / second, ce, slopes, c, ON_PROBABILITIES) - mean)
        if not ON_PROBABILITIES:
            result += ce * (p - here)
        tl.store(plane(target_grad, c, grad_c), result.to(grad.dtype.element_ty), inside)


def _check(logits: Tensor, target: Tensor, weight: Tensor, masked: bool) -> None:
    checks.has_channels("logits", logits)
    shape = (logits.shape[0], *logits.shape[2:])
    checks.has_shape("target", target, shape, "logits", logits)
    checks.has_shape("mask" if masked else "weight", weight, shape, "logits", logits)


def _sums(logits: Tensor, target: Tensor, weight: Tensor, on_probabilities: bool, masked: bool):
    """float64: (B, 2) of CE and weight, (C, 4) of Dice."""
    _check(logits, target, weight, masked)
    source = merge(logits)
    batch, channels, voxels = source.shape
    blocks = triton.cdiv(voxels, BLOCK)
    partial = torch.empty((batch, blocks, 2 + 4 * channels), dtype=torch.float32, device=logits.device)
    if partial.numel():
        _forward[grid_of(batch, voxels, BLOCK)](
            source, target.contiguous(), weight.contiguous(), partial, voxels, *source.stride(),
            CHANNELS=channels, ON_PROBABILITIES=on_probabilities, MASKED=masked, BLOCK=BLOCK,
        )
    total = partial.sum(1, dtype=torch.float64)
    return total[:, :2], total[:, 2:].sum(0).view(channels, 4)


def _unpack(grad: Tensor, losses: int, sums: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels = logits.shape[:2]
    checks.has_shape("grad", grad, (losses,), "number of losses", logits)
    checks.has_shape("sums", sums, (2 * batch + 4 * channels,), "logits", logits)
    return sums[: 2 * batch].view(batch, 2), sums[2 * batch :].view(channels, 4)


def _dice(hit: Tensor, size: Tensor) -> Tensor:
    return 1 - (2 * hit + SMOOTH) / (size + SMOOTH)


def _dice_slopes(hit: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of 1 - Dice for a voxel of the class and, times p, for every voxel."""
    whole = size + SMOOTH
    return -2 / whole, 2 * (2 * hit + SMOOTH) / whole**2


def _gradient(logits, target, weight, ce, slopes, on_probabilities: bool, masked: bool) -> Tensor:
    _check(logits, target, weight, masked)
    source = merge(logits)
    batch, channels, voxels = source.shape
    grad = torch.empty_like(logits)
    # Where the layout of logits does not merge, its gradient is written contiguous and then copied.
    merged = merge(grad)
    if grad.numel():
        _backward[grid_of(batch, voxels, BLOCK)](
            source, target.contiguous(), weight.contiguous(), ce.float().contiguous(), slopes.float().contiguous(),
            merged, voxels, *source.stride(), *merged.stride(),
            CHANNELS=channels, ON_PROBABILITIES=on_probabilities, MASKED=masked, BLOCK=BLOCK,
        )
    return grad if merged.data_ptr() == grad.data_ptr() else grad.copy_(merged.view(grad.shape))


def masked_ce_dice(logits: Tensor, target: Tensor, mask: Tensor, on_probabilities: bool) -> tuple[Tensor, Tensor]:
    volumes, classes = _sums(logits, target, mask, on_probabilities, True)
    ce = volumes[:, 0].sum() / volumes[:, 1].sum().clamp(min=1)
    dice = _dice(classes[:, 0::2], classes[:, 1::2]).mean(0)
    return torch.cat([ce[None], dice]).float(), torch.cat([volumes.flatten(), classes.flatten()])


def masked_ce_dice_backward(grad, logits, target, mask, sums, on_probabilities: bool) -> Tensor:
    volumes, classes = _unpack(grad, 3, sums, logits)
    ce = (grad[0] / volumes[:, 1].sum().clamp(min=1)).expand(len(volumes))
    hit, size = _dice_slopes(classes[:, 0::2], classes[:, 1::2])
    slopes = torch.stack([hit, size], 2) * (grad[1:] / len(classes))[:, None]  # (C, masked or all, hit or size)
    return _gradient(logits, target, mask, ce, slopes, on_probabilities, True)


def weighted_ce_dice(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    volumes, classes = _sums(logits, target, weight, False, False)
    ce = (volumes[:, 0] / volumes[:, 1]).mean()
    dice = _dice(classes[1:, 2], classes[1:, 3]).mean()
    return torch.stack([ce, dice]).float(), torch.cat([volumes.flatten(), classes.flatten()])


def weighted_ce_dice_backward(grad, logits, target, weight, sums) -> Tensor:
    volumes, classes = _unpack(grad, 2, sums, logits)
    ce = grad[0] / (volumes[:, 1] * len(volumes))
    slopes = torch.zeros_like(classes)
    slopes[1:, 2], slopes[1:, 3] = _dice_slopes(classes[1:, 2], classes[1:, 3])
    slopes = slopes * (grad[1] / (len(classes) - 1))
    return _gradient(logits, target, weight, ce, slopes, False, False)
