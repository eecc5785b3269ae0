"""The preparation of a scan as data: what :mod:`spss_fast.data.preparation` does, for somebody without this package."""

from __future__ import annotations

from typing import Any

from spss_fast.data.geometry import PLANES
from spss_fast.data.preparation import BODY_HU
from spss_fast.settings import DataSettings


def preparation_steps(settings: DataSettings) -> list[dict[str, Any]]:
    """The steps from a scan's file to the network's input, in order, as plain values that JSON holds.

    Each has its name under ``step``, its numbers, and the rest in words under ``text``. Axes are those of the array
    (H, W, D) whose element [i, j, k] is voxel (i, j, k) of the image, as SimpleITK counts it.
    """
    rule = {"coarser": 1.5} if settings.plane == "auto" else {"last": PLANES[settings.plane]}
    moved = (
        "If another axis than the last has a spacing more than `coarser` times those of both others, move it to the end"
        if settings.plane == "auto" else "Then move axis `last` to the end"
    )
    steps: list[dict[str, Any]] = [{
        "step": "orient", "orientation": "LPS", **rule,
        "text": "Reorder and flip axes, without interpolation, so that the array axes run to the patient's left, back "
        f"and head (SimpleITK.DICOMOrient to LPS). {moved}: slices lie along the last axis.",
    }]
    if settings.body_crop:
        steps.append({
            "step": "body_crop", "above": BODY_HU, "side": 128,
            "text": "Crop to the body. Subsample by max(1, n // side) along each axis of n voxels (SimpleITK.Shrink), "
            "keep voxels brighter than `above`, and of these the largest face-connected component; its box, one "
            "subsampled voxel wider on every side and cut off at the scan's border, is what remains.",
        })
    if settings.max_in_plane:
        steps.append({
            "step": "centre_crop", "in_plane": settings.max_in_plane,
            "text": "Crop the first two axes, of n voxels, to min(n, in_plane) about their middle, from voxel "
            "(n - in_plane) // 2 on.",
        })
    if settings.window is not None:
        low, high = settings.window
        steps.append({
            "step": "window", "low": low, "high": high,
            "text": "Clip intensities (CT: HU) to low .. high and map them to 0 .. 1.",
        })
    if settings.resample is not None or settings.downsample > 1:
        size = {"size": list(settings.resample)} if settings.resample else {"factor": settings.downsample}
        target = (
            "Divide what the crops left, border to border, into `size` voxels."
            if settings.resample else
            "Make voxels `factor` times as wide, beginning at the first voxel's corner; the last ones may reach beyond "
            "the border."
        )
        steps.append({
            "step": "resample", **size,
            "text": f"{target} Where a new voxel is at least 2 old ones wide, first average blocks of as many whole "
            "voxels as fit, counted from the scan's own first voxel, its border repeated to fill the last block; then "
            "interpolate linearly between the centres of the voxels (of the blocks).",
        })
    steps.append({
        "step": "z_score",
        "text": "Subtract the mean of the whole prepared volume and divide by its standard deviation (of the "
        "population, without Bessel's correction).",
    })
    return steps


def class_descriptions(settings: DataSettings, classes: int) -> list[dict[str, Any]]:
    """What each of the network's ``classes`` output channels stands for in the label maps that it learnt from."""
    merged = list(settings.foreground) or "all above 0"
    return [{"index": 0, "name": "background"}] + [
        {"index": c, "name": f"foreground {c}" if classes > 2 else "foreground",
         "label_values": [settings.class_values[c]] if settings.classes else merged}
        for c in range(1, classes)
    ]
