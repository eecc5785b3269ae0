"""A DICOM series, one file per slice (or one multi-frame file), as one image.

ITK stacks whatever files it is given at their mean distance; here every file's own position and size are looked at
first, so that a series with missing, doubled or mixed slices is refused instead of being bent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spss_fast.data.geometry import Grid
from spss_fast.errors import UserError, reason

GAP = 0.1  # how far a distance between slices may lie from the usual one, in parts of that
NO_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "SR", "KO", "REG")  # modalities
LABELS = ("SEG", "RTSTRUCT")  # those of them that hold a label
HEAD = 8192  # bytes of a file in which its ImageType and Modality lie
TILT = 0.5  # degrees between the slices' normal and the line that they are stacked along, which a gantry may tilt


@dataclass
class Slices:
    """The files of one series, in the order of their positions, and the grid that they fill."""

    files: list[str]
    grid: Grid
    modality: str


def is_dicom(path: Path) -> bool:
    """Whether the file says that it is DICOM, by its ending or its first bytes."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def no_scan(path: Path) -> str:
    """What a DICOM file is where that is no part of a scan: one of ``NO_SCANS``, or a localizer; empty for others.

    Its own bytes are looked at, as GDCM reads none that holds no image.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return ""
    modality = _code(head, 0x60)
    if modality in NO_SCANS:
        return modality
    return "localizer" if "LOCALIZER" in _code(head, 0x08) else ""


def _code(head: bytes, element: int) -> str:
    """The value of tag (0008, ``element``) in little endian, whether its type (CS) is written there or implicit; empty
    where there is none."""
    found = re.search(rb"\x08\0%c\0(?:CS(..)|(..)\0\0)" % element, head, re.DOTALL)
    if found is None:
        return ""
    length = int.from_bytes(found[1] or found[2], "little")
    return head[found.end() : found.end() + length].decode("ascii", "replace").strip(" \0")


def has_series(files: Iterable[Path]) -> bool:
    """Whether there is a DICOM file of a scan among ``files``, which may lie beside a DICOMDIR, notes and others."""
    return any(is_dicom(path) and not no_scan(path) for path in files if path.name != "DICOMDIR")


def read_series(folder: Path) -> sitk.Image:
    """The image of the one series in ``folder``, in the units of its rescale slope and intercept (CT: HU)."""
    slices = find_slices(folder)
    try:
        if len(slices.files) == 1:
            return sitk.ReadImage(slices.files[0], imageIO="GDCMImageIO")
        reader = sitk.ImageSeriesReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileNames(slices.files)
        first = _header(Path(slices.files[0]))
        if first.GetPixelID() == sitk.sitkFloat64:  # of a rescale slope that is no whole number
            reader.SetOutputPixelType(sitk.sitkFloat32)
        return reader.Execute()
    except RuntimeError as error:
        raise UserError(f"the DICOM series in {folder} is damaged: {reason(error)}; export it again") from error


def series_grid(folder: Path) -> Grid:
    """The grid of the one series in ``folder``, from the headers of its files."""
    return find_slices(folder).grid


def find_slices(folder: Path) -> Slices:
    """The files of the one series in ``folder``, found to be complete; what is :func:`no_scan` is passed over.

    Raises ``UserError`` for none or several series, colour, slices of different size or direction, missing or doubled
    slices and a tilted gantry.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "DICOMDIR"]
    passed = {path.name for path in files if no_scan(path)}
    series = (sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
              for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
    names = [kept for part in series if (kept := [name for name in part if Path(name).name not in passed])]
    if not names:
        raise UserError(f"{folder} holds no DICOM series that can be read: export it again")
    if len(names) > 1:
        raise UserError(f"{folder} mixes {len(names)} DICOM series ({', '.join(str(len(part)) for part in names)} "
                        "files): put each into a folder of its own")
    known = passed | {Path(name).name for name in names[0]}
    others = [path for path in files if is_dicom(path) and path.name not in known]
    if others:  # GDCM passes over them, and the series would only be shorter
        raise UserError(f"{others[0]} is no slice that can be read (damaged, or no image): export it again, or take it "
                        "away")
    headers = [_header(Path(name)) for name in names[0]]
    first = headers[0]
    if first.GetNumberOfComponents() != 1:
        raise UserError(f"{names[0][0]} holds {first.GetNumberOfComponents()} values per voxel (a colour image?): "
                        "export the scan itself")
    modality = first.GetMetaData("0008|0060").strip() if first.HasMetaDataKey("0008|0060") else ""
    grid = Grid(first.GetSize(), first.GetSpacing(), first.GetOrigin(), first.GetDirection())
    if len(headers) > 1:
        return _stacked(folder, names[0], headers, grid, modality)
    if grid.size[2] == 1:
        raise UserError(f"{folder} holds a single DICOM slice: a scan needs all of its slices; export it again, or "
                        "take it away where it is a localizer")
    return Slices(names[0], grid, modality)


def _stacked(
    folder: Path, names: list[str], headers: list[sitk.ImageFileReader], first: Grid, modality: str
) -> Slices:
    """Single slices on top of each other."""
    for name, header in zip(names, headers):
        same = (header.GetSize() == first.size and header.GetNumberOfComponents() == 1
                and np.allclose(header.GetSpacing()[:2], first.spacing[:2], rtol=1e-3)
                and np.allclose(header.GetDirection(), first.direction, atol=1e-3))
        if not same:
            raise UserError(f"{name} differs in size, pixel spacing or direction from {Path(names[0]).name}: keep one "
                            "series in the folder")
    positions = np.array([header.GetOrigin() for header in headers])
    order = np.argsort(positions @ first.axes[:, 2], kind="stable")
    names, positions = [names[i] for i in order], positions[order]
    along = positions @ first.axes[:, 2]
    steps = np.diff(along)
    usual = float(np.median(steps))
    if steps.min() <= GAP * usual:
        raise UserError(f"{folder} holds two slices at the same place ({along[int(steps.argmin())]:.1f} mm): several "
                        "echoes, phases or reconstructions? keep one of them")
    wrong = int(np.abs(steps - usual).argmax())
    if abs(steps[wrong] - usual) > GAP * usual:
        raise UserError(f"{folder} lacks slices, or is not evenly spaced: {steps[wrong]:.2f} mm between "
                        f"{Path(names[wrong]).name} and {Path(names[wrong + 1]).name} where {usual:.2f} mm are usual; "
                        "export the series again")
    stack = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    tilt = float(np.degrees(np.arccos(min(1.0, abs(float(stack @ first.axes[:, 2]))))))
    if tilt > TILT:
        raise UserError(f"{folder} was taken with the gantry tilted by {tilt:.1f} degrees: convert it with a tool that "
                        "corrects the tilt (dcm2niix does)")
    spacing = (*first.spacing[:2], float(along[-1] - along[0]) / len(steps))
    grid = Grid((*first.size[:2], len(headers)), spacing, tuple(map(float, positions[0])), first.direction)
    return Slices(names, grid, modality)


def _header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read as DICOM: {reason(error)}; export it again") from error
    return reader
