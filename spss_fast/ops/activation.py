"""A convolution's bias, another map's addition and leaky ReLU in one operator: what follows each convolution of the
registration net.

    z = x + bias [+ added],    y = z where z > 0, else slope z

Source: Maas et al., "Rectifier Nonlinearities Improve Neural Network Acoustic Models", ICML workshop 2013. Torch's own
operators read and write the feature map once each, and sum the bias's gradient in a pass of its own; here a pass does
it forward, and a pass backward, which keeps no map but y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks
from spss_fast.ops.norm import HALF, dense


def reference(x: Tensor, bias: Tensor, added: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """The definition of :func:`bias_leaky_relu` with torch's own operators."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = dense(x).to(wide) + bias.to(wide).view(-1, *[1] * (x.ndim - 2))
    if added is not None:
        z = z + added.to(wide)
    return F.leaky_relu(z, slope).to(x.dtype)


def check_slope(slope: float) -> None:
    """``TypeError`` or ``ValueError`` unless the sign of a result is that of what it was computed from."""
    checks.is_number("slope", slope)
    if not 0 <= slope < math.inf:
        raise ValueError(f"slope must be a finite number of at least 0, not {slope}")


def bias_leaky_relu(x: Tensor, bias: Tensor, added: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """``leaky_relu(x + bias + added, slope)``, differentiable in x, bias and added.

    Args:
        x: (B, C, *spatial), floating; read in place if contiguous or channels last; half types are computed in float32.
        bias: (C,), of x's dtype, or float32 beside a half type.
        added: of x's shape and dtype; None for nothing.
        slope: of the line below zero, at least 0; on a GPU kernels are compiled for each value.

    Returns:
        Of x's shape, dtype and memory format, which is channels last if x has its channels side by side without being
        contiguous. Deterministic. The gradient is once differentiable; it goes by the sign of the result, which is 0
        where float16 has no number so small.

    Raises:
        TypeError: an argument is no tensor or number, or of another dtype.
        ValueError: a shape or device does not fit, or slope is negative or not finite.
    """
    checks.is_tensor("x", x)
    checks.has_channels("x", x)
    checks.is_tensor("bias", bias, *((torch.float32, x.dtype) if x.dtype in HALF else (x.dtype,)))
    checks.has_shape("bias", bias, (x.shape[1],), "x", x)
    if added is not None:
        checks.is_tensor("added", added, x.dtype)
        checks.has_shape("added", added, x.shape, "x", x)
    check_slope(slope)
    if backends.use_reference("activation", x):
        return reference(x, bias, added, slope)
    return torch.ops.spss_fast.bias_leaky_relu(x, bias, added, slope)


@torch.library.register_fake("spss_fast::bias_leaky_relu")
def _fake(x, bias, added, slope):
    return torch.empty_like(dense(x))


@torch.library.register_fake("spss_fast::bias_leaky_relu_backward")
def _fake_backward(grad, y, bias, slope):
    return torch.empty_like(dense(y)), torch.empty_like(bias, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, bias, added, ctx.slope = inputs
    ctx.with_added = added is not None
    ctx.save_for_backward(output, bias)


def _gradient(ctx, grad: Tensor):
    dx, dbias = torch.ops.spss_fast.bias_leaky_relu_backward(grad, *ctx.saved_tensors, ctx.slope)
    return dx, dbias, dx if ctx.with_added else None, None


def _once(ctx, *grads):
    raise NotImplementedError(
        "bias_leaky_relu is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::bias_leaky_relu", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::bias_leaky_relu_backward", _once)
