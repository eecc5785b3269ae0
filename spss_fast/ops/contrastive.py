"""Self-paced bidirectional feature contrastive loss (SC) with class-wise negative banks.

Source: METHOD step 7. The negatives of an anchor depend on the anchor's class only, so C banks of k prototypes
replace the N x N similarity matrix, with the same value and gradients and memory O(N k).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends, checks


def reference_select_prototypes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition of :func:`select_prototypes` in plain PyTorch."""
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
    """The definition of :func:`contrastive_loss` in plain PyTorch, differentiable repeatedly."""
    indices, counts = reference_select_prototypes(logits_n, k)
    anchor_class = logits_a.argmax(1).flatten()
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype, n.dtype) else torch.float32

    def rows(x: Tensor) -> Tensor:
        return F.normalize(x.to(dtype).movedim(1, -1).flatten(0, -2), dim=1)

    with torch.autocast(a.device.type, enabled=False):
        a, b, n = rows(a), rows(b), rows(n)
        positive = (a * b).sum(1) / temperature
        total = a.new_zeros(()) + 0 * (a.sum() + b.sum() + n.sum())  # part of the graph, also where no term is
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


def select_prototypes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each anchor class c, the ``k`` voxels with the highest confidence among those NOT predicted c.

    Args:
        logits: (B, C, *spatial), floating, any memory format. Confidence is the largest softmax value, in float32.
        k: the size of a bank.

    Returns:
        int64 ``(indices (C, k), counts (C,))``: indices count voxels in (B, *spatial) order, the most confident first;
        entries beyond ``counts[c]`` are -1. Ties go to the lower index; voxels with NaN logits are never candidates.
        On a GPU nothing waits for the host.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no integer.
        ValueError: ``logits`` has no channels or no spatial axis, or ``k`` < 0.
    """
    checks.is_tensor("logits", logits)
    checks.has_channels("logits", logits)
    checks.is_count("k", k, 0)
    logits = logits.detach()
    if backends.use_reference("contrastive", logits):
        return reference_select_prototypes(logits, k)
    return torch.ops.spss_fast.select_prototypes(logits, k)


def contrastive_loss(
    a: Tensor, b: Tensor, n: Tensor, logits_a: Tensor, logits_n: Tensor,
    k: int = 50, temperature: float = 0.07, bidirectional: bool = True,
) -> Tensor:
    """Mean over all voxels of ``l(a) + l(b)`` (``l(a)`` alone if not bidirectional): a scalar, without w(t).

    With ``s+ = <a_i, b_i>/temperature`` and ``s-_j = <q_i, n_j>/temperature``, the n_j being the ``k`` prototypes of
    the class that ``logits_a`` predicts for voxel i (see :func:`select_prototypes` of ``logits_n``),
    ``l(q)_i = -log(exp(s+) / (exp(s+) + sum_j exp(s-_j)))``; 0 where that class has no prototypes.

    Args:
        a, b, n: features of anchors, positives and negatives, (B, F, *spatial), bfloat16, float16, float32 or float64,
            any strides; normalised inside (L2 over F). Gradients flow into all three; n's touches prototypes only.
        logits_a, logits_n: (B, C, *spatial), floating: classes of the anchors, classes and confidences of n. No
            gradient.
        k: negatives an anchor; fewer candidates mean those there are.
        temperature: of the cosines.
        bidirectional: whether b's own term is added.

    Returns:
        The loss, float32 (float64 where a feature map is float64). Its gradients are computed along with it, in one
        sweep, where any is needed, and are once differentiable. Deterministic.

    Raises:
        TypeError: an argument is no floating tensor, ``k`` no integer, or ``temperature`` no number.
        ValueError: shapes or devices differ, ``k`` < 0, or ``temperature`` <= 0.
    """
    for name, tensor in (("a", a), ("b", b), ("n", n), ("logits_a", logits_a), ("logits_n", logits_n)):
        checks.is_tensor(name, tensor)
        checks.has_channels(name, tensor)
    checks.has_shape("b", b, a.shape, "a", a)
    checks.has_shape("n", n, a.shape, "a", a)
    checks.has_shape("logits_a", logits_a, (a.shape[0], logits_a.shape[1], *a.shape[2:]), "a", a)
    checks.has_shape("logits_n", logits_n, logits_a.shape, "logits_a", logits_a)
    checks.is_count("k", k, 0)
    checks.is_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    logits_a, logits_n = logits_a.detach(), logits_n.detach()
    if torch.float64 in (a.dtype, b.dtype, n.dtype):
        a, b, n = a.double(), b.double(), n.double()
    elif not a.dtype == b.dtype == n.dtype:
        a, b, n = a.float(), b.float(), n.float()
    if backends.use_reference("contrastive", a) or (
        a.dtype == torch.float64 and backends.active("contrastive", a.device.type) == "triton"
    ):
        return reference_contrastive_loss(a, b, n, logits_a, logits_n, k, temperature, bidirectional)
    with_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or n.requires_grad)
    return torch.ops.spss_fast.contrastive_loss(
        a, b, n, logits_a, logits_n, k, temperature, bidirectional, with_grad
    )[0]


@torch.library.register_fake("spss_fast::select_prototypes")
def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    channels = logits.shape[1]
    return logits.new_empty((channels, k), dtype=torch.long), logits.new_empty(channels, dtype=torch.long)


@torch.library.register_fake("spss_fast::contrastive_loss")
def _(a, b, n, logits_a, logits_n, k, temperature, bidirectional, with_grad):
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32

    def gradient(x: Tensor) -> Tensor:
        return torch.empty_like(x, dtype=dtype) if with_grad else x.new_empty(0, dtype=dtype)

    return a.new_empty((), dtype=dtype), gradient(a), gradient(b), gradient(n)


def _save(ctx, inputs, output) -> None:
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.computed = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # asked to build a graph of the gradients, which were computed ahead
        raise NotImplementedError(
            "contrastive_loss is differentiable once; second derivatives need spss_fast.ops.backend('reference')"
        )
    if grad is None or not ctx.computed:
        return (None,) * 9
    gradients = [
        (grad * saved).to(dtype) if needed else None
        for saved, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    ]
    return (*gradients, *[None] * 6)


torch.library.register_autograd("spss_fast::contrastive_loss", _backward, setup_context=_save)
