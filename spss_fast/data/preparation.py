"""From a scan to what the networks see: window, crop, resample, z-score. Nothing here looks at a label to decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from spss_fast.data.geometry import Grid, resample, to_array
from spss_fast.data.images import ROUNDING
from spss_fast.data.layouts import Case, Scan
from spss_fast.errors import UserError, some
from spss_fast.settings import DataSettings

BODY_HU = -500.0
SLAB = 1 << 20  # voxels worked on at once
SAMPLES = 1 << 20  # voxels, about, that stand for all of a scan's
FEW = 16  # values, and no more, that a label map is known by


def sampled(image: np.ndarray) -> np.ndarray:
    """About ``SAMPLES`` voxels of an image (H, W, D), spread over it, as a view."""
    step = max(1, round((image.size / SAMPLES) ** (1 / 3)))
    return image[::step, ::step, ::step]


def refuse_label_map(image: np.ndarray, case: Case) -> None:
    """``UserError`` where the image (H, W, D) of a case looks like a label map, which its name did not say: at most
    ``FEW`` values, all of them whole numbers from 0 to 255, and most voxels 0. HDF5 files tell the two apart."""
    if case.preprocessed:
        return
    sample = sampled(image)
    shown = sample[sample != 0]
    if 2 * shown.size > sample.size:
        return
    if not shown.size:  # of small structures a sample may show nothing
        shown = image[image != 0]
    if shown.size and shown.min() > 0 and shown.max() <= 255:
        values = np.unique(shown)
        if values.size < FEW and (np.abs(values - np.rint(values)) <= ROUNDING).all():
            listed = some(f"{value:g}" for value in (0, *values))
            raise UserError(f"{case.image} looks like a label map, not like a scan (its values: {listed}): name it "
                            "after its scan, like CASE_seg.nii.gz beside CASE.nii.gz, or take it away")


def prepare_scan(scan: Scan, case: Case, settings: DataSettings) -> tuple[np.ndarray, np.ndarray | None, Grid]:
    """The prepared image (H, W, D) float32, its label uint8 in [0, C) (None where the scan has none), and their grid.

    HDF5 cases are windowed and cropped already, so only the resampling and the z-score apply to them. Raises
    ``UserError`` for an image without contrast.
    """
    grid = target_grid(scan, case, settings)
    label = None if scan.label is None else resampled_label(scan.label, scan.grid, grid, settings)
    image = resampled(scan, grid, None if case.preprocessed else settings.window)
    mean = image.mean(dtype=np.float64)
    # by slabs, as NumPy would make float64 copies of all of a scan
    deviation = np.sqrt(sum(np.square(slab - mean).sum() for slab in image) / image.size)
    if deviation < 1e-6 * max(1.0, abs(mean)):
        raise UserError(f"{case.image} has no contrast: all its voxels are {mean:.4g} after preparation; replace the "
                        "scan, or adapt window to its intensities")
    for slab in image:
        slab[:] = (slab - mean) / deviation
    return image, label, grid


def resampled(scan: Scan, grid: Grid, window: tuple[float, float] | None) -> np.ndarray:
    """The image of ``scan`` in ``window``, mapped to [0, 1], and then linearly on ``grid``: (H, W, D) float32 in C
    order. ``grid`` runs along the axes of the scan's.

    Only the part that ``grid`` covers is ever converted to float32, and where voxels shrink only slab by slab.
    """
    factors = np.maximum(np.array(grid.spacing) / scan.grid.spacing + 1e-6, 1).astype(int)
    corners = np.stack([scan.grid.index(grid.point(corner)) for corner in ((0, 0, 0), np.array(grid.size) - 1)])
    if np.allclose(grid.spacing, scan.grid.spacing) and np.allclose(corners, corners.round(), atol=1e-3):
        start, stop = corners[0].round().astype(int), corners[1].round().astype(int) + 1  # a crop
    else:
        # two blocks more on either side, for what interpolates at the border; blocks begin at the scan's own corner
        start = (np.floor(corners[0] / factors).astype(int) - 2) * factors
        stop = (np.ceil(corners[1] / factors).astype(int) + 3) * factors
    start, stop = np.maximum(start, 0), np.minimum(stop, scan.image.shape)
    array = scan.image[tuple(map(slice, start, stop))]
    part = scan.grid.cropped(start, stop - start)
    if factors.max() > 1:
        array, part = block_means(array, factors, window), part.shrunk(factors)
    else:
        array = windowed(array, window)
    if part.size == grid.size and np.allclose([part.spacing, part.origin], [grid.spacing, grid.origin], rtol=1e-6,
                                              atol=1e-3 * min(grid.spacing) / max(grid.size)):
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(resample(array, part, grid, linear=True, outside=float(array.min())))


def resampled_label(label: np.ndarray, source: Grid, target: Grid, settings: DataSettings) -> np.ndarray:
    """The classes of a ``label`` on ``target``, which runs along the axes of ``source``: uint8 in [0, C), in C order.

    A voxel that unites whole ones, as ``downsample`` makes them, has the class of most of them, of equally many the
    last: the nearest one would lie half a voxel to the side, always the same. Any other has that of the nearest.
    """
    factors = np.rint(np.divide(target.spacing, source.spacing)).astype(int)
    start = source.index(target.point((0, 0, 0))) - (factors - 1) / 2
    first = np.rint(start).astype(int)
    united = np.allclose(target.spacing, factors * source.spacing, rtol=1e-6) and np.allclose(start, first, atol=1e-3)
    if not united or factors.max() == 1:  # merged where it is small
        return foreground(np.ascontiguousarray(resample(label, source, target, linear=False)), settings)
    votes = np.zeros((settings.class_count, *target.size), np.uint16)
    for offset in np.ndindex(*factors):
        # the border is repeated to complete the last ones
        part = foreground(label[np.ix_(*[
            (begin + i + step * np.arange(n)).clip(0, size - 1)
            for begin, i, step, n, size in zip(first, offset, factors, target.size, label.shape)
        ])], settings)
        for c, vote in enumerate(votes):
            vote += part == c
    return (settings.class_count - 1 - votes[::-1].argmax(0)).astype(np.uint8)


def classes_shown(label: np.ndarray, settings: DataSettings) -> np.ndarray:
    """How many foreground classes each slice of a label map (H, W, D) uint8 shows: (D,) int64."""
    along = int(np.abs(label.strides).argmax())
    shown = np.zeros((settings.class_count - 1, label.shape[2]), bool)
    for place, slab in enumerate(np.moveaxis(label, along, 0)):  # in memory order
        classes = foreground(slab, settings)
        for c, of_class in enumerate(shown, 1):
            mask = classes == c
            if along == 2:
                of_class[place] = mask.any()
            else:
                of_class |= mask.any(axis=0)
    return shown.sum(0)


def windowed(image: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """A copy of ``image`` as float32 in C order; with ``window`` clipped to it, and mapped to [0, 1]."""
    image = image.astype(np.float32, order="C")
    if window is not None:
        low, high = window
        np.clip(image, low, high, out=image)
        image -= np.float32(low)
        image /= np.float32(high - low)
    return image


def block_means(image: np.ndarray, factors: Sequence[int], window: tuple[float, float] | None) -> np.ndarray:
    """Means over blocks of ``factors`` voxels of the windowed ``image``, as float32; the border is repeated to
    complete the last ones. Goes by slabs of whole blocks, so that memory stays that of one."""
    sizes = [-(-n // f) for n, f in zip(image.shape, factors)]
    result = np.empty(sizes, np.float32)
    along = int(np.abs(image.strides).argmax())  # the axis that is slowest in memory
    blocks = max(1, SLAB * sizes[along] // image.size)
    for first in range(0, sizes[along], blocks):
        cut = [slice(None)] * 3
        cut[along] = slice(first * factors[along], (first + blocks) * factors[along])
        slab = windowed(image[tuple(cut)], window)
        padding = [(0, int(-n % f)) for n, f in zip(slab.shape, factors)]
        if np.any(padding):
            slab = np.pad(slab, padding, mode="edge")
        cut[along] = slice(first, first + blocks)
        total = sum(slab[tuple(slice(i, None, f) for i, f in zip(offset, factors))].astype(np.float64)
                    for offset in np.ndindex(*factors))
        result[tuple(cut)] = total / np.prod(factors)
    return result


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
            start, stop = body_box(scan.image, case)
            grid = grid.cropped(start, stop - start)
        if settings.max_in_plane:
            kept = np.array(grid.size)
            kept[:2] = np.minimum(kept[:2], settings.max_in_plane)
            grid = grid.cropped((np.array(grid.size) - kept) // 2, kept)
    if settings.resample is not None:
        return grid.resized(settings.resample)
    return grid.shrunk(settings.downsample) if settings.downsample > 1 else grid


def body_box(image: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """First voxel of the body and the one past its last, per axis, in a CT (H, W, D) in Hounsfield units.

    The body is the largest connected component above -500 HU, found at about 128 voxels a side, which is plenty for
    a box and spares most of the time.
    """
    factors = [max(1, n // 128) for n in image.shape]
    coarse = image[tuple(slice(f // 2, n - n % f or None, f) for n, f in zip(image.shape, factors))]
    mask = sitk.GetImageFromArray((coarse > BODY_HU).astype(np.uint8).transpose(2, 1, 0))
    components = to_array(sitk.RelabelComponent(sitk.ConnectedComponent(mask)))
    inside = np.nonzero(components == 1)
    if not inside[0].size:
        raise UserError(f"{case.image} holds no body (nothing above {BODY_HU:g} HU): is it a CT in Hounsfield units? "
                        "If not, turn body_crop off")
    # one coarse voxel more on each side than was found
    start = np.maximum([(axis.min() - 1) * factor for axis, factor in zip(inside, factors)], 0)
    stop = np.minimum([(axis.max() + 2) * factor for axis, factor in zip(inside, factors)], image.shape)
    return start, stop
