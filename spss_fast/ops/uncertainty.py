"""Self-paced uncertainty selection (SU): entropy of the mean softmax over Monte-Carlo passes, K least uncertain voxels.

Source: METHOD step 4. ``p = mean_T softmax(logits)``, ``U = -sum_c p_c log(p_c + 1e-6)``, and a mask of the K voxels
of the whole batch with the lowest U.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def reference_accumulate_softmax(total: Tensor, logits: Tensor) -> None:
    """Add ``softmax(logits)`` over channels to ``total`` in place, in float32 (float64 for float64)."""
    total += logits.to(total.dtype).softmax(1)


def reference_uncertainty_mask(total: Tensor, passes: int, keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (B, *spatial) of ``total / passes`` and the mask of its ``keep`` lowest voxels."""
    p = total / passes
    entropy = -(p * (p + EPSILON).log()).sum(1)
    flat = entropy.flatten()
    order = flat.argsort(stable=True)  # ties by index; NaN sorts last
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    mask = (rank < keep) & ~flat.isnan()
    return entropy, mask.view_as(entropy)


accumulate_softmax = reference_accumulate_softmax
uncertainty_mask = reference_uncertainty_mask
