"""Sliding windows against a network whose answer is known, and batch-norm statistics against their definition."""

import itertools

import pytest
import torch
from torch import nn

from spss_fast.engine.inference import refresh_batch_norm, sliding_window, window_starts
from spss_fast.nets.vnet import VNet


@pytest.mark.parametrize("side, patch, stride", list(itertools.product([8, 9, 13], [4, 8], [1, 3, 8])))
def test_windows_cover_every_voxel_and_stay_inside(side, patch, stride):
    starts = window_starts(side, patch, stride)
    covered = {start + i for start in starts for i in range(patch)}
    if stride <= patch:
        assert covered == set(range(side))
    assert starts[0] == 0 and starts[-1] == side - patch
    assert len(set(starts)) == len(starts)


class _Pointwise(nn.Module):
    """Logits that depend on a voxel alone, so that windows cannot change them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x):
        return x * self.scale.view(1, 3, 1, 1, 1)


@pytest.mark.parametrize("shape", [(15, 12, 10), (16, 32, 32)])  # one window; nine, of which one is alone
def test_statistics_of_a_lone_window_of_the_smallest_size(shape):
    """Its bottleneck holds one value per channel."""
    torch.manual_seed(0)
    network = VNet(2, 2)
    for statistics in ("running", "case"):  # in training mode, as the report's uncertainty is, and not
        result = sliding_window(network, torch.randn(shape), (16, 16, 16), (8, 8, 8), statistics=statistics)
        torch.testing.assert_close(result.sum(0), torch.ones(shape))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    assert not network.training and min(float(norm.running_var.min()) for norm in norms) > 0


@pytest.mark.parametrize("shape", [(20, 17, 9), (16, 16, 8), (5, 30, 3)])
def test_windows_of_a_pointwise_network_give_its_answer(shape):
    torch.manual_seed(0)
    image, network = torch.randn(shape), _Pointwise()
    expected = network(image[None, None])[0].softmax(0)
    result = sliding_window(network, image, (16, 16, 8), (5, 7, 3))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("axis", range(3))
def test_a_stride_that_leaves_voxels_out_is_refused(axis):
    patch, stride = (16, 16, 8), [16, 16, 8]
    sliding_window(_Pointwise(), torch.zeros(40, 40, 20), patch, stride)
    stride[axis] += 1
    with pytest.raises(ValueError, match=r"exceeds the patch \(16, 16, 8\)"):
        sliding_window(_Pointwise(), torch.zeros(40, 40, 20), patch, stride)


class _Position(nn.Module):
    """Logits that depend on where in its window a voxel lies, so that the blending of windows shows."""

    def __init__(self, patch) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.logits = nn.Parameter(torch.randn(1, 2, *patch))

    def forward(self, x):
        return self.logits.expand(len(x), -1, -1, -1, -1) + 0 * x


@pytest.mark.parametrize("gaussian", [False, True])
def test_windows_blend_by_their_weights(gaussian):
    shape, patch, stride = (12, 9, 7), (8, 6, 4), (3, 4, 2)
    network = _Position(patch)
    softmax = network.logits.detach().softmax(1)[0].double()
    axes = torch.meshgrid(*(torch.arange(p).double() for p in patch), indexing="ij")
    distance = sum(((axis - (p - 1) / 2) / (p / 8)) ** 2 for axis, p in zip(axes, patch))
    weight = torch.exp(-0.5 * distance) if gaussian else torch.ones(patch).double()
    total, count = torch.zeros(2, *shape).double(), torch.zeros(shape).double()
    for starts in itertools.product(*map(window_starts, shape, patch, stride)):
        window = tuple(slice(start, start + p) for start, p in zip(starts, patch))
        total[(slice(None), *window)] += softmax * weight
        count[window] += weight
    result = sliding_window(network, torch.zeros(shape), patch, stride, gaussian=gaussian)
    torch.testing.assert_close(result.double(), total / count, rtol=1e-5, atol=1e-6)


def test_the_plain_mean_is_exact():
    """Sums of ones and their products are exact in float32: the published averaging keeps every bit."""
    shape, patch, stride = (12, 9, 7), (8, 6, 4), (1, 1, 1)
    network = _Position(patch)
    softmax = network.logits.detach().softmax(1)[0]
    total, count = torch.zeros(2, *shape), torch.zeros(shape)
    for starts in itertools.product(*map(window_starts, shape, patch, stride)):
        window = tuple(slice(start, start + p) for start, p in zip(starts, patch))
        total[(slice(None), *window)] += softmax
        count[window] += 1
    assert torch.equal(sliding_window(network, torch.zeros(shape), patch, stride, tiles=3), total / count)


def test_a_small_image_is_centred_in_its_minimum():
    torch.manual_seed(0)
    network, image, seen = _Pointwise(), torch.randn(5, 8, 3) + 10, []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sliding_window(network, image, (8, 8, 8), (4, 4, 4))
    expected = torch.full((8, 8, 8), float(image.min()))
    expected[1:6, :, 2:5] = image
    assert len(seen) == 1 and torch.equal(seen[0][0, 0], expected)


def test_probabilities_have_the_precision_of_float32_whatever_the_network_computes_in():
    torch.manual_seed(0)
    network, image = nn.Conv3d(1, 3, 1), torch.randn(16, 16, 8)
    result = sliding_window(network, image, (16, 16, 8), (8, 8, 4), torch.bfloat16)
    torch.testing.assert_close(result.sum(0), torch.ones(16, 16, 8), rtol=0, atol=1e-6)


def test_mirroring_makes_in_plane_flips_equivalent():
    torch.manual_seed(0)
    network, image = nn.Conv3d(1, 2, 3, padding=1), torch.randn(16, 16, 8)

    def result(image, mirror):
        return sliding_window(network, image, (16, 16, 8), (8, 8, 4), mirror=mirror)

    for axes in ((0,), (1,), (0, 1)):
        back = [axis + 1 for axis in axes]
        torch.testing.assert_close(result(image.flip(axes), True).flip(back), result(image, True))
        assert (result(image.flip(axes), False).flip(back) - result(image, False)).abs().max() > 0.05
    four = [result(image.flip(axes), False).flip([axis + 1 for axis in axes]) for axes in ((), (0,), (1,), (0, 1))]
    torch.testing.assert_close(result(image, True), torch.stack(four).mean(0))


def test_refreshed_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm3d(2, momentum=0.3), nn.Dropout3d(0.5)).train()
    batches = [torch.randn(3, 2, 4, 4, 4) * 3 + 1 for _ in range(5)]
    network(torch.full((3, 2, 4, 4, 4), 100.0))  # statistics that have to go
    refresh_batch_norm(network, batches, None)
    mean = torch.stack([batch.mean((0, 2, 3, 4)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3, 4)) for batch in batches]).mean(0)
    torch.testing.assert_close(network[0].running_mean, mean)
    torch.testing.assert_close(network[0].running_var, variance)
    assert network[0].momentum == 0.3 and not network.training and not network[0].training


def test_a_refresh_that_fails_leaves_the_network_ready_for_the_next():
    network = nn.Sequential(nn.BatchNorm3d(2, momentum=0.3)).train()

    def batches():
        yield torch.randn(3, 2, 4, 4, 4)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        refresh_batch_norm(network, batches(), None)
    assert network[0].momentum == 0.3 and not network.training and not network[0].training


def test_statistics_of_the_case_take_its_contrast_out():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()
    image, window, stride = torch.randn(20, 17, 9), (16, 16, 8), (8, 8, 4)

    def probability(scan, statistics):
        return sliding_window(network, scan, window, stride, statistics=statistics)[:, 2:-2, 2:-2, 2:-2]

    case, louder = (probability(scan, "case") for scan in (image, 3 * image))
    torch.testing.assert_close(case, louder, rtol=1e-3, atol=1e-4)
    assert not network.training
    # the statistics of 3 * image stay: they fit it, and not the image
    torch.testing.assert_close(probability(3 * image, "running"), louder)
    assert (probability(image, "running") - case).abs().max() > 0.01


def test_the_number_of_windows_at_once_changes_nothing():
    """Of the nine windows that the statistics are of, the last is alone where two or four go at once."""
    torch.manual_seed(0)
    network, contrast = VNet(2, 2), torch.linspace(0.2, 5, 32)[:, None, None]
    image, window = contrast * torch.randn(32, 32, 16), (16, 16, 16)
    one, *others = (
        sliding_window(network, image, window, window, tiles=tiles, statistics="case") for tiles in (1, 2, 4)
    )
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_statistics_of_the_case_are_those_of_windows_half_a_patch_apart():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, 2, 1)).eval()
    image = torch.arange(32.0).square()[:, None, None] + torch.randn(32, 16, 8)
    sliding_window(network, image, (16, 16, 8), (16, 16, 8), statistics="case")
    windows = torch.stack([image[start : start + 16] for start in (0, 8, 16)])
    torch.testing.assert_close(network[0].running_mean, windows.mean()[None])
    torch.testing.assert_close(network[0].running_var, windows.flatten(1).var(1).mean()[None])  # each on its own
