"""The contrastive loss, forward and backward, beside the N x N formulation of METHOD step 7 in plain PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from spss_fast.ops import contrastive_loss

BATCH, WIDTH, CLASSES, K, TEMPERATURE = 4, 64, 2, 50, 0.07
SIDES = (14, 14, 10)  # 1/8 of 112 x 112 x 80: N = 7840
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROWTH = {str(BATCH * 14 * 14 * depth): (14, 14, depth) for depth in (10, 20, 40, 80)}


def n_by_n(a, b, n, logits_a, logits_n):
    """All N x N similarities, and for every anchor its own search for the k most confident voxels of another class."""
    a, b, n = (F.normalize(x.movedim(1, -1).flatten(0, -2), dim=1) for x in (a, b, n))
    confidence, predicted = (x.flatten() for x in logits_n.softmax(1).max(1))
    other_class = logits_a.argmax(1).flatten()[:, None] != predicted
    chosen = torch.where(other_class, confidence, -1.0).topk(K, dim=1).indices
    positive = (a * b).sum(1, keepdim=True) / TEMPERATURE
    loss = 0
    for query in (a, b):
        negative = (query @ n.T / TEMPERATURE).gather(1, chosen)
        loss = loss + (torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]).mean()
    return loss


def fused(a, b, n, logits_a, logits_n):
    return contrastive_loss(a, b, n, logits_a, logits_n, K, TEMPERATURE)


def make(sides):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(BATCH, WIDTH, *sides, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]
    return features, [torch.randn(BATCH, CLASSES, *sides, generator=generator).to(DEVICE) for _ in range(2)]


def moved(features):
    """Bytes that must move: three feature maps read, three gradients written."""
    return 2 * sum(x.nbytes for x in features)


def step(provider, features, logits):
    return torch.autograd.grad(provider(*features, *logits), features)


PROVIDERS = {"spss_fast": fused, "N x N, eager": n_by_n, "N x N, compiled": torch.compile(n_by_n)}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_contrastive(measure, provider):
    features, logits = make(SIDES)
    measure("contrastive", provider, "forward + backward", lambda: step(PROVIDERS[provider], features, logits),
            bytes_moved=moved(features))


@pytest.mark.parametrize("size", GROWTH)
def test_contrastive_growth(measure, size):
    features, logits = make(GROWTH[size])
    measure("contrastive growth", "spss_fast", size, lambda: step(fused, features, logits), bytes_moved=moved(features),
            voxels=int(size))
