"""Folders of scans: which cases lie in them, and reading one with its slices along the last axis.

Four layouts are known: the raw left-atrium challenge (``<case>/lgemri.nrrd``, ``laendo.nrrd``), raw KiTS19
(``<case>/imaging.nii.gz``, ``segmentation.nii.gz``) and the two HDF5 ones of the literature (``<case>/mri_norm2.h5``
and ``<case>.h5``, with ``image`` and ``label``).
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from spss_fast.data.geometry import Grid, oriented, to_array
from spss_fast.errors import UserError

# layout: (image, label) file names inside a case's folder
RAW = {"la_raw": ("lgemri.nrrd", "laendo.nrrd"), "kits_raw": ("imaging.nii.gz", "segmentation.nii.gz")}
H5 = {"la_h5": "*/mri_norm2.h5", "h5": "*.h5"}
LAYOUTS = {
    "la": ("la_h5", "la_raw"),
    "kits": ("kits_raw", "h5"),
    "phantom": ("kits_raw",),
    "folder": ("la_h5", "la_raw", "kits_raw", "h5"),
}
SOURCES = (
    "KiTS19 comes from github.com/neheller/kits19 (clone it, then fetch the scans as it says), LA from the 2018 Atrial "
    "Segmentation Challenge (atriaseg2018.cardiacatlas.org); --dataset phantom needs no data"
)


@dataclass(frozen=True)
class Case:
    """One scan on disk; ``label`` is None where there is none, and equals ``image`` in the HDF5 layouts."""

    name: str
    image: Path
    label: Path | None
    layout: str

    @property
    def preprocessed(self) -> bool:
        """Whether the intensities already are windowed and normalised, and the scan cropped."""
        return self.layout in H5


@dataclass
class Scan:
    """A scan in memory, slices along the last axis."""

    image: np.ndarray  # (H, W, D) float32, intensities as stored
    label: np.ndarray | None  # (H, W, D) uint8, label values as stored
    spacing: tuple[float, float, float]  # mm, in array order
    grid: Grid  # where this array lies
    source: Grid  # where the file's own array lies: predictions go back there


def find_cases(dataset: str, data_dir: Path) -> list[Case]:
    """The cases of a folder, by name.

    ``dataset``: ``la``, ``kits``, ``phantom``, or ``folder`` for whichever layout the files show. Raises ``UserError``
    where the folder is missing, holds no scan, or holds a label without its scan.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"the data folder {data_dir} does not exist: {SOURCES}")
    for layout in LAYOUTS[dataset]:
        cases = _cases_of(layout, data_dir)
        if cases:
            return sorted(cases, key=lambda case: case.name)
    wanted = " or ".join(_pattern(layout) for layout in LAYOUTS[dataset])
    deeper = next((path for layout in LAYOUTS[dataset] for path in data_dir.glob("*/" + _pattern(layout))), None)
    if deeper is not None:
        levels = deeper.relative_to(data_dir).parts
        raise UserError(f"no scans in {data_dir}, but below it: give {data_dir / levels[0]} as the data folder")
    raise UserError(f"no scans in {data_dir} (looked for {wanted}): {SOURCES}")


def _pattern(layout: str) -> str:
    return H5[layout] if layout in H5 else f"*/{RAW[layout][0]}"


def _cases_of(layout: str, data_dir: Path) -> list[Case]:
    if layout in H5:
        paths = data_dir.glob(H5[layout])
        return [Case(p.stem if layout == "h5" else p.parent.name, p, p, layout) for p in paths]
    image_name, label_name = RAW[layout]
    cases = [
        Case(path.parent.name, path, label if (label := path.with_name(label_name)).exists() else None, layout)
        for path in data_dir.glob(f"*/{image_name}")
    ]
    alone = sorted(path for path in data_dir.glob(f"*/{label_name}") if not path.with_name(image_name).exists())
    if alone:
        others = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        fetch = "; the kits19 repository brings only labels, its own script fetches the scans" * (layout == "kits_raw")
        raise UserError(f"{alone[0].parent}{others} holds {label_name} but no {image_name}: add the scan{fetch}")
    return cases


def read_case(case: Case) -> Scan:
    """Read one case.

    The image is float32, the label uint8 with the values of the file, both (H, W, D) with the slices along the last
    axis (:func:`spss_fast.data.geometry.oriented`); HDF5 arrays are taken as they are. Raises ``UserError`` naming the
    file where it cannot be read, is not a 3-D scalar image, holds NaN or Inf, or where image and label do not match.
    """
    return _read_h5(case) if case.layout in H5 else _read_raw(case)


def _read_raw(case: Case) -> Scan:
    image = _read_image(case.image)
    turned = oriented(image)
    array, grid = to_array(turned).astype(np.float32), Grid.of(turned)
    _check_image(array, case.image)
    label = None
    if case.label is not None:
        mask = _read_image(case.label)
        _check_match(Grid.of(image), Grid.of(mask), case)
        # taken over so that rounding in the two headers cannot orient the two files differently
        mask.CopyInformation(image)
        label = _whole_numbers(to_array(oriented(mask)), case.label)
    return Scan(array, label, grid.spacing, grid, Grid.of(image))


def _read_image(path: Path) -> sitk.Image:
    """A 3-D scalar image whose file is complete."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as a medical image: {_reason(error)}; fetch the file again") from error
    if reader.GetDimension() != 3:
        raise UserError(f"{path} has {reader.GetDimension()} dimensions instead of 3: store one volume per file")
    if reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path} holds {reader.GetNumberOfComponents()} values per voxel (a colour image?): store one")
    if not (np.isfinite(reader.GetSpacing()).all() and min(reader.GetSpacing()) > 0):
        raise UserError(f"{path} has the voxel spacing {reader.GetSpacing()}: correct its header")
    _check_nifti(path, reader)
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {_reason(error)}; fetch the file again") from error


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """What the NIfTI reader does not tell: it fills what a truncated file lacks with zeros, and makes NaN zero."""
    if not reader.HasMetaDataKey("vox_offset"):
        return
    voxels = int(np.prod(reader.GetSize(), dtype=np.int64))
    offset = int(float(reader.GetMetaData("vox_offset")))
    needed = offset + voxels * int(reader.GetMetaData("bitpix")) // 8
    kind = {"16": "f4", "64": "f8"}.get(reader.GetMetaData("datatype"))
    length, bad = -1, 0
    if kind is None and path.suffix != ".gz":
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
    _check_finite(bad, path)


def _scan_nifti(path: Path, offset: int, needed: int, kind: str | None) -> tuple[int, int]:
    """Reads the bytes themselves: how many there are up to ``needed``, how many values of ``kind`` are not finite."""
    length = bad = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(offset)
            # the header begins with its own size, 348 or 540, in the file's byte order
            order = "<" if header[:1] in (b"\x5c", b"\x1c") else ">"
            length = len(header)
            while length < needed and (block := file.read(min(1 << 24, needed - length))):
                length += len(block)
                if kind is not None:
                    whole = len(block) - len(block) % int(kind[1])
                    bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(block[:whole], order + kind))))
            file.read(1)  # past the content: gzip verifies its checksum only there
    except (EOFError, OSError, zlib.error):
        return -1, 0
    return length, bad


def _reason(error: RuntimeError) -> str:
    """The last telling line of an ITK message, without the source file it was raised in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ").rstrip(".") if lines else "unknown reason"


def _read_h5(case: Case) -> Scan:
    try:
        with h5py.File(case.image) as file:
            if "image" not in file:
                raise UserError(f"{case.image} holds no data set named image: found {', '.join(file) or 'nothing'}")
            image = np.asarray(file["image"][()], np.float32)
            label = np.asarray(file["label"][()]) if case.label is not None and "label" in file else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{case.image} cannot be read as HDF5 ({_reason(error)}): fetch the file again") from error
    if image.ndim != 3:
        raise UserError(f"{case.image}: image has {image.ndim} dimensions instead of 3; store one volume per file")
    _check_image(image, case.image)
    grid = Grid(image.shape)
    if label is not None:
        if label.shape != image.shape:
            raise UserError(f"{case.image}: label {label.shape} does not fit image {image.shape}; export both anew")
        label = _whole_numbers(label, case.image)
    return Scan(image, label, grid.spacing, grid, grid)


def _check_image(array: np.ndarray, path: Path) -> None:
    _check_finite(array.size - np.count_nonzero(np.isfinite(array)), path)


def _check_finite(bad: int, path: Path) -> None:
    if bad:
        raise UserError(f"{path} holds {bad} voxels that are NaN or infinite: replace them by a background value")


def _check_match(image: Grid, label: Grid, case: Case) -> None:
    """Header fields may differ by rounding (a tenth of a voxel), not by more."""
    for name, one, other, tolerance in (
        ("size", image.size, label.size, 0),
        ("spacing", image.spacing, label.spacing, 1e-3 * min(image.spacing)),
        ("direction", image.direction, label.direction, 1e-3),
        ("origin", image.origin, label.origin, 0.1 * min(image.spacing)),
    ):
        if np.abs(np.subtract(one, other)).max() > tolerance:
            shown = [tuple(round(value, 3) for value in values) for values in (one, other)]
            raise UserError(f"{case.label} does not match {case.image.name}: {name} {shown[1]} instead of {shown[0]}; "
                            "export the label in the scan's own geometry")


def _whole_numbers(label: np.ndarray, path: Path) -> np.ndarray:
    if label.dtype == np.uint8:
        return label
    if label.dtype.kind == "b":
        return label.astype(np.uint8)
    if not (np.isfinite(label).all() and label.min() >= 0 and label.max() <= 255 and (label == np.round(label)).all()):
        raise UserError(f"{path} is not a label map: its values must be whole numbers from 0 to 255")
    return label.astype(np.uint8)
