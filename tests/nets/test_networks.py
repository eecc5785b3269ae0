"""The networks against the released ones: parameter names, shapes, and outputs with the same parameters."""

import contextlib
import copy
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from spss_fast.nets import regnet, vnet
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet, teacher_of, update_teacher
from spss_fast.ops import backend
from spss_fast.ops import convolution as convolutions
from spss_fast.ops.backends import available
from tests.conftest import SHARED

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _parameters(archive: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("param/"): value for key, value in archive.items() if key.startswith("param/")}


@pytest.mark.parametrize("name, network", [("vnet", VNet), ("regnet", RegistrationNet)])
def test_parameters_are_named_and_shaped_as_in_the_literatures_checkpoints(name, network):
    path = SHARED / "vectors" / "network_keys.json"
    if not path.exists():
        pytest.skip("reference vectors are absent: network_keys.json is not in ../shared/vectors")
    expected = json.loads(path.read_text())[name]
    assert {key: list(value.shape) for key, value in network().state_dict().items()} == expected


def test_vnet_outputs(vectors):
    archive = vectors("vnet")
    network = VNet(filters=2, features=8, dropout=0.0)
    network.load_state_dict(_parameters(archive))
    network.eval()
    encoded = network.encode(archive["x"])
    torch.testing.assert_close(network.project(encoded), archive["projection_eval"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        network.class_map(network.decode(encoded)), archive["class_map_eval"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(network(archive["x"]), archive["logits_eval"], rtol=1e-4, atol=1e-5)
    network.train()
    torch.testing.assert_close(network(archive["x"]), archive["logits_train"], rtol=1e-4, atol=1e-5)


def _free_nan() -> None:
    """Memory that was just freed holds NaN then, so that a gradient which is left unwritten shows."""
    freed = [torch.full((27 * 32 * 32,), torch.nan) for _ in range(40)]
    del freed


def test_bfloat16_gradients_where_the_bottleneck_is_one_voxel_deep():
    torch.manual_seed(0)
    network = VNet(filters=2).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 1, 32, 32, 16).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    _free_nan()
    logits.float().square().mean().backward()
    for convolution in network.block_five.conv[::3]:
        gradient = convolution.weight.grad
        assert gradient.isfinite().all() and gradient[..., 1].any()
        assert not gradient[..., 0].any() and not gradient[..., 2].any()  # these taps meet nothing but padding


@pytest.mark.parametrize("sides", [(16, 32, 16), (16, 32, 32), (32, 32, 16), (32, 16, 16)])
def test_bfloat16_passes_of_small_patches(sides):
    torch.manual_seed(0)
    network, x = VNet(filters=2, dropout=0), torch.randn(2, 1, *sides)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    # by the median: batch norm over the few voxels of a bottleneck magnifies what a few of them are off by
    assert (logits.float() - network(x)).abs().median() < 0.05


@pytest.mark.parametrize("sides", [(2, 2, 2), (2, 4, 4), (4, 2, 2), (4, 4, 2), (3, 2, 1), (1, 4, 4), (6, 4, 3)])
def test_bfloat16_gradients_of_small_bottlenecks(sides):
    """Against float64, as finite but wrong gradients show in no loss."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1).to(memory_format=torch.channels_last_3d)
    x, upstream = (torch.randn(4, 32, *sides).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = vnet._convolve(convolution, x)
    _free_nan()
    out.backward(upstream.to(out.dtype))
    exact = copy.deepcopy(convolution).double()
    exact.zero_grad()
    exact(x.double()).backward(upstream.double())
    scale = exact.weight.grad.abs().max()
    torch.testing.assert_close(convolution.weight.grad.double() / scale, exact.weight.grad / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels, depth", [(1, 16), (3, 8), (16, 8), (1, 7)])
def test_a_narrow_convolution_is_a_convolution(channels, depth, device):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 6, 5, depth, dtype=torch.float64, device=device, requires_grad=True)
    ours = vnet._NarrowConvolution(channels, 4, 3, padding=1, dtype=torch.float64, device=device)
    same_with_gradients(ours(x), F.conv3d(x, ours.weight, ours.bias, padding=1), [x, *ours.parameters()])


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_a_convolution_over_groups_is_a_convolution_and_copies_nothing(channels):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 6, 5, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    convolution = vnet._NarrowConvolution(channels, 4, 3, padding=1, dtype=torch.float64)
    leaves = [x.requires_grad_(), *convolution.parameters()]
    with torch.inference_mode():  # what it leaves behind must not be in the way of gradients
        convolution._in_groups(x, *leaves[1:])
    ours = convolution._in_groups(x, *leaves[1:])
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    same_with_gradients(ours, F.conv3d(x, *leaves[1:], padding=1), leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_a_dropped_channel_is_a_weight_of_zero(device):
    torch.manual_seed(0)
    network = VNet(classes=3, filters=8).double().to(device)
    decoded = torch.randn(3, 8, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.manual_seed(1)
    logits = network.classify(decoded)
    torch.manual_seed(1)
    expected = network.out_conv(network.dropout(decoded))
    same_with_gradients(logits, expected, [decoded, *network.out_conv.parameters()])
    dropped = torch.autograd.grad(network.classify(decoded).sum(), decoded)[0][..., 0, 0, 0] == 0
    assert dropped.any() and not dropped.all() and len(dropped.unique(dim=0)) > 1  # each sample has channels of its own


def test_channels_are_dropped_at_the_bottleneck_too():
    torch.manual_seed(0)
    network, x = VNet(filters=2), torch.randn(1, 1, 32, 32, 16)
    once, again = network.encode(x), network.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(once.skips, again.skips))
    assert not torch.equal(once.first_level, again.first_level)
    network.eval()
    assert torch.equal(network.encode(x).first_level, network.encode(x).first_level)


def test_an_untrained_registration_net_moves_next_to_nothing():
    torch.manual_seed(0)
    network = RegistrationNet()
    assert 0.8e-5 < network.flow.weight.std() < 1.2e-5 and not network.flow.bias.any()
    assert network(*torch.randn(2, 1, 1, 32, 32)).abs().max() < 1e-3


def same_with_gradients(actual, expected, leaves):
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    results = (torch.autograd.grad(y, leaves, upstream) for y in (actual, expected))
    for gradient, definition in zip(*results):
        torch.testing.assert_close(gradient, definition)


@pytest.mark.parametrize(
    "filters, amp, factor", [(4, None, 3), (8, None, 3), (4, torch.bfloat16, 1.1), (8, torch.bfloat16, 1.2)]
)
def test_gradients_are_as_near_to_float64s_as_plain_pytorchs(filters, amp, factor, monkeypatch):
    """Channels last and on our operators against contiguous and on torch's own. Rounding flips ReLUs, so each layer's
    error is a matter of chance, and their median is compared; bfloat16's is large anyhow, 0.7 where zeros give 1, and
    0.8 of eight filters where the CPU multiplies bfloat16: then they are convolve's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # and in float32 for certain
    torch.manual_seed(0)
    plain = VNet(filters=filters, dropout=0.0)
    x, target = torch.randn(2, 1, 48, 48, 32), torch.randint(2, (2, 48, 48, 32))

    def gradients(network, x, amp, operators):
        with operators, torch.autocast("cpu", amp, enabled=amp is not None):
            logits = network(x)
        loss = torch.nn.functional.cross_entropy(logits.to(x.dtype), target)
        weights = [p for p in network.parameters() if p.ndim == 5]
        return [g.double() for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]

    exact = gradients(copy.deepcopy(plain).double(), x.double(), None, backend("reference"))
    peer = gradients(plain, x, amp, backend("reference"))
    layout = {"memory_format": torch.channels_last_3d}
    ours = gradients(copy.deepcopy(plain).to(**layout), x.contiguous(**layout), amp, contextlib.nullcontext())
    ours, peer = (
        torch.stack([(g - e).norm() / e.norm() for g, e in zip(result, exact)]).median() for result in (ours, peer)
    )
    assert 0 < ours < factor * peer


@pytest.mark.skipif(not convolutions.MULTIPLIES_BF16, reason="this CPU does not multiply bfloat16")
def test_a_teacher_normalises_by_the_moments_that_its_convolutions_take(monkeypatch):
    monkeypatch.setattr(convolutions, "HAS_AMX", False)  # as on the CPUs where they are chosen
    torch.manual_seed(0)
    student = VNet(filters=8, dropout=0.0).to(memory_format=torch.channels_last_3d)
    teacher, x, taken = teacher_of(student), torch.randn(2, 1, 32, 48, 32), []

    def of(network, with_moments, amp=torch.bfloat16):
        monkeypatch.setattr(vnet, "_with_moments", with_moments)
        with torch.no_grad(), torch.autocast("cpu", amp, enabled=amp is not None):
            return network(x.contiguous(memory_format=torch.channels_last_3d)).float()

    def counted(*arguments, given=vnet._with_moments):
        taken.append(given(*arguments))
        return taken[-1]

    by_moments, plain, exact = of(teacher, counted), of(teacher, lambda *_: None), of(teacher, counted, None)
    if "cpu" in available("convolution", "cpu"):
        assert sum(moments is not None for moments in taken) > 12
    assert (by_moments - exact).norm() < 1.1 * (plain - exact).norm()  # the same rounding, of other digits
    before = len(taken)
    of(student, counted)  # whose running statistics somebody reads
    assert len(taken) == before


def test_registration_net_output(vectors):
    archive = vectors("regnet")
    network = RegistrationNet()
    network.load_state_dict(_parameters(archive))
    torch.testing.assert_close(network(archive["moving"], archive["fixed"]), archive["flow"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(8, 12), (7, 10)])
def test_registration_net_upsamples_and_concatenates(sides, device):
    torch.manual_seed(0)
    where = {"dtype": torch.float64, "device": device}
    block = regnet._block(3 + 2, 4).to(**where)
    x, skip = torch.randn(2, 3, 4, 6, **where), torch.randn(2, 2, *sides, **where)
    x.requires_grad_(), skip.requires_grad_()
    expected = block(torch.cat([F.interpolate(x, size=sides), skip], 1))
    actual = regnet._up(block, x, skip, regnet._summed_taps().to(x))
    same_with_gradients(actual, expected, [x, skip, *block.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", [(32, 48), (17, 30)])
def test_a_registration_net_as_gpus_run_it_is_the_one_that_cpus_run(sides, device, monkeypatch):
    torch.manual_seed(0)
    network, pair = RegistrationNet().double(), torch.randn(2, 3, 1, *sides, dtype=torch.float64)
    network.flow.weight.data *= 1e5

    def results(pair):
        flow = network.to(pair.device)(*pair)
        return [r.cpu() for r in (flow, *torch.autograd.grad(flow.square().mean(), network.parameters()))]

    expected = results(pair)
    monkeypatch.setattr(regnet, "_on_gpu", lambda x: True)
    for actual, definition in zip(results(pair.to(device)), expected):
        torch.testing.assert_close(actual, definition)


@pytest.mark.parametrize("device", DEVICES)
def test_a_registration_net_as_gpus_run_it_takes_autocast(device, monkeypatch):
    torch.manual_seed(0)
    network, pair = RegistrationNet().to(device), torch.randn(2, 3, 1, 32, 48, device=device)
    network.flow.weight.data *= 1e5
    monkeypatch.setattr(regnet, "_on_gpu", lambda x: True)
    expected = network(*pair)
    with torch.autocast(device, torch.bfloat16):
        actual = network(*pair)
    gradients = torch.autograd.grad(actual.sum(), network.parameters())
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("mode", [lambda: FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode])
def test_a_registration_net_trains_after_a_pass_as_exports_and_inference_make_it(mode):
    network, pair = RegistrationNet().half(), torch.randn(2, 1, 1, 32, 32).half()  # no other test's type
    with mode():
        network(*pair)
    network(*pair).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_registration_net_may_be_copied_and_converted(dtype):
    torch.manual_seed(0)
    network, pair = RegistrationNet(), torch.randn(2, 1, 1, 32, 32)
    network.flow.weight.data *= 1e5
    converted = copy.deepcopy(network).to(dtype)(*pair.to(dtype))
    assert converted.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(converted.float(), network(*pair), rtol=0.05, atol=0.05)


def test_every_parameter_learns_in_evaluation_mode():
    torch.manual_seed(0)
    network = VNet(filters=2).eval()
    network(torch.randn(1, 1, 32, 32, 16)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if not name.startswith("projector.") and p.grad is None]


def test_teacher_computes_what_the_student_does_and_moves_no_running_statistics():
    torch.manual_seed(0)
    student, x = VNet(filters=2), torch.randn(2, 1, 32, 32, 16)
    teacher = teacher_of(student)
    before = {name: value.clone() for name, value in teacher.named_buffers()}
    outputs = []
    for network in (student, teacher):
        torch.manual_seed(1)  # the same dropout
        outputs.append(network(x))
    assert torch.equal(*outputs)
    assert not torch.equal(student.block_one.conv[1].running_mean, before["block_one.conv.1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_buffers())
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_teacher_is_the_moving_average_of_parameters_only():
    torch.manual_seed(0)
    student, teacher = VNet(filters=1), VNet(filters=1)
    before = [p.clone() for p in teacher.parameters()]
    student.block_one.conv[1].running_mean.fill_(7)
    update_teacher(teacher, student, iteration=3)
    for old, now, new in zip(before, teacher.parameters(), student.parameters()):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
    assert (teacher.block_one.conv[1].running_mean == 0).all()
    update_teacher(teacher, student, iteration=0)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), student.parameters()))
