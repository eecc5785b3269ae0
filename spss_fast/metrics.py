"""Segmentation metrics of one case, as this literature defines them (METHOD, Inference and metrics)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

NAMES = ("dice", "jaccard", "hd95", "asd")


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of binary arrays; NaN if both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else math.nan


def jaccard(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|P and R| / |P or R| of binary arrays; NaN if both are empty."""
    union = np.count_nonzero(prediction | reference)
    return np.count_nonzero(prediction & reference) / union if union else math.nan


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from every surface voxel of P to the surface of R, and of R to that of P.

    Surface voxels are those a face-connected erosion removes. Units are voxels, or those of ``spacing``.
    """
    # a box with room for the erosion's border: nothing outside it is a surface voxel of either
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    grow = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
    prediction, reference = prediction[grow], reference[grow]
    face = ndimage.generate_binary_structure(prediction.ndim, 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask, face) for mask in (prediction, reference)]
    to_prediction, to_reference = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    return to_reference[surfaces[0]], to_prediction[surfaces[1]]


def evaluate(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Dice, Jaccard, 95% Hausdorff distance and average surface distance of two binary (H, W, D) arrays.

    HD95 is the 95th percentile of both directions' surface distances together, ASD the mean distance from the
    prediction's surface to the reference's (medpy's ``hd95`` and ``asd``). Both are NaN where either array is empty,
    and all four where both are. Raises ``ValueError`` for shapes that differ.
    """
    prediction, reference = np.asarray(prediction) > 0, np.asarray(reference) > 0
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    result = {"dice": dice(prediction, reference), "jaccard": jaccard(prediction, reference)}
    if prediction.any() and reference.any():
        outward, inward = surface_distances(prediction, reference, spacing)
        hd95, asd = float(np.percentile(np.concatenate([outward, inward]), 95)), float(outward.mean())
    else:
        hd95 = asd = math.nan
    return result | {"hd95": hd95, "asd": asd}


def evaluate_classes(
    prediction: np.ndarray, reference: np.ndarray, values: Sequence[int], spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """:func:`evaluate` of each foreground class of two (H, W, D) label maps in [0, C), averaged over them.

    Beside the averages stand several classes' own metrics, under names like ``dice_VALUE``; ``values`` (C,) are the
    classes' label values. What is NaN has no part in the average: all of a class that neither array shows (1, or
    medpy's 0, would say how rare it is), the distances of one that only one of them does.
    """
    result: dict[str, float] = {}
    for c, value in enumerate(values[1:], 1):
        of_class = evaluate(np.asarray(prediction) == c, np.asarray(reference) == c, spacing)
        result |= {f"{name}_{value}": metric for name, metric in of_class.items()}
    if len(values) == 2:
        return of_class
    means = {}
    for name in NAMES:
        known = [result[f"{name}_{value}"] for value in values[1:] if not math.isnan(result[f"{name}_{value}"])]
        means[name] = sum(known) / len(known) if known else math.nan
    return means | result
