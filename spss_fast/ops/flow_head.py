"""The last convolution of the registration net: 16 channels to the displacement along either axis, in float32.

Source: Balakrishnan et al., "VoxelMorph", IEEE TMI 2019. On a CPU a library computes eight or 16 outputs at once, so
most of what it multiplies for two of them is nothing; here a vector holds channels of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks, convolution

CHANNELS = 16


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition of :func:`flow_head` with torch's own operators."""
    return F.conv2d(x.float(), weight, bias, padding=1)


def flow_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x.float(), weight, bias, padding=1)``, differentiable in all three.

    Args:
        x: (B, 16, H, W) float32 or bfloat16, read in place if channels last.
        weight: (2, 16, 3, 3) float32.
        bias: (2,) float32.

    Returns:
        (B, 2, H, W) float32, contiguous by the C++ operator, whatever autocast says: its sums are float32 and nothing
        is rounded to bfloat16 but the gradient of such an x. Deterministic. The gradient is once differentiable.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    checks.is_tensor("x", x, *convolution.DTYPES)
    checks.is_tensor("weight", weight, torch.float32)
    checks.is_tensor("bias", bias, torch.float32)
    if x.ndim != 4 or x.shape[1] != CHANNELS or 0 in x.shape[2:]:
        raise ValueError(f"x must be (B, {CHANNELS}, H, W) with pixels, not of shape {tuple(x.shape)}")
    checks.has_shape("weight", weight, (2, CHANNELS, 3, 3), "x", x)
    checks.has_shape("bias", bias, (2,), "x", x)
    if backends.use_reference("convolution", x):
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, weight, bias)
    return torch.ops.spss_fast.flow_head(x, weight, bias)


def is_faster(x: Tensor) -> bool:
    """Whether :func:`flow_head` takes such an ``x`` and was measured to be faster than ``F.conv2d``: on CPUs with
    AVX512-BF16 but without AMX; others were not measured."""
    fits = x.device.type == "cpu" and x.dtype in convolution.DTYPES and x.shape[1] == CHANNELS
    return fits and convolution.was_measured() and backends.active("convolution", "cpu") == "cpu"


@torch.library.register_fake("spss_fast::flow_head")
def _fake(x, weight, bias):
    return bias.new_empty(x.shape[0], 2, *x.shape[2:])


@torch.library.register_fake("spss_fast::flow_head_backward")
def _fake_backward(grad, x, weight):
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), grad.new_empty(2)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx, grad: Tensor):
    return torch.ops.spss_fast.flow_head_backward(grad, *ctx.saved_tensors)


def _once(ctx, *grads):
    raise NotImplementedError(
        "flow_head is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::flow_head", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::flow_head_backward", _once)
