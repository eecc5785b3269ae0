"""propagate against the loop it replaces: per slice F.grid_sample, SimpleITK components, OpenCV morphology."""

from __future__ import annotations

import pytest
import torch
from straightforward import slice_chain
from torch.nn import functional as F

from spss_fast.ops import propagate
from spss_fast.settings import RegistrationSettings

MAIN = (2, 112, 112, 80)
GROWING = [(1, 112, 112, 80), MAIN, (4, 112, 112, 80), (8, 112, 112, 80)]  # far slices cost more: keep their share
ROWS = [(MAIN, "slice loop"), *((shape, "spss_fast") for shape in reversed(GROWING))]


def data(shape: tuple[int, ...], device: str):
    """An ellipse a volume, its annotated slice a third of the way up, smooth flows of about a voxel."""
    batch, height, width, depth = shape
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ellipse = ((y - height / 2) / (0.22 * height)) ** 2 + ((x - 0.45 * width) / (0.16 * width)) ** 2 < 1
    labels = ellipse.to(torch.uint8)[None].repeat(batch, 1, 1)
    index = torch.full((batch,), depth // 3)
    flows = [
        F.interpolate(0.6 * torch.randn(batch * (depth - 1), 2, 7, 7), size=(height, width), mode="bilinear")
        .view(batch, depth - 1, 2, height, width).to(device)
        for _ in range(2)
    ]
    return labels.to(device), index.to(device), *flows


def slice_loop(labels, index, flow_up, flow_down):
    """The chain with this literature's tools; the flows are where the network left them."""
    pytest.importorskip("cv2", reason="OpenCV comes with the bench extra")

    def flow_of(volume: int, z: int, to: int) -> torch.Tensor:
        return (flow_up if to > z else flow_down)[volume, min(z, to)]

    return slice_chain(flow_of, labels, index, flow_up.shape[1] + 1, RegistrationSettings())


@pytest.mark.parametrize("shape, provider", ROWS, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v)
def bench_propagate(measure, device, shape, provider):
    arguments = data(shape, device)
    function = slice_loop if provider == "slice loop" else propagate
    ours, peer = propagate(*arguments).cpu().bool(), slice_loop(*arguments).bool()
    dice = 2 * (ours & peer).sum() / (ours.sum() + peer.sum())
    assert dice > 0.99 and ours.float().mean() > 0.02  # only positions that fall on a half may differ
    batch, height, width, depth = shape
    voxels = batch * height * width * depth
    measure(
        lambda: function(*arguments), operator="propagate", case="both directions", size="x".join(map(str, shape)),
        provider=provider, elements=voxels, bytes=voxels * (8 + 1) + batch * height * width,
    )
