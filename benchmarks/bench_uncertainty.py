"""Uncertainty selection, beside softmax, mean, entropy and argsort in plain PyTorch, eager and compiled.

One round is METHOD step 4 without the networks: T logits of a batch in, entropy and mask of the K least uncertain out.
"""

import pytest
import torch

from spss_fast.ops import accumulate_softmax, uncertainty_mask

PASSES, BATCH, CLASSES, SIDES = 8, 4, 2, (112, 112, 80)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROWTH = {f"1/{2**i}": (SIDES[0] // 2**i, *SIDES[1:]) for i in (3, 2, 1, 0)}


def fused(logits, keep):
    total = torch.zeros_like(logits[0], dtype=torch.float32)
    for one in logits:
        accumulate_softmax(total, one)
    return uncertainty_mask(total, len(logits), keep)


def plain(logits, keep):
    p = torch.stack([one.float().softmax(1) for one in logits]).mean(0)
    entropy = -(p * (p + 1e-6).log()).sum(1)
    mask = torch.zeros(entropy.numel(), dtype=torch.bool, device=entropy.device)
    mask[entropy.flatten().argsort()[:keep]] = True
    return entropy, mask.view_as(entropy)


def make(sides, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    logits = [
        (2 * torch.randn(BATCH, CLASSES, *sides, generator=generator)).to(DEVICE, dtype, memory_format=memory_format)
        for _ in range(PASSES)
    ]
    return logits, BATCH * sides[0] * sides[1] * sides[2] // 10


def moved(logits):
    """Bytes that must move: every logit once, the total read and written once a pass, entropy and mask written."""
    voxels = logits[0][:, 0].numel()
    return sum(x.nbytes for x in logits) + 2 * PASSES * 4 * CLASSES * voxels + (4 * CLASSES + 4 + 1) * voxels


PROVIDERS = {"spss_fast": fused, "eager": plain, "compiled": torch.compile(plain)}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_uncertainty(measure, provider):
    logits, keep = make(SIDES)
    measure("uncertainty", provider, "float32", lambda: PROVIDERS[provider](logits, keep), bytes_moved=moved(logits))


@pytest.mark.parametrize("provider", ["spss_fast", "eager"])
def test_uncertainty_bfloat16_channels_last(measure, provider):
    logits, keep = make(SIDES, torch.bfloat16, torch.channels_last_3d)
    measure("uncertainty", provider, "bfloat16 channels_last_3d", lambda: PROVIDERS[provider](logits, keep),
            bytes_moved=moved(logits))


@pytest.mark.parametrize("size", GROWTH)
def test_uncertainty_growth(measure, size):
    logits, keep = make(GROWTH[size])
    measure("uncertainty growth", "spss_fast", size, lambda: fused(logits, keep), bytes_moved=moved(logits),
            voxels=logits[0][:, 0].numel())
