"""A level of the registration net's decoder: accuracy, determinism, where it is chosen, errors that name arguments."""

import pytest
import torch
from operator_cases.case import arrange
from threads import by_threads
from torch.nn import functional as F

from spss_fast.nets import regnet
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.ops import backend, convolution, convolve_upsampled
from spss_fast.ops.backends import available
from spss_fast.ops.upsampling import is_faster, reference

COMPILED = pytest.mark.skipif(
    "cpu" not in available("convolution", "cpu"),
    reason="the extension is not built, or by a compiler that makes no code for FMA",
)
BF16 = pytest.mark.skipif(not convolution.MULTIPLIES_BF16, reason="this CPU does not multiply bfloat16")
# (B, I, S, O, H, W): pixels of no whole tile, a single one, several bands of rows
SIZES = [
    (2, 16, 2, 16, 5, 7), (1, 32, 16, 32, 17, 4), (3, 16, 6, 48, 1, 1), (1, 32, 32, 32, 8, 3), (2, 16, 16, 16, 2, 33),
]


def _inputs(b, i, s, o, h, w, dtype=torch.float32, layout="channels_last"):
    torch.manual_seed(0)
    x, skip = torch.randn(b, i, h, w), torch.randn(b, s, 2 * h, 2 * w)
    weight = arrange(torch.randn(o, i + s, 3, 3) / (9 * (i + s)) ** 0.5, layout)
    return *(arrange(t.to(dtype), layout) for t in (x, skip)), weight, torch.randn(o)


def _gradients(function, inputs, upstream):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def _linear(x, skip, weight, bias, slope=1.0):
    """At a slope of one: another rounding of what is near zero is no other gradient then."""
    both = torch.cat([F.interpolate(x, scale_factor=2), skip], 1)
    return F.leaky_relu(F.conv2d(both, weight, bias, padding=1), slope)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), pytest.param(torch.bfloat16, 7e-3, marks=BF16)])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels_last"])
@pytest.mark.parametrize("sizes", SIZES)
def test_is_as_near_to_float64_as_its_dtype_allows(sizes, layout, dtype, error):
    inputs = _inputs(*sizes, dtype, layout)
    upstream = torch.randn(sizes[0], sizes[3], 2 * sizes[4], 2 * sizes[5]).to(dtype)
    ours = _gradients(lambda *t: convolve_upsampled(*t, 1.0), inputs, upstream)
    exact = _gradients(_linear, [t.double() for t in inputs], upstream.double())
    assert [t.dtype for t in ours] == [dtype, dtype, dtype, torch.float32, torch.float32]
    for actual, expected in zip(ours, exact):
        assert (actual - expected).norm() < error * expected.norm()


@BF16
@COMPILED
def test_is_exact_where_nothing_is_rounded():
    """Whole numbers so small that every sum is one that bfloat16 holds."""
    torch.manual_seed(0)
    sizes = (2, 16, 9, 6), (2, 2, 18, 12), (2, 16, 18, 12)
    x, skip, upstream = (torch.randint(-1, 2, size).bfloat16() for size in sizes)
    weight = torch.randint(-1, 2, (16, 18, 3, 3)) * (torch.rand(16, 18, 1, 1) < 0.1).float()
    inputs = x, skip, weight, torch.randint(-1, 2, (16,)).float()
    ours = _gradients(lambda *t: convolve_upsampled(*t, 1.0), inputs, upstream)
    for actual, expected in zip(ours, _gradients(_linear, [t.double() for t in inputs], upstream.double())):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_activates_by_the_slope(slope):
    inputs, upstream = _inputs(1, 16, 2, 16, 3, 4), torch.randn(1, 16, 6, 8)
    ours = _gradients(lambda *t: convolve_upsampled(*t, slope), inputs, upstream)
    for actual, expected in zip(ours, _gradients(lambda *t: _linear(*t, slope), inputs, upstream)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_gives_the_same_result_by_any_number_of_threads_and_the_same_bits_by_the_same(dtype):
    inputs, upstream = _inputs(3, 32, 2, 16, 40, 31, dtype), torch.randn(3, 16, 80, 62).to(dtype)
    results = by_threads(lambda: _gradients(convolve_upsampled, inputs, upstream))
    for other in results[1:]:
        for name, actual, expected in zip(("y", "x", "skip", "weight", "bias"), other, results[0]):
            if name == "weight":  # whose sums go by threads
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
            else:
                assert torch.equal(actual, expected), name
    again = _gradients(convolve_upsampled, inputs, upstream), _gradients(convolve_upsampled, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(*again))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[0][:3])


@COMPILED
def test_leaves_out_the_gradient_of_a_skip_connection_that_nobody_wants():
    x, skip, weight, bias = _inputs(1, 16, 2, 16, 3, 4)
    y = convolve_upsampled(x, skip, weight, bias)
    given = torch.randn_like(y), y, x, skip, weight, 0.2
    with_skip, without = (torch.ops.spss_fast.convolve_upsampled_backward(*given, wanted) for wanted in (True, False))
    assert with_skip[1].shape == skip.shape and without[1].numel() == 0
    assert all(torch.equal(with_skip[i], without[i]) for i in (0, 2, 3))


@COMPILED
def test_the_raw_gradient_refuses_a_result_of_other_maps():
    x, skip, weight, bias = _inputs(2, 16, 2, 16, 3, 4)
    y = convolve_upsampled(x, skip, weight, bias)
    backward = torch.ops.spss_fast.convolve_upsampled_backward
    for wrong in (y[:1], y[..., 1:], y[:, :8], y.double(), y[0]):  # which grad is alike
        with pytest.raises((ValueError, TypeError), match="y must be"):
            backward(wrong, wrong, x, skip, weight, 0.2, True)


def test_refuses_what_it_does_not_compute():
    x, skip, weight, bias = _inputs(1, 16, 2, 16, 3, 4)
    for arguments, error, message in (
        ((x.double(), skip, weight, bias), TypeError, "x must be float32 or bfloat16"),
        ((x, skip.bfloat16(), weight, bias), TypeError, "skip must be float32"),
        ((x, skip, weight.bfloat16(), bias), TypeError, "weight must be float32"),
        ((x, skip, weight, bias.half()), TypeError, "bias must be float32"),
        ((x[:, :8], skip, weight, bias), ValueError, "x must be .* a multiple of 16"),
        ((x[0], skip, weight, bias), ValueError, "x must be"),
        ((x[..., :0], skip, weight, bias), ValueError, "x must be .* with pixels"),
        ((x, skip[:, :1], weight, bias), ValueError, "skip must be .* a multiple of 2"),
        ((x, skip[..., 1:], weight, bias), ValueError, "skip must be"),
        ((x, skip, weight[:8], bias), ValueError, "weight must be .* O a multiple of 16"),
        ((x, skip, weight[:, :16], bias), ValueError, "weight must be"),
        ((x, skip, weight, bias[:1]), ValueError, "bias must be"),
        ((x, skip, weight, bias, -1.0), ValueError, "slope must be"),
    ):
        with pytest.raises(error, match=message):
            convolve_upsampled(*arguments)
        if "cpu" in available("convolution", "cpu"):
            with pytest.raises(error, match="must"):
                torch.ops.spss_fast.convolve_upsampled(*arguments, *(() if len(arguments) == 5 else (0.2,)))


@COMPILED
def test_is_chosen_where_it_was_measured_to_be_faster(monkeypatch):
    x, skip, weight, _ = _inputs(1, 16, 2, 16, 3, 4)
    for bf16, amx, chosen in ((False, False, False), (True, False, True), (True, True, False)):
        monkeypatch.setattr(convolution, "MULTIPLIES_BF16", bf16)
        monkeypatch.setattr(convolution, "HAS_AMX", amx)
        assert is_faster(x, skip, weight) == is_faster(x.bfloat16(), skip.bfloat16(), weight) == chosen
    monkeypatch.setattr(convolution, "HAS_AMX", False)
    wide = weight.repeat(2, 1, 1, 1)
    assert is_faster(x.bfloat16(), skip, wide) and not is_faster(x, skip, wide)
    assert not is_faster(x.half(), skip, weight) and not is_faster(x, skip[..., :7], weight)
    assert not is_faster(x[:, :8], skip, weight) and not is_faster(x, skip[:, :1], weight)
    with backend("reference"):
        assert not is_faster(x, skip, weight)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_the_registration_net_takes_it_and_learns_the_same(dtype, monkeypatch):
    torch.manual_seed(0)
    network = RegistrationNet().to(dtype)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    pair, taken, results = torch.randn(2, 3, 1, 32, 32).to(dtype), [], []
    monkeypatch.setattr(regnet, "convolve_upsampled", lambda *t: taken.append(1) or convolve_upsampled(*t))
    for chosen in (True, False):
        monkeypatch.setattr(regnet, "is_faster_upsampled", lambda *t, chosen=chosen: chosen)
        displacement = network(*pair)
        gradients = torch.autograd.grad(displacement.square().mean(), list(network.parameters()))
        results.append([displacement.detach(), *gradients])
    assert len(taken) == 4
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype
        error = 2e-5 if dtype == torch.float32 else 4e-2
        assert (actual - expected).norm() <= error * expected.norm() + 1e-6


def test_autocast_changes_nothing():
    x, skip, weight, bias = _inputs(1, 16, 2, 16, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve_upsampled(x, skip, weight, bias)
    torch.testing.assert_close(y, reference(x, skip, weight, bias), rtol=1e-5, atol=1e-5)
