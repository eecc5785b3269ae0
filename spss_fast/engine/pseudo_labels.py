"""Pseudo labels: registration labels, the teacher's, and their fusion (METHOD, stage 2, steps 2 and 8)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from spss_fast.engine.device import upload
from spss_fast.ops.holes import fill_holes
from spss_fast.ops.propagate import propagate
from spss_fast.settings import RegistrationSettings


def registration_labels(
    flows: Tensor, annotation: Tensor, index: Tensor, classes: int, settings: RegistrationSettings,
) -> Tensor:
    """Carry each annotated slice through its volume (step 2).

    ``flows`` (L, d - 1, 2, h, w) by :func:`~spss_fast.engine.registration.outward_flows` from ``index`` (L,) int64, the
    annotated slices z*; ``annotation`` (L, h, w) uint8 in [0, C = ``classes``), on the CPU. Returns uint8 in [0, C) of
    shape (L, h, w, d) on the device of ``flows``.

    Every foreground class is carried on its own. So is each of the ``structures`` largest components that it has in the
    annotated slice, because keeping the largest component on the way would lose one of a pair of organs; with 1, a
    class is carried as it is (as published). What the cleaning gives to several classes, :func:`joined` settles.
    """
    masks = foreground_masks(annotation, classes)
    parts, count = masks.flatten(0, 1), settings.structures
    if count > 1:
        parts = split_structures(parts, count)
    chains, device = len(parts) // max(1, len(annotation)), flows.device  # per volume
    if chains > 1:
        flows = flows.repeat_interleave(chains, 0)
    labels = propagate(
        upload(parts, device), index.repeat_interleave(chains), flows, flows, opening=settings.opening,
        closing=settings.closing, far_distance=settings.far_distance, far_iterations=settings.far_iterations,
    )
    if chains == 1:
        return labels
    labels = joined(labels.unflatten(0, (-1, classes - 1, count)).amax(2), masks.sum((2, 3)))
    return restore_annotation(labels, upload(annotation, device), index)


def foreground_masks(labels: Tensor, classes: int) -> Tensor:
    """One mask a foreground class of ``labels`` (L, *spatial) in [0, C): uint8 (L, C - 1, *spatial)."""
    numbers = torch.arange(1, classes, dtype=labels.dtype, device=labels.device)
    return (labels[:, None] == numbers.view(-1, *[1] * (labels.ndim - 1))).to(torch.uint8)


def joined(masks: Tensor, sizes: Tensor) -> Tensor:
    """One label map of foreground masks (L, C - 1, *spatial): uint8 (L, *spatial) in [0, C).

    Where masks overlap the class of the least of ``sizes`` (L, C - 1), on the CPU, is right, of equal ones the first:
    a lesion that its organ's mask has closed over stays, and the smaller of two neighbours loses nothing.
    """
    labels = torch.zeros_like(masks[:, 0])
    for label, of_volume, order in zip(labels, masks, sizes.argsort(dim=1, stable=True).flip(1).tolist()):
        for i in order:  # the smallest last
            label.masked_fill_(of_volume[i] > 0, i + 1)
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


def restore_annotation(labels: Tensor, annotation: Tensor, index: Tensor) -> Tensor:
    """``labels`` (L, h, w, d) with the annotated slice of each put back, in place."""
    labels[torch.arange(len(labels), device=labels.device), :, :, index] = annotation.to(labels.dtype)
    return labels


def fuse(
    registration: Tensor, probability: Tensor, teacher_weight: float, annotation: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 8: the teacher's labels L_seg = argmax p_t and the fused y = argmax[(1 - w_p) onehot(L_reg) + w_p p_t].

    Both uint8 (L, h, w, d) in [0, C), with their holes filled and the annotated slices restored.

    ``registration`` (L, h, w, d) in [0, C) is L_reg, ``probability`` (L, C, h, w, d) float p_t, ``teacher_weight`` w_p,
    ``annotation`` (L, h, w) the slices, at ``index`` (L,) int64 along the last axis.
    """
    classes, foreground = probability.shape[1], probability[:, 1:].float()
    fused = (1 - teacher_weight) * foreground_masks(registration, classes).float() + teacher_weight * foreground
    labels = torch.cat([most_probable(scores) for scores in (foreground, fused)]).to(torch.uint8)
    segmentation, label = fill_holes(labels, classes).chunk(2)
    return restore_annotation(segmentation, annotation, index), restore_annotation(label, annotation, index)


def most_probable(foreground: Tensor) -> Tensor:
    """argmax over C classes (L, *spatial) of probabilities, of which ``foreground`` (L, C - 1, *spatial) are given.

    The background's is 1 less those, and it wins ties: with one foreground class that is exactly its ``> 0.5``.
    """
    background = 1 - foreground.sum(1, keepdim=True)
    return torch.cat([background, foreground], 1).max(1).indices  # the first of equals, as argmax, many times as fast


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
    return (weight.trunc() if truncated else weight).contiguous()  # of the same strides at every iteration
