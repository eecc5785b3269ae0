"""Images that are smaller than what a network reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def padded(image: Tensor, least: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """``image`` in the middle of its own minimum, so that its last axes are at least ``least`` voxels long, as
    training's patches are; and the slices of those axes where it lies."""
    sides = image.shape[-len(least) :]
    missing = [max(0, need - side) for need, side in zip(least, sides)]
    inside = tuple(slice(m // 2, m // 2 + side) for m, side in zip(missing, sides))
    if any(missing):
        ends = [end for m in reversed(missing) for end in (m // 2, m - m // 2)]
        image = F.pad(image, ends, value=float(image.min()))
    return image, inside
