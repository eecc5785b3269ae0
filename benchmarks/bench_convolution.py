"""The networks' convolutions against torch's own, which are oneDNN's: a GPU has no other here.

The sizes are those of the V-Net's levels at half resolution and width, and of LA's first two, and of the registration
net's two largest levels, upwards and at the end of a level, and its last convolution for both. Of the image's
convolution and of the V-Net's upwards the forward pass alone is measured, as torch does the rest.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from spss_fast.ops import convolve, convolve_transposed, convolve_upsampled, flow_head
from spss_fast.ops.convolution import MULTIPLIES_BF16, reference

SIZES = [
    (4, 8, 64, 64, 48), (4, 16, 32, 32, 24), (4, 32, 16, 16, 12), (4, 64, 8, 8, 6), (4, 16, 112, 112, 80),
    (4, 32, 56, 56, 40), (16, 16, 64, 64), (16, 32, 32, 32), (32, 16, 112, 112), (32, 32, 56, 56),
]
LAST = {5: torch.channels_last_3d, 4: torch.channels_last}
CASES = {"forward": False, "forward + backward": True}
PROVIDERS = {"spss_fast": convolve, "torch": reference}
# ours, torch's, and the shapes of x and of the weight
FORWARD = {
    "image": (convolve, PROVIDERS["torch"], [
        ((4, 1, 64, 64, 48), (8, 1, 3, 3, 3)), ((4, 1, 112, 112, 80), (16, 1, 3, 3, 3)),
    ]),
    "transposed": (convolve_transposed, functools.partial(F.conv_transpose3d, stride=2), [
        ((4, 16, 32, 32, 24), (16, 8, 2, 2, 2)), ((4, 32, 16, 16, 12), (32, 16, 2, 2, 2)),
        ((4, 64, 8, 8, 6), (64, 32, 2, 2, 2)), ((4, 32, 56, 56, 40), (32, 16, 2, 2, 2)),
        ((4, 64, 28, 28, 20), (64, 32, 2, 2, 2)),
    ]),
}
# in float32 torch's own gradient of the weight errs by 1e-5 on CPUs with AVX-512
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def _maps(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Maps as a training step has them: channels last."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST[len(shape)])


def _dtype(device: str, name: str) -> torch.dtype:
    if device != "cpu":
        pytest.skip("on a GPU these are torch's own convolutions")
    dtype = getattr(torch, name)
    if dtype == torch.bfloat16 and not MULTIPLIES_BF16:
        pytest.skip("without AVX512-BF16 these are torch's own convolutions")
    return dtype


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    maps = [_maps(shape, dtype) for _ in range(2)]
    weight = _maps((shape[1], shape[1], *[3] * (len(shape) - 2)), torch.float32)
    return [maps[0], weight / weight[0].numel() ** 0.5], maps[1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def bench_convolution(measure, device, shape, name, case, provider):
    dtype = _dtype(device, name)
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
    what = ("" if len(shape) == 5 else "slices, ") + case
    measure(run, operator="convolution", case=f"{what}, {name}", size="x".join(map(str, shape)), provider=provider,
            elements=inputs[0].numel() * shape[1], bytes=(6 if CASES[case] else 2) * inputs[0].nbytes)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "kind, sizes", [(kind, sizes) for kind, (*_, of_kind) in FORWARD.items() for sizes in of_kind],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value[0])),
)
def bench_forward(measure, device, kind, sizes, name, provider):
    dtype = _dtype(device, name)
    torch.manual_seed(0)
    x, weight = _maps(sizes[0], dtype), _maps(sizes[1], torch.float32) / sizes[1][0] ** 0.5
    ours, torchs, _ = FORWARD[kind]
    rounded = weight.to(dtype)
    run = functools.partial(ours, x, weight) if provider == "spss_fast" else functools.partial(torchs, x, rounded)
    y, expected = run(), torchs(x, rounded)
    assert (y - expected).norm() < TOLERANCE[name] * expected.norm()
    measure(run, operator="convolution", case=f"{kind}, forward, {name}", size="x".join(map(str, sizes[0])),
            provider=provider, elements=y.numel() * sizes[1][1], bytes=x.nbytes + y.nbytes)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("shape", [(16, 16, 64, 64), (32, 16, 112, 112)], ids=lambda shape: "x".join(map(str, shape)))
def bench_flow_head(measure, device, shape, name, case, provider):
    dtype = _dtype(device, name)
    torch.manual_seed(0)
    x = _maps(shape, dtype)
    weight, bias = torch.randn(2, 16, 3, 3) / 12, torch.randn(2)
    upstream = torch.randn(shape[0], 2, *shape[2:])

    def run(by: str = provider):
        leaves = leaves_of[by]
        # torch's in the maps' dtype, and then the float32 that a warp takes
        y = flow_head(*leaves) if by == "spss_fast" else F.conv2d(*leaves, padding=1).float()
        return torch.autograd.grad(y, leaves, upstream) if CASES[case] else [y]

    inputs = {"spss_fast": (x, weight, bias), "torch": (x, weight.to(dtype), bias.to(dtype))}
    leaves_of = {by: [t.detach().requires_grad_(CASES[case]) for t in of_one] for by, of_one in inputs.items()}
    for actual, expected in zip(run(), run("torch")):
        assert (actual - expected).norm() < TOLERANCE[name] * expected.norm()
    measure(run, operator="convolution", case=f"flow head, {case}, {name}", size="x".join(map(str, shape)),
            provider=provider, elements=2 * x.numel(), bytes=(3 if CASES[case] else 1) * x.nbytes)


def _upsampled_by_torch(x, skip, weight, bias):
    """As a transposed convolution, whose kernel sums the taps that read the same pixel, and one of the skip connection:
    the fastest of torch's own."""
    coarse, beside = weight.split([x.shape[1], skip.shape[1]], 1)
    flipped = coarse.flip(2, 3).transpose(0, 1)
    kernel = sum(F.pad(flipped, (w, 1 - w, h, 1 - h)) for h in (0, 1) for w in (0, 1))
    y = F.conv_transpose2d(x, kernel, stride=2, padding=1) + F.conv2d(skip, beside, bias, padding=1)
    return F.leaky_relu_(y, 0.2)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "shape, skips, outputs",
    [((16, 32, 32, 32), 2, 16), ((16, 32, 16, 16), 16, 32), ((32, 32, 56, 56), 2, 16), ((32, 32, 28, 28), 16, 32)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def bench_upsampled(measure, device, shape, skips, outputs, name, case, provider):
    dtype = _dtype(device, name)
    torch.manual_seed(0)
    batch, inputs, h, w = shape
    large = batch, outputs, 2 * h, 2 * w
    x, skip, upstream = (_maps(size, dtype) for size in (shape, (batch, skips, 2 * h, 2 * w), large))
    weight = _maps((outputs, inputs + skips, 3, 3), torch.float32) / (9 * (inputs + skips)) ** 0.5
    bias = torch.randn(outputs)
    given = {"spss_fast": (x, skip, weight, bias), "torch": (x, skip, weight.to(dtype), bias.to(dtype))}
    wanted = [CASES[case], CASES[case] and skips > 2, CASES[case], CASES[case]]  # nobody differentiates the images
    leaves_of = {by: [t.detach().requires_grad_(w) for t, w in zip(of_one, wanted)] for by, of_one in given.items()}

    def run(by: str = provider):
        y = (convolve_upsampled if by == "spss_fast" else _upsampled_by_torch)(*leaves_of[by])
        return torch.autograd.grad(y, [t for t in leaves_of[by] if t.requires_grad], upstream) if CASES[case] else [y]

    for actual, expected in zip(run(), run("torch")):  # where a result's sign is rounded, so is all of its gradient
        assert (actual - expected).norm() < (6 if CASES[case] else 1) * TOLERANCE[name] * expected.norm()
    measure(run, operator="convolution", case=f"upsampled, {case}, {name}", size="x".join(map(str, large)),
            provider=provider, elements=skip[:, 0].numel() * outputs * (inputs + skips),
            bytes=(3 if CASES[case] else 1) * (x.nbytes + skip.nbytes + upstream.nbytes))
