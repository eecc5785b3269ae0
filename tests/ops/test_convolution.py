"""The networks' convolutions: accuracy, determinism, where it is chosen, and errors that name the argument."""

import copy

import pytest
import torch
from operator_cases.case import arrange
from operator_cases.convolution import SHAPES
from threads import by_threads
from torch.nn import functional as F

from spss_fast.nets import regnet, vnet
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet
from spss_fast.ops import backend, convolution, convolve, convolve_transposed
from spss_fast.ops.backends import available
from spss_fast.ops.convolution import (
    halve,
    is_faster,
    is_faster_halving,
    is_faster_on_slices,
    is_faster_transposed,
)

COMPILED = pytest.mark.skipif(
    "cpu" not in available("convolution", "cpu"),
    reason="the extension is not built, or by a compiler that makes no code for FMA",
)
BF16 = pytest.mark.skipif(
    "cpu" not in available("convolution", "cpu") or not convolution.MULTIPLIES_BF16,
    reason="the kernel for bfloat16 needs a CPU with AVX512-BF16",
)


LAST = {5: torch.channels_last_3d, 4: torch.channels_last}
# kinds of CPU, as `machine` takes them, and whether they choose what was measured on those with AVX512-BF16 alone
ONLY_WITH_AVX512_BF16 = (
    (("AVX2",), False), (("AVX512",), False), (("AVX512", True), True), (("AVX512", True, True), False),
)


def torchs(x, weight):
    """Torch's own convolution of volumes, or of slices."""
    return (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, padding=1)


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=LAST[len(shape)])


def gradients(function, x, weight, upstream):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("shape", [(4, 16, 24, 24, 20), (2, 128, 6, 7, 5), (16, 32, 32, 30)])
def test_is_as_near_to_float64_as_torchs_own(shape):
    torch.manual_seed(0)
    x, upstream, weight = maps(*shape), maps(*shape), torch.randn(shape[1], shape[1], *[3] * (len(shape) - 2))
    exact = gradients(torchs, x.double(), weight.double(), upstream.double())
    ours, others = gradients(convolve, x, weight, upstream), gradients(torchs, x, weight, upstream)
    for actual, other, expected in zip(ours, others, exact):
        error, of_torch = ((t - expected).norm() / expected.norm() for t in (actual, other))
        assert error < max(2 * of_torch, 5e-7)


@BF16
@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels_last"])
@pytest.mark.parametrize("shape", [
    *(s for s in SHAPES if all(s) and s[1] > 1), (4, 16, 24, 24, 20), (1, 8, 5, 12, 43), (2, 64, 9, 8, 7),
])
def test_bfloat16_errs_no_more_than_three_times_what_torchs_own_does(shape, layout):
    """Of maps as batch norm leaves them, half of them zero, and weights as they are: of both the transforms' sums
    are rounded, where torch rounds weights and results alone."""
    torch.manual_seed(0)
    x, upstream = (arrange(torch.randn(shape).relu().bfloat16(), layout) for _ in range(2))
    weight = torch.randn(shape[1], shape[1], *[3] * (x.ndim - 2))
    exact = gradients(torchs, x.double(), weight.double(), upstream.double())
    ours = gradients(convolve, x, weight, upstream)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for actual, expected in zip(ours, exact):
        assert (actual - expected).norm() < 3 * 2.4e-3 * expected.norm()


@BF16
def test_bfloat16_is_exact_where_nothing_is_rounded():
    """Whole numbers so small that every sum of the transforms is one that bfloat16 holds."""
    torch.manual_seed(0)
    x, upstream = (torch.randint(-1, 2, (2, 16, 6, 9, 11)).bfloat16() for _ in range(2))
    weight = 8.0 * torch.randint(-1, 2, (16, 16, 3, 3, 3)) * (torch.rand(16, 16, 1, 1, 1) < 0.1)
    exact = gradients(lambda *t: F.conv3d(*t, padding=1), x.double(), weight.double(), upstream.double())
    for actual, expected in zip(gradients(convolve, x, weight, upstream), exact):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0)


@BF16
def test_bfloat16_propagates_what_is_not_finite():
    x, weight = torch.zeros(1, 8, 6, 6, 6).bfloat16(), torch.ones(8, 8, 3, 3, 3)
    x[0, 3, 1, 1, 1] = torch.nan
    assert convolve(x, weight).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph_whatever_the_dtype(dtype):
    torch.manual_seed(0)
    x, upstream, weight = maps(1, 8, 4, 5, 6).to(dtype), maps(1, 8, 4, 5, 6).to(dtype), torch.randn(8, 8, 3, 3, 3)
    torch.compiler.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, x, weight, upstream), gradients(convolve, x, weight, upstream)):
        assert torch.equal(actual, expected)


def test_bfloat16_goes_by_the_reference_where_the_cpu_does_not_multiply_it(monkeypatch):
    monkeypatch.setattr(convolution, "MULTIPLIES_BF16", False)
    torch.manual_seed(0)
    x, weight = maps(1, 8, 4, 5, 6).bfloat16(), torch.randn(8, 8, 3, 3, 3)
    assert torch.equal(convolve(x, weight), F.conv3d(x, weight.bfloat16(), padding=1))


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
@pytest.mark.parametrize("shape", [(3, 16, 9, 7, 21), (3, 16, 9, 7)])
def test_gives_the_same_bits_again_and_keeps_channels_last(shape, dtype):
    torch.manual_seed(0)
    x, upstream, last = maps(*shape).to(dtype), maps(*shape).to(dtype), LAST[len(shape)]
    weight = torch.randn(16, 16, *[3] * (x.ndim - 2))
    first = gradients(convolve, x, weight, upstream)
    again = gradients(convolve, x.contiguous(), weight.contiguous(memory_format=last), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[0].is_contiguous(memory_format=last) and first[1].is_contiguous(memory_format=last)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_threads_change_no_more_than_the_order_of_the_filters_sums(dtype):
    torch.manual_seed(0)
    x, upstream, weight = maps(2, 8, 12, 10, 8).to(dtype), maps(2, 8, 12, 10, 8).to(dtype), torch.randn(8, 8, 3, 3, 3)
    results = by_threads(lambda: gradients(convolve, x, weight, upstream))
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


@COMPILED
@pytest.mark.parametrize("shape", [(1, 16, 3, 4, 5), (2, 16, 6, 5)])
def test_takes_weights_of_any_layout(shape):
    """Kernels read the taps where they lie, and write the gradient's."""
    torch.manual_seed(0)
    x, weight, upstream = maps(*shape), torch.randn(16, 16, *[3] * (len(shape) - 2)), maps(*shape)
    expected = gradients(convolve, x, weight, upstream)
    swapped = (weight.transpose(*axes).contiguous().transpose(*axes) for axes in ((-1, -2), (0, 1)))
    for other in (*swapped, weight.movedim(1, -1).contiguous().movedim(-1, 1), torch.stack([weight, weight], 1)[:, 0]):
        for actual, same in zip(gradients(convolve, x, other, upstream), expected):
            assert torch.equal(actual, same)
        arguments = upstream, x, other, True, True
        torch.library.opcheck(  # a gradient's strides are declared as they come
            torch.ops.spss_fast.convolve_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@BF16
@pytest.mark.parametrize("shape, transposed", [
    ((4, 8, 9, 24, 70), False), ((2, 16, 9, 8, 21), False), ((2, 1, 15, 16, 27), False), ((2, 16, 9, 5, 31), True),
])
def test_moments_are_those_of_the_maps_but_for_what_is_rounded(shape, transposed):
    """Far from zero, too: there rounding the maps moves the variance by more than sums about zero do."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 10).bfloat16()
    inputs, outputs = shape[1], 8 if transposed or shape[1] == 1 else shape[1]
    weight = torch.rand(*((inputs, outputs, 2, 2, 2) if transposed else (outputs, inputs, 3, 3, 3)))
    plain = (convolve_transposed if transposed else convolve)(x, weight)
    of_variance, of_mean = torch.var_mean(plain.double(), (0, 2, 3, 4), correction=0)
    assert (of_mean.abs() / of_variance.sqrt()).max() > 4
    for y, mean, variance in by_threads(lambda: convolution.convolve_moments(x, weight, transposed)):
        assert torch.equal(y, plain)
        assert ((mean - of_mean).abs() < 1e-3 * of_variance.sqrt()).all()
        torch.testing.assert_close(variance.double(), of_variance, rtol=2e-3, atol=0)


@BF16
@pytest.mark.parametrize("shape", [(2, 8, 3, 4, 5), (2, 1, 3, 4, 5), (1, 16, 5, 6)])
def test_moments_are_declared_as_they_come(shape):
    weight = torch.randn(8 if shape[1] == 1 else shape[1], shape[1], *[3] * (len(shape) - 2))
    x = maps(*shape).bfloat16()
    for arguments in (x, weight, False), *([(x, torch.randn(8, 8, 2, 2, 2), True)] if shape[1] == 8 else []):
        torch.library.opcheck(
            torch.ops.spss_fast.convolve_moments.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_moments_have_no_gradient():
    x, weight = maps(1, 8, 4, 4, 4).bfloat16(), torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    with pytest.raises(TypeError, match="x must be bfloat16"):
        convolution.convolve_moments(x.float(), weight)
    if "cpu" in available("convolution", "cpu") and convolution.MULTIPLIES_BF16:
        with pytest.raises(NotImplementedError, match="not differentiable"):
            convolution.convolve_moments(x, weight)[0].sum().backward()


def test_refuses_what_it_does_not_compute():
    x, weight = torch.zeros(1, 8, 4, 4, 4), torch.zeros(8, 8, 3, 3, 3)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x must be float32 or bfloat16"),
        ((x, weight.half()), TypeError, "weight must be float32"),
        ((x[:, :7], weight), ValueError, "x must be"),
        ((x[0], weight), ValueError, "x must be"),
        ((x[:, :, 0], weight[..., 0]), ValueError, "x must be"),  # slices of eight channels
        ((x[:, :, 0].repeat(1, 2, 1, 1), weight), ValueError, "weight must be"),
        ((x[..., :0], weight), ValueError, "x must have voxels"),
        ((x, weight[:, :4]), ValueError, "weight must be"),
        ((x[:, :1], weight), ValueError, "weight must be"),
        ((x[:, :1], weight[:4, :1]), ValueError, "weight must be .* O a multiple of 8"),
        ((x[:, :1], weight[0]), ValueError, "weight must be"),
    ):
        with pytest.raises(error, match=message):
            convolve(*arguments)
        if "cpu" in available("convolution", "cpu"):
            with pytest.raises(error, match="must"):
                torch.ops.spss_fast.convolve(*arguments)


@COMPILED
def test_the_kernel_refuses_what_it_does_not_compute():
    with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
        torch.ops.spss_fast.convolve(torch.zeros(1, 8, 4, 4, 4).double(), torch.zeros(8, 8, 3, 3, 3).double())
    for axis in (2, 3, 4):
        x = torch.zeros(1, 8, 4, 4, 4).narrow(axis, 0, 0)
        with pytest.raises(ValueError, match="x must have voxels"):
            torch.ops.spss_fast.convolve(x, torch.zeros(8, 8, 3, 3, 3))


@pytest.fixture
def machine(monkeypatch):
    """A CPU of a given kind, to those who ask."""

    def become(capability, bf16=False, amx=False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(convolution, "MULTIPLIES_BF16", bf16)
        monkeypatch.setattr(convolution, "HAS_AMX", amx)

    return become


def check_that_other_cpus_do_not_choose(rule, x, weight, machine):
    for kind, chosen in ONLY_WITH_AVX512_BF16:
        machine(*kind)
        assert rule(x, weight) == chosen
        with torch.autocast("cpu", torch.bfloat16):
            assert rule(x.bfloat16(), weight) == chosen
            assert not rule(x, weight)


@COMPILED
def test_is_chosen_where_it_was_measured_to_be_faster(machine):
    x, weight = torch.zeros(4, 16, 16, 16, 16), torch.zeros(16, 16, 3, 3, 3)
    for kind, float32, bfloat16 in (
        (("AVX2",), True, False), (("AVX512",), False, False), (("AVX512", True), True, True),
        (("AVX512", True, True), False, False),
    ):
        machine(*kind)
        assert is_faster(x, weight) == float32
        assert not is_faster(x.bfloat16(), weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert is_faster(x.bfloat16(), weight) == bfloat16
            assert not is_faster(x, weight)
        with torch.autocast("cpu", torch.float16):
            assert not is_faster(x.bfloat16(), weight)
            assert not is_faster(x.half(), weight)
    machine("AVX512", True)
    assert is_faster(x[:, :, :4, :4, :4], weight)  # 32 tiles
    assert not is_faster(x[:, :, :4, :4, :2], weight)  # so few that the filter's transform is most of it
    with torch.autocast("cpu", torch.bfloat16):
        assert is_faster(x[:, :, :4, :4, :6].bfloat16(), weight)  # 48 tiles
        assert not is_faster(x[:, :, :4, :4, :4].bfloat16(), weight)
    assert not is_faster(x.double(), weight.double())
    assert not is_faster(x.bfloat16(), weight.bfloat16())
    assert not is_faster(x[:, :8], weight[:, :8])  # to more channels
    assert not is_faster(x, weight[..., :2])
    with backend("reference"):
        assert not is_faster(x, weight)


@COMPILED
def test_on_slices_it_is_chosen_where_it_was_measured_to_be_faster(machine):
    x, weight = torch.zeros(16, 32, 16, 16), torch.zeros(32, 32, 3, 3)  # 1024 tiles
    for kind, chosen in ONLY_WITH_AVX512_BF16:
        machine(*kind)
        assert is_faster_on_slices(x, weight) == is_faster_on_slices(x.bfloat16(), weight.bfloat16()) == chosen
    machine("AVX512", True)
    assert not is_faster_on_slices(x[:, :, :14], weight)
    assert not is_faster_on_slices(x[:, :16], weight[:, :16])  # to more channels
    assert not is_faster_on_slices(x.half(), weight)
    with backend("reference"):
        assert not is_faster_on_slices(x, weight)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_the_registration_net_takes_it(machine, monkeypatch, dtype):
    """Both ways err by as much from float32."""
    machine("AVX512", True)
    torch.manual_seed(0)
    network = RegistrationNet().to(memory_format=torch.channels_last)
    network.flow.weight.data.normal_(0, 0.1)
    pair, taken = [torch.randn(16, 1, 64, 64) for _ in range(2)], []
    monkeypatch.setattr(regnet, "is_faster_upsampled", lambda *maps: False)
    monkeypatch.setattr(regnet, "convolve", lambda x, weight: taken.append(x.shape[1:3]) or convolve(x, weight))

    def step(dtype):
        copied = copy.deepcopy(network).to(dtype)
        y = copied(*(x.to(dtype) for x in pair))
        return [y.detach(), *torch.autograd.grad(y.square().mean(), list(copied.parameters()))]

    ours = step(dtype)
    assert taken == [(32, 16), (32, 32), (16, 64)]  # the skip connection at a quarter, and both that end a level
    monkeypatch.setattr(regnet, "is_faster_on_slices", lambda x, weight: False)
    others, exact = step(dtype), step(torch.float32)
    for actual, other, expected in zip(ours, others, exact):
        assert actual.dtype == other.dtype
        error, of_torch = ((t.float() - expected).norm() for t in (actual, other))
        assert error < 3 * of_torch + 1e-5 * expected.norm()


@COMPILED
def test_the_v_net_takes_it_and_gives_what_it_gives_without(machine, monkeypatch):
    machine("AVX2")
    torch.manual_seed(0)
    network = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d)
    x, taken = maps(2, 1, 32, 32, 32), []
    monkeypatch.setattr(vnet, "convolve", lambda x, weight: taken.append(x.shape[1]) or convolve(x, weight))
    with torch.no_grad():
        actual = network(x)
        monkeypatch.setattr(vnet, "is_faster", lambda x, weight: False)
        expected = network(x)
    # not the first convolution, of one channel, which was not measured there, nor the deepest, of too few voxels
    assert taken == [16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 8]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@BF16
def test_the_v_net_takes_it_in_bfloat16(machine, monkeypatch):
    """A step in bfloat16: both ways err by as much from float32."""
    machine("AVX512", True)
    torch.manual_seed(0)
    network = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d)
    weights = [p for name, p in network.named_parameters() if p.ndim == 5 and not name.startswith("projector")]
    x, taken = maps(2, 1, 32, 32, 32), []
    monkeypatch.setattr(vnet, "convolve", lambda x, weight: taken.append(x.shape[1]) or convolve(x, weight))

    def step(amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = network(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), weights)]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(x)
    assert taken.pop(0) == 1  # the image, where nothing is to be differentiated
    taken.clear()
    ours = step(True)
    assert taken == [16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 8]
    monkeypatch.setattr(vnet, "is_faster", lambda x, weight: False)
    torchs, exact = step(True), step(False)
    for actual, other, expected in zip(ours, torchs, exact):
        assert actual.dtype == other.dtype
        error, others = ((t.float() - expected).norm() for t in (actual, other))
        assert error < 3 * others + 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-7), pytest.param(torch.bfloat16, 2.6e-3, marks=BF16)])
@pytest.mark.parametrize("outputs, sides", [(8, (8, 9, 24)), (24, (3, 4, 7)), (16, (1, 2, 1)), (16, (4, 1, 50))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_channel_is_as_near_to_float64_as_the_result_is_rounded(outputs, sides, layout, dtype, error):
    torch.manual_seed(0)
    x = torch.randn(2, 1, *sides).to(dtype)
    weight = arrange(torch.randn(outputs, 1, 3, 3, 3).to(dtype).float(), layout)  # of which nothing is rounded
    y, exact = convolve(x, weight), F.conv3d(x.double(), weight.double(), padding=1)
    assert y.dtype == dtype and (y - exact).norm() < error * exact.norm()


@COMPILED
def test_one_channel_is_chosen_where_nothing_is_differentiated(machine):
    x, weight = torch.zeros(1, 1, 4, 4, 4), torch.zeros(8, 1, 3, 3, 3)
    for kind, chosen in ONLY_WITH_AVX512_BF16:
        machine(*kind)
        assert is_faster(x, weight) == chosen
    machine("AVX512", True)
    for leaf in (x, weight):
        leaf.requires_grad_()
        assert not is_faster(x, weight)
        with torch.no_grad():
            assert is_faster(x, weight)
        leaf.requires_grad_(False)
    assert not is_faster(x, torch.zeros(32, 1, 3, 3, 3))


def _transposed(x, weight):
    return F.conv_transpose3d(x, weight, stride=2)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-7), pytest.param(torch.bfloat16, 2.6e-3, marks=BF16)])
@pytest.mark.parametrize("inputs, outputs, sides", [(16, 8, (8, 9, 24)), (6, 24, (3, 4, 7)), (64, 32, (2, 3, 1)),
                                                    (2, 8, (1, 1, 14)), (32, 16, (4, 5, 20))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_transposed_convolution_is_as_near_to_float64_as_its_result_is_rounded(
    inputs, outputs, sides, layout, dtype, error
):
    torch.manual_seed(0)
    x = arrange(torch.randn(2, inputs, *sides).to(dtype), layout)
    weight = arrange(torch.randn(inputs, outputs, 2, 2, 2).to(dtype).float(), layout)  # of which nothing is rounded
    y = convolve_transposed(x, weight)
    exact = _transposed(x.double(), weight.double())
    assert y.dtype == dtype and (y - exact).norm() < error * exact.norm()


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_the_transposed_convolution_gives_torchs_gradients_and_channels_last(dtype):
    torch.manual_seed(0)
    x, upstream, weight = maps(2, 16, 3, 4, 5).to(dtype), maps(2, 8, 6, 8, 10).to(dtype), torch.randn(16, 8, 2, 2, 2)
    ours = gradients(convolve_transposed, x, weight, upstream)
    torchs = gradients(lambda x, w: _transposed(x, w.to(dtype)), x, weight, upstream)
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d) and ours[2].dtype == torch.float32
    torch.testing.assert_close(ours[0], torchs[0])
    assert torch.equal(ours[1], torchs[1]) and torch.equal(ours[2], torchs[2])
    leaf = weight.requires_grad_()
    convolve_transposed(x, leaf).backward(upstream)  # one alone
    assert torch.equal(leaf.grad, ours[2])


@COMPILED
def test_the_transposed_convolution_gives_the_same_bits_by_any_number_of_threads():
    torch.manual_seed(0)
    x, weight = maps(2, 16, 12, 10, 20), torch.randn(16, 16, 2, 2, 2)
    results = by_threads(lambda: convolve_transposed(x, weight))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_transposed_convolution_goes_by_the_reference_where_the_cpu_does_not_multiply_bfloat16(monkeypatch):
    monkeypatch.setattr(convolution, "MULTIPLIES_BF16", False)
    torch.manual_seed(0)
    x, weight = maps(1, 16, 2, 3, 4).bfloat16(), torch.randn(16, 8, 2, 2, 2)
    assert torch.equal(convolve_transposed(x, weight), _transposed(x, weight.bfloat16()))


def test_the_transposed_convolution_refuses_what_it_does_not_compute():
    x, weight = torch.zeros(1, 16, 2, 2, 2), torch.zeros(16, 8, 2, 2, 2)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x must be float32 or bfloat16"),
        ((x, weight.half()), TypeError, "weight must be float32"),
        ((x[:, :7], weight[:7]), ValueError, "x must be .* an even I"),
        ((x[0], weight), ValueError, "x must be"),
        ((x[..., :0], weight), ValueError, "x must be .* with voxels"),
        ((x, weight[:, :4]), ValueError, "weight must be .* O a multiple of 8"),
        ((x, weight[0]), ValueError, "weight must be"),
        ((x, weight[:8]), ValueError, "weight must be"),
        ((x, weight[..., :1]), ValueError, "weight must be"),
    ):
        with pytest.raises(error, match=message):
            convolve_transposed(*arguments)
        if "cpu" in available("convolution", "cpu"):
            with pytest.raises(error, match="must"):
                torch.ops.spss_fast.convolve_transposed(*arguments)


@COMPILED
def test_the_transposed_convolution_is_chosen_where_it_was_measured_to_be_faster(machine):
    x, weight = torch.zeros(1, 32, 4, 4, 4), torch.zeros(32, 16, 2, 2, 2)
    check_that_other_cpus_do_not_choose(is_faster_transposed, x, weight, machine)
    machine("AVX512", True)
    assert not is_faster_transposed(torch.zeros(1, 128, 4, 4, 4), torch.zeros(128, 64, 2, 2, 2))
    assert not is_faster_transposed(x.double(), weight.double())
    with backend("reference"):
        assert not is_faster_transposed(x, weight)


@BF16
def test_the_v_net_takes_the_transposed_convolution(machine, monkeypatch):
    machine("AVX512", True)
    torch.manual_seed(0)
    network = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d).eval()
    x, taken = maps(1, 1, 32, 32, 32), []
    monkeypatch.setattr(
        vnet, "convolve_transposed", lambda x, weight: taken.append(weight.shape[1]) or convolve_transposed(x, weight)
    )
    with torch.no_grad():
        actual = network(x)
        monkeypatch.setattr(vnet, "is_faster_transposed", lambda x, weight: False)
        expected = network(x)
    assert taken == [32, 16, 8]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
def test_halving_gives_torchs_convolution_and_gradients(dtype):
    torch.manual_seed(0)
    x, upstream, weight = maps(2, 8, 6, 8, 10).to(dtype), maps(2, 16, 3, 4, 5).to(dtype), torch.randn(16, 8, 2, 2, 2)
    ours = gradients(halve, x, weight, upstream)
    torchs = gradients(lambda x, w: F.conv3d(x, w.to(dtype), stride=2), x, weight, upstream)
    assert torch.equal(ours[0], torchs[0]) and torch.equal(ours[2], torchs[2]) and ours[2].dtype == torch.float32
    torch.testing.assert_close(ours[1], torchs[1])
    for wanted in ((True, False), (False, True)):  # one alone
        leaves = [t.detach().requires_grad_(w) for t, w in zip((x, weight), wanted)]
        halve(*leaves).backward(upstream)
        for leaf, of_both, w in zip(leaves, ours[1:], wanted):
            assert torch.equal(leaf.grad, of_both) if w else leaf.grad is None
    y = halve(x, weight.requires_grad_()).float().square().sum()
    (gradient,) = torch.autograd.grad(y, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@COMPILED
def test_halving_is_chosen_where_its_gradient_was_measured_to_be_faster(machine):
    x, weight = torch.zeros(1, 16, 4, 4, 4, requires_grad=True), torch.zeros(32, 16, 2, 2, 2)
    check_that_other_cpus_do_not_choose(is_faster_halving, x, weight, machine)
    machine("AVX512", True)
    assert not is_faster_halving(x.detach(), weight) and not is_faster_halving(x[..., :3], weight)
    assert not is_faster_halving(torch.zeros(1, 64, 4, 4, 4, requires_grad=True), torch.zeros(128, 64, 2, 2, 2))
    with torch.no_grad():
        assert not is_faster_halving(x, weight)


@BF16
def test_the_v_net_takes_halving_where_it_learns(machine, monkeypatch):
    machine("AVX512", True)
    torch.manual_seed(0)
    network = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d)
    x, taken, results = maps(2, 1, 32, 32, 32), [], []
    monkeypatch.setattr(vnet, "halve", lambda x, weight: taken.append(weight.shape[1]) or halve(x, weight))
    for chosen in (is_faster_halving, lambda x, weight: False):
        monkeypatch.setattr(vnet, "is_faster_halving", chosen)
        results.append(torch.autograd.grad(network(x).square().mean(), network.block_one.conv[0].weight)[0])
    assert taken == [8, 16, 32]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)
