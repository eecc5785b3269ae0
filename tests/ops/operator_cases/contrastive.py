import functools

import torch

from operator_cases.case import Case
from spss_fast.ops import contrastive_loss, select_prototypes

CLASSES = 3
SHAPES = ((2, 20, 5, 6, 3), (3, 7, 9, 5), (1, 64, 4, 4, 4), (1, 2, 1, 1, 1), (1, 1, 40), (0, 4, 3, 2, 2))


def _logits(shape, generator, scale):
    """Integers, so that no gradient is asked of them; a coarse `scale` makes confidences equal."""
    return torch.randint(-500, 500, (shape[0], CLASSES, *shape[2:]), generator=generator) // scale * scale


def _make(shape, dtype, generator, scale):
    features = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return *features, _logits(shape, generator, 1), _logits(shape, generator, scale)


def _loss(a, b, n, logits_a, logits_n, k, bidirectional):
    return contrastive_loss(a, b, n, logits_a / 200, logits_n / 200, k, 0.07, bidirectional)


def _select(logits, dtype=torch.float32, unit=256):
    return select_prototypes((logits / unit).to(dtype), 11)


def _raw_loss(a, b, n, logits_a, logits_n):
    arguments = (a, b, n, logits_a / 200, logits_n / 200, 6, 0.07, True, True)
    return [(torch.ops.spss_fast.contrastive_loss.default, arguments)]


def _raw_select(logits):
    return [(torch.ops.spss_fast.select_prototypes.default, (logits / 256, 11))]


CASES = [
    *(
        Case(
            "contrastive", f"contrastive_loss-{'both' if both else 'one'}-{k}",
            functools.partial(_loss, k=k, bidirectional=both), functools.partial(_make, scale=1), SHAPES,
            dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
            gradcheck_shape=(1, 3, 3, 2, 2), raw=_raw_loss,
        )
        for both, k in ((True, 6), (False, 6), (True, 50), (True, 0))
    ),
    *(
        Case(
            "contrastive", f"select_prototypes-{name}", functools.partial(_select, dtype=dtype, unit=unit),
            lambda shape, _, generator, scale=scale: (_logits(shape, generator, scale),), SHAPES,
            dtypes=(torch.float32,), gradients=False, exact=True, raw=_raw_select,
        )
        for name, dtype, scale, unit in (
            ("distinct", torch.float32, 1, 256),
            # exp of the gap is 0: confidences are 1, 1/2 and 1/3 whatever the last bit of a device's exp
            ("ties", torch.float32, 500, 4), ("bfloat16", torch.bfloat16, 1, 256),
        )
    ),
]
