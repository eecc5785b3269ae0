"""The segmentation losses of a step, each in one pass over the voxels.

Source: METHOD steps 6 and 8. Dice has squared denominators and smooth = 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def reference_masked_ce_dice(
    logits: Tensor, target: Tensor, mask: Tensor, ce_input: str = "probabilities",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(CE over masked voxels, Dice over masked voxels, Dice over all voxels)``, scalars; differentiable in logits.

    ``logits`` (B, C, *spatial), ``target`` (B, *spatial) int64, ``mask`` (B, *spatial) bool. ``ce_input`` says what
    the cross entropy takes as its logits: the softmax ``probabilities`` (as released), or the ``logits``. Dice is
    averaged over classes. With an empty mask CE is 0.
    """
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
    """``(weighted CE, foreground Dice)``, scalars; differentiable in logits.

    ``logits`` (B, C, *spatial), ``target`` (B, *spatial) int64, ``weight`` (B, *spatial). CE is normalised by each
    volume's weight sum, then averaged over volumes. Dice is that of ``softmax(logits)[:, 1:]`` summed over all voxels,
    averaged over foreground classes.
    """
    ce = F.cross_entropy(logits, target, reduction="none")
    over = list(range(1, target.ndim))
    ce = ((ce * weight).sum(over) / weight.sum(over)).mean()
    probability = logits.softmax(1)[:, 1:]
    onehot = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
    over = [0, *range(2, logits.ndim)]
    dice = 1 - (2 * (probability * onehot).sum(over) + SMOOTH) / (
        (probability**2).sum(over) + (onehot**2).sum(over) + SMOOTH
    )
    return ce, dice.mean()


masked_ce_dice = reference_masked_ce_dice
weighted_ce_dice = reference_weighted_ce_dice
