import functools

import torch

from operator_cases.case import Case
from spss_fast.ops import accumulate_softmax, uncertainty_mask

SHAPES = ((2, 2, 5, 6, 7), (3, 4, 9, 5), (1, 3, 300), (1, 1, 1, 1, 1), (0, 2, 4, 3, 4), (2, 2, 11, 12, 13))


def _accumulate(logits):
    total = torch.zeros_like(logits, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    accumulate_softmax(total, logits)
    accumulate_softmax(total, logits.flip(0))
    return total


def _logits(shape, dtype, generator):
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),)


def _total(shape, dtype, generator):
    logits = 3 * torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return (logits.softmax(2).sum(0).to(dtype),)


def _raw_accumulate(logits):
    return [(torch.ops.spss_fast.accumulate_softmax.default, (torch.ones_like(logits), logits))]


def _raw_mask(total):
    return [(torch.ops.spss_fast.uncertainty_mask.default, (total, 4, torch.tensor(9, device=total.device)))]


CASES = [
    Case("uncertainty", "accumulate_softmax", _accumulate, _logits, SHAPES,
         dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16), gradients=False, raw=_raw_accumulate),
    *(
        Case("uncertainty", f"uncertainty_mask-{keep}", functools.partial(uncertainty_mask, passes=4, keep=keep),
             _total, SHAPES, dtypes=(torch.float32, torch.float64), gradients=False, raw=_raw_mask)
        for keep in (0, 1, 37, 10**6)
    ),
]
