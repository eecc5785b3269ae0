"""Where a volume's voxels lie in the patient, and moving volumes between such grids.

Arrays are indexed (H, W, D) along the grid's three axes, in millimetres of the LPS patient frame (x to the left, y to
the back, z to the head), as SimpleITK has it. SimpleITK's own arrays come in reverse order; only this module knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk


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

    def shrunk(self, factor: int) -> Grid:
        """Voxels ``factor`` times as wide, beginning at the same corner; the last ones may reach past the border."""
        size = [math.ceil(n / factor) for n in self.size]
        return self.cropped((0, 0, 0), np.array(size) * factor).resized(size)


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


def oriented(image: sitk.Image) -> sitk.Image:
    """The same scan with its array axes along left, back and head, and its slices along the last one.

    Slices are axial, unless one axis is sampled more than 1.5 times as coarsely as both others: that one then is the
    slice axis (coronal and sagittal acquisitions, and files that bring no orientation). No voxel is interpolated.
    """
    image = sitk.DICOMOrient(image, "LPS")
    spacing = np.array(image.GetSpacing())
    coarsest = int(spacing.argmax())
    if coarsest != 2 and spacing[coarsest] > 1.5 * np.delete(spacing, coarsest).max():
        image = sitk.PermuteAxes(image, [axis for axis in range(3) if axis != coarsest] + [coarsest])
    return image


def resample(array: np.ndarray, grid: Grid, target: Grid, *, linear: bool, outside: float = 0.0) -> np.ndarray:
    """``array`` (H, W, D) on ``grid`` resampled onto ``target``: linear, else nearest; ``outside`` beyond the border.

    Linear shrinking first averages blocks of whole voxels, as linear interpolation alone would skip most of them and
    keep all of their noise.
    """
    if target == grid:
        return array
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
