import torch

from operator_cases.case import Case
from spss_fast.ops import convolve

# every number of channels; odd sides, sides of one voxel, lines of several parts, parts of a block, an empty batch
SHAPES = ((2, 8, 5, 6, 7), (1, 8, 3, 4, 65), (3, 16, 4, 1, 9), (2, 32, 1, 5, 2), (1, 64, 7, 2, 3), (2, 128, 3, 3, 1),
          (0, 8, 4, 4, 4))


def _make(shape, dtype, generator):
    """Outputs of about one, as after initialisation."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[1], shape[1], 3, 3, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), (weight / (27 * shape[1]) ** 0.5).to(dtype)


def _raw(x, weight):
    grad, given = torch.ones_like(x.detach()), [t.detach() for t in (x, weight)]
    backward = torch.ops.spss_fast.convolve_backward.default
    return [
        (torch.ops.spss_fast.convolve.default, (x, weight)),
        (backward, (grad, *given, True, True)), (backward, (grad, *given, False, True)),
        (backward, (grad, *given, True, False)),
    ]


CASES = [Case("convolution", "convolve", convolve, _make, SHAPES, dtypes=(torch.float32,), raw=_raw)]
