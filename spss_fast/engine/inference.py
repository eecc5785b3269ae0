"""Sliding-window inference with the student (METHOD, Inference and metrics)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from spss_fast.engine.padding import padded


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis: every ``stride``, the last one flush with the end."""
    return [min(start, side - patch) for start in range(0, side - patch + stride, stride)]


def _windows(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    starts = [window_starts(side, p, s) for side, p, s in zip(shape, patch, stride)]
    for i in starts[0]:
        for j in starts[1]:
            for k in starts[2]:
                yield tuple(slice(start, start + p) for start, p in zip((i, j, k), patch))


def _profile(side: int, gaussian: bool) -> Tensor:
    """Weights of a window along one axis: equal, or a Gaussian about its middle with sigma ``side / 8`` (Isensee et
    al., "nnU-Net", Nature Methods 2021)."""
    offset = torch.arange(side) - (side - 1) / 2
    return torch.exp(-0.5 * (offset / (side / 8)) ** 2) if gaussian else torch.ones(side)


FLIPS: list[tuple[int, ...]] = [(), (2,), (3,), (2, 3)]
SMALLEST_WINDOW = 16**3  # voxels, of which the V-Net's halvings leave one


def _accompanied(batch: Tensor) -> Tensor:
    """``batch`` for normalisation by its own statistics: a lone window of the smallest size, whose one value per
    channel at the bottleneck has no variance, gets its flips beside it."""
    return torch.cat([batch.flip(axes) for axes in FLIPS]) if batch.numel() == SMALLEST_WINDOW else batch


def _softmax(network: nn.Module, batch: Tensor, amp: torch.dtype | None, mirror: bool) -> Tensor:
    """Softmax (B, C, h, w, d) float32 of ``batch``; with ``mirror`` the mean over the four in-plane flips, the ones
    that training draws."""
    total = None
    flips = FLIPS if mirror else FLIPS[:1]
    for axes in flips:
        flipped = batch.flip(axes) if axes else batch
        with torch.autocast(batch.device.type, amp, enabled=amp is not None):
            shown = _accompanied(flipped) if network.training else flipped
            logits = network(shown.contiguous(memory_format=torch.channels_last_3d))[: len(batch)]
        probability = logits.float().softmax(1)
        if axes:
            probability = probability.flip(axes)
        total = probability if total is None else total.add_(probability)
    return total.div_(len(flips)) if mirror else total


@torch.no_grad()
def sliding_window(
    network: nn.Module, image: Tensor, patch: Sequence[int], stride: Sequence[int], amp: torch.dtype | None = None,
    tiles: int = 4, gaussian: bool = False, mirror: bool = False, statistics: str = "running",
) -> Tensor:
    """Mean softmax (C, H, W, D) float32 over all windows of ``image`` (H, W, D), on the network's device.

    ``patch`` and ``stride`` are in voxels; an image smaller than the patch is padded with its minimum and cropped
    back. ``tiles`` windows go through the network at once, which in evaluation mode is a matter of memory and time
    alone. The mean is the plain one that this literature's figures are taken with; ``gaussian`` lets the middle of a
    window, which sees most around it, count more than its rim. ``mirror`` averages over in-plane flips, for four times
    the work. ``statistics`` ``"case"`` first replaces the running batch-norm statistics by the mean of those of the
    image's own windows, half a patch apart, each on its own, which takes a scan's contrast out: prediction-time batch
    normalisation (Nado et al., 2020). The network's mode (training or not) is the caller's. Raises ``ValueError`` for
    a stride beyond the patch, which would leave voxels out.
    """
    if any(s > p for p, s in zip(patch, stride)):
        raise ValueError(f"the stride {tuple(stride)} exceeds the patch {tuple(patch)}")
    device = next(network.parameters()).device
    image, inside = padded(image.to(device).float(), patch)
    profiles = [_profile(p, gaussian).to(device) for p in patch]
    weight = profiles[0][:, None, None] * profiles[1][:, None] * profiles[2]
    # the windows are a lattice and their weight a product over the axes, so the sum of weights in a voxel is one too:
    # three short vectors instead of another volume
    sums = [torch.zeros(side, device=device) for side in image.shape]
    for summed, profile, p, s in zip(sums, profiles, patch, stride):
        for start in window_starts(len(summed), p, s):
            summed[start : start + p] += profile

    def batches(apart: Sequence[int], size: int) -> Iterator[tuple[list[tuple[slice, ...]], Tensor]]:
        windows = list(_windows(image.shape, patch, apart))
        for first in range(0, len(windows), size):
            some = windows[first : first + size]
            batch = torch.stack([image[window] for window in some])[:, None]
            yield some, batch.contiguous(memory_format=torch.channels_last_3d)

    if statistics == "case":
        # one at a time: the statistics, and so the labels, would otherwise depend on how many windows fit into memory
        refresh_batch_norm(network, (batch for _, batch in batches([side // 2 for side in patch], 1)), amp)
    total = None
    for some, batch in batches(stride, tiles):
        probability = _softmax(network, batch, amp, mirror)
        if total is None:
            total = torch.zeros(probability.shape[1], *image.shape, device=device)
        if gaussian:
            probability *= weight
        for window, p in zip(some, probability):
            total[(slice(None), *window)] += p
    plane = sums[1][:, None] * sums[2]
    for row, along in zip(total.unbind(1), sums[0]):  # in place: a second copy may not fit
        row /= along * plane
    return total[(slice(None), *inside)]


@torch.no_grad()
def refresh_batch_norm(network: nn.Module, batches: Iterable[Tensor], amp: torch.dtype | None) -> None:
    """Replace running batch-norm statistics by the exact mean over ``batches`` (B, 1, h, w, d), without dropout.

    Running statistics are averages over past weights and over passes with dropout, which inflates the variance that
    the next normalisation sees; inference has neither (Li et al., "Understanding the disharmony between dropout and
    batch normalization by variance shift", CVPR 2019). Batches count alike, whatever their length. Leaves the network
    in evaluation mode, also where a pass fails.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for batch in batches:
            with torch.autocast(batch.device.type, amp, enabled=amp is not None):
                network(_accompanied(batch))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        network.eval()
