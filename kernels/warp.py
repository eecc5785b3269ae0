"""warp and its gradients in Triton: one program a block of voxels, all channels in turn. 2-D is 3-D of one slice.

The functions ``warp`` and ``warp_backward`` have the signatures of ``torch.ops.spss_fast.*``: spss_fast/ops/warp.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from spss_fast.kernels.planes import block_of, grid_of
from torch import Tensor

from spss_fast.ops import checks

BLOCK = 256


@triton.jit
def _voxels(voxels, height, width, BLOCK: tl.constexpr):
    """Batch element, flat voxel, its (z, y, x) and the mask of this program."""
    batch, voxel, mask = block_of(voxels, BLOCK)
    x, y, z = voxel % width, voxel // width % height, voxel // (width * height)
    return batch, voxel, z, y, x, mask


@triton.jit
def _last(side, dtype: tl.constexpr):
    return tl.cast(side - 1, dtype)  # not .to(): a side of 1, which 2-D images have, is a constant


@triton.jit
def _index(value, last):
    """Clamped before the conversion: a float outside the integer's range has no defined value, and NaN becomes 0."""
    value = tl.where(value > 0, value, 0.0)
    return tl.where(value < last, value, last).to(tl.int64)


@triton.jit
def _clamp(position, last):
    position = tl.where(position < 0, 0.0, position)
    return tl.where(position > last, last, position)


@triton.jit
def _corner(position, last, stride, BORDER: tl.constexpr):
    """Offsets of the two voxels around a position, their weights (0 outside) and the weights' derivatives."""
    inside = position
    if BORDER:
        inside = _clamp(position, last)
    low = tl.floor(inside)
    high = low + 1
    fraction = inside - low
    if BORDER:
        weight0, weight1 = 1 - fraction, fraction
        slope1 = tl.where((position >= 0) & (position <= last), 1.0, 0.0)
        slope0 = -slope1
    else:
        out0, out1 = (low < 0) | (low > last), (high < 0) | (high > last)
        none = 0 * fraction  # 0, or NaN where there is no position
        weight0, weight1 = tl.where(out0, none, 1 - fraction), tl.where(out1, none, fraction)
        slope0, slope1 = tl.where(out0, 0.0, -1.0), tl.where(out1, 0.0, 1.0)
    return _index(low, last) * stride, _index(high, last) * stride, weight0, weight1, slope0, slope1


@triton.jit
def _nearest(position, last, stride, BORDER: tl.constexpr):
    """Offset of the nearest voxel, halves to even, and whether it is inside."""
    if BORDER:
        position = _clamp(position, last)
    low = tl.floor(position)
    fraction = position - low
    odd = low - 2 * tl.floor(low / 2) == 1
    nearest = tl.where((fraction > 0.5) | ((fraction == 0.5) & odd), low + 1, low)
    nearest = tl.where(fraction == fraction, nearest, position)  # NaN stays NaN
    inside = (nearest >= 0) & (nearest <= last)
    if BORDER:
        inside = inside | (nearest != nearest)
    return _index(nearest, last) * stride, inside


@triton.jit
def _positions(shift, axis_stride, strides_z, strides_y, strides_x, z, y, x, mask, PLANAR: tl.constexpr):
    at = shift + z * strides_z + y * strides_y + x * strides_x
    if PLANAR:
        py = tl.load(at, mask, 0.0)
        px = tl.load(at + axis_stride, mask, 0.0)
        pz = py * 0
    else:
        pz = z + tl.load(at, mask, 0.0)
        py = tl.load(at + axis_stride, mask, 0.0)
        px = tl.load(at + axis_stride + axis_stride, mask, 0.0)  # twice the stride may not fit into 32 bits
    return pz, y + py, x + px


@triton.jit
def _forward(
    image, shift, out, channels, voxels, depth, height, width,
    image_b, image_c, image_z, image_y, image_x, shift_b, shift_c, shift_z, shift_y, shift_x,
    PLANAR: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):
    batch, voxel, z, y, x, mask = _voxels(voxels, height, width, BLOCK)
    pz, py, px = _positions(shift + batch * shift_b, shift_c, shift_z, shift_y, shift_x, z, y, x, mask, PLANAR)
    lz, ly, lx = _last(depth, pz.dtype), _last(height, pz.dtype), _last(width, pz.dtype)
    if NEAREST:
        nz, inside_z = _nearest(pz, lz, image_z, BORDER)
        ny, inside_y = _nearest(py, ly, image_y, BORDER)
        nx, inside_x = _nearest(px, lx, image_x, BORDER)
        inside = mask & inside_x & inside_y
        if not PLANAR:
            inside = inside & inside_z
    else:
        z0, z1, wz0, wz1, _, _ = _corner(pz, lz, image_z, BORDER)
        y0, y1, wy0, wy1, _, _ = _corner(py, ly, image_y, BORDER)
        x0, x1, wx0, wx1, _, _ = _corner(px, lx, image_x, BORDER)
    source = image + batch * image_b
    for c in range(channels):
        if NEAREST:
            value = tl.load(source + nz + ny + nx, inside, 0.0).to(pz.dtype)
        else:
            value = tl.zeros_like(pz)
            for bits in tl.static_range(4 if PLANAR else 8):
                at = (x1 if bits & 1 else x0) + (y1 if bits & 2 else y0) + (z1 if bits & 4 else z0)
                weight = (wx1 if bits & 1 else wx0) * (wy1 if bits & 2 else wy0)
                if not PLANAR:
                    weight = weight * (wz1 if bits & 4 else wz0)
                value += weight * tl.load(source + at, mask, 0.0).to(pz.dtype)
        tl.store(out + (batch * channels + c) * voxels + voxel, value.to(out.dtype.element_ty), mask)
        source += image_c


@triton.jit
def _backward(
    grad, image, shift, image_grad, shift_grad, scale, channels, voxels, depth, height, width,
    image_b, image_c, image_z, image_y, image_x, shift_b, shift_c, shift_z, shift_y, shift_x,
    PLANAR: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, IMAGE: tl.constexpr, SHIFT: tl.constexpr,
    FIXED: tl.constexpr, BLOCK: tl.constexpr,
):
    """``image_grad`` is contiguous: of the accumulation dtype, or int64 in units of ``1 / scale`` if FIXED."""
    batch, voxel, z, y, x, mask = _voxels(voxels, height, width, BLOCK)
    pz, py, px = _positions(shift + batch * shift_b, shift_c, shift_z, shift_y, shift_x, z, y, x, mask, PLANAR)
    lz, ly, lx = _last(depth, pz.dtype), _last(height, pz.dtype), _last(width, pz.dtype)
    if IMAGE:  # in units of voxels, as the gradient is contiguous
        if NEAREST:
            nz, inside_z = _nearest(pz, lz, height * width, BORDER)
            ny, inside_y = _nearest(py, ly, width, BORDER)
            nx, inside_x = _nearest(px, lx, 1, BORDER)
            inside = mask & inside_x & inside_y
            if not PLANAR:
                inside = inside & inside_z
        else:
            cz0, cz1, _, _, _, _ = _corner(pz, lz, height * width, BORDER)
            cy0, cy1, _, _, _, _ = _corner(py, ly, width, BORDER)
            cx0, cx1, _, _, _, _ = _corner(px, lx, 1, BORDER)
    if not NEAREST:
        z0, z1, wz0, wz1, sz0, sz1 = _corner(pz, lz, image_z, BORDER)
        y0, y1, wy0, wy1, sy0, sy1 = _corner(py, ly, image_y, BORDER)
        x0, x1, wx0, wx1, sx0, sx1 = _corner(px, lx, image_x, BORDER)
    gz, gy, gx = tl.zeros_like(pz), tl.zeros_like(pz), tl.zeros_like(pz)
    source = image + batch * image_b
    for c in range(channels):
        upstream = tl.load(grad + (batch * channels + c) * voxels + voxel, mask, 0.0).to(pz.dtype)
        target = image_grad + (batch * channels + c) * voxels
        if NEAREST:
            if IMAGE:
                if FIXED:
                    units = tl.floor(upstream.to(tl.float64) * tl.load(scale) + 0.5).to(tl.int64)
                    tl.atomic_add(target + nz + ny + nx, units, inside, sem="relaxed")
                else:
                    tl.atomic_add(target + nz + ny + nx, upstream, inside, sem="relaxed")
        else:
            for bits in tl.static_range(4 if PLANAR else 8):
                wx, wy = wx1 if bits & 1 else wx0, wy1 if bits & 2 else wy0
                wz = wz1 if bits & 4 else wz0
                if PLANAR:
                    wz = tl.full(wz.shape, 1.0, wz.dtype)
                if IMAGE:
                    to = (cx1 if bits & 1 else cx0) + (cy1 if bits & 2 else cy0) + (cz1 if bits & 4 else cz0)
                    share = upstream * wx * wy * wz
                    if FIXED:
                        units = tl.floor(share.to(tl.float64) * tl.load(scale) + 0.5).to(tl.int64)
                        tl.atomic_add(target + to, units, mask & (share != 0), sem="relaxed")
                    else:
                        tl.atomic_add(target + to, share, mask & (share != 0), sem="relaxed")
                if SHIFT:
                    at = (x1 if bits & 1 else x0) + (y1 if bits & 2 else y0) + (z1 if bits & 4 else z0)
                    value = upstream * tl.load(source + at, mask, 0.0).to(pz.dtype)
                    gz += value * (sz1 if bits & 4 else sz0) * wy * wx
                    gy += value * wz * (sy1 if bits & 2 else sy0) * wx
                    gx += value * wz * wy * (sx1 if bits & 1 else sx0)
        source += image_c
    if SHIFT:
        if PLANAR:
            to = shift_grad + batch * 2 * voxels + voxel
        else:
            to = shift_grad + batch * 3 * voxels + voxel
            tl.store(to, gz, mask)
            to += voxels
        tl.store(to, gy, mask)
        tl.store(to + voxels, gx, mask)


def _geometry(image: Tensor, displacement: Tensor) -> tuple[list[int], bool]:
    """Channels, voxels, sides and strides as the kernels take them, and whether the image is 2-D."""
    wanted = (image.shape[0], image.ndim - 2, *image.shape[2:])
    checks.has_shape("displacement", displacement, wanted, "image", image)
    planar = image.ndim == 4
    sides = [1] * planar + list(image.shape[2:])

    def strides(tensor: Tensor) -> list[int]:
        return [*tensor.stride()[:2], *([0] * planar), *tensor.stride()[2:]]

    voxels = sides[0] * sides[1] * sides[2]
    return [image.shape[1], voxels, *sides, *strides(image), *strides(displacement)], planar


def warp(image: Tensor, displacement: Tensor, mode: str, padding: str) -> Tensor:
    numbers, planar = _geometry(image, displacement)
    out = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    if out.numel():
        _forward[grid_of(len(image), numbers[1], BLOCK)](
            image, displacement, out, *numbers,
            PLANAR=planar, NEAREST=mode == "nearest", BORDER=padding == "border", BLOCK=BLOCK,
        )
    return out


def fixed_point_scale(grad: Tensor, voxels: int) -> Tensor:
    """Units per 1 such that no sum of ``voxels`` gradients leaves 63 bits; float64, on the gradient's device."""
    return 2.0**62 / (grad.detach().abs().amax().double().clamp(min=1e-300) * voxels)


def warp_backward(
    grad: Tensor, image: Tensor, displacement: Tensor, mode: str, padding: str,
    image_grad: bool, displacement_grad: bool,
) -> tuple[Tensor, Tensor]:
    checks.has_shape("grad", grad, image.shape, "image", image)
    numbers, planar = _geometry(image, displacement)
    grad = grad.contiguous()
    fixed = image_grad and torch.are_deterministic_algorithms_enabled()
    for_image = torch.zeros(
        image.shape if image_grad else 0, dtype=torch.int64 if fixed else displacement.dtype, device=image.device
    )
    for_displacement = torch.zeros(
        displacement.shape if displacement_grad else 0, dtype=displacement.dtype, device=image.device
    )
    scale = for_displacement
    if grad.numel():
        if fixed:
            scale = fixed_point_scale(grad, numbers[1])
        _backward[grid_of(len(image), numbers[1], BLOCK)](
            grad, image, displacement, for_image, for_displacement, scale, *numbers,
            PLANAR=planar, NEAREST=mode == "nearest", BORDER=padding == "border",
            IMAGE=image_grad, SHIFT=displacement_grad, FIXED=fixed, BLOCK=BLOCK,
        )
    if fixed and grad.numel():
        for_image = for_image / scale
    return for_image.to(image.dtype), for_displacement
