"""Bias, sum and leaky ReLU: sums over many programs, and errors that name the argument."""

import pytest
import torch
from devices import DEVICE
from torch.nn import functional as F

from spss_fast.ops import backend, bias_leaky_relu
from spss_fast.ops.backends import available

needs_triton = pytest.mark.skipif(
    "triton" not in available("activation", DEVICE), reason="Triton's interpreter is off, or Triton is not installed"
)


def results(name, x, bias):
    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    with backend(name):
        y = bias_leaky_relu(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_is_torchs_leaky_relu():
    torch.manual_seed(0)
    x, added, bias = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(3)
    shifted = x + bias[:, None, None]
    torch.testing.assert_close(bias_leaky_relu(x, bias), F.leaky_relu(shifted, 0.2))
    torch.testing.assert_close(bias_leaky_relu(x, bias, added, 0), F.relu(shifted + added))


@needs_triton
@pytest.mark.parametrize("programs", [6, 640])
def test_triton_programs_that_add_up_several_tiles_or_programs(programs, monkeypatch):
    from spss_fast.kernels import activation, planes

    monkeypatch.setattr(planes, "TILE", 64)
    monkeypatch.setattr(activation, "PROGRAMS", programs)
    torch.manual_seed(0)
    # 16 voxels a tile. Of 8 a volume each of its three programs adds up three; 44 programs are added up by 16s.
    x, bias = torch.randn(2, 3, 9, 13, dtype=torch.float64, device=DEVICE), torch.randn(3).to(DEVICE, torch.float64)
    x = x.repeat(1, 1, 1, 1 if programs == 6 else 3)
    for actual, expected in zip(results("triton", x, bias), results("reference", x, bias)):
        torch.testing.assert_close(actual, expected)


@needs_triton
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format_also_of_the_gradient(memory_format):
    x = torch.randn(2, 4, 6, 7, device=DEVICE).contiguous(memory_format=memory_format)
    y, dx, _ = results("triton", x, torch.zeros(4, device=DEVICE))
    assert y.is_contiguous(memory_format=memory_format) and dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.zeros(2, 3)), ValueError, r"^x must be \(B, C, \*spatial\)"),
    (dict(x=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "^x must be of a floating dtype"),
    (dict(bias=None), TypeError, "^bias must be a tensor"),
    (dict(bias=torch.zeros(4)), ValueError, r"^bias must be of shape \(3,\)"),
    (dict(bias=torch.zeros(3, dtype=torch.float64)), TypeError, "^bias must be float32, not"),
    (dict(x=torch.zeros(2, 3, 4).half(), bias=torch.zeros(3).bfloat16()), TypeError, "^bias must be float32 or float1"),
    (dict(added=torch.zeros(2, 3, 1)), ValueError, "^added must be of shape"),
    (dict(added=torch.zeros(2, 3, 4).half()), TypeError, "^added must be float32"),
    (dict(slope="steep"), TypeError, "^slope must be a number"),
    (dict(slope=-0.5), ValueError, "^slope must be a finite number of at least 0, not -0.5"),
    (dict(slope=float("nan")), ValueError, "^slope must be a finite number"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        bias_leaky_relu(**dict(x=torch.zeros(2, 3, 4), bias=torch.zeros(3)) | change)


@needs_triton
def test_the_raw_operator_refuses_a_negative_slope_too():
    x, bias = torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(3, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=r"^slope must be"):
        torch.ops.spss_fast.bias_leaky_relu(x, bias, None, -0.5)
