"""Bias, sum and leaky ReLU in Triton: one pass over memory forward, and one backward with the bias's sums in it.

The functions have the signatures of ``torch.ops.spss_fast.*``: spss_fast/ops/activation.py. Sums over programs are
float64, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import Launch, at, chunk_of, merge, tile_of
from torch import Tensor

from spss_fast.ops import checks
from spss_fast.ops.activation import check_slope
from spss_fast.ops.norm import dense

PROGRAMS = 640  # that share a sum, as norm's backward has; others were not measured


@triton.jit
def _forward(
    x, bias, added, y, voxels, x_b, x_c, x_v: tl.constexpr, added_b, added_c, added_v: tl.constexpr, y_b, y_c,
    y_v: tl.constexpr, channels: tl.constexpr, slope: tl.constexpr, WITH_ADDED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    batch, tile = chunk_of(voxels, 1, ROWS)
    row, c, inside = tile_of(tile, voxels, channels, ROWS, COLUMNS)
    z = tl.load(x + at(batch, row, c, x_b, x_c, x_v), inside, 0.0).to(WIDE)
    z += tl.load(bias + c, c < channels, 0.0).to(WIDE)[None, :]
    if WITH_ADDED:
        z += tl.load(added + at(batch, row, c, added_b, added_c, added_v), inside, 0.0).to(WIDE)
    z = tl.where(z > 0, z, slope * z)  # NaN stays NaN
    tl.store(y + at(batch, row, c, y_b, y_c, y_v), z.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tiles"])
def _backward(
    grad, y, dx, partial, voxels, tiles, grad_b, grad_c, grad_v: tl.constexpr, y_b, y_c, y_v: tl.constexpr, dx_b, dx_c,
    dx_v: tl.constexpr, channels: tl.constexpr, slope: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx, and each program's sums of it."""
    batch, chunk = chunk_of(voxels, tiles, ROWS)
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for tile in range(tiles):
        row, c, inside = tile_of(chunk * tiles + tile, voxels, channels, ROWS, COLUMNS)
        value = tl.load(y + at(batch, row, c, y_b, y_c, y_v), inside, 0.0).to(WIDE)
        g = tl.load(grad + at(batch, row, c, grad_b, grad_c, grad_v), inside, 0.0).to(WIDE)
        g = tl.where(value > 0, g, slope * g)
        total += g
        tl.store(dx + at(batch, row, c, dx_b, dx_c, dx_v), g.to(dx.dtype.element_ty), inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * channels + c, tl.sum(total, 0), c < channels)


@triton.jit(do_not_specialize=["parts"])
def _bias_gradient(
    partial, dbias, parts, channels: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        place = partial + part.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.load(place, (part < parts)[:, None] & (c < channels)[None, :], 0.0).to(tl.float64)
    total = tl.sum(total, 0).to(WIDE)  # half types are rounded from float32, not from float64
    tl.store(dbias + c, total.to(dbias.dtype.element_ty), c < channels)


def bias_leaky_relu(x: Tensor, bias: Tensor, added: Tensor | None, slope: float) -> Tensor:
    checks.has_channels("x", x)
    checks.has_shape("bias", bias, (x.shape[1],), "x", x)
    if added is not None:
        checks.has_shape("added", added, x.shape, "x", x)
    check_slope(slope)
    x = dense(x)
    y = torch.empty_like(x)
    if not x.numel():
        return y
    source, target = merge(x), merge(y)
    other = source if added is None else merge(added)
    run = Launch(source)
    _forward[run.each](
        source, bias.contiguous(), other, target, run.voxels, *source.stride(), *other.stride(), *target.stride(),
        slope=slope, WITH_ADDED=added is not None, **run.shape,
    )
    return y


def bias_leaky_relu_backward(grad: Tensor, y: Tensor, bias: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    checks.has_channels("y", y)
    checks.has_shape("grad", grad, y.shape, "y", y)
    checks.has_shape("bias", bias, (y.shape[1],), "y", y)
    check_slope(slope)
    dx, dbias = torch.empty_like(dense(y)), torch.empty_like(bias, memory_format=torch.contiguous_format)
    if not y.numel():
        return dx, dbias.zero_()
    upstream, values, target = merge(grad), merge(y), merge(dx)
    run = Launch(values, PROGRAMS, 1)
    _backward[run.sums](
        upstream, values, target, run.partial, run.voxels, run.tiles, *upstream.stride(), *values.stride(),
        *target.stride(), slope=slope, **run.shape,
    )
    _bias_gradient[run.narrow](run.partial, dbias, run.parts, **run.narrow_shape)
    return dx, dbias
