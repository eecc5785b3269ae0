import torch

from operator_cases.case import Case
from spss_fast.ops import convolution, convolve, convolve_transposed, convolve_upsampled, flow_head

# every number of channels that are filtered, and a single one; odd sides, sides of one voxel, lines of several parts,
# parts of a block, an empty batch; volumes, and slices
SHAPES = ((2, 8, 5, 6, 7), (1, 8, 3, 4, 65), (3, 16, 4, 1, 9), (2, 32, 1, 5, 2), (1, 64, 7, 2, 3), (2, 128, 3, 3, 1),
          (0, 8, 4, 4, 4), (2, 1, 5, 6, 27), (1, 1, 3, 1, 2), (0, 1, 4, 4, 4),
          (1, 16, 3, 70), (3, 16, 9, 6), (2, 32, 1, 7), (1, 64, 4, 1), (1, 128, 3, 3), (0, 16, 4, 4))


def _make(shape, dtype, generator):
    """Outputs of about one, as after initialisation."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    outputs = 16 if shape[1] == 1 else shape[1]
    weight = torch.randn(outputs, shape[1], *[3] * (x.ndim - 2), generator=generator, dtype=torch.float64)
    return x.to(dtype), (weight / weight[0].numel() ** 0.5).to(dtype)


def _raw(x, weight):
    given = [t.detach() for t in (x, weight)]
    grad = torch.ones(len(x), len(weight), *x.shape[2:], dtype=x.dtype, device=x.device)
    backward = torch.ops.spss_fast.convolve_backward.default
    return [
        (torch.ops.spss_fast.convolve.default, (x, weight)),
        (backward, (grad, *given, True, True)), (backward, (grad, *given, False, True)),
        (backward, (grad, *given, True, False)),
    ]


# of one voxel and many a line, as the kernel takes several at once
TRANSPOSED_SHAPES = ((2, 16, 3, 4, 5), (1, 16, 2, 1, 31), (2, 32, 1, 5, 2), (1, 64, 3, 1, 7), (1, 128, 2, 2, 1),
                     (0, 16, 2, 2, 2))


def _make_transposed(shape, dtype, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[1], shape[1] // 2, 2, 2, 2, generator=generator, dtype=torch.float64)
    return x.to(dtype), (weight / shape[1] ** 0.5).to(dtype)


def _raw_transposed(x, weight):
    return [(torch.ops.spss_fast.convolve_transposed.default, (x, weight))]


# of one pixel and of several tiles and bands; an empty batch
UPSAMPLED_SHAPES = ((2, 16, 3, 6), (1, 32, 9, 5), (1, 16, 1, 1), (0, 16, 2, 2))


def _make_upsampled(shape, dtype, generator):
    batch, inputs, h, w = shape
    sizes = shape, (batch, 2, 2 * h, 2 * w), (16, inputs + 2, 3, 3), (16,)
    x, skip, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return x.to(dtype), skip.to(dtype), (weight / 18).float(), bias.float()


def _raw_upsampled(x, skip, weight, bias):
    y = torch.ops.spss_fast.convolve_upsampled(*(t.detach() for t in (x, skip, weight, bias)), 0.2)
    given = torch.ones_like(y), y, x.detach(), skip.detach(), weight.detach(), 0.2
    backward = torch.ops.spss_fast.convolve_upsampled_backward.default
    return [
        (torch.ops.spss_fast.convolve_upsampled.default, (x, skip, weight, bias, 0.2)),
        (backward, (*given, True)), (backward, (*given, False)),
    ]


# sides of one pixel, of no whole tile, of several bands of rows; an empty batch
FLOW_SHAPES = ((2, 16, 9, 6), (1, 16, 17, 20), (3, 16, 1, 1), (1, 16, 2, 33), (0, 16, 3, 4))


def _make_flow(shape, dtype, generator):
    sizes = shape, (2, shape[1], 3, 3), (2,)
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return x.to(dtype), (weight / 12).float(), bias.float()


def _raw_flow(x, weight, bias):
    grad = torch.ones(len(x), 2, *x.shape[2:], device=x.device)
    return [
        (torch.ops.spss_fast.flow_head.default, (x, weight, bias)),
        (torch.ops.spss_fast.flow_head_backward.default, (grad, x.detach(), weight.detach())),
    ]


CASES = [
    Case("convolution", "convolve", convolve, _make, SHAPES, dtypes=(torch.float32,), raw=_raw),
    Case("convolution", "convolve_transposed", convolve_transposed, _make_transposed, TRANSPOSED_SHAPES,
         dtypes=(torch.float32,), raw=_raw_transposed),
    Case("convolution", "convolve_upsampled", convolve_upsampled, _make_upsampled, UPSAMPLED_SHAPES,
         dtypes=(torch.float32,), raw=_raw_upsampled),
    Case("convolution", "flow_head", flow_head, _make_flow, FLOW_SHAPES, dtypes=convolution.DTYPES, raw=_raw_flow),
]
