import functools

import torch

from operator_cases.case import Case
from spss_fast.ops import propagate

SETTINGS = {
    "method": dict(opening=5, closing=5, far_distance=10, far_iterations=5),
    "small": dict(opening=3, closing=3, far_distance=1, far_iterations=2),
    "identity": dict(opening=1, closing=1, far_distance=1, far_iterations=1),
}


def _make(shape, dtype, generator):
    """Annotated slices with several components, some of equal size, one slice empty; smooth flows with noise."""
    batch, depth, height, width = shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blob = ((y - height / 2) / (0.35 * height + 1)) ** 2 + ((x - width / 2) / (0.35 * width + 1)) ** 2 < 1
    specks = torch.rand(batch, height, width, generator=generator) > 0.9
    labels = (blob ^ specks).to(torch.uint8)
    labels[1:2] = 0
    labels[2:3, ::3, ::3] = 1  # isolated voxels: components of one size
    index = torch.randint(0, depth, (batch,), generator=generator)
    index[:1], index[-1:] = 0, depth - 1
    flows = []
    for _ in range(2):
        drift = torch.randn(batch, depth - 1, 2, 1, 1, generator=generator)
        noise = torch.randn(batch, depth - 1, 2, height, width, generator=generator)
        flows.append((drift + 0.3 * noise).to(dtype))
    return labels, index, *flows


def _raw(labels, index, flow_up, flow_down):
    return [(torch.ops.spss_fast.propagate.default, (labels, index, flow_up, flow_down, 5, 5, 2, 2))]


CASES = [
    Case(
        operator="propagate",
        name=f"propagate-{name}",
        call=functools.partial(propagate, **settings),
        make=_make,
        shapes=((3, 6, 17, 33), (2, 15, 40, 70), (1, 1, 5, 5), (2, 3, 1, 9), (0, 4, 6, 6), (1, 2, 1, 1), (1, 3, 8, 64)),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        gradients=False,
        exact=True,
        raw=_raw,
    )
    for name, settings in SETTINGS.items()
]
