"""Self-paced bidirectional feature contrastive loss (SC) with class-wise negative banks.

Source: METHOD step 7. The negatives of an anchor depend on the anchor's class only, so C banks of k prototypes
replace the N x N similarity matrix, with the same value and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_select_prototypes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each anchor class c, the ``k`` voxels with the highest confidence among those NOT predicted c.

    ``logits``: (B, C, *spatial). Returns int64 ``(indices (C, k), counts (C,))``: indices count voxels in
    (B, *spatial) order; entries beyond ``counts[c]`` are -1. Ties go to the lower index; voxels with NaN logits
    are never candidates.
    """
    channels = logits.shape[1]
    probability = logits.float().softmax(1)
    confidence, predicted = (t.flatten() for t in probability.max(1))
    indices = torch.full((channels, k), -1, dtype=torch.long, device=logits.device)
    counts = torch.zeros(channels, dtype=torch.long, device=logits.device)
    for c in range(channels):
        candidates = ((predicted != c) & ~confidence.isnan()).nonzero().flatten()
        order = confidence[candidates].argsort(descending=True, stable=True)[:k]
        indices[c, : len(order)] = candidates[order]
        counts[c] = len(order)
    return indices, counts


def reference_contrastive_loss(
    a: Tensor, b: Tensor, n: Tensor, logits_a: Tensor, logits_n: Tensor,
    k: int = 50, temperature: float = 0.07, bidirectional: bool = True,
) -> Tensor:
    """Mean over all voxels of ``l(a) + l(b)`` (``l(a)`` alone if not bidirectional): a scalar, without w(t)."""
    indices, counts = reference_select_prototypes(logits_n, k)
    anchor_class = logits_a.argmax(1).flatten()

    def rows(x: Tensor) -> Tensor:
        return F.normalize(x.movedim(1, -1).flatten(0, -2), dim=1)

    a, b, n = rows(a), rows(b), rows(n)
    positive = (a * b).sum(1) / temperature
    total = a.new_zeros(())
    for c in range(len(counts)):
        chosen = indices[c][indices[c] >= 0]
        anchors = (anchor_class == c).nonzero().flatten()
        if not len(chosen) or not len(anchors):
            continue
        bank = n[chosen]
        for q in (a, b) if bidirectional else (a,):
            negative = q[anchors] @ bank.T / temperature
            all_scores = torch.cat([positive[anchors, None], negative], 1)
            total = total + (all_scores.logsumexp(1) - positive[anchors]).sum()
    return total / len(a)


select_prototypes = reference_select_prototypes
contrastive_loss = reference_contrastive_loss
