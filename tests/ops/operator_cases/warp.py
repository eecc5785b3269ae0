import functools

import torch

from operator_cases.case import Case
from spss_fast.ops import integrate, warp

SHAPES = (
    (2, 3, 5, 6, 7), (1, 1, 1, 1, 1), (0, 2, 4, 3, 4), (2, 0, 3, 4, 2), (2, 1, 3, 4, 1), (3, 2, 9, 5), (1, 1, 1, 7),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _make(shape, dtype, generator):
    batch, channels, *spatial = shape
    image = torch.randn(batch, channels, *spatial, generator=generator, dtype=torch.float64).to(dtype)
    reach = 0.4 * max(spatial)
    displacement = reach * torch.randn(batch, len(spatial), *spatial, generator=generator, dtype=torch.float64)
    return image, displacement.to(torch.float64 if dtype == torch.float64 else torch.float32)


def _velocity(shape, dtype, generator):
    batch, _, *spatial = shape
    return (2 * torch.randn(batch, len(spatial), *spatial, generator=generator, dtype=torch.float64).to(dtype),)


def _raw(mode, padding):
    def calls(image, displacement):
        arguments = (image.detach(), displacement.detach(), mode, padding)
        forward = (torch.ops.spss_fast.warp.default, (image, displacement, mode, padding))
        return [forward, (torch.ops.spss_fast.warp_backward.default, (image.detach(), *arguments, True, True)),
                (torch.ops.spss_fast.warp_backward.default, (image.detach(), *arguments, False, True))]

    return calls


CASES = [
    Case(
        operator="warp",
        name=f"warp-{mode}-{padding}",
        call=functools.partial(warp, mode=mode, padding=padding),
        make=_make,
        shapes=SHAPES,
        dtypes=DTYPES,
        gradcheck_shape=(1, 2, 3, 4, 3) if mode == "bilinear" else None,
        raw=_raw(mode, padding),
    )
    for mode in ("bilinear", "nearest")
    for padding in ("zeros", "border")
] + [
    Case(
        operator="warp",
        name="integrate",
        call=functools.partial(integrate, steps=2),
        make=_velocity,
        shapes=SHAPES,
        gradcheck_shape=(1, 2, 3, 4),
    )
]
