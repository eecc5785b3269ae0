import torch

from operator_cases.case import Case
from spss_fast.ops import bias_leaky_relu

SHAPES = ((2, 8, 5, 6, 7), (3, 1, 9, 5), (2, 24, 3), (4, 70, 1, 1, 1), (1, 16, 60, 30), (0, 2, 3, 4))


def _make(shape, dtype, generator):
    sizes = shape, shape[1:2], shape
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def _with_sum(x, bias, added):
    return bias_leaky_relu(x, bias, added)


def _wide_bias_alone(x, bias, added):
    return bias_leaky_relu(x, bias.to(torch.promote_types(x.dtype, torch.float32)), slope=0.01) + 0 * added


def _raw(x, bias, added):
    forward, backward = torch.ops.spss_fast.bias_leaky_relu, torch.ops.spss_fast.bias_leaky_relu_backward
    return [
        (forward.default, (x, bias, added, 0.2)),
        (forward.default, (x, bias, None, 0.2)),
        (backward.default, (added.detach(), x.detach(), bias.detach(), 0.2)),
    ]


CASES = [
    Case("activation", f"bias_leaky_relu-{call.__name__.strip('_')}", call, _make, SHAPES,
         dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16), gradcheck_shape=(2, 3, 2, 2), raw=_raw)
    for call in (_with_sum, _wide_bias_alone)
]
