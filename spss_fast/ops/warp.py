"""Spatial-transformer warp: ``warped(p) = image(p + u(p))``, the displacement u in voxels.

Source: Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015; voxel displacements as in VoxelMorph
(Balakrishnan et al., IEEE TMI 2019). Zero displacement is the identity. With fractions f_i of p + u(p) beyond its lower
voxel l, the bilinear value is ``sum over corners b in {0, 1}^nd of image(l + b) prod_i (f_i if b_i else 1 - f_i)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spss_fast.ops import backends, checks

MODES = ("bilinear", "nearest")
PADDINGS = ("zeros", "border")


def reference(image: Tensor, displacement: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """The definition in plain PyTorch, any device and floating dtype; differentiable in both arguments, repeatedly."""
    spatial = image.shape[2:]
    axes = [torch.arange(side, device=image.device, dtype=displacement.dtype) for side in spatial]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement  # (B, nd, *spatial)
    if padding == "border":  # clamped indices do the rest
        position = torch.stack([position[:, i].clamp(0, side - 1) for i, side in enumerate(spatial)], 1)
    flat = image.flatten(2).to(displacement.dtype)

    def at(corner: list[Tensor], weight: Tensor | None = None) -> Tensor:
        outside = torch.zeros_like(corner[0], dtype=torch.bool)
        index = torch.zeros_like(corner[0], dtype=torch.long)
        for coordinate, side in zip(corner, spatial):
            outside = outside | ~((coordinate >= 0) & (coordinate <= side - 1))  # NaN is outside
            index = index * side + coordinate.nan_to_num(0).clamp(0, side - 1).long()
        values = flat.gather(2, index.flatten(1)[:, None].expand(-1, image.shape[1], -1)).view_as(image)
        if padding == "zeros":  # with "border" only an upper corner of weight 0 is outside: the border's value again
            values = values.masked_fill(outside[:, None], 0)
        return values if weight is None else values * weight[:, None]

    if mode == "nearest":
        return at([position[:, i].round() for i in range(len(spatial))]).to(image.dtype)
    low = position.detach().floor()
    fraction = position - low
    warped = torch.zeros_like(image, dtype=displacement.dtype)
    for bits in range(2 ** len(spatial)):
        corner, weight = [], torch.ones_like(position[:, 0])
        for i in range(len(spatial)):
            upper = bits >> i & 1
            corner.append(low[:, i] + upper)
            weight = weight * (fraction[:, i] if upper else 1 - fraction[:, i])
        warped = warped + at(corner, weight)
    return warped.to(image.dtype)


def _check(image: Tensor, displacement: Tensor, mode: str, padding: str) -> None:
    checks.is_tensor("image", image)
    checks.is_tensor("displacement", displacement)
    if image.ndim not in (4, 5):
        raise ValueError(f"image must be (B, C, H, W) or (B, C, H, W, D), not of shape {tuple(image.shape)}")
    wanted = (image.shape[0], image.ndim - 2, *image.shape[2:])
    checks.has_shape("displacement", displacement, wanted, "image", image)
    _check_settings(mode, padding)


def _check_settings(mode: str, padding: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}")


def warp(image: Tensor, displacement: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """``warped(p) = image(p + u(p))``: 2-D and 3-D, differentiable in both arguments.

    Args:
        image: (B, C, H, W) or (B, C, H, W, D), floating, any strides; finite, as a voxel with NaN or infinity makes NaN
            of its neighbours even where its weight is 0.
        displacement: u, (B, 2, H, W) or (B, 3, H, W, D), in voxels, its channels in the order of the spatial axes;
            any strides. Positions and sums are float32 (float64 for a float64 image), so under autocast a bf16 or fp16
            image goes with a float32 displacement; a displacement of another dtype is converted.
        mode: ``"bilinear"`` (in 3-D: trilinear) or ``"nearest"`` (halves round to even; no displacement gradient).
        padding: what lies outside, ``"zeros"`` or the nearest ``"border"`` voxel. With ``"border"`` the gradient for
            displacements that point outside is 0.

    Returns:
        The warped image, contiguous, of the image's shape and dtype. A NaN displacement gives NaN with ``"bilinear"``.

    On a GPU the image's gradient is summed with atomics, in varying order; under
    ``torch.use_deterministic_algorithms(True)`` it is summed in 64-bit fixed point, in which order does not matter.

    Raises:
        TypeError: an argument is no tensor or of no floating dtype.
        ValueError: a shape, device, mode or padding does not fit; the message names the argument.
    """
    _check(image, displacement, mode, padding)
    displacement = displacement.to(torch.float64 if image.dtype == torch.float64 else torch.float32)
    if backends.use_reference("warp", image):
        return reference(image, displacement, mode, padding)
    return torch.ops.spss_fast.warp(image, displacement, mode, padding)


@torch.library.register_fake("spss_fast::warp")
def _(image: Tensor, displacement: Tensor, mode: str, padding: str) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


@torch.library.register_fake("spss_fast::warp_backward")
def _(grad, image, displacement, mode, padding, image_grad, displacement_grad):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(image, memory_format=contiguous) if image_grad else image.new_empty(0),
        torch.empty_like(displacement, memory_format=contiguous) if displacement_grad else displacement.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    image, displacement, ctx.mode, ctx.padding = inputs
    ctx.save_for_backward(image, displacement)


def _backward(ctx, grad):
    image_grad, displacement_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.mode == "bilinear"
    if not (image_grad or displacement_grad):
        return None, None, None, None
    image, displacement = ctx.saved_tensors
    for_image, for_displacement = torch.ops.spss_fast.warp_backward(
        grad, image, displacement, ctx.mode, ctx.padding, image_grad, displacement_grad
    )
    return for_image if image_grad else None, for_displacement if displacement_grad else None, None, None


def _once(ctx, *grads):
    raise NotImplementedError("warp is differentiable once; second derivatives need spss_fast.ops.backend('reference')")


torch.library.register_autograd("spss_fast::warp", _backward, setup_context=_save)
torch.library.register_autograd("spss_fast::warp_backward", _once)


class SpatialTransformer(nn.Module):
    """VoxelMorph's spatial transformer: ``SpatialTransformer()(moving, displacement)``, any size, nothing to set up.

    Args:
        mode: ``"bilinear"`` or ``"nearest"``.
        padding: ``"zeros"`` or ``"border"``.
    """

    def __init__(self, mode: str = "bilinear", padding: str = "zeros") -> None:
        super().__init__()
        _check_settings(mode, padding)
        self.mode, self.padding = mode, padding

    def forward(self, moving: Tensor, displacement: Tensor) -> Tensor:
        """``moving`` (B, C, *spatial), ``displacement`` (B, nd, *spatial) in voxels; see :func:`warp`."""
        return warp(moving, displacement, self.mode, self.padding)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, padding={self.padding!r}"


def integrate(velocity: Tensor, steps: int = 7) -> Tensor:
    """The displacement of a stationary velocity field's flow at time 1, by scaling and squaring.

    ``u = v / 2^steps``, then ``steps`` times ``u(p) <- u(p) + u(p + u(p))``: Arsigny et al., MICCAI 2006, as in
    VoxelMorph's diffeomorphic networks (Dalca et al., MedIA 2019). ``velocity`` (B, nd, *spatial) in voxels; the result
    has its shape and is float32 (float64 for float64). Displacements outside the volume are those of its border.
    Differentiable.

    Raises:
        TypeError: ``velocity`` is no floating tensor, or ``steps`` no integer.
        ValueError: ``velocity`` is of another shape, or ``steps`` < 0.
    """
    checks.is_tensor("velocity", velocity)
    if velocity.ndim not in (4, 5) or velocity.shape[1] != velocity.ndim - 2:
        raise ValueError(f"velocity must be (B, 2, H, W) or (B, 3, H, W, D), not of shape {tuple(velocity.shape)}")
    checks.is_count("steps", steps, 0)
    displacement = velocity.to(torch.float64 if velocity.dtype == torch.float64 else torch.float32) / 2**steps
    for _ in range(steps):
        displacement = displacement + warp(displacement, displacement, padding="border")
    return displacement
