"""Pseudo labels: registration labels, the teacher's, and their fusion (METHOD, stage 2, steps 2 and 8)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from spss_fast.config import RegistrationSettings
from spss_fast.engine.registration import neighbour_flows
from spss_fast.ops.propagate import propagate


def registration_labels(
    network: nn.Module, volumes: Tensor, annotation: Tensor, index: Tensor, settings: RegistrationSettings,
    amp: torch.dtype | None,
) -> Tensor:
    """Carry each annotated slice through its volume (step 2).

    ``volumes`` (L, h, w, d); ``annotation`` (L, h, w) uint8, on the CPU; ``index`` (L,) int64, its slice z*. Returns
    uint8 (L, h, w, d) on the device of ``volumes``.

    Keeping the largest component on the way would lose one of a pair of organs, so each of the ``structures`` largest
    components of the annotated slice is carried on its own; with 1, the slice is carried as it is (as published).
    """
    count = settings.structures
    parts = annotation if count == 1 else split_structures(annotation, count)
    flows = neighbour_flows(network, volumes, amp)
    up, down = (flow if count == 1 else flow.repeat_interleave(count, 0) for flow in flows)
    labels = propagate(
        parts.to(volumes.device), index.repeat_interleave(count), up, down, opening=settings.opening,
        closing=settings.closing, far_distance=settings.far_distance, far_iterations=settings.far_iterations,
    )
    if count > 1:
        labels = restore_annotation(labels.unflatten(0, (-1, count)).amax(1), annotation.to(labels.device), index)
    return labels


def split_structures(annotation: Tensor, count: int) -> Tensor:
    """The ``count`` largest 8-connected components of each slice (L, h, w): uint8 (L * count, h, w), empty if fewer."""
    parts = torch.zeros(len(annotation), count, *annotation.shape[1:], dtype=torch.uint8)
    for slice_parts, mask in zip(parts, annotation.numpy()):
        components, _ = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        for part, largest in zip(slice_parts, np.argsort(-sizes, kind="stable")):
            part.copy_(torch.from_numpy(components == largest + 1))
    return parts.flatten(0, 1)


def fill_holes(labels: Tensor) -> Tensor:
    """Fill the 3-D holes of each binary label (L, h, w, d): background that no path joins to the border."""
    filled = [ndimage.binary_fill_holes(label) for label in labels.cpu().numpy()]
    return torch.stack([torch.from_numpy(label) for label in filled]).to(labels.device, torch.uint8)


def restore_annotation(labels: Tensor, annotation: Tensor, index: Tensor) -> Tensor:
    """``labels`` (L, h, w, d) with the annotated slice of each put back, in place."""
    labels[torch.arange(len(labels), device=labels.device), :, :, index] = annotation.to(labels.dtype)
    return labels


def fused_labels(
    registration: Tensor, foreground: Tensor, annotation: Tensor, index: Tensor, teacher_weight: float,
) -> tuple[Tensor, Tensor]:
    """The teacher's labels L_seg and the fused labels y (step 8), both uint8 (L, h, w, d).

    ``registration`` (L, h, w, d) is L_reg, ``foreground`` (L, h, w, d) float the teacher's p_t of the foreground.
    """
    segmentation = restore_annotation(fill_holes(foreground > 0.5), annotation, index)
    fused = (1 - teacher_weight) * registration.float() + teacher_weight * foreground.float() > 0.5
    return segmentation, restore_annotation(fill_holes(fused), annotation, index)


def voxel_weights(
    registration: Tensor, segmentation: Tensor, index: Tensor, iteration: int, decay: float, disagreement_from: int,
    truncated: bool,
) -> Tensor:
    """Weights (L, h, w, d) of the supervised cross entropy: decay^|z - z*|, more where L_reg and L_seg disagree."""
    slices = torch.arange(registration.shape[-1], device=registration.device)
    distance = (slices - index[:, None]).abs()
    weight = (decay**distance)[:, None, None, :].expand(registration.shape)
    if iteration >= disagreement_from:
        rise = 2 * ((iteration - disagreement_from) / 1e5) ** 0.5
        weight = weight * (1 + rise * (registration != segmentation))
    return weight.trunc() if truncated else weight
