"""The V-Net's 3 x 3 x 3 convolutions in float32 against torch's own, which are oneDNN's: a GPU has no other here.

The sizes are those of the V-Net's levels at half resolution and width, and of LA's first two.
"""

from __future__ import annotations

import functools

import pytest
import torch

from spss_fast.ops import convolve
from spss_fast.ops.convolution import reference

SIZES = [
    (4, 8, 64, 64, 48), (4, 16, 32, 32, 24), (4, 32, 16, 16, 12), (4, 64, 8, 8, 6), (4, 16, 112, 112, 80),
    (4, 32, 56, 56, 40),
]
CASES = {"forward": False, "forward + backward": True}
PROVIDERS = {"spss_fast": convolve, "torch": reference}


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...]):
    """Maps as a training step has them: channels last."""
    torch.manual_seed(0)
    maps = [torch.randn(shape).contiguous(memory_format=torch.channels_last_3d) for _ in range(2)]
    weight = torch.randn(shape[1], shape[1], 3, 3, 3) / (27 * shape[1]) ** 0.5
    return [maps[0], weight.contiguous(memory_format=torch.channels_last_3d)], maps[1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def bench_convolution(measure, device, shape, case, provider):
    if device != "cpu":
        pytest.skip("on a GPU convolve is torch's own convolution")
    inputs, upstream = data(shape)
    leaves = [tensor.detach().requires_grad_(CASES[case]) for tensor in inputs]

    def run(function=PROVIDERS[provider]):
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, upstream) if CASES[case] else [y]

    for actual, expected in zip(run(), run(reference)):
        assert (actual - expected).norm() < 1e-5 * expected.norm()
    size = inputs[0].nbytes
    measure(run, operator="convolution", case=case, size="x".join(map(str, shape)), provider=provider,
            elements=inputs[0].numel() * shape[1], bytes=(6 if CASES[case] else 2) * size)
