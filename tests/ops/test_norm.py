"""Batch norm with ReLU and skip connection: statistics, accuracy, and errors that name the argument."""

import contextlib

import pytest
import torch
from devices import DEVICE
from torch import nn
from torch.nn import functional as F

from spss_fast.ops import backend, batch_norm_relu
from spss_fast.ops.backends import available

BACKENDS = available("norm", DEVICE)


def parameters(channels, dtype=torch.float32, device="cpu"):
    return [make(channels, dtype=dtype, device=device) for make in (torch.ones, torch.zeros, torch.zeros, torch.ones)]


def test_is_torchs_module_with_relu_and_moves_its_running_statistics():
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(6)
    x, skip = 5 + torch.randn(3, 6, 4, 5, 6), torch.randn(3, 6, 4, 5, 6)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    expected = F.relu(norm(x)) + skip
    actual = batch_norm_relu(x, norm.weight, norm.bias, mean, variance, True, skip=skip)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)


def test_an_offset_is_a_convolutions_bias():
    torch.manual_seed(0)
    convolution, norm = nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)
    convolution.bias.data *= 10
    x = torch.randn(3, 2, 6, 5, 6)
    for training in (True, False):
        norm.train(training)
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        expected = F.relu(norm(convolution(x)))
        without = F.conv3d(x, convolution.weight)
        actual = batch_norm_relu(
            without, norm.weight, norm.bias, mean, variance, training, offset=convolution.bias
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(variance, norm.running_var)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_offset_has_its_gradient_in_inference(name):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 5, 6, dtype=torch.float64, device=DEVICE)
    norm = nn.BatchNorm3d(6, dtype=torch.float64, device=DEVICE).eval()
    norm.load_state_dict({key: 0.5 + torch.rand_like(value) for key, value in norm.state_dict().items()
                          if value.is_floating_point()}, strict=False)
    offset = torch.randn(6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    leaves = [offset, norm.weight, norm.bias]
    expected = F.relu(norm(x + offset[:, None, None, None]))
    with backend(name):
        actual = batch_norm_relu(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, offset=offset
        )
        results = [torch.autograd.grad(y.square().sum(), leaves) for y in (actual, expected)]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["reference", None])
def test_running_statistics_that_nobody_reads_may_be_left_out_in_training(name):
    torch.manual_seed(0)
    x, offset = torch.randn(3, 6, 4, 5, 6), torch.randn(6)
    weight, bias, mean, variance = parameters(6)
    with backend(name) if name else contextlib.nullcontext():
        expected = batch_norm_relu(x, weight, bias, mean, variance, True, offset=offset)
        for given in (None, offset):
            assert torch.equal(batch_norm_relu(x, weight, bias, None, None, True, offset=given), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_mean_far_above_the_deviation_costs_no_digits(memory_format):
    torch.manual_seed(0)
    x = (1000 + torch.randn(2, 8, 20, 30, 40)).contiguous(memory_format=memory_format)
    mean, variance = torch.zeros(8), torch.zeros(8)
    y = batch_norm_relu(x, torch.ones(8), torch.ones(8), mean, variance, True, 1.0)
    wide = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(variance.double(), wide.var(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-7, atol=0)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_first_voxel_far_off_all_others_costs_no_digits(name, memory_format):
    x = torch.randn(2, 8, 16, 16, 16)
    x[0, :, 0, 0, 0] = 100
    wide = x.double().movedim(1, 0).flatten(1)
    x = x.to(DEVICE).contiguous(memory_format=memory_format)
    mean, variance = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with backend(name) if name else contextlib.nullcontext():
        batch_norm_relu(x, torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE), mean, variance, True, 1.0)
    torch.testing.assert_close(variance.double().cpu(), wide.var(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double().cpu(), wide.mean(1), rtol=0, atol=2e-6)


def last(*shape):
    """Channels last, in any number of dimensions; ``shape`` names them last, too."""
    return torch.randn(shape, device=DEVICE).movedim(-1, 1)


STRIDED = {
    "a slice whose runs are long": lambda: last(2, 3, 5, 50, 6)[..., 1:-1],
    "a slice whose runs are short": lambda: last(2, 7, 5, 9, 6)[..., 1:-1],
    "long runs along two axes": lambda: last(2, 5, 9, 50, 6)[..., 1:, 2:-2, 1:-1],
    "some of the channels": lambda: last(2, 7, 5, 9, 8)[:, 1:7],
    "every other volume, contiguous": lambda: torch.randn(6, 6, 7, 8, 9, device=DEVICE)[::2],
    "channels last in one dimension": lambda: last(3, 700, 6),
    "an expanded axis": lambda: last(3, 1, 60, 6).expand(3, 6, 4, 60),
    "axes in another order": lambda: torch.randn(4, 3, 2, 5, 6, device=DEVICE).permute(0, 4, 2, 1, 3),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_inputs_give_what_their_copies_give(kind, name):
    torch.manual_seed(0)
    x = STRIDED[kind]()
    skip, grad = torch.randn(2, *x.shape, device=DEVICE)
    results = []
    for given in (x, x.contiguous()):
        weight, bias = parameters(6, device=DEVICE)[:2]
        leaves = [value.detach().requires_grad_() for value in (given, weight, bias)]
        with backend(name):
            y = batch_norm_relu(*leaves, None, None, True, skip=skip)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 if DEVICE == "cpu" else 1e-4)
    y = results[0][0]
    if name != "reference":
        assert y.movedim(1, -1).is_contiguous() if x.stride(1) == 1 else y.is_contiguous()


@pytest.mark.skipif(BACKENDS[0] == "reference", reason="the operator has no backend here")
@pytest.mark.parametrize("kind", STRIDED)
def test_compile_is_told_the_strides_of_strided_inputs(kind):
    x = STRIDED[kind]()
    weight, bias = (value.requires_grad_() for value in parameters(6, device=DEVICE)[:2])
    results = torch.library.opcheck(
        torch.ops.spss_fast.batch_norm_relu.default, (x.detach().requires_grad_(), weight, bias, None, None, None, 1e-5)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_triton_programs_that_add_up_several_tiles(monkeypatch):
    if "triton" not in BACKENDS:
        pytest.skip("Triton's interpreter is off, or Triton is not installed")
    from spss_fast.kernels import norm, planes

    monkeypatch.setattr(planes, "TILE", 64)
    monkeypatch.setattr(norm, "PROGRAMS", (6, 6))  # 3 a volume: 8 tiles of 16 voxels each, the last of all in part
    torch.manual_seed(0)
    x = 3 + torch.randn(2, 3, 9, 13, 3, dtype=torch.float64, device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        weight, bias, *running = parameters(3, torch.float64, DEVICE)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with backend(name):
            y = batch_norm_relu(*leaves, *running, True)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_nan_passes_through_the_relu():
    x = torch.zeros(1, 2, 4)
    x[0, 1, 2] = torch.nan
    y = batch_norm_relu(x, *parameters(2), False)
    assert y[0, 1, 2].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.zeros(2, 3)), ValueError, r"^x must be \(B, C, \*spatial\)"),
    (dict(x=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "^x must be of a floating dtype"),
    (dict(x=torch.zeros(1, 3, 1), training=True), ValueError, "^x must have more than one value per channel"),
    (dict(weight=torch.ones(4)), ValueError, r"^weight must be of shape \(3,\)"),
    (dict(running_var=torch.ones(3, dtype=torch.float64)), TypeError, "^running_var must be float32"),
    (dict(skip=torch.zeros(2, 3, 5)), ValueError, "^skip must be of shape"),
    (dict(skip=torch.zeros(2, 3, 4, dtype=torch.bfloat16)), TypeError, "^skip must be float32"),
    (dict(running_mean=None, running_var=None), TypeError, "^running_mean must be a tensor"),
    (dict(running_mean=None, training=True), TypeError, "^running_mean must be a tensor"),
    (dict(bias=None), TypeError, "^bias must be a tensor"),
    (dict(offset=torch.zeros(2)), ValueError, r"^offset must be of shape \(3,\)"),
])
def test_errors(change, error, message):
    names = ("weight", "bias", "running_mean", "running_var")
    arguments = dict(zip(names, parameters(3))) | dict(x=torch.zeros(2, 3, 4), training=False) | change
    with pytest.raises(error, match=message):
        batch_norm_relu(**arguments)
