"""How the kernels address (B, C, *spatial) tensors: three strides, as the spatial axes merge into one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def plane(voxel_0, c, stride):
    """The address of channel c, given that of channel 0: in 64 bits, as strides come in 32 where they fit."""
    return voxel_0 + tl.cast(c, tl.int64) * stride


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
