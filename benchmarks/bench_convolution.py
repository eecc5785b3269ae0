"""The V-Net's 3 x 3 x 3 convolutions against torch's own, which are oneDNN's: a GPU has no other here.

The sizes are those of the V-Net's levels at half resolution and width, and of LA's first two.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from spss_fast.ops import convolve
from spss_fast.ops.convolution import MULTIPLIES_BF16

SIZES = [
    (4, 8, 64, 64, 48), (4, 16, 32, 32, 24), (4, 32, 16, 16, 12), (4, 64, 8, 8, 6), (4, 16, 112, 112, 80),
    (4, 32, 56, 56, 40),
]
CASES = {"forward": False, "forward + backward": True}
PROVIDERS = {"spss_fast": convolve, "torch": functools.partial(F.conv3d, padding=1)}
# in float32 torch's own gradient of the weight errs by 1e-5 on CPUs with AVX-512
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], dtype: torch.dtype):
    """Maps as a training step has them: channels last."""
    torch.manual_seed(0)
    maps = [torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d) for _ in range(2)]
    weight = torch.randn(shape[1], shape[1], 3, 3, 3) / (27 * shape[1]) ** 0.5
    return [maps[0], weight.contiguous(memory_format=torch.channels_last_3d)], maps[1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def bench_convolution(measure, device, shape, name, case, provider):
    if device != "cpu":
        pytest.skip("on a GPU convolve is torch's own convolution")
    dtype = getattr(torch, name)
    if dtype == torch.bfloat16 and not MULTIPLIES_BF16:
        pytest.skip("without AVX512-BF16 convolve is torch's own convolution")
    inputs, upstream = data(shape, dtype)

    def run(by: str = provider):
        # torch multiplies weights of the maps' dtype, to which autocast casts them once an iteration
        leaves = leaves_of[by]
        y = PROVIDERS[by](*leaves)
        return torch.autograd.grad(y, leaves, upstream) if CASES[case] else [y]

    weights = {"spss_fast": inputs[1], "torch": inputs[1].to(dtype)}
    leaves_of = {by: [t.detach().requires_grad_(CASES[case]) for t in (inputs[0], w)] for by, w in weights.items()}
    for actual, expected in zip(run(), run("torch")):
        assert (actual - expected).norm() < TOLERANCE[name] * expected.norm()
    size = inputs[0].nbytes
    measure(run, operator="convolution", case=f"{case}, {name}", size="x".join(map(str, shape)), provider=provider,
            elements=inputs[0].numel() * shape[1], bytes=(6 if CASES[case] else 2) * size)
