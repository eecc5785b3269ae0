"""Batch norm, ReLU and skip connection in one operator against torch's own, one after the other, eager and compiled.

The sizes are the V-Net's first level, as a step of LA sees it and at half resolution and half width.
"""

from __future__ import annotations

import functools

import pytest
import torch

from spss_fast.ops import batch_norm_relu
from spss_fast.ops.norm import reference

SIZES = [(4, 16, 112, 112, 80), (4, 8, 64, 64, 48)]
CASES = {"forward": False, "forward + backward": True}
PROVIDERS = {
    "spss_fast": batch_norm_relu, "eager": reference, "eager compiled": torch.compile(reference, dynamic=False),
}


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], device: str):
    """Feature maps as a training step in mixed precision has them: bfloat16, channels last."""
    torch.manual_seed(0)
    maps = [torch.randn(shape).to(device, torch.bfloat16, memory_format=torch.channels_last_3d) for _ in range(3)]
    weight, bias = (torch.rand(shape[1], device=device) for _ in range(2))
    return [*maps[:2], weight, bias], maps[2]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def bench_norm(measure, device, shape, case, provider):
    inputs, upstream = data(shape, device)
    leaves = [tensor.detach().requires_grad_(CASES[case]) for tensor in inputs]
    mean, variance = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    def run(function=PROVIDERS[provider]):
        x, skip, weight, bias = leaves
        y = function(x, weight, bias, mean, variance, True, skip=skip)
        return torch.autograd.grad(y, leaves, upstream) if CASES[case] else [y]

    for actual, expected in zip(run(), run(reference)):
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2e-2  # bfloat16 keeps 8 bits, and torch's order of sums is another
    size = inputs[0].nbytes
    # forward: x twice, skip, y; backward: x and the gradient twice, dx
    measure(run, operator="norm", case=case, size="x".join(map(str, shape)), provider=provider,
            elements=inputs[0].numel(), bytes=4 * size + (5 * size if CASES[case] else 0))
