"""Filling the holes of label volumes (METHOD, stage 2, step 8)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from spss_fast.ops import backends, checks


def reference(labels: Tensor, classes: int) -> Tensor:
    """The definition of :func:`fill_holes` with SciPy's connected components."""
    filled = [_without_holes(label, classes) for label in labels.cpu().numpy()]
    return torch.from_numpy(np.stack(filled)).to(labels.device) if filled else labels.clone()


def _without_holes(label: np.ndarray, classes: int) -> np.ndarray:
    background, filled = label == 0, label.copy()
    tightest = np.full(label.shape, label.size)  # voxels of the smallest enclosure around each voxel so far
    for c in range(1, classes if label.size else 1):
        regions, _ = ndimage.label(label != c)
        faces = [np.take(regions, end, axis) for axis in range(label.ndim) for end in (0, -1)]
        sizes = np.bincount(regions.ravel())
        sizes[np.unique(np.concatenate([face.ravel() for face in faces]))] = label.size  # open
        sizes[0] = label.size  # the class itself
        size = sizes[regions]
        tighter = background & (size < tightest)
        filled[tighter], tightest[tighter] = c, size[tighter]
    return filled


def fill_holes(labels: Tensor, classes: int) -> Tensor:
    """Fill the 3-D holes of each class of label volumes: a copy.

    A hole of a class is background that no path of face neighbours joins to the border but through that class. Other
    classes within it stay, and background that several classes enclose goes to the one that encloses it most tightly,
    with the fewest voxels; of equals, to the first.

    Args:
        labels: (L, H, W, D) uint8 in [0, C). On a GPU, where the CUDA operators are built, nothing is waited for;
            elsewhere copies on the CPU are filled.
        classes: C.

    Returns:
        uint8 of the same shape, contiguous.

    Raises:
        TypeError: ``labels`` is no tensor of uint8, or ``classes`` no integer.
        ValueError: another number of dimensions, ``classes`` < 1, or, on a GPU, 2**31 - 1 voxels or more a volume.
    """
    checks.is_tensor("labels", labels, torch.uint8)
    if labels.ndim != 4:
        raise ValueError(f"labels must be (L, H, W, D), not of shape {tuple(labels.shape)}")
    checks.is_count("classes", classes, 1)
    if backends.use_host("fill_holes", labels):
        return torch.ops.spss_fast.fill_holes(labels.cpu(), classes).to(labels.device)
    if backends.use_reference("fill_holes", labels):
        return reference(labels, classes)
    return torch.ops.spss_fast.fill_holes(labels, classes)


@torch.library.register_fake("spss_fast::fill_holes")
def _(labels: Tensor, classes: int) -> Tensor:
    return labels.new_empty(labels.shape)
