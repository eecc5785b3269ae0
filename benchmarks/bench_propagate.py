"""propagate against the loop it replaces: per slice F.grid_sample, SimpleITK components, OpenCV morphology."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spss_fast.ops import propagate

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
    cv2 = pytest.importorskip("cv2", reason="OpenCV comes with the bench extra")
    import SimpleITK as sitk

    batch, height, width = labels.shape
    depth = flow_up.shape[1] + 1
    axes = [torch.arange(side, dtype=torch.float32, device=labels.device) for side in (height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (5, 5))
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (5, 5))
    out = np.zeros((batch, height, width, depth), np.uint8)

    def moved(current, flow):
        position = grid + flow
        normalised = torch.stack([2 * position[1] / (width - 1) - 1, 2 * position[0] / (height - 1) - 1], -1)
        moving = torch.from_numpy(current).to(labels.device, torch.float32)[None, None]
        warped = F.grid_sample(moving, normalised[None], "nearest", align_corners=True)[0, 0]
        return warped.to(torch.uint8).cpu().numpy()

    def clean(current, distance):
        components = sitk.ConnectedComponent(sitk.GetImageFromArray(current), True)
        current = sitk.GetArrayFromImage(sitk.RelabelComponent(components, sortByObjectSize=True) == 1)
        times = 1 if distance <= 10 else 5
        current = cv2.morphologyEx(current, cv2.MORPH_OPEN, cross, iterations=times)
        return current if distance <= 10 else cv2.morphologyEx(current, cv2.MORPH_CLOSE, square)

    for b, start in enumerate(index.tolist()):
        out[b, :, :, start] = labels[b].cpu().numpy()
        for step, flows, stop in ((1, flow_up, depth), (-1, flow_down, -1)):
            current = out[b, :, :, start].copy()
            for z in range(start + step, stop, step):
                current = clean(moved(current, flows[b, min(z, z - step)]), abs(z - start))
                out[b, :, :, z] = current
    return torch.from_numpy(out)


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
