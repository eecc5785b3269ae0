"""The segmentation losses of a step, each in one pass over the voxels forward and one backward.

Source: METHOD steps 6 and 8. Dice has squared denominators and smooth = 1e-5 (V-Net: Milletari et al., 3DV 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks

SMOOTH = 1e-5
CE_INPUTS = ("probabilities", "logits")


def _compute(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def reference_masked_ce_dice(
    logits: Tensor, target: Tensor, mask: Tensor, ce_input: str = "probabilities",
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of :func:`masked_ce_dice` in plain PyTorch, differentiable repeatedly."""
    logits = _compute(logits)
    probability = logits.softmax(1)
    ce = F.cross_entropy(probability if ce_input == "probabilities" else logits, target, reduction="none")
    ce = (ce * mask).sum() / mask.sum().clamp(min=1)
    onehot = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)

    def dice(weight: Tensor) -> Tensor:
        over = [0, *range(2, logits.ndim)]
        intersection = (probability * onehot * weight).sum(over)
        total = (probability**2 * weight).sum(over) + (onehot**2 * weight).sum(over)
        return (1 - (2 * intersection + SMOOTH) / (total + SMOOTH)).mean()

    return ce, dice(mask[:, None].to(logits.dtype)), dice(torch.ones_like(logits[:, :1]))


def reference_weighted_ce_dice(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of :func:`weighted_ce_dice` in plain PyTorch, differentiable repeatedly."""
    logits = _compute(logits)
    ce = F.cross_entropy(logits, target, reduction="none")
    over = list(range(1, target.ndim))
    weight = weight.to(logits.dtype)
    ce = ((ce * weight).sum(over) / weight.sum(over)).mean()
    probability = logits.softmax(1)[:, 1:]
    onehot = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
    over = [0, *range(2, logits.ndim)]
    dice = 1 - (2 * (probability * onehot).sum(over) + SMOOTH) / (
        (probability**2).sum(over) + (onehot**2).sum(over) + SMOOTH
    )
    return ce, dice.mean()


def _check(logits: Tensor, target: Tensor) -> tuple[int, ...]:
    checks.is_tensor("logits", logits)
    checks.has_channels("logits", logits)
    checks.is_tensor("target", target, torch.int64)
    shape = (logits.shape[0], *logits.shape[2:])
    checks.has_shape("target", target, shape, "logits", logits)
    return shape


def _on_reference(logits: Tensor) -> bool:
    """The Triton kernels compute in float32."""
    return backends.use_reference("losses", logits) or (
        logits.dtype == torch.float64 and backends.active("losses", logits.device.type) == "triton"
    )


def masked_ce_dice(
    logits: Tensor, target: Tensor, mask: Tensor, ce_input: str = "probabilities",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(CE over masked voxels, Dice over masked voxels, Dice over all voxels)``, differentiable in logits.

    Args:
        logits: (B, C, *spatial), floating, any memory format; half types are computed in float32.
        target: (B, *spatial) int64, classes in [0, C).
        mask: (B, *spatial) bool.
        ce_input: what cross entropy takes as its logits: the softmax ``"probabilities"`` (as released) or ``"logits"``.

    Returns:
        Three scalars, float32 (float64 for float64 logits). CE is the mean over the mask, 0 where it is empty. Dice is
        ``1 - (2 I + 1e-5) / (P + 1e-5)``, ``I`` the sum of p over the class, ``P`` that of p^2 plus the class's size,
        averaged over classes. Sums are float64 beyond small tiles; deterministic. The gradient is once differentiable.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or ``ce_input`` does not fit, or (on the CPU) a label is outside [0, C); on a GPU,
            where that would need a wait, such a label makes the losses NaN.
    """
    shape = _check(logits, target)
    checks.is_tensor("mask", mask, torch.bool)
    checks.has_shape("mask", mask, shape, "logits", logits)
    if ce_input not in CE_INPUTS:
        raise ValueError(f"ce_input must be one of {', '.join(CE_INPUTS)}, not {ce_input!r}")
    if _on_reference(logits):
        return reference_masked_ce_dice(logits, target, mask, ce_input)
    losses, _ = torch.ops.spss_fast.masked_ce_dice(logits, target, mask, ce_input == "probabilities")
    return losses.unbind()


def weighted_ce_dice(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(weighted CE, foreground Dice)``, differentiable in logits.

    Args:
        logits: (B, C, *spatial) with C >= 2, floating, any memory format; half types are computed in float32.
        target: (B, *spatial) int64, classes in [0, C).
        weight: (B, *spatial), floating. Its own gradient is not computed.

    Returns:
        Two scalars, float32 (float64 for float64 logits). CE is normalised by each volume's weight sum, then averaged
        over volumes. Dice is that of ``softmax(logits)[:, 1:]`` summed over all voxels, averaged over foreground
        classes. Accuracy, determinism and errors as in :func:`masked_ce_dice`.
    """
    shape = _check(logits, target)
    checks.is_tensor("weight", weight)
    checks.has_shape("weight", weight, shape, "logits", logits)
    if logits.shape[1] < 2:
        raise ValueError("logits must have a background and at least one foreground channel, not 1 channel")
    weight = weight.detach()
    if _on_reference(logits):
        return reference_weighted_ce_dice(logits, target, weight)
    losses, _ = torch.ops.spss_fast.weighted_ce_dice(logits, target, weight)
    return losses.unbind()


def _fake(losses: int):
    def fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        sums = 2 * logits.shape[0] + 4 * logits.shape[1]
        return _compute(logits).new_empty(losses), logits.new_empty(sums, dtype=torch.float64)

    return fake


def _fake_backward(grad: Tensor, logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx, inputs, output) -> None:
    logits, target, weight, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
    ctx.save_for_backward(logits, target, weight, output[1])


def _gradient(backward: str):
    def gradient(ctx, grad: Tensor | None, _: None):
        others = [None] * (2 + len(ctx.rest))
        if grad is None:
            return None, *others
        return getattr(torch.ops.spss_fast, backward)(grad, *ctx.saved_tensors, *ctx.rest), *others

    return gradient


def _once(ctx, *grads):
    raise NotImplementedError(
        "the losses are differentiable once; second derivatives need spss_fast.ops.backend('reference')"
    )


for _name, _losses in (("masked_ce_dice", 3), ("weighted_ce_dice", 2)):
    torch.library.register_fake(f"spss_fast::{_name}", _fake(_losses))
    torch.library.register_fake(f"spss_fast::{_name}_backward", _fake_backward)
    torch.library.register_autograd(f"spss_fast::{_name}", _gradient(f"{_name}_backward"), setup_context=_save)
    torch.library.register_autograd(f"spss_fast::{_name}_backward", _once)
