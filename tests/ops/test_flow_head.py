"""The registration net's last convolution: accuracy, determinism, where it is chosen, errors that name the argument."""

import pytest
import torch
from operator_cases.case import arrange
from threads import by_threads
from torch.nn import functional as F

from spss_fast.nets import regnet
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.ops import backend, convolution, flow_head
from spss_fast.ops.backends import available
from spss_fast.ops.flow_head import is_faster

COMPILED = pytest.mark.skipif(
    "cpu" not in available("convolution", "cpu"),
    reason="the extension is not built, or by a compiler that makes no code for FMA",
)


def _inputs(*shape, dtype=torch.float32, layout="channels_last"):
    torch.manual_seed(0)
    x = arrange(torch.randn(shape).to(dtype), layout)
    return x, torch.randn(2, 16, 3, 3), torch.randn(2)


def _gradients(function, inputs, upstream):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype, of_x", [(torch.float32, 3e-7), (torch.bfloat16, 1.8e-3)])
@pytest.mark.parametrize("sides", [(64, 64), (13, 7), (1, 5), (9, 1), (33, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels_last"])
def test_sums_are_float32_and_only_the_gradient_of_half_precision_is_rounded(sides, layout, dtype, of_x):
    inputs, upstream = _inputs(3, 16, *sides, dtype=dtype, layout=layout), torch.randn(3, 2, *sides)
    ours = _gradients(flow_head, inputs, upstream)
    exact = _gradients(lambda *t: F.conv2d(*t, padding=1), [t.double() for t in inputs], upstream.double())
    assert [t.dtype for t in ours] == [torch.float32, dtype, torch.float32, torch.float32]
    for actual, expected, error in zip(ours, exact, (5e-7, of_x, 2e-6, 2e-6)):
        assert (actual - expected).norm() < error * expected.norm()


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_the_same_bits_by_any_number_of_threads(dtype):
    inputs, upstream = _inputs(5, 16, 40, 31, dtype=dtype), torch.randn(5, 2, 40, 31)
    results = by_threads(lambda: _gradients(flow_head, inputs, upstream)[:3])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert results[0][0].is_contiguous() and results[0][1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_stays_so_and_what_is_does_not_become_so(value):
    x, weight, bias = _inputs(1, 16, 8, 8, dtype=torch.bfloat16)
    leaf = x.requires_grad_()
    upstream = torch.zeros(1, 2, 8, 8)
    upstream[0, 0, 4, 4] = value
    (gradient,) = torch.autograd.grad(flow_head(leaf, weight, bias), leaf, upstream)
    expected = torch.nn.grad.conv2d_input(x.shape, weight, upstream, padding=1).bfloat16()
    torch.testing.assert_close(gradient, expected, equal_nan=True)


def test_refuses_what_it_does_not_compute():
    x, weight, bias = _inputs(1, 16, 4, 4)
    for arguments, error, message in (
        ((x.double(), weight, bias), TypeError, "x must be float32 or bfloat16"),
        ((x, weight.bfloat16(), bias), TypeError, "weight must be float32"),
        ((x, weight, bias.half()), TypeError, "bias must be float32"),
        ((x[:, :8], weight, bias), ValueError, "x must be"),
        ((x[0], weight, bias), ValueError, "x must be"),
        ((x[..., :0], weight, bias), ValueError, "x must be .* with pixels"),
        ((x, weight[:1], bias), ValueError, "weight must be"),
        ((x, weight, bias[:1]), ValueError, "bias must be"),
    ):
        with pytest.raises(error, match=message):
            flow_head(*arguments)
    if "cpu" in available("convolution", "cpu"):
        with pytest.raises(ValueError, match="x must be"):
            torch.ops.spss_fast.flow_head(x[:, :8], weight, bias)


@COMPILED
def test_is_chosen_where_it_was_measured_to_be_faster(monkeypatch):
    x = torch.zeros(1, 16, 4, 4)
    for bf16, amx, chosen in ((False, False, False), (True, False, True), (True, True, False)):
        monkeypatch.setattr(convolution, "MULTIPLIES_BF16", bf16)
        monkeypatch.setattr(convolution, "HAS_AMX", amx)
        assert is_faster(x) == is_faster(x.bfloat16()) == chosen
    monkeypatch.setattr(convolution, "HAS_AMX", False)
    assert not is_faster(x.half()) and not is_faster(x[:, :8])
    with backend("reference"):
        assert not is_faster(x)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registration_net_takes_it_and_learns_the_same(dtype, monkeypatch):
    torch.manual_seed(0)
    network = RegistrationNet().to(dtype)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    pair, taken, results = torch.randn(2, 3, 1, 32, 32).to(dtype), [], []
    monkeypatch.setattr(regnet, "flow_head", lambda *inputs: taken.append(1) or flow_head(*inputs))
    for chosen in (True, False):
        monkeypatch.setattr(regnet, "is_faster", lambda x, chosen=chosen: chosen)
        displacement = network(*pair)
        gradients = torch.autograd.grad(displacement.square().mean(), list(network.parameters()))
        results.append([displacement.detach(), *gradients])
    assert len(taken) == 1
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype
        error = 2e-5 if dtype == torch.float32 else 2e-2
        assert (actual - expected).norm() <= error * expected.norm() + 1e-6
