"""How the kernels address (B, C, *spatial) tensors: three strides, as the spatial axes merge into one.

A grid has one axis for the batch and its blocks of voxels, as CUDA's other axes end at 65535 programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def plane(voxel_0, c, stride):
    """The address of channel c, given that of channel 0: in 64 bits, as strides come in 32 where they fit."""
    return voxel_0 + tl.cast(c, tl.int64) * stride


@triton.jit
def logit(source, c, stride, inside):
    """float32 logits of class c, given where those of class 0 are."""
    return tl.load(plane(source, c, stride), inside, 0.0).to(tl.float32)


@triton.jit
def softmax(source, stride, inside, CHANNELS: tl.constexpr):
    """Top, sum of exponentials, and class of the top, the first of equals: the softmax is exp(x - top) / sum."""
    top = logit(source, 0, stride, inside)
    best = tl.zeros(top.shape, tl.int32)
    for c in range(1, CHANNELS):
        x = logit(source, c, stride, inside)
        best = tl.where(x > top, c, best)
        top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    norm = tl.zeros_like(top)
    for c in range(CHANNELS):
        norm += tl.exp(logit(source, c, stride, inside) - top)
    return top, norm, best


@triton.jit
def probability(source, c, stride, inside, top, norm):
    return tl.exp(logit(source, c, stride, inside) - top) / norm


@triton.jit
def block_of(voxels, BLOCK: tl.constexpr):
    """Batch element of this program, its voxels, and which of them there are."""
    blocks = (voxels - 1) // BLOCK + 1  # tl.cdiv would leave 32 bits for the last sizes that fit them
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    voxel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return batch, voxel, voxel < voxels


def grid_of(batch: int, voxels: int, block: int) -> tuple[int]:
    """The grid for :func:`block_of`."""
    return (batch * triton.cdiv(voxels, block),)


def merge(x: Tensor) -> Tensor:
    """``x`` as (B, C, voxels), a view for contiguous and channels-last tensors, a copy where axes do not merge."""
    return x.flatten(2)


def merges(x: Tensor) -> bool:
    """Whether :func:`merge` is a view."""
    expected = None
    for size, stride in reversed(list(zip(x.shape[2:], x.stride()[2:]))):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True
