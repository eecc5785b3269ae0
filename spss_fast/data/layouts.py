"""Folders of scans: which cases lie in them, and reading one with its slices along the last axis.

The data sets' own layouts are the raw left-atrium challenge (``<case>/lgemri.nrrd``, ``laendo.nrrd``), raw KiTS19
(``<case>/imaging.nii.gz``, ``segmentation.nii.gz``) and the two HDF5 ones of the literature (``<case>/mri_norm2.h5``
and ``<case>.h5``, with ``image`` and ``label``). Those of ``folders`` come after them: nnU-Net, Medical Segmentation
Decathlon, and plain files or DICOM series.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from spss_fast.data.folders import FOLDERS, left_out
from spss_fast.data.geometry import Grid, oriented
from spss_fast.data.images import check_image, check_match, padding_before, read_grid, read_image, whole_numbers
from spss_fast.errors import UserError, reason

# layout: (image, label) file names inside a case's folder
RAW = {"la_raw": ("lgemri.nrrd", "laendo.nrrd"), "kits_raw": ("imaging.nii.gz", "segmentation.nii.gz")}
H5 = {"la_h5": "*/mri_norm2.h5", "h5": "*.h5"}
LAYOUTS = {
    "la": ("la_h5", "la_raw"),
    "kits": ("kits_raw", "h5"),
    "phantom": ("kits_raw",),
    "folder": ("la_h5", "la_raw", "kits_raw", "h5", *FOLDERS),
}
_SOURCES = {
    "la": "LA comes from the 2018 Atrial Segmentation Challenge (atriaseg2018.cardiacatlas.org); --dataset phantom "
          "needs no data",
    "kits": "KiTS19 comes from github.com/neheller/kits19 (clone it, then fetch the scans as it says); --dataset "
            "phantom needs no data",
    "phantom": "leave out --data-dir, and training writes phantoms into phantoms/",
    "folder": "give the folder that holds your scans, as NIfTI, NRRD, MetaImage or DICOM (docs/own-data.md lists the "
              "layouts)",
}


@dataclass(frozen=True)
class Case:
    """One scan on disk: a file, or the folder of a DICOM series. ``label`` is None where there is none, and equals
    ``image`` in the HDF5 layouts."""

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

    image: np.ndarray  # (H, W, D), intensities as stored: whole numbers or float32; its memory is in any order
    label: np.ndarray | None  # (H, W, D) uint8, label values as stored
    spacing: tuple[float, float, float]  # mm, in array order
    grid: Grid  # where this array lies
    source: Grid  # where the file's own array lies: predictions go back there


def sources(dataset: str) -> str:
    """Where the scans of a data set come from, for who has not got them."""
    return _SOURCES[dataset]


def find_cases(dataset: str, data_dir: Path) -> list[Case]:
    """The cases of a folder, by name.

    ``dataset``: ``la``, ``kits``, ``phantom``, or ``folder`` for whichever layout the files show. Raises ``UserError``
    where the folder is missing, holds no scan, or holds a label without its scan.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"the data folder {data_dir} does not exist: {sources(dataset)}")
    for layout in LAYOUTS[dataset]:
        cases = cases_of(layout, data_dir)
        if cases or dataset != "folder":  # there a label of that name may be that of a plain scan
            _refuse_labels_alone(layout, data_dir)
        if cases:
            return sorted(cases, key=lambda case: case.name)
    wanted = " or ".join(_pattern(layout) for layout in LAYOUTS[dataset])
    deeper = next((path for layout in LAYOUTS[dataset] for path in data_dir.glob("*/" + _pattern(layout))), None)
    if deeper is not None:
        levels = deeper.relative_to(data_dir).parts
        raise UserError(f"no scans in {data_dir}, but below it: give {data_dir / levels[0]} as the data folder")
    looked = "" if dataset == "folder" else f" (looked for {wanted})"  # sources says it already
    others = "".join(f"; {line}" for line in left_out(data_dir))
    raise UserError(f"no scans in {data_dir}{looked}: {sources(dataset)}{others}")


def _pattern(layout: str) -> str:
    if layout in FOLDERS:
        return FOLDERS[layout].pattern
    return H5[layout] if layout in H5 else f"*/{RAW[layout][0]}"


def cases_of(layout: str, data_dir: Path) -> list[Case]:
    """The cases of a folder in ``layout``, in any order; none where it is another one."""
    if layout in FOLDERS:
        return [Case(*found, layout) for found in FOLDERS[layout].find(data_dir)]
    if layout in H5:
        paths = data_dir.glob(H5[layout])
        return [Case(p.stem if layout == "h5" else p.parent.name, p, p, layout) for p in paths]
    image_name, label_name = RAW[layout]
    return [
        Case(path.parent.name, path, label if (label := path.with_name(label_name)).exists() else None, layout)
        for path in data_dir.glob(f"*/{image_name}")
    ]


def _refuse_labels_alone(layout: str, data_dir: Path) -> None:
    if layout not in RAW:
        return
    image_name, label_name = RAW[layout]
    alone = sorted(path for path in data_dir.glob(f"*/{label_name}") if not path.with_name(image_name).exists())
    if alone:
        others = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        fetch = "; the kits19 repository brings only labels, its own script fetches the scans" * (layout == "kits_raw")
        raise UserError(f"{alone[0].parent}{others} holds {label_name} but no {image_name}: add the scan{fetch}")


def read_case(case: Case, plane: str = "auto") -> Scan:
    """Read one case.

    The image comes as stored (float64 as float32), the label uint8 with the values of the file, both (H, W, D) with
    the slices along the last axis (:func:`spss_fast.data.geometry.oriented`, which takes ``plane``); HDF5 arrays are
    taken as they are with ``auto``. Raises ``UserError`` naming the file where it cannot be read, is not a 3-D scalar
    image, holds NaN or Inf, or where image and label do not match.
    """
    if case.layout in H5:
        return _read_h5(case, plane)
    array, source = _read_array(case.image)
    check_image(array, case.image)
    view, grid = oriented(array, source, plane)
    label = read_label(case, source, plane)[0] if case.label is not None else None
    return Scan(view, label, grid.spacing, grid, source)


def read_label(case: Case, source: Grid, plane: str = "auto", padded: bool = False) -> tuple[np.ndarray, Grid]:
    """The label of a case as :func:`read_case` gives it, without its image, which lies on ``source``; and its grid.

    With ``padded`` the label's file may reach beyond the image; that part of it is left out.
    """
    if case.layout in H5 and case.label == case.image:
        scan = _read_h5(case, plane)
        return scan.label, scan.grid
    label, own = _read_array(case.label)
    if padded:
        before = padding_before(source, own, case.image, case.label)
        label = label[tuple(slice(start, start + n) for start, n in zip(before, source.size))]
    else:
        check_match(source, own, case.image, case.label)
    # the scan's own grid, so that rounding in the two headers cannot orient the two files differently
    return oriented(whole_numbers(label, case.label), source, "axial" if _as_it_is(case, plane) else plane)


def source_grid(case: Case) -> Grid:
    """Where the array of a case's file lies, from its header alone."""
    if case.layout not in H5:
        return read_grid(case.image)
    try:
        with h5py.File(case.image) as file:
            return Grid(tuple(file["image"].shape))
    except (OSError, KeyError, AttributeError) as error:
        raise UserError(f"{case.image} cannot be read as HDF5 ({reason(error)}): fetch the file again") from error


def _as_it_is(case: Case, plane: str) -> bool:
    return case.layout in H5 and plane == "auto"


def _read_array(path: Path) -> tuple[np.ndarray, Grid]:
    """An image's array in the file's own axes and memory order, and its grid."""
    image = read_image(path)
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), Grid.of(image)


def _read_h5(case: Case, plane: str) -> Scan:
    try:
        with h5py.File(case.image) as file:
            if "image" not in file:
                raise UserError(f"{case.image} holds no data set named image: found {', '.join(file) or 'nothing'}")
            image = np.asarray(file["image"][()], np.float32)
            label = np.asarray(file["label"][()]) if case.label is not None and "label" in file else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{case.image} cannot be read as HDF5 ({reason(error)}): fetch the file again") from error
    if image.ndim != 3:
        raise UserError(f"{case.image}: image has {image.ndim} dimensions instead of 3; store one volume per file")
    check_image(image, case.image)
    source = grid = Grid(image.shape)
    if label is not None:
        if label.shape != image.shape:
            raise UserError(f"{case.image}: label {label.shape} does not fit image {image.shape}; export both anew")
        label = whole_numbers(label, case.image)
    if not _as_it_is(case, plane):
        label = None if label is None else oriented(label, source, plane)[0]
        image, grid = oriented(image, source, plane)
    return Scan(image, label, grid.spacing, grid, source)
