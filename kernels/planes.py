"""How the kernels address (B, C, *spatial) tensors: three strides, as the spatial axes merge into one.

A grid has one axis for the batch and its blocks of voxels, as CUDA's other axes end at 65535 programs. Where channels
are independent, a program takes tiles: rows of voxels times columns of channels, which suits channels last and
contiguous tensors alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements
COLUMNS = 64  # most channels of a tile


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


@triton.jit
def chunk_of(voxels, tiles, ROWS: tl.constexpr):
    """Batch element and chunk of so many tiles of this program. The grid's second axis is blocks of channels."""
    chunks = (voxels - 1) // ROWS // tiles + 1
    return (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)


@triton.jit
def tile_of(chunk, voxels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile, its channels, and which of both there are."""
    row = chunk * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row, c, (row < voxels)[:, None] & (c < channels)[None, :]


@triton.jit
def at(batch, row, c, stride_b, stride_c, stride_v):
    return batch * stride_b + row[:, None] * stride_v + c.to(tl.int64)[None, :] * stride_c


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


class Launch:
    """What all kernels of a call on tiles of (B, C, voxels) have in common; ``programs`` share each of ``sums``."""

    def __init__(self, x: Tensor, programs: int = 1, sums: int = 0) -> None:
        batch, channels, self.voxels = x.shape
        self.count = batch * self.voxels
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        columns = min(COLUMNS, triton.next_power_of_2(channels))
        rows = TILE // columns
        tiles, blocks = triton.cdiv(self.voxels, rows), triton.cdiv(channels, columns)
        self.tiles = triton.cdiv(tiles, max(1, programs // batch))  # of one program
        self.parts = triton.cdiv(tiles, self.tiles) * batch
        self.sums, self.each = (self.parts, blocks), (tiles * batch, blocks)
        self.partial = torch.empty(self.parts, sums, channels, dtype=self.wide, device=x.device)
        wide = {"channels": channels, "WIDE": tl.float64 if self.wide == torch.float64 else tl.float32}
        self.shape = wide | {"ROWS": rows, "COLUMNS": columns}
        # sums over programs: few channels a program, so that many programs go through the parts, in few rounds each
        narrow = min(8, columns)
        self.narrow = (triton.cdiv(channels, narrow),)
        self.narrow_shape = wide | {"ROWS": TILE // narrow, "COLUMNS": narrow}
