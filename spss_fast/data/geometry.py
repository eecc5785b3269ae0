"""Where a volume's voxels lie in the patient, and moving volumes between such grids.

Arrays are indexed (H, W, D) along the grid's three axes, in millimetres of the LPS patient frame (x to the left, y to
the back, z to the head), as SimpleITK has it. SimpleITK's own arrays come in reverse order; only this module knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk

# the patient's axis that the slices of a plane are stacked along
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class Grid:
    """Voxel lattice: ``size`` in voxels and ``spacing`` in mm per array axis, ``origin`` (mm) of voxel (0, 0, 0), and
    ``direction``, the 3 x 3 matrix in row order whose columns are the axes' unit vectors."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    @classmethod
    def of(cls, image: sitk.Image) -> Grid:
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @property
    def axes(self) -> np.ndarray:
        """(3, 3) float64: column ``a`` is the unit vector of array axis ``a``."""
        return np.array(self.direction).reshape(3, 3)

    def point(self, index) -> np.ndarray:
        """Position in mm of a (possibly fractional) voxel ``index``."""
        return np.array(self.origin) + self.axes @ (np.asarray(index, np.float64) * self.spacing)

    def index(self, point) -> np.ndarray:
        """Fractional voxel index of a position in mm; the inverse of :meth:`point`."""
        return np.linalg.solve(self.axes, np.asarray(point, np.float64) - self.origin) / self.spacing

    def cropped(self, start, size) -> Grid:
        """The part of the grid that begins at voxel ``start``; it may reach outside."""
        return replace(self, size=tuple(int(n) for n in size), origin=tuple(map(float, self.point(start))))

    def resized(self, size) -> Grid:
        """The same box of space divided into ``size`` voxels."""
        spacing = np.array(self.spacing) * self.size / np.asarray(size)
        shift = 0.5 * (spacing / self.spacing - 1)
        return replace(self, size=tuple(int(n) for n in size), spacing=tuple(map(float, spacing)),
                       origin=tuple(map(float, self.point(shift))))

    def shrunk(self, factor: int | Sequence[int]) -> Grid:
        """Voxels ``factor`` times as wide (one number, or one per axis), beginning at the same corner; the last ones
        may reach past the border."""
        factors = np.broadcast_to(factor, 3)
        size = [math.ceil(n / f) for n, f in zip(self.size, factors)]
        return self.cropped((0, 0, 0), np.array(size) * factors).resized(size)

    def turned(self, order: Sequence[int], mirrored: Sequence[bool]) -> Grid:
        """The same lattice with its axes in another ``order``, those of the result that are ``mirrored`` reversed."""
        order = list(order)
        corner = np.zeros(3)
        corner[order] = np.where(mirrored, np.array(self.size)[order] - 1, 0)
        axes = self.axes[:, order] * np.where(mirrored, -1.0, 1.0)
        return Grid(tuple(self.size[axis] for axis in order), tuple(self.spacing[axis] for axis in order),
                    tuple(map(float, self.point(corner))), tuple(map(float, axes.ravel())))

    def patient_axes(self) -> tuple[int, int, int]:
        """Per array axis, the patient's axis that it is closest to: 0 right-left, 1 front-back, 2 feet-head."""
        left = np.abs(self.axes)
        result = [0, 0, 0]
        for _ in range(3):  # the closest pair first, as an oblique scan may be nearest to one axis twice
            patient, axis = np.unravel_index(left.argmax(), left.shape)
            result[axis] = int(patient)
            left[patient], left[:, axis] = -1, -1
        return tuple(result)


def to_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    """A SimpleITK image of an (H, W, D) array on ``grid``."""
    if array.shape != grid.size:
        raise ValueError(f"array of shape {array.shape} does not fit a grid of size {grid.size}")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def to_array(image: sitk.Image) -> np.ndarray:
    """The (H, W, D) array of a SimpleITK image, in its memory order (H fastest): reordering a scan takes seconds."""
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


def oriented(array: np.ndarray, grid: Grid, plane: str = "auto") -> tuple[np.ndarray, Grid]:
    """The same scan with its array axes along left, back and head, and its slices along the last one, as a view.

    ``plane`` names the slices: ``axial``, ``coronal``, ``sagittal``; ``auto`` takes axial ones, unless one axis is
    sampled more than 1.5 times as coarsely as both others: that one then is the slice axis (coronal and sagittal
    acquisitions, and files that bring no orientation). No voxel is interpolated, or copied.
    """
    patient = grid.patient_axes()
    order = [patient.index(axis) for axis in range(3)]
    spacing = np.array(grid.spacing)[order]
    last = PLANES[plane] if plane != "auto" else 2
    coarsest = int(spacing.argmax())
    if plane == "auto" and spacing[coarsest] > 1.5 * np.delete(spacing, coarsest).max():
        last = coarsest
    order = [order[axis] for axis in range(3) if axis != last] + [order[last]]
    mirrored = [bool(grid.axes[patient[axis], axis] < 0) for axis in order]
    view = array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in mirrored)]
    return view, grid.turned(order, mirrored)


def resample(array: np.ndarray, grid: Grid, target: Grid, *, linear: bool, outside: float = 0.0) -> np.ndarray:
    """``array`` (H, W, D) on ``grid`` resampled onto ``target``: linear, else nearest; ``outside`` beyond the border.

    Linear shrinking first averages blocks of whole voxels, as linear interpolation alone would skip most of them and
    keep all of their noise.
    """
    if target == grid:
        return array
    if not linear and np.allclose(target.direction, grid.direction, atol=1e-9):
        return _nearest(array, grid, target, outside)
    image = to_image(array, grid)
    if linear:
        # a file's own grid may run along other axes than the grid its scan was prepared on
        along = np.abs(grid.axes.T @ target.axes) @ target.spacing
        factors = np.maximum(along / grid.spacing + 1e-6, 1).astype(int)
        padding = [int(n) for n in -np.array(grid.size) % factors]
        if factors.max() > 1:
            # BinShrink drops an incomplete last block, so the border is repeated to complete it
            image = sitk.BinShrink(sitk.ZeroFluxNeumannPad(image, [0, 0, 0], padding), [int(f) for f in factors])
    reference = sitk.Image([int(n) for n in target.size], sitk.sitkUInt8)
    reference.SetSpacing(target.spacing)
    reference.SetOrigin(target.origin)
    reference.SetDirection(target.direction)
    method = sitk.sitkLinear if linear else sitk.sitkNearestNeighbor
    return to_array(sitk.Resample(image, reference, sitk.Transform(), method, float(outside)))


def _nearest(array: np.ndarray, grid: Grid, target: Grid, outside: float) -> np.ndarray:
    """The nearest voxels on a ``target`` along the same axes; of two as near, the later one, whatever rounding says.

    Only what is taken is touched: ITK would first reorder and copy all of a scan.
    """
    first, last = (grid.index(target.point(corner)) for corner in ((0, 0, 0), np.array(target.size) - 1))
    indices, beyond = [], []
    for start, stop, count, size in zip(first, last, target.size, grid.size):
        index = np.floor(np.linspace(start, stop, count) + 0.5 + 1e-6).astype(int)
        beyond.append((index < 0) | (index >= size))
        indices.append(index.clip(0, size - 1))
    result = array[np.ix_(*indices)]
    result[beyond[0]], result[:, beyond[1]], result[:, :, beyond[2]] = outside, outside, outside
    return result
