import torch

from operator_cases.case import Case
from spss_fast.ops import batch_norm_relu

# odd sizes, one value a volume, more channels than a vector register holds, none that divides it, more than a segment
SHAPES = ((2, 8, 5, 6, 7), (3, 1, 9, 5), (2, 24, 3), (4, 70, 1, 1, 1), (1, 16, 20, 10, 9), (0, 2, 3, 4))


def _make(shape, dtype, generator):
    """x off centre; weights of both signs; a skip connection; running statistics and offset as integers,
    which ask no gradient."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64).to(compute) for _ in range(2))
    skip = torch.randn(shape, generator=generator, dtype=torch.float64)
    running = torch.randint(1, 9, (3, shape[1]), generator=generator)
    return x.to(dtype), weight, bias, skip.to(dtype), running


def _training(x, weight, bias, skip, running):
    mean, variance, offset = (row.clone() for row in running.to(weight.dtype))
    y = batch_norm_relu(x, weight, bias, mean, variance, True, 0.3, 1e-3, skip, offset)
    return y, mean, variance


def _inference(x, weight, bias, skip, running):
    mean, variance, offset = running.to(weight.dtype).unbind()
    return batch_norm_relu(x, weight, bias, mean, variance, False, offset=offset) + 0 * skip


def _raw(x, weight, bias, skip, running):
    mean, variance, _ = running.to(weight.dtype).unbind()
    detached = [t.detach() for t in (x, weight, bias)]
    forward, backward = torch.ops.spss_fast.batch_norm_relu, torch.ops.spss_fast.batch_norm_relu_backward
    return [
        (forward.default, (x, weight, bias, skip, None, None, 1e-5)),
        (forward.default, (x, weight, bias, None, mean, variance, 1e-5)),
        (backward.default, (skip.detach(), *detached, mean, variance, 1e-5, True)),
    ]


CASES = [
    Case("norm", f"batch_norm_relu-{call.__name__.strip('_')}", call, _make, SHAPES,
         dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16), gradcheck_shape=(2, 3, 2, 2), raw=_raw)
    for call in (_training, _inference)
]
