"""The networks' convolutions on a CPU: ``F.conv3d(x, weight, padding=1)`` of 3 x 3 x 3 voxels, ``F.conv2d`` of 3 x 3
pixels, and upwards ``F.conv_transpose3d(x, weight, stride=2)`` of 2 x 2 x 2, which is also what convolutions downwards
send back.

For the former two minimal filtering takes 64 products a pair of channels for eight outputs, or 16 for four, where a
direct convolution takes 216 or 36. In float32 its sums are as exact; in bfloat16 it multiplies rounded sums of values
and of weights. Source: Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016: F(2 x 2, 3 x 3),
and in three dimensions F(2 x 2 x 2, 3 x 3 x 3). A single channel, which would gain nothing by it, is convolved
directly. The transposed convolution is four matrix products a row of voxels, each of which writes a row of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks

CHANNELS = 8, 16, 32, 64, 128
DTYPES = torch.float32, torch.bfloat16
MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported()  # which the C++ operator needs for bfloat16
HAS_AMX = torch.cpu._is_amx_tile_supported()


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition of :func:`convolve` with torch's own operator."""
    convolution = F.conv3d if x.ndim == 5 else F.conv2d
    return convolution(x, weight.to(x.dtype), padding=1)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv3d(x, weight, padding=1)``, or of slices ``F.conv2d``, differentiable in both.

    Args:
        x: (B, C, H, W, D) float32 or bfloat16 with C of 8, 16, 32, 64 or 128, read in place if channels last; or with C
            of 1; or slices (B, C, H, W) with C of 16, 32, 64 or 128.
        weight: (C, C, 3, 3, 3) float32; of one channel (O, 1, 3, 3, 3) with O a multiple of 8; of slices (C, C, 3, 3).

    Returns:
        (B, C or O, H, W, D) or (B, C, H, W) of x's dtype, by the C++ operator channels last, whatever autocast says.
        Deterministic for a number of threads. The gradient, of one channel torch's own, is once differentiable.

        bfloat16 maps go through the C++ operator on CPUs with AVX512-BF16. It errs by 5e-3 of the result's norm, twice
        as much as what bfloat16 itself rounds, of one channel no more than that; its gradient of the weight is float32.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    _check(x, weight)
    if use_reference(x):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, weight)
    return torch.ops.spss_fast.convolve(x, weight)


def _check(x: Tensor, weight: Tensor) -> None:
    checks.is_tensor("x", x, *DTYPES)
    checks.is_tensor("weight", weight, torch.float32)
    if x.ndim not in (4, 5) or x.shape[1] not in (CHANNELS[1:] if x.ndim == 4 else (1, *CHANNELS)):
        raise ValueError(f"x must be (B, C, H, W, D) with C of {(1, *CHANNELS)}, or (B, C, H, W) with C of "
                         f"{CHANNELS[1:]}, not of shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have voxels, not be of shape {tuple(x.shape)}")
    outputs = weight.shape[0] if x.shape[1] == 1 and weight.ndim == 5 else x.shape[1]
    if outputs == 0 or outputs % 8:
        raise ValueError(f"weight must be (O, 1, 3, 3, 3) with O a multiple of 8, not of shape {tuple(weight.shape)}")
    checks.has_shape("weight", weight, (outputs, x.shape[1], *[3] * (x.ndim - 2)), "x", x)


def use_reference(x: Tensor) -> bool:
    """Whether a convolution of ``x`` goes by its reference now: by choice, or for want of AVX512-BF16."""
    return backends.use_reference("convolution", x) or (x.dtype == torch.bfloat16 and not MULTIPLIES_BF16)


def reference_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """The definition of :func:`convolve_transposed` with torch's own operator."""
    return F.conv_transpose3d(x, weight.to(x.dtype), stride=2)


def convolve_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv_transpose3d(x, weight, stride=2)``, differentiable in both.

    Args:
        x: (B, I, H, W, D) float32 or bfloat16, I even; read in place if channels last.
        weight: (I, O, 2, 2, 2) float32, O a multiple of 8.

    Returns:
        (B, O, 2 H, 2 W, 2 D) of x's dtype, by the C++ operator channels last, whatever autocast says; its sums are
        float32. Deterministic; the gradients are torch's. bfloat16 maps go through the C++ operator on CPUs with
        AVX512-BF16.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    _check_transposed(x, weight)
    if use_reference(x):
        with torch.autocast(x.device.type, enabled=False):
            return reference_transposed(x, weight)
    return torch.ops.spss_fast.convolve_transposed(x, weight)


def _check_transposed(x: Tensor, weight: Tensor) -> None:
    checks.is_tensor("x", x, *DTYPES)
    checks.is_tensor("weight", weight, torch.float32)
    if x.ndim != 5 or 0 in x.shape[1:] or x.shape[1] % 2:
        raise ValueError(f"x must be (B, I, H, W, D) with voxels and an even I, not of shape {tuple(x.shape)}")
    outputs = weight.shape[1] if weight.ndim == 5 else 0
    if outputs == 0 or outputs % 8:
        raise ValueError(f"weight must be (I, O, 2, 2, 2) with O a multiple of 8, not of shape {tuple(weight.shape)}")
    checks.has_shape("weight", weight, (x.shape[1], outputs, 2, 2, 2), "x", x)


def convolve_moments(x: Tensor, weight: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`convolve`, or :func:`convolve_transposed`, and the mean and biased variance of each of its channels, (O,)
    float32: batch norm by them reads the maps once less. x must be bfloat16; not differentiable.

    The C++ operator takes them of its float32 sums, as they are rounded to the maps; the reference of the maps.

    Raises:
        TypeError, ValueError: as theirs.
    """
    checks.is_tensor("x", x, torch.bfloat16)
    (_check_transposed if transposed else _check)(x, weight)
    if not use_reference(x):
        return torch.ops.spss_fast.convolve_moments(x, weight, transposed)
    with torch.no_grad():
        y = (convolve_transposed if transposed else convolve)(x, weight)
        variance, mean = torch.var_mean(y.float(), [0, *range(2, y.ndim)], correction=0)
    return y, mean, variance


class _Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight.to(x.dtype), stride=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        _, dweight = _backward_of_stride_two(grad, x, weight, False, [False, of_weight])
        return convolve_transposed(grad, weight) if of_x else None, dweight


def halve(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv3d(x, weight, stride=2)`` in x's dtype, of x (B, I, H, W, D) with even sides and I a multiple of 8, by a
    float32 weight (O, I, 2, 2, 2) with O even; once differentiable, in x by :func:`convolve_transposed`."""
    return _Halving.apply(x, weight)


def was_measured() -> bool:
    """Whether this CPU is of the kind that most of this was measured on: with AVX512-BF16 but without AMX."""
    return MULTIPLIES_BF16 and not HAS_AMX


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` gives what ``F.conv3d`` would, in the dtype that autocast asks for, and was measured to
    be faster.

    That is so of float32 on CPUs with AVX2 only, and of float32 and bfloat16 on those with AVX512-BF16 but without AMX,
    whose matrix units are beyond it; others were not measured. And there must be so many tiles of eight outputs that
    the transforms of data outweigh that of the filter. One channel is convolved faster to 8 or 16 on CPUs with
    AVX512-BF16 but without AMX, where no gradients are wanted.
    """
    channels, measured = x.shape[1], was_measured()
    if not _takes(x, weight):
        return False
    if weight.shape in ((8, 1, 3, 3, 3), (16, 1, 3, 3, 3)) and channels == 1:
        return measured and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    if channels not in CHANNELS or weight.shape != (channels, channels, 3, 3, 3):
        return False
    least = 3 * channels
    if x.dtype == torch.float32:
        measured, least = measured or torch.backends.cpu.get_cpu_capability() == "AVX2", 2 * channels
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) * ((x.shape[4] + 1) // 2)
    return measured and tiles >= least


def is_faster_on_slices(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` takes such slices ``x`` and was measured to be faster than ``F.conv2d`` by more than a
    call of it from Python costs: of 16 and 32 channels and a thousand tiles of four outputs, on CPUs with AVX512-BF16
    but without AMX; others were not measured."""
    fits = x.device.type == "cpu" and x.dtype in DTYPES and weight.shape in ((16, 16, 3, 3), (32, 32, 3, 3))
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    return fits and tiles >= 1000 and was_measured() and backends.active("convolution", "cpu") == "cpu"


def is_faster_transposed(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve_transposed` gives what ``F.conv_transpose3d`` would, in the dtype that autocast asks for,
    and was measured to be faster: up to 32 channels, on CPUs with AVX512-BF16 but without AMX; others were not
    measured."""
    return _takes(x, weight) and _is_measured_upwards(weight)


def is_faster_halving(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`halve` gives what ``F.conv3d`` of stride 2 would, in the dtype that autocast asks for, and has a
    gradient that was measured to be faster: where :func:`convolve_transposed` is."""
    wanted = torch.is_grad_enabled() and x.requires_grad and not any(side % 2 for side in x.shape[2:])
    return wanted and _takes(x, weight) and _is_measured_upwards(weight)


def _is_measured_upwards(weight: Tensor) -> bool:
    fits = weight.shape[1:] in [(outputs, 2, 2, 2) for outputs in (8, 16, 32)] and weight.shape[0] % 2 == 0
    return fits and was_measured()


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the C++ operators run on such tensors, in the dtype that autocast asks for."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or weight.dtype != torch.float32:
        return False
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return x.dtype == wanted and backends.active("convolution", "cpu") == "cpu"


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


@torch.library.register_fake("spss_fast::convolve")
def _fake(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:]).contiguous(memory_format=_channels_last(x))


@torch.library.register_fake("spss_fast::convolve_backward")
def _fake_backward(grad, x, weight, x_grad, weight_grad):
    dx = torch.empty_like(x, memory_format=_channels_last(x)) if x_grad else x.new_empty(0)
    return dx, empty_weight(weight) if weight_grad else weight.new_empty(0)


def empty_weight(weight: Tensor) -> Tensor:
    """What kernels write the gradient of ``weight`` to: like it if contiguous or channels last, else contiguous."""
    last = weight.is_contiguous(memory_format=_channels_last(weight)) and not weight.is_contiguous()
    return torch.empty_like(weight, memory_format=_channels_last(weight) if last else torch.contiguous_format)


@torch.library.register_fake("spss_fast::convolve_transposed")
def _fake_transposed(x, weight):
    shape = x.shape[0], weight.shape[1], *(2 * side for side in x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last_3d)


@torch.library.register_fake("spss_fast::convolve_moments")
def _fake_moments(x, weight, transposed):
    y = (_fake_transposed if transposed else _fake)(x, weight)
    return y, *(weight.new_empty(y.shape[1]) for _ in range(2))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor):
    needed = ctx.needs_input_grad
    gradients = torch.ops.spss_fast.convolve_backward(grad, *ctx.saved_tensors, *needed)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed))


def _no_gradient(ctx, *grads):
    raise NotImplementedError("convolve_moments is not differentiable; convolve and convolve_transposed are")


def _gradient_transposed(ctx, grad: Tensor):
    return _backward_of_stride_two(grad, *ctx.saved_tensors, True, ctx.needs_input_grad)


def _backward_of_stride_two(
    grad: Tensor, x: Tensor, weight: Tensor, transposed: bool, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's gradients of x and of the weight, in their own dtypes; None where not ``needed``."""
    twos, zeros, ones = [2] * 3, [0] * 3, [1] * 3
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, twos, zeros, ones, transposed, zeros, 1, [*needed, False]
    )
    return dx, None if dweight is None else dweight.float()


def _once(ctx, *grads):
    raise NotImplementedError(
        "convolve is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::convolve", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::convolve_backward", _once)
torch.library.register_autograd("spss_fast::convolve_transposed", _gradient_transposed, setup_context=_save)
torch.library.register_autograd("spss_fast::convolve_moments", _no_gradient)
