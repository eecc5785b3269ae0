"""Sliding windows against a network whose answer is known, and batch-norm statistics against their definition."""

import itertools

import pytest
import torch
from torch import nn

from spss_fast.engine.inference import refresh_batch_norm, sliding_window, window_starts


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


@pytest.mark.parametrize("shape", [(20, 17, 9), (16, 16, 8), (5, 30, 3)])
def test_windows_of_a_pointwise_network_give_its_answer(shape):
    torch.manual_seed(0)
    image, network = torch.randn(shape), _Pointwise()
    expected = network(image[None, None])[0].softmax(0)
    result = sliding_window(network, image, (16, 16, 8), (5, 7, 3))
    torch.testing.assert_close(result, expected)


def test_refreshed_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm3d(2), nn.Dropout3d(0.5)).train()
    batches = [torch.randn(3, 2, 4, 4, 4) * 3 + 1 for _ in range(5)]
    network(torch.full((3, 2, 4, 4, 4), 100.0))  # statistics that have to go
    refresh_batch_norm(network, batches, None)
    mean = torch.stack([batch.mean((0, 2, 3, 4)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3, 4)) for batch in batches]).mean(0)
    torch.testing.assert_close(network[0].running_mean, mean)
    torch.testing.assert_close(network[0].running_var, variance)
    assert network[0].momentum == 0.1 and not network.training and not network[0].training


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
