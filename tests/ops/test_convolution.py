"""The minimal convolution: accuracy, determinism, where it is chosen, and errors that name the argument."""

import pytest
import torch
from torch.nn import functional as F

from spss_fast.nets import vnet
from spss_fast.nets.vnet import VNet
from spss_fast.ops import backend, convolve
from spss_fast.ops.backends import available
from spss_fast.ops.convolution import is_faster

COMPILED = pytest.mark.skipif(
    "cpu" not in available("convolution", "cpu"),
    reason="the extension is not built, or by a compiler that makes no code for FMA",
)


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def gradients(function, x, weight, upstream):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("shape", [(4, 16, 24, 24, 20), (2, 128, 6, 7, 5)])
def test_is_as_near_to_float64_as_torchs_own(shape):
    torch.manual_seed(0)
    x, upstream, weight = maps(*shape), maps(*shape), torch.randn(shape[1], shape[1], 3, 3, 3)
    exact = gradients(lambda *t: F.conv3d(*t, padding=1), x.double(), weight.double(), upstream.double())
    ours = gradients(convolve, x, weight, upstream)
    torchs = gradients(lambda *t: F.conv3d(*t, padding=1), x, weight, upstream)
    for actual, other, expected in zip(ours, torchs, exact):
        error, others = ((t - expected).norm() / expected.norm() for t in (actual, other))
        assert error < max(2 * others, 5e-7)


@COMPILED
def test_gives_the_same_bits_again_and_keeps_channels_last():
    torch.manual_seed(0)
    x, upstream, weight = maps(3, 16, 9, 7, 21), maps(3, 16, 9, 7, 21), torch.randn(16, 16, 3, 3, 3)
    first = gradients(convolve, x, weight, upstream)
    again = gradients(convolve, x.contiguous(), weight.contiguous(memory_format=torch.channels_last_3d), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert first[1].is_contiguous(memory_format=torch.channels_last_3d)


@COMPILED
def test_threads_change_no_more_than_the_order_of_the_filters_sums():
    torch.manual_seed(0)
    x, upstream, weight = maps(2, 8, 12, 10, 8), maps(2, 8, 12, 10, 8), torch.randn(8, 8, 3, 3, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            results.append(gradients(convolve, x, weight, upstream))
    finally:
        torch.set_num_threads(before)
    for y, dx, dweight in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])
        torch.testing.assert_close(dweight, results[0][2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(wanted):
    torch.manual_seed(0)
    x, upstream, weight = maps(1, 8, 4, 5, 6), maps(1, 8, 4, 5, 6), torch.randn(8, 8, 3, 3, 3)
    both = gradients(convolve, x, weight, upstream)[1:]
    leaves = [t.detach().requires_grad_(w) for t, w in zip((x, weight), wanted)]
    convolve(*leaves).backward(upstream)
    for leaf, of_both, w in zip(leaves, both, wanted):
        assert torch.equal(leaf.grad, of_both) if w else leaf.grad is None


def test_refuses_what_it_does_not_compute():
    x, weight = torch.zeros(1, 8, 4, 4, 4), torch.zeros(8, 8, 3, 3, 3)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x must be float32"),
        ((x, weight.half()), TypeError, "weight must be float32"),
        ((x[:, :7], weight), ValueError, "x must be"),
        ((x[0], weight), ValueError, "x must be"),
        ((x[..., :0], weight), ValueError, "x must have voxels"),
        ((x, weight[:, :4]), ValueError, "weight must be"),
    ):
        with pytest.raises(error, match=message):
            convolve(*arguments)


@COMPILED
def test_the_kernel_refuses_what_it_does_not_compute():
    with pytest.raises(TypeError, match="x must be float32"):
        torch.ops.spss_fast.convolve(torch.zeros(1, 8, 4, 4, 4).double(), torch.zeros(8, 8, 3, 3, 3).double())
    for axis in (2, 3, 4):
        x = torch.zeros(1, 8, 4, 4, 4).narrow(axis, 0, 0)
        with pytest.raises(ValueError, match="x must have voxels"):
            torch.ops.spss_fast.convolve(x, torch.zeros(8, 8, 3, 3, 3))


@pytest.fixture
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@COMPILED
def test_is_chosen_where_it_was_measured_to_be_faster(avx2, monkeypatch):
    x, weight = torch.zeros(4, 16, 16, 16, 16), torch.zeros(16, 16, 3, 3, 3)
    assert is_faster(x, weight)
    assert is_faster(x[:, :, :4, :4, :4], weight)  # 32 tiles
    assert not is_faster(x[:, :, :4, :4, :2], weight)  # so few that the filter's transform is most of it
    assert not is_faster(x.double(), weight.double())
    assert not is_faster(x.bfloat16(), weight.bfloat16())
    assert not is_faster(x[:, :8], weight[:, :8])  # to more channels
    assert not is_faster(x, weight[..., :2])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_faster(x, weight)
    with backend("reference"):
        assert not is_faster(x, weight)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not is_faster(x, weight)


@COMPILED
def test_the_v_net_takes_it_and_gives_what_it_gives_without(avx2, monkeypatch):
    torch.manual_seed(0)
    network = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d)
    x, taken = maps(2, 1, 32, 32, 32), []
    monkeypatch.setattr(vnet, "convolve", lambda x, weight: taken.append(x.shape[1]) or convolve(x, weight))
    with torch.no_grad():
        actual = network(x)
        monkeypatch.setattr(vnet, "is_faster", lambda x, weight: False)
        expected = network(x)
    # not the first convolution, of one channel, nor the deepest, of too few voxels
    assert taken == [16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 8]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
