"""Self-paced uncertainty selection (SU): entropy of the mean softmax over Monte-Carlo passes, K least uncertain voxels.

Source: METHOD step 4. ``p = mean_T softmax(logits)``, ``U = -sum_c p_c log(p_c + 1e-6)``, and a mask of the K voxels
of the whole batch with the lowest U. The T outputs are never stored: each pass is added to a running total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spss_fast.ops import backends, checks

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


def _on_reference(total: Tensor) -> bool:
    """The Triton kernels are for float32 totals."""
    return backends.use_reference("uncertainty", total) or (
        total.dtype == torch.float64 and backends.active("uncertainty", total.device.type) == "triton"
    )


def accumulate_softmax(total: Tensor, logits: Tensor) -> None:
    """Add ``softmax(logits)`` over channels to ``total``, in place and in one pass over memory.

    Args:
        total: (B, C, *spatial) float32, the running sum; start it with zeros, in the memory format of the logits
            (``torch.zeros_like(logits, dtype=torch.float32)``). float64 where logits are float64.
        logits: (B, C, *spatial) float32, bfloat16 or float16, in any memory format: contiguous and channels-last
            tensors are read in place. No gradient flows through this.

    Raises:
        TypeError: an argument is no tensor, or of a dtype other than the above.
        ValueError: shapes or devices differ, or there is no spatial axis.
    """
    checks.is_tensor("logits", logits)
    checks.has_channels("logits", logits)
    checks.is_tensor("total", total, torch.float64 if logits.dtype == torch.float64 else torch.float32)
    checks.has_shape("total", total, logits.shape, "logits", logits)
    total, logits = total.detach(), logits.detach()
    if _on_reference(total):
        reference_accumulate_softmax(total, logits)
    else:
        torch.ops.spss_fast.accumulate_softmax(total, logits)
        torch.autograd.graph.increment_version(total)  # else a gradient that needs its old values would take the new


def uncertainty_mask(total: Tensor, passes: int, keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of the mean softmax, and exactly its ``keep`` least uncertain voxels, by selection, not by sorting.

    Args:
        total: (B, C, *spatial) float32 (or float64), the sum of ``passes`` softmax outputs; any memory format.
        passes: T, how many outputs were added.
        keep: K over the whole batch: an int, or an int64 tensor of no dimensions that may live on the GPU, where it
            is read without the host waiting for it. More than there are voxels means all, a tensor below 0 means none.

    Returns:
        ``(entropy, mask)``, both (B, *spatial) and contiguous: natural-log entropy of total's dtype, and bool. Of
        voxels with equal entropy those of lower index are chosen; NaN never is, so the mask holds fewer than K where
        fewer than K numbers are there. Deterministic.

    Raises:
        TypeError: ``total`` is not float32 or float64, ``passes`` no integer, ``keep`` neither int nor int64 tensor.
        ValueError: ``passes`` < 1, ``keep`` < 0, ``keep`` has dimensions, or ``total`` has no spatial axis or 2^32
            voxels or more.
    """
    checks.is_tensor("total", total, torch.float32, torch.float64)
    checks.has_channels("total", total)
    checks.is_count("passes", passes, 1)
    if isinstance(keep, Tensor):
        checks.is_tensor("keep", keep, torch.int64)
        if keep.ndim:
            raise ValueError(f"keep must be an int or a tensor of no dimensions, not of shape {tuple(keep.shape)}")
        keep = keep.to(total.device, non_blocking=total.is_cuda)  # onto a host it would be read before it is there
    else:
        checks.is_count("keep", keep, 0)
        keep = torch.full((), keep, dtype=torch.int64, device=total.device)
    total = total.detach()
    if _on_reference(total):
        return reference_uncertainty_mask(total, passes, keep)
    return torch.ops.spss_fast.uncertainty_mask(total, passes, keep)


@torch.library.register_fake("spss_fast::accumulate_softmax")
def _(total: Tensor, logits: Tensor) -> None:
    return None


@torch.library.register_fake("spss_fast::uncertainty_mask")
def _(total: Tensor, passes: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    shape = (total.shape[0], *total.shape[2:])
    return total.new_empty(shape), total.new_empty(shape, dtype=torch.bool)
