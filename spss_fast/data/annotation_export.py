"""Folders to annotate in: per case the scan, an empty label on its grid, and what opens both on the suggested slice.

Layout of the folder::

    slices.csv                  case,axis,slice: what was suggested; axis and slice in SimpleITK's index order (x, y, z)
    README.txt                  for the person who annotates
    <case>/image.nii.gz         the scan in the geometry and orientation of its file, but with the suggested slice in
                                its middle, where viewers open an image: padded on one side along that axis
    <case>/annotation.nii.gz    uint8, all zero, on exactly the same grid
    <case>/open.mrml            scene of 3D Slicer
    <case>/workspace.itksnap    workspace of ITK-SNAP

A case's folder is whole or absent, and one that is there is never written to again.
"""

from __future__ import annotations

import csv
import gzip
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spss_fast.data.annotations import SLICES, read_slices
from spss_fast.data.cache import PreparedCase
from spss_fast.data.geometry import to_image
from spss_fast.data.images import byte_order, nifti_start, read_grid
from spss_fast.data.layouts import Scan, read_case
from spss_fast.data.viewers import itksnap_workspace, slicer_scene, slicer_view
from spss_fast.errors import UserError
from spss_fast.files import atomically

IMAGE, ANNOTATION = "image.nii.gz", "annotation.nii.gz"
COLUMNS = ["case", "axis", "slice"]


@dataclass(frozen=True)
class Suggestion:
    """Slice ``slice`` of ``case``, along array axis ``axis`` of its file (SimpleITK's index order, from 0)."""

    case: str
    axis: int
    slice: int


def read_table(folder: Path) -> list[Suggestion]:
    """What ``slices.csv`` in ``folder`` lists, in its order; nothing where there is no such file.

    Raises ``UserError`` for a file that is not such a table.
    """
    path = folder / SLICES
    if not path.exists():
        return []
    return [Suggestion(name, found.axis, found.index) for name, found in read_slices(path, COLUMNS).items()]


def write_table(folder: Path, suggestions: list[Suggestion]) -> None:
    """``slices.csv`` in ``folder``, whole or as it was."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = ([item.case, item.axis, item.slice] for item in suggestions)
            csv.writer(file).writerows([COLUMNS, *rows])

    atomically(folder / SLICES, write)


def write_readme(folder: Path, suggestions: list[Suggestion]) -> None:
    """``README.txt`` in ``folder``: how to annotate, and the slice of every case as the two programs show it."""
    lines = []
    for item in suggestions:
        grid = read_grid(folder / item.case / IMAGE)
        place = grid.size[item.axis] // 2 + 1
        lines.append(f"  {item.case}: {slicer_view(grid, item.axis)} view; in ITK-SNAP {'xyz'[item.axis]} = {place}")
    text = README.format(cases="\n".join(lines), annotation=ANNOTATION)
    atomically(folder / "README.txt", lambda temporary: temporary.write_text(text, encoding="utf-8"))


README = """One slice per scan is to be annotated. Every folder here holds a scan and an empty label, annotation.nii.gz.

Paint the structure in ONE slice, the whole of it, with value 1 (further structures: 2, 3, ...), and save over
{annotation}. The slice below was suggested from the image alone. Where it does not show the structure, or not
well, take the nearest one along the same axis that does: the slice you annotate is the one that counts. Leave all
others empty.

3D Slicer: drag open.mrml into the window. The view named below shows the slice. In Segment Editor press Add and paint.
Then module Segmentations, Export/import models and labelmaps: Export, Labelmap, into "annotation"; File > Save Data
with only {annotation} ticked.

ITK-SNAP: open workspace.itksnap. It opens on the slice, which the number below names (as cursor position, counted from
1, padding included) and a note marks (to come back to it: annotation mode, next annotation). Paint with label 1;
Segmentation > Save.

Every scan is padded at one end so that the suggested slice is its middle one, where other viewers open it too. What is
beyond the scan's end is of one value; nothing is to be annotated there.

{cases}
"""


def export_case(folder: Path, case: PreparedCase, suggestion: Suggestion) -> None:
    """The folder of one case in ``folder``; nothing happens where it is there already.

    Raises ``UserError`` where something else is in its place, and where it cannot be written.
    """
    target = folder / suggestion.case
    if target.exists():
        if not ((target / IMAGE).is_file() and (target / ANNOTATION).is_file()):
            raise UserError(f"{target} is there already and holds no {IMAGE} and {ANNOTATION}: choose another --out")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        try:
            before, after = centring(suggestion.slice, case.source.size[suggestion.axis])
            _write_image(temporary / IMAGE, case, suggestion.axis, before, after)
            write_empty(temporary / ANNOTATION, temporary / IMAGE)
            grid = read_grid(temporary / IMAGE)
            voxel = _cursor(case, suggestion, before)
            (temporary / "open.mrml").write_bytes(slicer_scene(suggestion.case, grid, voxel, IMAGE, ANNOTATION))
            workspace = itksnap_workspace(target.resolve(), voxel, suggestion.axis, IMAGE, ANNOTATION)
            (temporary / "workspace.itksnap").write_bytes(workspace)
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private; others are to annotate here
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): free space, or set another --out") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def centring(index: int, count: int) -> tuple[int, int]:
    """How many slices to put before and after ``count`` ones so that slice ``index`` becomes the middle one.

    The middle of n is n // 2, where ITK-SNAP opens; where slices are added n is odd, so that all call the same one so.
    """
    if index == count // 2:
        return 0, 0
    return max(0, count - 1 - 2 * index), max(0, 2 * index + 1 - count)


def _cursor(case: PreparedCase, suggestion: Suggestion, before: int) -> tuple[int, int, int]:
    """The voxel of the padded file in the middle of the prepared plane, on the suggested slice."""
    middle = case.grid.point((np.array(case.grid.size) - 1) / 2)
    voxel = np.clip(np.rint(case.source.index(middle)), 0, np.array(case.source.size) - 1).astype(int)
    voxel[suggestion.axis] = suggestion.slice + before
    return tuple(int(n) for n in voxel)


def _write_image(path: Path, case: PreparedCase, axis: int, before: int, after: int) -> None:
    """The scan as NIfTI, padded along ``axis`` with its lowest value. Never a link to it: who saves the image in a
    viewer would write into the scan itself."""
    original = case.case.image
    if original.name.endswith(".nii.gz") and not (before or after):
        shutil.copyfile(original, path)
        return
    scan = read_case(case.case)
    array = in_file_axes(scan)
    below, above = np.zeros((2, 3), int)
    below[axis], above[axis] = before, after
    padded = np.pad(array, np.stack([below, above], 1), constant_values=array.min())
    grid = scan.source.cropped(-below, padded.shape)
    sitk.WriteImage(to_image(padded, grid), str(path), useCompression=True)


def in_file_axes(scan: Scan) -> np.ndarray:
    """The image of ``scan`` with its axes in the order and direction of the file's own; no voxel is interpolated."""
    along = scan.source.axes.T @ scan.grid.axes  # [file axis, scan axis]: +-1 where they run along each other
    order = np.abs(along).argmax(1)
    backwards = [axis for axis in range(3) if along[axis, order[axis]] < 0]
    return np.flip(scan.image.transpose(order), backwards)


# where the fields of a NIfTI-1 header lie, and as what; NIfTI-2 is not read, so no scan has such a header
_DIM = 40, "8h"
_EMPTY = (70, "h", [2]), (72, "h", [8]), (108, "f", [352]), (112, "2f", [1, 0]), (124, "2f", [0, 0])


def write_empty(path: Path, like: Path) -> None:
    """An all-zero uint8 ``.nii.gz`` on the grid of another.

    Its header is that of the other but for the voxel type, so that every program reads the same geometry from both,
    to the last bit; a header that ITK writes anew rounds an oblique direction once more.
    """
    header = bytearray(nifti_start(like, 348))
    order = byte_order(header)
    dim = struct.unpack_from(order + _DIM[1], header, _DIM[0])
    # voxel type uint8, its bits, where the voxels begin, no intensity scaling, no display range
    for offset, kind, values in _EMPTY:
        struct.pack_into(order + kind, header, offset, *values)
    voxels, block = int(np.prod(dim[1 : dim[0] + 1], dtype=np.int64)), bytes(1 << 20)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes(header) + bytes(4))  # no extension follows
        for begin in range(0, voxels, len(block)):
            file.write(block[: voxels - begin])
