"""A level of the registration net's decoder: maps of half the sides and a skip connection through one convolution.

    y = leaky_relu(conv2d([upsampled(x), skip], weight) + bias)

Source: Balakrishnan et al., "VoxelMorph", IEEE TMI 2019. Upsampled by nearest neighbours, the taps of an output meet
two pixels of x along each axis; by x and its differences between neighbours, nine products a pair of channels make the
four outputs of a pixel, not 36, and neither the upsampled map nor the concatenation is made. In float32 that is as
exact; in bfloat16 the differences are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks, convolution
from spss_fast.ops.activation import check_slope


def reference(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, slope: float = 0.2) -> Tensor:
    """The definition of :func:`convolve_upsampled` with torch's own operators."""
    both = torch.cat([F.interpolate(x, scale_factor=2), skip], 1)
    return F.leaky_relu(F.conv2d(both, weight.to(x.dtype), bias.to(x.dtype), padding=1), slope)


def convolve_upsampled(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, slope: float = 0.2) -> Tensor:
    """``leaky_relu(F.conv2d(cat([upsampled x, skip]), weight, bias, padding=1), slope)``, differentiable in all four.

    Args:
        x: (B, I, H, W) float32 or bfloat16, I a multiple of 16, upsampled by nearest neighbours; read in place if
            channels last.
        skip: (B, S, 2 H, 2 W) of x's dtype, S even; likewise.
        weight: (O, I + S, 3, 3) float32, O a multiple of 16.
        bias: (O,) float32.
        slope: of the line below zero, at least 0.

    Returns:
        (B, O, 2 H, 2 W) of x's dtype, by the C++ operator channels last, whatever autocast says. Its sums are float32;
        of the weight's gradient the skip connection's share is torch's, in x's dtype, unless S is O and a power of two
        up to 128. Deterministic for a number of threads, and once differentiable. bfloat16 maps go through the C++
        operator on CPUs with AVX512-BF16.

    Raises:
        TypeError: an argument is no tensor or number, or of another dtype.
        ValueError: a shape or device does not fit, or slope is negative or not finite.
    """
    checks.is_tensor("x", x, *convolution.DTYPES)
    checks.is_tensor("skip", skip, x.dtype)
    checks.is_tensor("weight", weight, torch.float32)
    checks.is_tensor("bias", bias, torch.float32)
    check_slope(slope)
    for name, maps, multiple in (("x", x, 16), ("skip", skip, 2)):
        if maps.ndim != 4 or 0 in maps.shape[1:] or maps.shape[1] % multiple:
            raise ValueError(f"{name} must be (B, C, H, W) with pixels, C a multiple of {multiple}, not of shape "
                             f"{tuple(maps.shape)}")
    checks.has_shape("skip", skip, (x.shape[0], skip.shape[1], 2 * x.shape[2], 2 * x.shape[3]), "x", x)
    outputs = weight.shape[0] if weight.ndim == 4 else 0
    if outputs == 0 or outputs % 16:
        raise ValueError(f"weight must be (O, I + S, 3, 3) with O a multiple of 16, not of shape {tuple(weight.shape)}")
    checks.has_shape("weight", weight, (outputs, x.shape[1] + skip.shape[1], 3, 3), "x", x)
    checks.has_shape("bias", bias, (outputs,), "x", x)
    if convolution.use_reference(x):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, skip, weight, bias, slope)
    return torch.ops.spss_fast.convolve_upsampled(x, skip, weight, bias, slope)


def is_faster(x: Tensor, skip: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve_upsampled` takes such maps and was measured to be faster than torch's own operators: on
    CPUs with AVX512-BF16 but without AMX, of bfloat16 maps, or float32 ones with 16 outputs (with 32 it is as fast);
    other CPUs were not measured."""
    doubled = tuple(skip.shape[2:]) == tuple(2 * side for side in x.shape[2:])
    both = weight.shape[1] == x.shape[1] + skip.shape[1]  # and no further channels, as GPUs have
    fits = doubled and both and not (x.shape[1] % 16 or skip.shape[1] % 2 or weight.shape[0] % 16)
    known = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and weight.shape[0] == 16)
    measured = x.device.type == "cpu" and known and convolution.was_measured()
    return fits and measured and backends.active("convolution", "cpu") == "cpu"


@torch.library.register_fake("spss_fast::convolve_upsampled")
def _fake(x, skip, weight, bias, slope):
    return x.new_empty(x.shape[0], weight.shape[0], *skip.shape[2:]).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("spss_fast::convolve_upsampled_backward")
def _fake_backward(grad, y, x, skip, weight, slope, skip_grad):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dskip = torch.empty_like(skip, memory_format=torch.channels_last) if skip_grad else skip.new_empty(0)
    return dx, dskip, convolution.empty_weight(weight), weight.new_empty(len(weight))


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.slope = inputs
    ctx.save_for_backward(output, *tensors)


def _gradient(ctx, grad: Tensor):
    with_skip = ctx.needs_input_grad[1]
    dx, dskip, dweight, dbias = torch.ops.spss_fast.convolve_upsampled_backward(
        grad, *ctx.saved_tensors, ctx.slope, with_skip
    )
    return dx, dskip if with_skip else None, dweight, dbias, None


def _once(ctx, *grads):
    raise NotImplementedError(
        "convolve_upsampled is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::convolve_upsampled", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::convolve_upsampled_backward", _once)
