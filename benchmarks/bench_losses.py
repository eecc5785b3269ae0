"""The segmentation losses, forward and backward, against the same formulas in plain PyTorch, eager and compiled."""

from __future__ import annotations

import functools

import pytest
import torch

from spss_fast.ops import losses

MAIN = (4, 2, 112, 112, 80)
GROWING = [(4, 2, 14, 112, 80), (4, 2, 28, 112, 80), (4, 2, 56, 112, 80)]
CASES = {
    "masked_ce_dice": (losses.masked_ce_dice, losses.reference_masked_ce_dice),
    "weighted_ce_dice": (losses.weighted_ce_dice, losses.reference_weighted_ce_dice),
}
COMPILED = {case: torch.compile(reference) for case, (_, reference) in CASES.items()}
PROVIDERS = ("spss_fast", "eager", "eager compiled")
ROWS = [(MAIN, case, provider) for case in CASES for provider in PROVIDERS]
ROWS += [(shape, case, "spss_fast") for case in CASES for shape in GROWING]


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], case: str, device: str):
    torch.manual_seed(0)
    voxels = (shape[0], *shape[2:])
    weight = torch.rand(voxels).to(device)
    return (torch.randn(shape).to(device).requires_grad_(), torch.randint(0, shape[1], voxels).to(device),
            weight < 0.1 if case == "masked_ce_dice" else weight)


@pytest.mark.parametrize("shape, case, provider", ROWS, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v)
def bench_losses(measure, device, shape, case, provider):
    logits, target, weight = data(shape, case, device)
    fused, reference = CASES[case]
    function = {"spss_fast": fused, "eager": reference, "eager compiled": COMPILED[case]}[provider]

    def run(function=function):
        return torch.autograd.grad(sum(function(logits, target, weight)), logits)[0]

    torch.testing.assert_close(run(), run(reference), rtol=1e-3, atol=1e-9)
    # Logits, labels and weights are read forward and again backward, the gradient is written.
    moved = 2 * (logits.nbytes + target.nbytes + weight.nbytes) + logits.nbytes
    measure(run, operator="losses", case=case, size="x".join(map(str, shape)), provider=provider,
            elements=target.numel(), bytes=moved)
