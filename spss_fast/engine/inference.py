"""Sliding-window inference with the student (METHOD, Inference and metrics)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis: every ``stride``, the last one flush with the end."""
    return [min(start, side - patch) for start in range(0, side - patch + stride, stride)]


def _windows(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    starts = [window_starts(side, p, s) for side, p, s in zip(shape, patch, stride)]
    for i in starts[0]:
        for j in starts[1]:
            for k in starts[2]:
                yield tuple(slice(start, start + p) for start, p in zip((i, j, k), patch))


@torch.no_grad()
def sliding_window(
    network: nn.Module, image: Tensor, patch: Sequence[int], stride: Sequence[int], amp: torch.dtype | None = None,
    tiles: int = 4, statistics: str = "running",
) -> Tensor:
    """Mean softmax (C, H, W, D) float32 over all windows of ``image`` (H, W, D), on the network's device.

    ``patch`` and ``stride`` are in voxels; an image smaller than the patch is padded with its minimum and cropped
    back. ``tiles`` windows go through the network at once. The network's mode (training or not) is the caller's.
    ``statistics`` ``"case"`` first replaces the running batch-norm statistics by those of the image's own windows, half
    a patch apart, which takes a scan's contrast out: prediction-time batch normalisation (Nado et al., 2020).
    """
    device = next(network.parameters()).device
    shape = image.shape
    missing = [max(0, p - side) for p, side in zip(patch, shape)]
    before = [m // 2 for m in missing]
    padding = [amount for b, m in reversed(list(zip(before, missing))) for amount in (b, m - b)]
    image = F.pad(image.to(device).float(), padding, value=float(image.min()))

    def batches(apart: Sequence[int]) -> Iterator[tuple[list[tuple[slice, ...]], Tensor]]:
        windows = list(_windows(image.shape, patch, apart))
        for first in range(0, len(windows), tiles):
            some = windows[first : first + tiles]
            batch = torch.stack([image[window] for window in some])[:, None]
            yield some, batch.contiguous(memory_format=torch.channels_last_3d)

    if statistics == "case":
        refresh_batch_norm(network, (batch for _, batch in batches([side // 2 for side in patch])), amp)
    total, count = None, torch.zeros(image.shape, device=device)
    for some, batch in batches(stride):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            probability = network(batch).float().softmax(1)
        if total is None:
            total = torch.zeros(probability.shape[1], *image.shape, device=device)
        for window, p in zip(some, probability):
            total[(slice(None), *window)] += p
            count[window] += 1
    mean = total / count
    return mean[(slice(None), *(slice(b, b + side) for b, side in zip(before, shape)))]


@torch.no_grad()
def refresh_batch_norm(network: nn.Module, batches: Iterable[Tensor], amp: torch.dtype | None) -> None:
    """Replace running batch-norm statistics by the exact mean over ``batches`` (B, 1, h, w, d), without dropout.

    Running statistics are averages over past weights and over passes with dropout, which inflates the variance that
    the next normalisation sees; inference has neither (Li et al., "Understanding the disharmony between dropout and
    batch normalization by variance shift", CVPR 2019). Leaves the network in evaluation mode.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in batches:
        with torch.autocast(batch.device.type, amp, enabled=amp is not None):
            network(batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    network.eval()
