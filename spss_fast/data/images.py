"""Reading one 3-D scan or label map: a NIfTI, NRRD or MetaImage file, or the folder of a DICOM series.

Whatever cannot be used ends in a ``UserError`` that names the file and the mend.
"""

from __future__ import annotations

import glob
import gzip
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from spss_fast.data.dicom import read_series, series_grid
from spss_fast.data.geometry import Grid
from spss_fast.errors import UserError, reason

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
ROUNDING = 0.02  # how far a label value may lie from a whole number: a NIfTI file's scale moves them a little


def ending(path: Path) -> str:
    """The ending of an image's name that says its format, in lower case; empty where it is none of ``ENDINGS``."""
    return next((end for end in ENDINGS if path.name.lower().endswith(end)), "")


def stem(path: Path) -> str:
    """The file's name without its ending, ``.nii.gz`` being one; empty where it ends in none of ``ENDINGS``."""
    return path.name[: -len(ending(path))] if ending(path) else ""


def files_of(path: Path) -> list[Path]:
    """All files that make up the image at ``path``: those of a DICOM folder, a ``.mhd`` or ``.nhdr`` header with its
    data."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if ending(path) in (".mhd", ".nhdr"):
        return sorted({path, *path.parent.glob(glob.escape(path.stem) + ".*raw*")})  # .raw, .zraw, .raw.gz
    return [path]


def read_image(path: Path) -> sitk.Image:
    """A 3-D scalar image whose file, or series, is complete; float64 comes as float32, other types as stored."""
    if path.is_dir():
        return read_series(path)
    reader = _header(path)
    if reader.GetPixelID() == sitk.sitkFloat64:
        reader.SetOutputPixelType(sitk.sitkFloat32)
    _check_nifti(path, reader)
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {reason(error)}; fetch the file again") from error


def read_grid(path: Path) -> Grid:
    """The grid of an image, from its header alone."""
    if path.is_dir():
        return series_grid(path)
    reader = _header(path)
    return Grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if path.exists() and not os.access(path, os.R_OK):  # of which ITK says that it does not exist
            raise UserError(f"{path} cannot be opened (permission denied): make it readable") from error
        said = str(error).replace(str(path), "")  # a path may hold any word
        if "spacing" in said.lower():
            raise UserError(f"{path} has a voxel spacing of zero: correct its header") from error
        if "orthonormal" in said:
            raise UserError(f"{path} has axes that are not at right angles to each other, or none at all (its sform): "
                            "resample the scan onto ones that are, or correct its header") from error
        if _is_nifti2(path):  # ITK 5.4 knows NIfTI-1 only
            raise UserError(f"{path} is NIfTI-2, which is not read: save it as NIfTI-1, or as NRRD") from error
        raise UserError(f"{path} cannot be read as a medical image: {reason(error)}; fetch the file again") from error
    if reader.GetDimension() != 3:
        raise UserError(f"{path} has {reader.GetDimension()} dimensions instead of 3: store one volume per file")
    if reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path} holds {reader.GetNumberOfComponents()} values per voxel (a colour image?): store one")
    stated = _nifti_spacings(path)
    for spacing in (reader.GetSpacing(), *stated):
        if not (np.isfinite(spacing).all() and np.all(np.abs(spacing) > 0)):
            raise UserError(f"{path} has the voxel spacing {_shown(spacing)}: correct its header")
    if len(stated) == 2 and not np.allclose(np.abs(stated[0]), stated[1], rtol=0.01):
        raise UserError(f"{path} has two voxel spacings, {_shown(stated[0])} by its pixdim and {_shown(stated[1])} by "
                        "its sform: correct the one in its header that is wrong, or convert the scan anew")
    return reader


def _nifti_spacings(path: Path) -> list[tuple[float, ...]]:
    """The spacings that a NIfTI header states: its pixdim, of which ITK makes 1 mm where it is 0, and where it has an
    sform the lengths of its columns, which ITK passes over. Empty for other files."""
    if ending(path) not in (".nii", ".nii.gz"):
        return []
    header = nifti_start(path, 348)
    order = byte_order(header)
    pixdim = struct.unpack_from(order + "3f", header, 80)
    if struct.unpack_from(order + "h", header, 254)[0] <= 0:
        return [pixdim]
    rows = np.reshape(struct.unpack_from(order + "12f", header, 280), (3, 4))
    return [pixdim, tuple(np.linalg.norm(rows[:, :3], axis=0))]


def _shown(spacing: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(side), 4) for side in spacing)


def nifti_start(path: Path, length: int) -> bytes:
    """The first ``length`` bytes of a NIfTI file, packed or not."""
    with _opened(path) as file:
        return file.read(length)


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if _is_packed(path) else open(path, "rb")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def byte_order(header: bytes) -> str:
    """``<`` or ``>``: of a NIfTI-1 header, which begins with its own size, 348."""
    return "<" if header[:1] == b"\x5c" else ">"


def _is_nifti2(path: Path) -> bool:
    try:
        return ending(path) in (".nii", ".nii.gz") and nifti_start(path, 8)[4:] in (b"n+2\0", b"ni2\0")
    except (EOFError, OSError, zlib.error):
        return False


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """What the NIfTI reader does not tell: it fills what a truncated file lacks with zeros, and makes NaN zero."""
    if not reader.HasMetaDataKey("vox_offset"):
        return
    voxels = int(np.prod(reader.GetSize(), dtype=np.int64))
    offset = int(float(reader.GetMetaData("vox_offset")))
    needed = offset + voxels * int(reader.GetMetaData("bitpix")) // 8
    kind = {"16": "f4", "64": "f8"}.get(reader.GetMetaData("datatype"))
    length, bad = -1, 0
    if kind is None and not _is_packed(path):
        length = path.stat().st_size
    elif kind is None:
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            # a gzip member ends with its content's length modulo 2^32: right in nearly every file, and read at once
            length = needed if int.from_bytes(file.read(4), "little") == needed % 2**32 else -1
    if length < needed:
        length, bad = _scan_nifti(path, offset, needed, kind)
    if length < needed:
        raise UserError(f"{path} is truncated: it ends before its last voxel; fetch the file again")
    check_finite(bad, path)


def _scan_nifti(path: Path, offset: int, needed: int, kind: str | None) -> tuple[int, int]:
    """Reads the bytes themselves: how many there are up to ``needed``, how many values of ``kind`` are not finite."""
    length = bad = 0
    try:
        with _opened(path) as file:
            header = file.read(offset)
            order, length = byte_order(header), len(header)
            while length < needed and (block := file.read(min(1 << 24, needed - length))):
                length += len(block)
                if kind is not None:
                    whole = len(block) - len(block) % int(kind[1])
                    bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(block[:whole], order + kind))))
            file.read(1)  # past the content: gzip verifies its checksum only there
    except (EOFError, OSError, zlib.error):
        return -1, 0
    return length, bad


def check_image(array: np.ndarray, path: Path) -> None:
    """Raises ``UserError`` where voxels of the array are NaN or infinite."""
    if array.dtype.kind == "f":
        check_finite(array.size - np.count_nonzero(np.isfinite(array)), path)


def check_finite(bad: int, path: Path) -> None:
    """Raises ``UserError`` where ``bad``, the number of voxels that are NaN or infinite, is not 0."""
    if bad:
        raise UserError(f"{path} holds {bad} voxels that are NaN or infinite: replace them by a background value")


def check_match(image: Grid, label: Grid, image_path: Path, label_path: Path) -> None:
    """Raises ``UserError`` where a label does not lie on the grid of its image.

    Header fields may differ by rounding (a tenth of a voxel), not by more.
    """
    for name, one, other, tolerance in (
        ("size", image.size, label.size, 0),
        ("spacing", image.spacing, label.spacing, 1e-3 * min(image.spacing)),
        ("direction", image.direction, label.direction, 1e-3),
        ("origin", image.origin, label.origin, 0.1 * min(image.spacing)),
    ):
        if np.abs(np.subtract(one, other)).max() > tolerance:
            shown = [tuple(round(value, 3) for value in values) for values in (one, other)]
            raise UserError(f"{label_path} does not match {image_path.name}: {name} {shown[1]} instead of {shown[0]}; "
                            "export the label in the scan's own geometry")


def padding_before(image: Grid, label: Grid, image_path: Path, label_path: Path) -> np.ndarray:
    """(3,) int64: how many voxels a label begins before its image, whose lattice it may continue beyond all borders.

    Raises ``UserError`` where it leaves out part of the image, and otherwise as :func:`check_match` does.
    """
    before = -np.rint(image.index(label.origin)).astype(np.int64)
    if (before < 0).any() or (np.array(label.size) - before < image.size).any():
        before[:] = 0
    else:
        image = image.cropped(-before, label.size)
    check_match(image, label, image_path, label_path)
    return before


def whole_numbers(label: np.ndarray, path: Path) -> np.ndarray:
    """A label map as uint8, or ``UserError`` where its values are not whole numbers from 0 to 255, but for
    ``ROUNDING``."""
    if label.dtype == np.uint8:
        return label
    if label.dtype.kind == "b":
        return label.astype(np.uint8)
    whole = np.rint(label) if label.dtype.kind == "f" else label
    with np.errstate(invalid="ignore"):  # infinity less itself
        good = (whole >= 0) & (whole <= 255) & (np.abs(label - whole) <= ROUNDING)
    if not good.all():
        raise UserError(f"{path} is not a label map: its values must be whole numbers from 0 to 255, and one is "
                        f"{label[~good][0]:.4g}")
    return whole.astype(np.uint8)
