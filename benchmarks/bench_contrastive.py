"""The contrastive loss, forward and backward, against the N x N formulation of METHOD step 7 in plain PyTorch, and
against the same class banks in plain PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from straightforward import contrastive_n_by_n

from spss_fast.ops import contrastive_loss
from spss_fast.ops.contrastive import reference_contrastive_loss

CLASSES, K, TEMPERATURE = 2, 50, 0.07
MAIN = (4, 64, 14, 14, 10)  # 1/8 of 112 x 112 x 80: N = 7840
GROWING = [(4, 64, 14, 14, 20), (4, 64, 14, 28, 20), (4, 64, 28, 28, 20)]  # four sizes with MAIN


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], device: str):
    torch.manual_seed(0)
    features = [torch.randn(shape).to(device).requires_grad_() for _ in range(3)]
    return features, [torch.randn(shape[0], CLASSES, *shape[2:]).to(device) for _ in range(2)]


def fused(a, b, n, logits_a, logits_n):
    return contrastive_loss(a, b, n, logits_a, logits_n, K, TEMPERATURE)


def banks(a, b, n, logits_a, logits_n):
    """The operator's own idea, one bank of negatives a class, in plain PyTorch."""
    return reference_contrastive_loss(a, b, n, logits_a, logits_n, K, TEMPERATURE)


def n_by_n(a, b, n, logits_a, logits_n):
    return contrastive_n_by_n(a, b, n, logits_a, logits_n, K, TEMPERATURE)


PROVIDERS = {
    "spss_fast": fused, "class banks, plain PyTorch": banks, "N x N": n_by_n, "N x N compiled": torch.compile(n_by_n),
}
ROWS = [(MAIN, provider) for provider in PROVIDERS] + [(shape, "spss_fast") for shape in GROWING]


@pytest.mark.parametrize("shape, provider", ROWS, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v)
def bench_contrastive(measure, device, shape, provider):
    features, logits = data(shape, device)

    def run():
        return torch.autograd.grad(PROVIDERS[provider](*features, *logits), features)

    if shape == MAIN:
        expected = torch.autograd.grad(n_by_n(*features, *logits), features)
        for actual, e in zip(run(), expected):
            torch.testing.assert_close(actual, e, rtol=1e-3, atol=1e-6)
    measure(run, operator="contrastive", case="forward + backward", size="x".join(map(str, shape)), provider=provider,
            elements=logits[0][:, 0].numel(), bytes=6 * features[0].nbytes)  # three maps read, three gradients written
