import functools

import torch
from torch.nn import functional as F

from operator_cases.case import Case
from spss_fast.ops import fill_holes

# no interior, one voxel of it, a single slice, sides that no vector divides, a volume of noise, no volume
SHAPES = ((2, 2, 5, 4), (3, 3, 3, 3), (1, 6, 7, 1), (2, 9, 11, 13), (1, 20, 24, 40), (0, 3, 4, 5))


def _make(shape, dtype, generator):
    """Noise of five labels, smoothed so that the classes lie in shells and clumps; a third of the voxels alone."""
    noise = torch.randn(shape, generator=generator)
    smooth = F.avg_pool3d(F.pad(noise[:, None], (1,) * 6), 3, 1)[:, 0] * 3
    mixed = torch.where(torch.rand(shape, generator=generator) < 0.3, noise, smooth)
    return ((mixed * 1.5 + 1.5).clamp(0, 4).to(torch.uint8),)


def _raw(labels):
    return [(torch.ops.spss_fast.fill_holes.default, (labels, 5))]


CASES = [
    Case(operator="fill_holes", name=f"fill_holes-{classes}", call=functools.partial(fill_holes, classes=classes),
         make=_make, shapes=SHAPES, dtypes=(torch.float32,), gradients=False, exact=True, raw=_raw)
    for classes in (1, 2, 5)
]
