import functools

import torch

from operator_cases.case import Case
from spss_fast.ops import masked_ce_dice, weighted_ce_dice

SHAPES = ((2, 2, 5, 6, 7), (3, 4, 9, 5), (1, 3, 300), (1, 2, 1, 1, 1), (2, 2, 9, 10, 13))


def _make(shape, dtype, generator):
    """The weights are integers, so that no gradient is asked of them."""
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    voxels = (shape[0], *shape[2:])
    target = torch.randint(0, shape[1], voxels, generator=generator)
    return logits.to(dtype), target, torch.randint(1, 100, voxels, generator=generator)


def _masked(logits, target, weight, ce_input, below):
    return masked_ce_dice(logits, target, weight < below, ce_input)


def _weighted(logits, target, weight):
    return weighted_ce_dice(logits, target, weight / 50)


def _raw_masked(logits, target, weight):
    mask, detached = weight < 50, logits.detach()
    _, sums = torch.ops.spss_fast.masked_ce_dice(detached, target, mask, True)
    return [
        (torch.ops.spss_fast.masked_ce_dice.default, (logits, target, mask, True)),
        (torch.ops.spss_fast.masked_ce_dice_backward.default,
         (torch.tensor([1.0, 2.0, 3.0], device=logits.device), detached, target, mask, sums, True)),
    ]


def _raw_weighted(logits, target, weight):
    weight, detached = weight / 50, logits.detach()
    _, sums = torch.ops.spss_fast.weighted_ce_dice(detached, target, weight)
    return [
        (torch.ops.spss_fast.weighted_ce_dice.default, (logits, target, weight)),
        (torch.ops.spss_fast.weighted_ce_dice_backward.default,
         (torch.tensor([1.0, 2.0], device=logits.device), detached, target, weight, sums)),
    ]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    *(
        Case("losses", f"masked_ce_dice-{ce_input}-{below}",
             functools.partial(_masked, ce_input=ce_input, below=below), _make, (*SHAPES, (2, 1, 3, 4), (0, 2, 3, 4)),
             dtypes=DTYPES, gradcheck_shape=(2, 3, 2, 3), raw=_raw_masked)
        for ce_input in ("probabilities", "logits")
        for below in (40, 0, 1000)  # some voxels, none, all
    ),
    Case("losses", "weighted_ce_dice", _weighted, _make, (*SHAPES, (0, 2, 3, 4)), dtypes=DTYPES,
         gradcheck_shape=(2, 3, 2, 3), raw=_raw_weighted),
]
