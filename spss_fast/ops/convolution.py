"""The V-Net's 3 x 3 x 3 convolution on a CPU: ``F.conv3d(x, weight, padding=1)``.

Minimal filtering takes 64 products a pair of channels for eight outputs, where a direct convolution takes 216. In
float32 its sums are as exact; in bfloat16 it multiplies rounded sums of values and of weights. Source: Lavin &
Gray, "Fast algorithms for convolutional neural networks", CVPR 2016, in three dimensions: F(2 x 2 x 2, 3 x 3 x 3).
"""

from __future__ import annotations

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
    return F.conv3d(x, weight.to(x.dtype), padding=1)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv3d(x, weight, padding=1)``, differentiable in both.

    Args:
        x: (B, C, H, W, D) float32 or bfloat16 with C of 8, 16, 32, 64 or 128; read in place if channels last.
        weight: (C, C, 3, 3, 3) float32.

    Returns:
        (B, C, H, W, D) of x's dtype, by the C++ operator channels last, whatever autocast says. Deterministic for a
        number of threads. The gradient is once differentiable.

        bfloat16 maps go through the C++ operator on CPUs with AVX512-BF16. It errs by 5e-3 of the result's norm, twice
        as much as what bfloat16 itself rounds; its gradient of the weight is float32.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    checks.is_tensor("x", x, *DTYPES)
    checks.is_tensor("weight", weight, torch.float32)
    if x.ndim != 5 or x.shape[1] not in CHANNELS:
        raise ValueError(f"x must be (B, C, H, W, D) with C of {CHANNELS}, not of shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have voxels, not be of shape {tuple(x.shape)}")
    checks.has_shape("weight", weight, (x.shape[1], x.shape[1], 3, 3, 3), "x", x)
    if backends.use_reference("convolution", x) or (x.dtype == torch.bfloat16 and not MULTIPLIES_BF16):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, weight)
    return torch.ops.spss_fast.convolve(x, weight)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` gives what ``F.conv3d`` would, in the dtype that autocast asks for, and was measured to
    be faster.

    That is so of float32 on CPUs with AVX2 only, and of float32 and bfloat16 on those with AVX512-BF16 but without AMX,
    whose matrix units are beyond it; others were not measured. And there must be so many tiles of eight outputs that
    the transforms of data outweigh that of the filter.
    """
    if x.device.type != "cpu" or x.dtype not in DTYPES or weight.dtype != torch.float32:
        return False
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    channels = x.shape[1]
    if x.dtype != wanted or channels not in CHANNELS or weight.shape != (channels, channels, 3, 3, 3):
        return False
    measured, least = MULTIPLIES_BF16 and not HAS_AMX, 3 * channels
    if x.dtype == torch.float32:
        measured, least = measured or torch.backends.cpu.get_cpu_capability() == "AVX2", 2 * channels
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) * ((x.shape[4] + 1) // 2)
    return measured and tiles >= least and backends.active("convolution", "cpu") == "cpu"


@torch.library.register_fake("spss_fast::convolve")
def _fake(x, weight):
    return torch.empty_like(x, memory_format=torch.channels_last_3d)


@torch.library.register_fake("spss_fast::convolve_backward")
def _fake_backward(grad, x, weight, x_grad, weight_grad):
    dx = torch.empty_like(x, memory_format=torch.channels_last_3d) if x_grad else x.new_empty(0)
    return dx, torch.empty_like(weight) if weight_grad else weight.new_empty(0)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor):
    needed = ctx.needs_input_grad
    gradients = torch.ops.spss_fast.convolve_backward(grad, *ctx.saved_tensors, *needed)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed))


def _once(ctx, *grads):
    raise NotImplementedError(
        "convolve is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::convolve", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::convolve_backward", _once)
