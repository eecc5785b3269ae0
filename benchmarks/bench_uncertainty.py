"""Uncertainty selection against softmax, mean, entropy and argsort (or topk) in plain PyTorch.

A call is METHOD step 4 without the networks: T logits of a batch in, entropy and mask of the K least uncertain out.
"""

from __future__ import annotations

import functools

import pytest
import torch

from spss_fast.ops import accumulate_softmax, uncertainty_mask

PASSES = 8
MAIN = (4, 2, 112, 112, 80)
GROWING = [(4, 2, 14, 112, 80), (4, 2, 28, 112, 80), (4, 2, 56, 112, 80)]
KEPT = 0.1
CASES = {"float32": (torch.float32, torch.contiguous_format), "bfloat16": (torch.bfloat16, torch.channels_last_3d)}


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], case: str, device: str) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(0)
    dtype, memory_format = CASES[case]
    logits = [(2 * torch.randn(shape)).to(device, dtype, memory_format=memory_format) for _ in range(PASSES)]
    return logits, int(KEPT * logits[0][:, 0].numel())


def fused(logits, keep):
    total = torch.zeros_like(logits[0], dtype=torch.float32)
    for one in logits:
        accumulate_softmax(total, one)
    return uncertainty_mask(total, len(logits), keep)


def plain(logits, keep, choose=lambda entropy, keep: entropy.argsort()[:keep]):
    p = torch.stack([one.float().softmax(1) for one in logits]).mean(0)
    entropy = -(p * (p + 1e-6).log()).sum(1)
    mask = torch.zeros(entropy.numel(), dtype=torch.bool, device=entropy.device)
    mask[choose(entropy.flatten(), keep)] = True
    return entropy, mask.view_as(entropy)


def with_topk(logits, keep):
    return plain(logits, keep, lambda entropy, keep: entropy.topk(keep, largest=False, sorted=False).indices)


def bytes_moved(logits) -> int:
    """Every logit once, the running total read and written with each, entropy and mask written."""
    numbers = logits[0].numel()
    return sum(one.nbytes for one in logits) + (2 * PASSES + 1) * 4 * numbers + 5 * numbers // logits[0].shape[1]


PROVIDERS = {"spss_fast": fused, "eager": plain, "eager, topk": with_topk, "eager compiled": torch.compile(plain)}
ROWS = [(MAIN, case, provider) for case in CASES for provider in PROVIDERS]
ROWS += [(shape, "float32", "spss_fast") for shape in GROWING]


@pytest.mark.parametrize("shape, case, provider", ROWS, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v)
def bench_uncertainty(measure, device, shape, case, provider):
    logits, keep = data(shape, case, device)
    (entropy, mask), (expected, _) = PROVIDERS[provider](logits, keep), plain(logits, keep)
    torch.testing.assert_close(entropy, expected, rtol=1e-3, atol=1e-4)
    assert mask.sum() == keep
    what = dict(operator="uncertainty", case=case, size="x".join(map(str, shape)), provider=provider,
                elements=mask.numel(), bytes=bytes_moved(logits))
    measure(lambda: PROVIDERS[provider](logits, keep), **what)
