"""Batch norm, ReLU and a skip connection's addition in Triton: two passes over memory forward, and two backward.

The functions have the signatures of ``torch.ops.spss_fast.*``: spss_fast/ops/norm.py. A program adds its tiles up
place by place in the compute type, about a mean of a few of the channel's own values so that no digits cancel; sums
over programs are float64, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import Launch, at, chunk_of, merge, tile_of
from torch import Tensor

from spss_fast.ops import checks
from spss_fast.ops.norm import dense

PROGRAMS = 1024, 640  # that share a sum, forward and backward: what an H100 holds at once


@triton.jit
def _normalised(value, c, channels, weight, bias, mean, variance, eps: tl.constexpr):
    """(x - mean), weight / deviation, and weight (x - mean) / deviation + bias."""
    has = c < channels
    scale = tl.load(weight + c, has, 0.0) / tl.sqrt(tl.load(variance + c, has, 1.0) + eps)
    about_mean = value - tl.load(mean + c, has, 0.0)[None, :]
    return about_mean, scale[None, :], about_mean * scale[None, :] + tl.load(bias + c, has, 0.0)[None, :]


@triton.jit
def _store_sums(partial, first, second, c, channels):
    out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(first, 0), c < channels)
    tl.store(out + channels, tl.sum(second, 0), c < channels)


@triton.jit
def _add_up(partial, parts, c, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.zeros([ROWS, COLUMNS], tl.float64)
    second = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        inside = (part < parts)[:, None] & (c < channels)[None, :]
        place = partial + part.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        first += tl.load(place, inside, 0.0).to(tl.float64)
        second += tl.load(place + channels, inside, 0.0).to(tl.float64)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _center(x, c, voxels, x_c, x_v: tl.constexpr, channels: tl.constexpr, WIDE: tl.constexpr):
    """The mean of a few of each channel's values: one alone may be far off all others."""
    row = (2 * tl.arange(0, 16) + 1).to(tl.int64) * voxels // 32
    few = tl.load(x + at(0, row, c, 0, x_c, x_v), (c < channels)[None, :], 0.0).to(WIDE)
    return tl.sum(few, 0) / 16


@triton.jit(do_not_specialize=["tiles"])
def _moments(
    x, partial, voxels, tiles, x_b, x_c, x_v: tl.constexpr, channels: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Sums of x and of its square, about ``_center``."""
    batch, chunk = chunk_of(voxels, tiles, ROWS)
    first = tl.zeros([ROWS, COLUMNS], WIDE)
    second = tl.zeros([ROWS, COLUMNS], WIDE)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    center = _center(x, c, voxels, x_c, x_v, channels, WIDE)
    for tile in range(tiles):
        row, c, inside = tile_of(chunk * tiles + tile, voxels, channels, ROWS, COLUMNS)
        value = tl.load(x + at(batch, row, c, x_b, x_c, x_v), inside, 0.0).to(WIDE)
        d = tl.where(inside, value - center[None, :], 0.0)
        first += d
        second += d * d
    _store_sums(partial, first, second, c, channels)


@triton.jit(do_not_specialize=["parts", "count", "voxels"])
def _statistics(
    x, partial, mean, variance, parts, count, voxels, x_c, x_v: tl.constexpr, channels: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first, second = _add_up(partial, parts, c, channels, ROWS, COLUMNS)
    center = _center(x, c, voxels, x_c, x_v, channels, WIDE)
    shift = first / tl.cast(count, tl.float64)
    spread = second / tl.cast(count, tl.float64) - shift * shift
    tl.store(mean + c, (center.to(tl.float64) + shift).to(WIDE), c < channels)
    tl.store(variance + c, tl.where(spread < 0, 0.0, spread).to(WIDE), c < channels)


@triton.jit
def _apply(
    x, skip, y, weight, bias, mean, variance, voxels, x_b, x_c, x_v: tl.constexpr, skip_b, skip_c,
    skip_v: tl.constexpr, y_b, y_c, y_v: tl.constexpr, channels: tl.constexpr, eps: tl.constexpr,
    WITH_SKIP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    batch, tile = chunk_of(voxels, 1, ROWS)
    row, c, inside = tile_of(tile, voxels, channels, ROWS, COLUMNS)
    value = tl.load(x + at(batch, row, c, x_b, x_c, x_v), inside, 0.0).to(WIDE)
    _, _, z = _normalised(value, c, channels, weight, bias, mean, variance, eps)
    z = tl.where(z < 0, 0.0, z)  # NaN stays NaN
    if WITH_SKIP:
        z += tl.load(skip + at(batch, row, c, skip_b, skip_c, skip_v), inside, 0.0).to(WIDE)
    tl.store(y + at(batch, row, c, y_b, y_c, y_v), z.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tiles"])
def _add_gradients(
    grad, x, partial, weight, bias, mean, variance, voxels, tiles, grad_b, grad_c, grad_v: tl.constexpr, x_b, x_c,
    x_v: tl.constexpr, channels: tl.constexpr, eps: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of the gradient behind the ReLU, and of its product with x about the mean."""
    batch, chunk = chunk_of(voxels, tiles, ROWS)
    first = tl.zeros([ROWS, COLUMNS], WIDE)
    second = tl.zeros([ROWS, COLUMNS], WIDE)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for tile in range(tiles):
        row, c, inside = tile_of(chunk * tiles + tile, voxels, channels, ROWS, COLUMNS)
        value = tl.load(x + at(batch, row, c, x_b, x_c, x_v), inside, 0.0).to(WIDE)
        about_mean, _, z = _normalised(value, c, channels, weight, bias, mean, variance, eps)
        g = tl.load(grad + at(batch, row, c, grad_b, grad_c, grad_v), inside, 0.0).to(WIDE)
        g = tl.where(inside & (z > 0), g, 0.0)
        first += g
        second += tl.where(inside, g * about_mean, 0.0)
    _store_sums(partial, first, second, c, channels)


@triton.jit(do_not_specialize=["parts", "count"])
def _gradients(
    partial, variance, dweight, dbias, slopes, parts, count, channels: tl.constexpr, eps: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Gradients of weight and bias, and what the batch's statistics take from x's: a and b of ``_input_gradient``."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    has = c < channels
    first, second = _add_up(partial, parts, c, channels, ROWS, COLUMNS)
    squared = tl.load(variance + c, has, 1.0).to(tl.float64) + eps
    tl.store(dbias + c, first.to(WIDE), has)
    tl.store(dweight + c, (second / tl.sqrt(squared)).to(WIDE), has)
    if BATCH_STATISTICS:
        count = tl.cast(count, tl.float64)
        tl.store(slopes + c, (first / count).to(WIDE), has)
        tl.store(slopes + channels + c, (second / squared / count).to(WIDE), has)


@triton.jit
def _input_gradient(
    grad, x, dx, weight, bias, mean, variance, slopes, voxels, grad_b, grad_c, grad_v: tl.constexpr, x_b, x_c,
    x_v: tl.constexpr, dx_b, dx_c, dx_v: tl.constexpr, channels: tl.constexpr, eps: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """dx = scale (g - a - b (x - mean))."""
    batch, tile = chunk_of(voxels, 1, ROWS)
    row, c, inside = tile_of(tile, voxels, channels, ROWS, COLUMNS)
    value = tl.load(x + at(batch, row, c, x_b, x_c, x_v), inside, 0.0).to(WIDE)
    about_mean, scale, z = _normalised(value, c, channels, weight, bias, mean, variance, eps)
    g = tl.load(grad + at(batch, row, c, grad_b, grad_c, grad_v), inside, 0.0).to(WIDE)
    g = tl.where(z > 0, g, 0.0)
    if BATCH_STATISTICS:
        a = tl.load(slopes + c, c < channels, 0.0)
        b = tl.load(slopes + channels + c, c < channels, 0.0)
        g -= a[None, :] + b[None, :] * about_mean
    tl.store(dx + at(batch, row, c, dx_b, dx_c, dx_v), (scale * g).to(dx.dtype.element_ty), inside)


def _check(x, weight, bias, **others: Tensor | None) -> None:
    checks.has_channels("x", x)
    for name, value in {"weight": weight, "bias": bias, **others}.items():
        if value is not None:
            shape = x.shape if name in ("skip", "grad") else (x.shape[1],)
            checks.has_shape(name, value, shape, "x", x)


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, skip=skip, mean=mean, variance=variance)
    x = dense(x)
    y = torch.empty_like(x)
    source, target = merge(x), merge(y)
    if not x.numel():
        empty = torch.zeros_like(weight)
        return y, empty if mean is None else mean.clone(), empty.clone() if variance is None else variance.clone()
    run = Launch(source, PROGRAMS[0], 2)
    if mean is None:
        mean, variance = (torch.empty(x.shape[1], dtype=run.wide, device=x.device) for _ in range(2))
        _moments[run.sums](source, run.partial, run.voxels, run.tiles, *source.stride(), **run.shape)
        _statistics[run.narrow](
            source, run.partial, mean, variance, run.parts, run.count, run.voxels, *source.stride()[1:],
            **run.narrow_shape,
        )
    else:
        mean, variance = mean.contiguous().clone(), variance.contiguous().clone()
    added = source if skip is None else merge(skip)
    _apply[run.each](
        source, added, target, weight.contiguous(), bias.contiguous(), mean, variance, run.voxels,
        *source.stride(), *added.stride(), *target.stride(), eps=eps, WITH_SKIP=skip is not None, **run.shape,
    )
    return y, mean, variance


def batch_norm_relu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, grad=grad, mean=mean, variance=variance)
    x = dense(x)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    source, upstream, target = merge(x), merge(grad), merge(dx)
    run = Launch(source, PROGRAMS[1], 2)
    weight, bias, mean, variance = (t.contiguous() for t in (weight, bias, mean, variance))
    _add_gradients[run.sums](
        upstream, source, run.partial, weight, bias, mean, variance, run.voxels, run.tiles,
        *upstream.stride(), *source.stride(), eps=eps, **run.shape,
    )
    slopes = torch.empty(2, x.shape[1], dtype=run.wide, device=x.device)
    _gradients[run.narrow](
        run.partial, variance, dweight, dbias, slopes, run.parts, run.count, eps=eps,
        BATCH_STATISTICS=batch_statistics, **run.narrow_shape,
    )
    _input_gradient[run.each](
        upstream, source, target, weight, bias, mean, variance, slopes, run.voxels,
        *upstream.stride(), *source.stride(), *target.stride(), eps=eps, BATCH_STATISTICS=batch_statistics, **run.shape,
    )
    return dx, dweight, dbias
