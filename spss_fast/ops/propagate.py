"""Registration labels: one annotated slice carried through its volume by nearest warps and cleaned on the way.

Source: METHOD, stage 2, step 2. From the annotated slice z* outwards in both directions
``L(z +- 1) = post(warp_nearest(L(z), flow(x(z) -> x(z +- 1))))``, where post keeps the largest 8-connected component
and opens it with a cross; far from z* the opening is [erode, dilate] several times, then a closing with a square.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spss_fast.ops import backends
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
    """The definition in plain PyTorch."""
    batch, height, width = labels.shape
    depth = flow_up.shape[1] + 1
    out = torch.zeros(batch, height, width, depth, dtype=torch.uint8, device=labels.device)
    for i in range(batch if out.numel() else 0):
        start = int(index[i])
        if not 0 <= start < depth:
            raise ValueError(f"index must lie in [0, {depth}), not {start}")
        out[i, :, :, start] = labels[i] > 0
        for step, flows, stop in ((1, flow_up, depth), (-1, flow_down, -1)):
            current = labels[i] > 0
            for z in range(start + step, stop, step):
                flow = flows[i, min(z, z - step)]
                moved = warp_reference(current[None, None].to(flow.dtype), flow[None], "nearest")[0, 0] > 0.5
                current = _post(moved, abs(z - start), opening, closing, far_distance, far_iterations)
                out[i, :, :, z] = current
    return out


def _check(labels, index, flow_up, flow_down, opening, closing, far_distance, far_iterations) -> None:
    tensors = {"labels": labels, "index": index, "flow_up": flow_up, "flow_down": flow_down}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.device != labels.device:
            raise ValueError(f"{name} is on {tensor.device}, but labels on {labels.device}")
    if labels.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"labels must be uint8 or bool, not {labels.dtype}")
    if labels.ndim != 3:
        raise ValueError(f"labels must be (B, H, W), not of shape {tuple(labels.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, not {index.dtype}")
    if tuple(index.shape) != (labels.shape[0],):
        raise ValueError(f"index must be of shape ({labels.shape[0]},), not {tuple(index.shape)}")
    if not flow_up.is_floating_point():
        raise TypeError(f"flow_up must be of a floating dtype, not {flow_up.dtype}")
    if flow_down.dtype != flow_up.dtype:
        raise TypeError(f"flow_down must be of flow_up's dtype {flow_up.dtype}, not {flow_down.dtype}")
    batch, height, width = labels.shape
    if flow_up.ndim != 5 or tuple(flow_up.shape) != (batch, flow_up.shape[1], 2, height, width):
        raise ValueError(
            f"flow_up must be (B, D - 1, 2, H, W) with B, H, W = {batch}, {height}, {width}, not {tuple(flow_up.shape)}"
        )
    if flow_down.shape != flow_up.shape:
        raise ValueError(f"flow_down must be of flow_up's shape {tuple(flow_up.shape)}, not {tuple(flow_down.shape)}")
    for name, value in (("opening", opening), ("closing", closing)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{name} must be odd and positive, not {value}")
    for name, value in (("far_distance", far_distance), ("far_iterations", far_iterations)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, not {value}")


def propagate(
    labels: Tensor, index: Tensor, flow_up: Tensor, flow_down: Tensor,
    opening: int = 5, closing: int = 5, far_distance: int = 10, far_iterations: int = 5,
) -> Tensor:
    """The whole slice chains of a batch of volumes, both directions, in one call (on a GPU: one launch, or copies on
    the CPU where the CUDA operators are not built).

    Args:
        labels: (B, H, W) uint8 or bool, the annotated slices; what is > 0 is foreground.
        index: (B,) int64, z* of each volume, in [0, D). The CUDA operator does not read it on the host: a volume whose
            index is out of range comes back empty there.
        flow_up: (B, D - 1, 2, H, W) floating, in voxels: displacement [b, z] takes slice z to z + 1.
        flow_down: the same shape and dtype: displacement [b, z] takes slice z + 1 to z. Half types are read as they
            are and computed with in float32.
        opening: width of the cross that opens a slice, odd; 1 leaves it as it is.
        closing: width of the square that closes far slices, odd; 1 leaves them as they are.
        far_distance: slices further than this from z* count as far.
        far_iterations: on far slices the opening is so many erosions, then as many dilations.

    Returns:
        uint8 (B, H, W, D), 0 or 1; slice z* is the annotation itself. Of equally large components the first in raster
        order is kept; an empty slice stays empty to its end of the volume. There are no gradients.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    settings = (opening, closing, far_distance, far_iterations)
    _check(labels, index, flow_up, flow_down, *settings)
    if backends.use_host("propagate", labels):
        tensors = (tensor.cpu() for tensor in (labels, index, flow_up, flow_down))
        return torch.ops.spss_fast.propagate(*tensors, *settings).to(labels.device)
    if backends.use_reference("propagate", labels):
        if flow_up.dtype in (torch.bfloat16, torch.float16):
            flow_up, flow_down = flow_up.float(), flow_down.float()
        return reference(labels, index, flow_up, flow_down, *settings)
    return torch.ops.spss_fast.propagate(labels, index, flow_up, flow_down, *settings)


@torch.library.register_fake("spss_fast::propagate")
def _(labels, index, flow_up, flow_down, opening, closing, far_distance, far_iterations):
    batch, height, width = labels.shape
    return labels.new_empty((batch, height, width, flow_up.shape[1] + 1), dtype=torch.uint8)
