"""warp against MONAI's Warp, a VoxelMorph-style grid with F.grid_sample, and the same compiled."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch.nn import functional as F

from spss_fast.ops import backend, warp
from spss_fast.ops.backends import active, available

MAIN = (4, 1, 112, 112, 80)
LARGE = (8, 2, 256, 256, 256)  # GPU only
# all larger than the caches of today's CPUs: below that, cost grows faster than voxels until they are full
GROWING = [MAIN, (4, 1, 112, 112, 160), (8, 1, 112, 112, 160), (16, 1, 112, 112, 160)]
CASES = {"forward": (False, False), "forward + backward": (False, True), "forward + both backward": (True, True)}


@functools.lru_cache(maxsize=1)
def data(shape: tuple[int, ...], device: str):
    """A noise image and a smooth displacement of a few voxels, as registration networks make them."""
    torch.manual_seed(0)
    coarse = [max(side // 14, 2) for side in shape[2:]]
    displacement = F.interpolate(3 * torch.randn(shape[0], 3, *coarse), size=shape[2:], mode="trilinear")
    return torch.randn(shape).to(device), displacement.to(device)


class GridWarp(torch.nn.Module):
    """The usual spatial transformer: identity grid plus displacement, normalised, channels last, F.grid_sample."""

    def __init__(self, size: tuple[int, ...], device: str) -> None:
        super().__init__()
        grid = torch.stack(torch.meshgrid(*[torch.arange(side, dtype=torch.float32) for side in size], indexing="ij"))
        self.register_buffer("grid", grid[None].to(device))
        self.size = size

    def forward(self, moving, displacement):
        position = self.grid + displacement
        scaled = [2 * (position[:, i] / (side - 1) - 0.5) for i, side in enumerate(self.size)]
        return F.grid_sample(moving, torch.stack(scaled[::-1], -1), mode="bilinear", align_corners=True)


def make(provider: str, shape: tuple[int, ...], device: str):
    if provider == "monai":
        blocks = pytest.importorskip("monai.networks.blocks", reason="MONAI comes with the bench extra")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI says that it uses grid_sample, which is the point
            return blocks.Warp(mode="bilinear", padding_mode="zeros")
    if provider == "grid_sample":
        return GridWarp(shape[2:], device)
    if provider == "grid_sample compiled":
        torch.compiler.reset()  # of other sizes: they share the code, and a later one would get dynamic shapes
        return torch.compile(GridWarp(shape[2:], device), dynamic=False)
    return warp


def bytes_moved(shape: tuple[int, ...], case: str) -> int:
    image = 4 * torch.Size(shape).numel()
    displacement = 3 * image // shape[1]
    gradient = sum(size for size, wanted in zip((image, displacement), CASES[case]) if wanted)
    forward = 2 * image + displacement
    return forward + (2 * image + displacement + gradient if any(CASES[case]) else 0)


def rows() -> list[tuple[tuple[int, ...], str, str]]:
    peers = ["spss_fast", "monai", "grid_sample", "grid_sample compiled"]
    found = [(MAIN, case, provider) for case in CASES for provider in peers]
    growing = [shape for shape in GROWING if shape != MAIN]
    found += [(shape, case, "spss_fast") for shape in growing for case in ("forward", "forward + backward")]
    if torch.cuda.is_available():
        found += [(LARGE, case, provider) for case in CASES for provider in peers]
        others = [name for name in available("warp", "cuda") if name not in ("reference", active("warp", "cuda"))]
        found += [(shape, case, f"spss_fast {name}") for shape in (MAIN, LARGE) for case in CASES for name in others]
    return found


@pytest.mark.parametrize(
    "shape, case, provider", rows(), ids=lambda value: "x".join(map(str, value)) if type(value) is tuple else value
)
def bench_warp(measure, device, shape, case, provider):
    if shape == LARGE and device == "cpu":
        pytest.skip("the large size is for GPUs")
    image, displacement = data(shape, device)
    image_grad, displacement_grad = CASES[case]
    function = make(provider, shape, device)
    override = provider.removeprefix("spss_fast").strip() if provider.startswith("spss_fast ") else None

    def run():
        moving, shift = image.requires_grad_(image_grad), displacement.requires_grad_(displacement_grad)
        warped = function(moving, shift)
        if not (image_grad or displacement_grad):
            return warped
        return torch.autograd.grad(warped, [t for t in (moving, shift) if t.requires_grad], torch.ones_like(warped))

    expected = warp(image.detach(), displacement.detach())
    actual = function(image.detach(), displacement.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)  # their normalised grids cost digits
    channels = "" if shape[1] == 1 else f", {shape[1]} channels"  # they share a displacement: not one growth
    what = dict(operator="warp", case=case + channels, size="x".join(map(str, shape)), provider=provider,
                elements=torch.Size(shape).numel(), bytes=bytes_moved(shape, case))
    if override:
        with backend(override):
            measure(run, **what)
    else:
        measure(run, **what)
