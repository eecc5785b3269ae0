"""Registration labels: one annotated slice carried through its volume by nearest warps and cleaned on the way.

Source: METHOD, stage 2, step 2. From the annotated slice z* outwards in both directions
``L(z +- 1) = post(warp_nearest(L(z), flow(x(z) -> x(z +- 1))))``, where post keeps the largest 8-connected component
and opens it with a cross; far from z* the opening is [erode, dilate] several times, then a closing with a square.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops.warp import reference as warp_reference


def _dilate(mask: Tensor, width: int, cross: bool) -> Tensor:
    reach = width // 2
    x = mask.float()[None]
    if cross:
        rows = F.max_pool2d(x, (width, 1), 1, (reach, 0))
        columns = F.max_pool2d(x, (1, width), 1, (0, reach))
        return torch.maximum(rows, columns)[0] > 0
    return F.max_pool2d(x, width, 1, reach)[0] > 0


def _erode(mask: Tensor, width: int, cross: bool) -> Tensor:
    return ~_dilate(~mask, width, cross)  # outside the slice counts as set, as in OpenCV


def _largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected component of a (H, W) mask; of equally large ones, the first in raster order."""
    height, width = mask.shape
    label = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float64).view(height, width) * mask
    while True:  # every voxel takes its neighbourhood's highest label until nothing changes
        spread = F.max_pool2d(label[None], 3, 1, 1)[0] * mask
        if torch.equal(spread, label):
            break
        label = spread
    if not mask.any():
        return mask
    names, counts = label[mask].unique(return_counts=True)
    best = names[counts == counts.max()]
    first = (label.flatten()[:, None] == best).nonzero()[0, 1]
    return label == best[first]


def _post(mask: Tensor, distance: int, opening: int, closing: int, far_distance: int, far_iterations: int) -> Tensor:
    mask = _largest_component(mask)
    times = 1 if distance <= far_distance else far_iterations
    for _ in range(times):
        mask = _erode(mask[None], opening, True)[0]
    for _ in range(times):
        mask = _dilate(mask[None], opening, True)[0]
    if distance > far_distance:
        mask = _erode(_dilate(mask[None], closing, False), closing, False)[0]
    return mask


def reference(
    labels: Tensor, index: Tensor, flow_up: Tensor, flow_down: Tensor,
    opening: int = 5, closing: int = 5, far_distance: int = 10, far_iterations: int = 5,
) -> Tensor:
    """The definition in plain PyTorch.

    ``labels`` (B, H, W) uint8/bool: the annotated slices. ``index`` (B,) int64: z* of each. ``flow_up`` and
    ``flow_down`` (B, D - 1, 2, H, W) in voxels: displacement [b, z] takes slice z to z + 1, respectively z + 1 to z.
    Returns uint8 (B, H, W, D). The annotated slice itself is returned as given.
    """
    batch, height, width = labels.shape
    depth = flow_up.shape[1] + 1
    out = torch.zeros(batch, height, width, depth, dtype=torch.uint8, device=labels.device)
    for i in range(batch):
        start = int(index[i])
        out[i, :, :, start] = labels[i] > 0
        for step, flows, stop in ((1, flow_up, depth), (-1, flow_down, -1)):
            current = labels[i] > 0
            for z in range(start + step, stop, step):
                flow = flows[i, min(z, z - step)]
                moved = warp_reference(current[None, None].to(flow.dtype), flow[None], "nearest")[0, 0] > 0.5
                current = _post(moved, abs(z - start), opening, closing, far_distance, far_iterations)
                out[i, :, :, z] = current
    return out


propagate = reference
