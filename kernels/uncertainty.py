"""Running mean of softmax, entropy, and selection of the K least uncertain voxels in Triton.

The functions ``accumulate_softmax`` and ``uncertainty_mask`` have the signatures of ``torch.ops.spss_fast.*``. The
selection is a radix select, 8 bits at a time, whose state (histograms, K) never leaves the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import block_of, grid_of, merge, merges, plane, probability, softmax
from torch import Tensor

from spss_fast.ops import checks

BLOCK = 1024
LEVELS = tl.constexpr(4)  # of 8 bits, of a float32's 32
BINS = tl.constexpr(256)
EPSILON = tl.constexpr(1e-6)


@triton.jit
def _accumulate(
    total, logits, voxels, total_b, total_c, total_v, logits_b, logits_c, logits_v,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):
    batch, voxel, inside = block_of(voxels, BLOCK)
    source = logits + batch * logits_b + voxel * logits_v
    target = total + batch * total_b + voxel * total_v
    top, norm, _ = softmax(source, logits_c, inside, CHANNELS)
    for c in range(CHANNELS):
        p = probability(source, c, logits_c, inside, top, norm)
        at = plane(target, c, total_c)
        tl.store(at, tl.load(at, inside, 0.0) + p, inside)


@triton.jit
def _key(value):
    """Bits that sort as the numbers do; NaN comes last, and -0 equals 0."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    flip = tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(value == value, bits ^ flip, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _entropy(
    total, result, histogram, missing, voxels, passes, total_b, total_c, total_v,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):
    batch, voxel, inside = block_of(voxels, BLOCK)
    source = total + batch * total_b + voxel * total_v
    value = tl.zeros([BLOCK], tl.float32)
    for c in range(CHANNELS):
        p = tl.load(plane(source, c, total_c), inside, 0.0) / passes
        value -= p * tl.log(p + EPSILON)
    tl.store(result + batch * voxels + voxel, value, inside)
    bins = tl.histogram((_key(value) >> 24).to(tl.int32), BINS, mask=inside)
    tl.atomic_add(histogram + tl.arange(0, BINS), bins, mask=bins > 0, sem="relaxed")
    nans = tl.sum((inside & (value != value)).to(tl.int32))
    tl.atomic_add(missing, nans, mask=nans > 0, sem="relaxed")


@triton.jit
def _count(at):
    return tl.load(at).to(tl.uint32, bitcast=True).to(tl.int64)  # a bin may hold more than an int32


@triton.jit
def _resolve(histogram, missing, keep, count, UP_TO: tl.constexpr):
    """The first UP_TO digits of the keep-th lowest key, and its rank among keys that begin so."""
    bins = tl.arange(0, BINS)
    left = tl.minimum(tl.load(keep), count - _count(missing))
    left = tl.maximum(left, 0)
    prefix = tl.zeros([], tl.uint32)
    for level in tl.static_range(UP_TO):
        here = _count(histogram + level * BINS + bins)
        digit = tl.sum((tl.cumsum(here, 0) < left).to(tl.int32), 0)
        left -= tl.sum(tl.where(bins < digit, here, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    return prefix, left


@triton.jit
def _next_digit(values, histogram, missing, keep, count, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    prefix, _ = _resolve(histogram, missing, keep, count, LEVEL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(values + at, at < count, 0.0))
    matches = (at < count) & ((key >> (32 - 8 * LEVEL)) == prefix)
    digit = ((key >> (24 - 8 * LEVEL)) & 0xFF).to(tl.int32)
    bins = tl.arange(0, BINS)
    here = tl.histogram(digit, BINS, mask=matches)
    tl.atomic_add(histogram + LEVEL * BINS + bins, here, mask=here > 0, sem="relaxed")


@triton.jit
def _count_equals(values, histogram, missing, keep, equals, count, BLOCK: tl.constexpr):
    threshold, _ = _resolve(histogram, missing, keep, count, LEVELS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(values + at, at < count, 0.0))
    tl.store(equals + tl.program_id(0), tl.sum(((at < count) & (key == threshold)).to(tl.int64)))


@triton.jit
def _mask(values, histogram, missing, keep, equals_so_far, mask, count, BLOCK: tl.constexpr):
    threshold, wanted = _resolve(histogram, missing, keep, count, LEVELS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    key = _key(tl.load(values + at, inside, 0.0))
    equal = (inside & (key == threshold)).to(tl.int64)
    # Ties by index: the rank among the equals of all blocks up to here.
    before = tl.load(equals_so_far + tl.program_id(0)) - tl.sum(equal, 0)
    chosen = (key < threshold) | ((equal == 1) & (before + tl.cumsum(equal, 0) <= wanted))
    tl.store(mask + at, chosen, inside)


def accumulate_softmax(total: Tensor, logits: Tensor) -> None:
    checks.has_channels("logits", logits)
    checks.has_shape("total", total, logits.shape, "logits", logits)
    if not logits.numel():
        return
    merged, source = merge(total), merge(logits)
    batch, channels, voxels = source.shape
    _accumulate[grid_of(batch, voxels, BLOCK)](
        merged, source, voxels, *merged.stride(), *source.stride(), CHANNELS=channels, BLOCK=BLOCK
    )
    if not merges(total):
        total.copy_(merged.view(total.shape))


def uncertainty_mask(total: Tensor, passes: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    checks.has_channels("total", total)
    checks.has_shape("keep", keep, (), "total", total)
    entropy = total.new_empty((total.shape[0], *total.shape[2:]))
    mask = torch.empty_like(entropy, dtype=torch.bool)
    count = entropy.numel()
    checks.fits_32_bits("total", count)
    if not count:
        return entropy, mask
    source = merge(total)
    batch, channels, voxels = source.shape
    state = torch.zeros(LEVELS.value * BINS.value + 1, dtype=torch.int32, device=total.device)
    missing = state[-1:]
    _entropy[grid_of(batch, voxels, BLOCK)](
        source, entropy, state, missing, voxels, passes, *source.stride(), CHANNELS=channels, BLOCK=BLOCK
    )
    blocks = triton.cdiv(count, BLOCK)
    for level in range(1, LEVELS.value):
        _next_digit[(blocks,)](entropy, state, missing, keep, count, LEVEL=level, BLOCK=BLOCK)
    equals = torch.empty(blocks, dtype=torch.int64, device=total.device)
    _count_equals[(blocks,)](entropy, state, missing, keep, equals, count, BLOCK=BLOCK)
    _mask[(blocks,)](entropy, state, missing, keep, equals.cumsum(0), mask, count, BLOCK=BLOCK)
    return entropy, mask
