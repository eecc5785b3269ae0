"""The V-Net's 3 x 3 x 3 convolution in float32 on a CPU: ``F.conv3d(x, weight, padding=1)``.

Minimal filtering takes 64 products a pair of channels for eight outputs, where a direct convolution takes 216, and its
sums are as exact. Source: Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016, in three
dimensions: F(2 x 2 x 2, 3 x 3 x 3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks

CHANNELS = 8, 16, 32, 64, 128


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition of :func:`convolve` with torch's own operator."""
    return F.conv3d(x, weight, padding=1)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv3d(x, weight, padding=1)`` of float32 maps, differentiable in both.

    Args:
        x: (B, C, H, W, D) float32 with C of 8, 16, 32, 64 or 128; read in place if channels last.
        weight: (C, C, 3, 3, 3) float32.

    Returns:
        (B, C, H, W, D) float32, by the C++ operator channels last, whatever autocast says. Deterministic for a number
        of threads. The gradient is once differentiable.

    Raises:
        TypeError: an argument is no tensor, or not float32.
        ValueError: a shape or device does not fit.
    """
    checks.is_tensor("x", x, torch.float32)
    checks.is_tensor("weight", weight, torch.float32)
    if x.ndim != 5 or x.shape[1] not in CHANNELS:
        raise ValueError(f"x must be (B, C, H, W, D) with C of {CHANNELS}, not of shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have voxels, not be of shape {tuple(x.shape)}")
    checks.has_shape("weight", weight, (x.shape[1], x.shape[1], 3, 3, 3), "x", x)
    if backends.use_reference("convolution", x):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, weight)
    return torch.ops.spss_fast.convolve(x, weight)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` takes these arguments and was measured to be faster than ``F.conv3d``.

    That is so on CPUs with AVX2 only: where there is AVX-512, it was not measured. And there must be so many tiles of
    eight outputs that the transforms of data outweigh that of the filter.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    channels = x.shape[1]
    if channels not in CHANNELS or weight.shape[0] != channels or weight.shape[2:] != (3, 3, 3):
        return False
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) * ((x.shape[4] + 1) // 2)
    fast = backends.active("convolution", "cpu") == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return fast and tiles >= 2 * channels


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
