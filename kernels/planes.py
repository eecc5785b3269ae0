"""How the kernels address (B, C, *spatial) tensors: three strides, as the spatial axes merge into one."""

from __future__ import annotations

from torch import Tensor


def merge(x: Tensor) -> Tensor:
    """``x`` as (B, C, voxels), a view for contiguous and channels-last tensors, a copy where axes do not merge."""
    return x.flatten(2)


def merges(x: Tensor) -> bool:
    """Whether :func:`merge` is a view."""
    expected = None
    for size, stride in reversed(list(zip(x.shape[2:], x.stride()[2:]))):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True
