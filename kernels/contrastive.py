"""Prototype selection and the contrastive loss with its gradients in Triton: one program a few blocks of anchors.

The functions have the signatures of ``torch.ops.spss_fast.*``: spss_fast/ops/contrastive.py. Nothing waits for the
host: which classes a block holds is decided on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import block_of, grid_of, merge, softmax
from torch import Tensor

from spss_fast.ops import checks

BLOCK = 1024
ANCHORS = 32  # a block
PROGRAMS = 128  # each adds up the prototypes' gradients of its blocks, one after the other
LARGEST = 2**24  # numbers in all those sums together
EPSILON = 1e-12
# three products of a GPU's matrix units for each of float32: as "ieee" Triton 3.6 keeps the tiles in local memory
EXACT = tl.constexpr("tf32x3")


@triton.jit
def _confidence(
    logits, key, predicted, voxels, logits_b, logits_c, logits_v, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """key: confidence in the upper 32 bits, the complement of the index below, so that no two are equal; -1 for NaN."""
    batch, voxel, inside = block_of(voxels, BLOCK)
    source = logits + batch * logits_b + voxel * logits_v
    _, norm, best = softmax(source, logits_c, inside, CHANNELS)
    confidence = 1.0 / norm
    index = batch * voxels + voxel
    bits = confidence.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(key + index, tl.where(confidence == confidence, bits | (0xFFFFFFFF - index), -1), inside)
    tl.store(predicted + index, best, inside)


def select_prototypes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.has_channels("logits", logits)
    source = merge(logits)
    batch, channels, voxels = source.shape
    checks.fits_32_bits("logits", batch * voxels)
    key = torch.empty(batch * voxels, dtype=torch.int64, device=logits.device)
    predicted = torch.empty(batch * voxels, dtype=torch.int32, device=logits.device)
    if key.numel():
        _confidence[grid_of(batch, voxels, BLOCK)](
            source, key, predicted, voxels, *source.stride(), CHANNELS=channels, BLOCK=BLOCK
        )
    classes = torch.arange(channels, dtype=torch.int32, device=logits.device)
    best = torch.where(predicted != classes[:, None], key, -1).topk(min(k, key.numel())).values
    indices = torch.full((channels, k), -1, dtype=torch.int64, device=logits.device)
    indices[:, : best.shape[1]] = torch.where(best >= 0, 0xFFFFFFFF - (best & 0xFFFFFFFF), -1)
    return indices, (best >= 0).sum(1)


@triton.jit
def _unit(rows, epsilon):
    """Normalised rows, their divisors, and 1 where the divisor is the row's length, 0 where it is constant."""
    length = tl.sqrt(tl.sum(rows * rows, 1))
    divisor = tl.where(length < epsilon, epsilon, length)
    return rows / divisor[:, None], divisor, (length >= epsilon).to(tl.float32)


@triton.jit
def _through_unit(grad, unit, divisor, free):
    """The gradient of rows from that of their normalised selves: the part along the row is lost."""
    along = tl.sum(grad * unit, 1) * free
    return (grad - along[:, None] * unit) / divisor[:, None]


@triton.jit
def _direction(unit, bank, positive, here, banked, temperature, scale, BANK: tl.constexpr):
    """Sum of losses, dL/d(cosines with the bank), dL/d(cosine with the positive) for the anchors `here`."""
    score = tl.dot(unit, tl.trans(bank), input_precision=EXACT) / temperature
    score = tl.where(tl.arange(0, BANK)[None, :] < banked, score, float("-inf"))
    top = tl.maximum(tl.max(score, 1), positive)
    e = tl.exp(score - top[:, None])
    of_positive = tl.exp(positive - top)
    norm = tl.sum(e, 1) + of_positive
    loss = tl.sum(tl.where(here, top + tl.log(norm) - positive, 0.0))
    each = tl.where(here, scale / temperature / norm, 0.0)
    return loss, e * each[:, None], tl.where(here, (of_positive / norm - 1) * scale / temperature, 0.0)


@triton.jit
def _loss(
    a, b, anchor_class, banks, counts, loss, grad_a, grad_b, grad_banks,
    anchors, voxels, width, classes, epsilon, temperature, scale,
    a_b, a_f, a_v, b_b, b_f, b_v, ga_b, ga_f, ga_v, gb_b, gb_f, gb_v,
    BOTH: tl.constexpr, WITH_GRAD: tl.constexpr, BANK: tl.constexpr, WIDTH: tl.constexpr, ANCHORS: tl.constexpr,
):
    feature = tl.arange(0, WIDTH)[None, :]
    far = feature.to(tl.int64)  # feature times stride may not fit into 32 bits
    tile = tl.arange(0, BANK)[:, None] * WIDTH + feature
    sum_of_losses = tl.zeros([], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(anchors, ANCHORS), tl.num_programs(0)):
        anchor = (block * ANCHORS + tl.arange(0, ANCHORS)).to(tl.int64)
        inside = anchor < anchors
        batch, voxel = (anchor // voxels)[:, None], (anchor % voxels)[:, None]
        wanted = inside[:, None] & (feature < width)
        unit_a = tl.load(a + batch * a_b + voxel * a_v + far * a_f, wanted, 0.0).to(tl.float32)
        unit_b = tl.load(b + batch * b_b + voxel * b_v + far * b_f, wanted, 0.0).to(tl.float32)
        unit_a, divisor_a, free_a = _unit(unit_a, epsilon)
        unit_b, divisor_b, free_b = _unit(unit_b, epsilon)
        positive = tl.sum(unit_a * unit_b, 1) / temperature
        of_class = tl.load(anchor_class + anchor, inside, -1)
        to_a = tl.zeros([ANCHORS, WIDTH], tl.float32)
        to_b = tl.zeros([ANCHORS, WIDTH], tl.float32)
        slope = tl.zeros([ANCHORS], tl.float32)
        for c in range(classes):
            here = of_class == c
            banked = tl.load(counts + c)
            if (tl.sum(here.to(tl.int32)) > 0) & (banked > 0):
                bank = tl.load(banks + c * BANK * WIDTH + tile)
                losses, of_score, of_positive = _direction(
                    unit_a, bank, positive, here, banked, temperature, scale, BANK
                )
                sum_of_losses += losses
                slope += of_positive
                to_a += tl.dot(of_score, bank, input_precision=EXACT)
                to_bank = tl.dot(tl.trans(of_score), unit_a, input_precision=EXACT)
                if BOTH:
                    losses, of_score, of_positive = _direction(
                        unit_b, bank, positive, here, banked, temperature, scale, BANK
                    )
                    sum_of_losses += losses
                    slope += of_positive
                    to_b += tl.dot(of_score, bank, input_precision=EXACT)
                    to_bank += tl.dot(tl.trans(of_score), unit_b, input_precision=EXACT)
                if WITH_GRAD:
                    at = grad_banks + (tl.program_id(0).to(tl.int64) * classes + c) * BANK * WIDTH + tile
                    tl.store(at, tl.load(at) + to_bank)
        if WITH_GRAD:
            to_a += slope[:, None] * unit_b
            to_b += slope[:, None] * unit_a
            to_a = _through_unit(to_a, unit_a, divisor_a, free_a)
            to_b = _through_unit(to_b, unit_b, divisor_b, free_b)
            tl.store(grad_a + batch * ga_b + voxel * ga_v + far * ga_f, to_a, wanted)
            tl.store(grad_b + batch * gb_b + voxel * gb_v + far * gb_f, to_b, wanted)
    tl.store(loss + tl.program_id(0), sum_of_losses)


def _power(least: int) -> int:
    return max(16, triton.next_power_of_2(least))  # 16: what a matrix product takes


def shared_memory(bank: int, wide: int) -> int:
    """Bytes that a program of ``_loss`` takes at most: a bank, scores and two blocks of anchors, or four blocks, or
    scores and anchors with what matrix units take of both."""
    return 4 * max(bank * wide + ANCHORS * (bank + 2 * wide), 4 * ANCHORS * wide, 2 * ANCHORS * (bank + wide))


def _room(device: torch.device) -> int:
    """Bytes that a program may have there; without a GPU those of an H100. An A100 has 163 KiB."""
    if device.type != "cuda":
        return 227 * 2**10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def contrastive_loss(
    a: Tensor, b: Tensor, n: Tensor, logits_a: Tensor, logits_n: Tensor,
    k: int, temperature: float, bidirectional: bool, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.has_channels("a", a)
    for name, other in (("b", b), ("n", n)):
        checks.has_shape(name, other, a.shape, "a", a)
    for name, logits in (("logits_a", logits_a), ("logits_n", logits_n)):
        checks.has_shape(name, logits, (a.shape[0], logits_a.shape[1], *a.shape[2:]), "a", a)
    grads = [torch.empty_like(x, dtype=torch.float32) if with_grad else x.new_empty(0, dtype=torch.float32)
             for x in (a, b, n)]
    grads[2].zero_()  # of the others every voxel is written, of this only prototypes
    if not a.numel():
        return (a.new_full((), torch.nan, dtype=torch.float32), *grads)
    rows_a, rows_b, rows_n = (merge(x) for x in (a, b, n))
    _, width, voxels = rows_a.shape
    anchors, bank, wide = a.shape[0] * voxels, _power(k), _power(width)
    if shared_memory(bank, wide) > _room(a.device):
        raise ValueError(f"k: {k} prototypes of {width} features do not fit a GPU's shared memory in this kernel; "
                         "use fewer, or spss_fast.ops.backend('reference')")
    indices, counts = select_prototypes(logits_n, k)
    classes = len(counts)

    chosen = indices.clamp(min=0).flatten()
    at = (chosen // voxels, chosen % voxels)
    valid = (indices >= 0).flatten()[:, None]
    prototypes = torch.where(valid, rows_n.transpose(1, 2)[at].float(), 0)
    length = prototypes.norm(dim=1, keepdim=True)
    unit = prototypes / length.clamp(min=EPSILON)
    banks = unit.new_zeros(classes, bank, wide)
    banks[:, :k, :width] = unit.view(classes, k, width)

    programs = max(1, min(triton.cdiv(anchors, ANCHORS), PROGRAMS, LARGEST // (classes * bank * wide)))
    loss = unit.new_empty(programs)
    grad_banks = unit.new_zeros((programs, *banks.shape) if with_grad else 1)
    merged = [merge(g) if with_grad else g for g in grads]
    strides = [s for g in merged[:2] for s in (g.stride() if with_grad else (0, 0, 0))]
    _loss[(programs,)](
        rows_a, rows_b, logits_a.argmax(1).flatten(), banks, counts, loss, merged[0], merged[1], grad_banks,
        anchors, voxels, width, classes, EPSILON, temperature, 1 / anchors,
        *rows_a.stride(), *rows_b.stride(), *strides,
        BOTH=bidirectional, WITH_GRAD=with_grad, BANK=bank, WIDTH=wide, ANCHORS=ANCHORS,
        num_warps=min(16, max(8, bank * wide // 2**11)),  # of a bank and its gradient, 64 registers a thread each
    )
    if with_grad:
        to_unit = grad_banks.sum(0)[:, :k, :width].reshape(-1, width)
        along = torch.where(length < EPSILON, 0, (to_unit * unit).sum(1, keepdim=True))
        to_n = torch.where(valid, (to_unit - along * unit) / length.clamp(min=EPSILON), 0)
        merged[2].transpose(1, 2).index_put_(at, to_n, accumulate=True)  # sorts: the same sum every time
        for grad, rows in zip(grads, merged):
            if rows.data_ptr() != grad.data_ptr():
                grad.copy_(rows.view(grad.shape))
    total = loss.sum(dtype=torch.float64) / anchors
    return (total.float(), *grads)
