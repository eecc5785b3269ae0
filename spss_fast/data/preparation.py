"""From a scan to what the networks see: window, crop, resample, z-score. Nothing here looks at a label to decide."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from spss_fast.config import DataSettings
from spss_fast.data.geometry import Grid, resample, to_array, to_image
from spss_fast.data.layouts import Case, Scan
from spss_fast.errors import UserError

BODY_HU = -500.0


def prepare_scan(scan: Scan, case: Case, settings: DataSettings) -> tuple[np.ndarray, np.ndarray | None, Grid]:
    """The prepared image (H, W, D) float32, its label uint8 in [0, C) (None where the scan has none), and their grid.

    HDF5 cases are windowed and cropped already, so only the resampling and the z-score apply to them. Raises
    ``UserError`` for a label without foreground and an image without contrast.
    """
    image, label = scan.image, None
    if scan.label is not None:
        label = foreground(scan.label, settings)
        if not label.any():
            values = ", ".join(map(str, settings.foreground or settings.classes)) or "any above 0"
            raise UserError(f"{case.label} holds no foreground (label value {values}): annotate it, or take it away to "
                            "use the scan unlabelled")
    grid = target_grid(scan, case, settings)
    if settings.window is not None and not case.preprocessed:
        low, high = settings.window
        image = np.clip(image, low, high)
        image -= np.float32(low)
        image /= np.float32(high - low)
    image = resample(image, scan.grid, grid, linear=True, outside=float(image.min()))
    image = image.astype(np.float32, copy=False)
    mean, deviation = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    if deviation < 1e-6 * max(1.0, abs(mean)):
        raise UserError(f"{case.image} has no contrast: all its voxels are {mean:.4g} after preparation; replace the "
                        "scan, or adapt window to its intensities")
    image = ((image - mean) / deviation).astype(np.float32, order="C")
    if label is not None:
        label = np.ascontiguousarray(resample(label, scan.grid, grid, linear=False))
    return image, label, grid


def foreground(label: np.ndarray, settings: DataSettings) -> np.ndarray:
    """uint8 classes in [0, C): the label values of ``settings.classes`` as 1, 2, ... in their order; where it is empty,
    those of ``settings.foreground`` merged to 1, or every one above 0."""
    if settings.classes:
        class_of = np.zeros(256, np.uint8)
        class_of[list(settings.class_values)] = np.arange(settings.class_count)
        return class_of[label]
    merged = np.isin(label, settings.foreground) if settings.foreground else label > 0
    return merged.astype(np.uint8)


def target_grid(scan: Scan, case: Case, settings: DataSettings) -> Grid:
    """The grid that ``scan`` is resampled to, from its image alone."""
    grid = scan.grid
    if not case.preprocessed:
        if settings.body_crop:
            start, stop = body_box(scan.image, grid, case)
            grid = grid.cropped(start, stop - start)
        if settings.max_in_plane:
            kept = np.array(grid.size)
            kept[:2] = np.minimum(kept[:2], settings.max_in_plane)
            grid = grid.cropped((np.array(grid.size) - kept) // 2, kept)
    if settings.resample is not None:
        return grid.resized(settings.resample)
    return grid.shrunk(settings.downsample) if settings.downsample > 1 else grid


def body_box(image: np.ndarray, grid: Grid, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """First voxel of the body and the one past its last, per axis, in a CT (H, W, D) in Hounsfield units.

    The body is the largest connected component above -500 HU, found at about 128 voxels a side, which is plenty for
    a box and spares most of the time.
    """
    factors = [max(1, n // 128) for n in image.shape]
    mask = sitk.Cast(sitk.Shrink(to_image(image, grid), factors) > BODY_HU, sitk.sitkUInt8)
    components = to_array(sitk.RelabelComponent(sitk.ConnectedComponent(mask)))
    inside = np.nonzero(components == 1)
    if not inside[0].size:
        raise UserError(f"{case.image} holds no body (nothing above {BODY_HU:g} HU): is it a CT in Hounsfield units? "
                        "If not, turn body_crop off")
    # one coarse voxel more on each side than was found
    start = np.maximum([(axis.min() - 1) * factor for axis, factor in zip(inside, factors)], 0)
    stop = np.minimum([(axis.max() + 2) * factor for axis, factor in zip(inside, factors)], image.shape)
    return start, stop
