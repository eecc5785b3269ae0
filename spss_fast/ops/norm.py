"""Batch norm, ReLU and a skip connection's addition in one operator: what follows each convolution of the V-Net.

    y = max(0, weight (x [+ offset] - mean) / sqrt(variance + eps) + bias) [+ skip]

with each channel's mean and biased variance, over the batch in training and the running ones else. Source: Ioffe &
Szegedy, "Batch Normalization", ICML 2015. Torch's own operators, one after the other, read and write every feature map
five times where this reads it twice and writes it once; the backward pass keeps nothing but x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks

HALF = torch.float16, torch.bfloat16


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy where its elements do not lie in order: channels last, in any number of dimensions, if its
    channels lie side by side without it being contiguous; else contiguous."""
    if x.is_contiguous() or x.stride(1) != 1:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _with_offset(
    mean: Tensor, bias: Tensor, offset: Tensor, weight: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``bias`` by which running statistics normalise x as they do x + offset: x + offset about the mean is
    x about the mean without it. The gradient of offset takes the way of the bias, to which it adds nothing."""
    if offset.requires_grad and torch.is_grad_enabled():
        bias = bias + weight * (offset - offset.detach()) * (variance + eps).rsqrt()
    return mean - offset.detach(), bias


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool,
    momentum: float = 0.1, eps: float = 1e-5, skip: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:
    """The definition of :func:`batch_norm_relu` with torch's own operators."""
    # torch sums a strided half-precision tensor less exactly on the CPU
    x = dense(x) if x.ndim in (4, 5) else x.contiguous()
    # torch 2.13's CPU backward misreads a strided weight of a tensor with one voxel a volume
    weight, bias = weight.contiguous(), bias.contiguous()
    shifted, mean = offset is not None and running_mean is not None, running_mean
    if shifted and training:
        mean = running_mean - offset.detach()
    elif shifted:
        mean, bias = _with_offset(running_mean, bias, offset, weight, running_var, eps)
    # torch's CUDA backward rounds sums over contiguous half-precision tensors to that precision
    wide = x.float() if x.is_cuda and x.dtype in HALF and x.is_contiguous() else x
    y = F.relu(F.batch_norm(wide, mean, running_var, weight, bias, training, momentum, eps)).to(x.dtype)
    if training and shifted:
        with torch.no_grad():
            running_mean.copy_(mean + offset)
    return y if skip is None else y + skip


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool,
    momentum: float = 0.1, eps: float = 1e-5, skip: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:
    """``relu(batch_norm(x + offset)) + skip``, differentiable in x, weight, bias, skip and, in inference, offset.

    Args:
        x: (B, C, *spatial), floating; read in place if contiguous or channels last, by the C++ operator also if it is a
            slice of a channels-last tensor; half types are computed in float32.
        weight, bias: (C,), of the compute type.
        running_mean, running_var: (C,), of the compute type; in training they move towards the batch's, in place, or
            are None where nobody will read them.
        training: whether to normalise by the batch's statistics (else by the running ones).
        momentum: the share of the batch's statistics in the new running ones.
        eps: added to the variance.
        skip: of x's shape and dtype, added to the result; None for nothing.
        offset: (C,), of the compute type, such as a convolution's bias; None for nothing. It costs no pass over x. In
            training the batch's mean takes it off again: it moves the running mean, and has no gradient.

    Returns:
        Of x's shape, dtype and memory format, which is channels last if x has its channels side by side without being
        contiguous. Deterministic. The gradient is once differentiable.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit, or training with one value per channel.
    """
    checks.is_tensor("x", x)
    checks.has_channels("x", x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tracked = running_mean is not None or running_var is not None
    of_channels = [("weight", weight), ("bias", bias)]
    if tracked or not training:
        of_channels += [("running_mean", running_mean), ("running_var", running_var)]
    for name, value in of_channels:
        checks.is_tensor(name, value, compute)
        checks.has_shape(name, value, (x.shape[1],), "x", x)
    if skip is not None:
        checks.is_tensor("skip", skip, x.dtype)
        checks.has_shape("skip", skip, x.shape, "x", x)
    if offset is not None:
        checks.is_tensor("offset", offset, compute)
        checks.has_shape("offset", offset, (x.shape[1],), "x", x)
    count = x.numel() // x.shape[1]
    if training and count == 1:
        raise ValueError(f"x must have more than one value per channel in training, not shape {tuple(x.shape)}")
    if backends.use_reference("norm", x):
        return reference(x, weight, bias, running_mean, running_var, training, momentum, eps, skip, offset)
    statistics = (None, None) if training else (running_mean, running_var)
    if offset is not None and not training:
        shifted, bias = _with_offset(running_mean, bias, offset, weight, running_var, eps)
        statistics = shifted, running_var
    y, mean, variance = torch.ops.spss_fast.batch_norm_relu(x, weight, bias, skip, *statistics, eps)
    if training and tracked and count:
        with torch.no_grad():
            mean = mean if offset is None else mean + offset
            unbiased = variance * (count / (count - 1))  # as torch keeps it
            torch._foreach_lerp_([running_mean, running_var], [mean, unbiased], momentum)
    return y


@torch.library.register_fake("spss_fast::batch_norm_relu")
def _fake(x, weight, bias, skip, mean, variance, eps):
    return torch.empty_like(dense(x)), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("spss_fast::batch_norm_relu_backward")
def _fake_backward(grad, x, weight, bias, mean, variance, eps, batch_statistics):
    return torch.empty_like(dense(x)), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, skip, mean, _, ctx.eps = inputs
    ctx.with_skip, ctx.batch_statistics = skip is not None, mean is None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _gradient(ctx, grad: Tensor | None, *_: None):
    if grad is None:
        return (None,) * 7
    gradients = torch.ops.spss_fast.batch_norm_relu_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.batch_statistics)
    return *gradients, grad if ctx.with_skip else None, None, None, None


def _once(ctx, *grads):
    raise NotImplementedError(
        "batch_norm_relu is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


torch.library.register_autograd("spss_fast::batch_norm_relu", _gradient, setup_context=_save)
torch.library.register_autograd("spss_fast::batch_norm_relu_backward", _once)
