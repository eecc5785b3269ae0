"""Which slice of which case a person annotated: a CSV of slices, or a folder of annotated label maps."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spss_fast.data.folders import ANNOTATION, says_label
from spss_fast.data.geometry import PLANES, Grid
from spss_fast.data.images import padding_before, read_image, stem, whole_numbers
from spss_fast.data.layouts import Case, source_grid
from spss_fast.errors import UserError, some
from spss_fast.settings import DataSettings

SLICES = "slices.csv"


@dataclass(frozen=True)
class Annotation:
    """Slice ``index`` along axis ``axis`` (0, 1, 2: SimpleITK's x, y, z) of the file's array is annotated.

    ``axis`` is None for the slice axis of the scan, whichever that is. ``label`` is the file that holds the
    annotation, ``grid`` where its array lies, which may begin before the scan's, and ``values`` its label values; None
    and empty where it is the case's own label.
    """

    index: int
    axis: int | None = None
    label: Path | None = None
    grid: Grid | None = None
    values: tuple[int, ...] = ()

    @property
    def plane(self) -> str:
        """The anatomical plane of the annotated slice."""
        return {axis: name for name, axis in PLANES.items()}[self.grid.patient_axes()[self.axis]]

    def index_in(self, scan: Grid) -> int:
        """The annotated slice as the scan's own file on ``scan`` counts it."""
        before = 0 if self.grid is None else np.rint(-scan.index(self.grid.origin)[self.axis])
        return self.index - int(before)


def read_annotations(settings: DataSettings) -> dict[str, Annotation]:
    """What ``settings.annotations`` says, a CSV or a folder, by case name; empty where none is set.

    Cases of a folder whose annotation is still empty are left out. Raises ``UserError`` for a file that cannot be
    read, and for the first annotation that cannot be used.
    """
    if not settings.annotations:
        return {}
    path = Path(settings.annotations).expanduser()
    if not path.exists():
        raise UserError(f"the annotations {path} do not exist: give a CSV of case,slice or a folder of annotations")
    if not path.is_dir():
        given = read_slices(path)
        if not given:
            raise UserError(f"{path} names no slice: add a line case,slice per annotated case, or leave annotations "
                            "unset")
        return given
    states = folder_states(path, settings)
    refuse_all_empty(states, path)
    return usable(states)


def refuse_all_empty(states: dict[str, Annotation | str | None], folder: Path) -> None:
    """``UserError`` where nothing has been annotated yet in ``folder``, whose :func:`folder_states` these are."""
    if all(state is None for state in states.values()):
        others = saved_beside(folder, states)
        mend = f", but {some(others)} is there: save it" if others else ": annotate one slice of a case, and save it"
        raise UserError(f"{folder}: all annotations are still empty{mend} as {ANNOTATION}.nii.gz")


def saved_beside(folder: Path, names: Iterable[str]) -> list[Path]:
    """What else than their annotation seems to be a label in the folders of the cases ``names``."""
    return [path for name in names for path in sorted((folder / name).glob("*"))
            if stem(path).lower() != ANNOTATION and says_label(path)]


def usable(states: dict[str, Annotation | str | None]) -> dict[str, Annotation]:
    """The annotations of :func:`folder_states` that are not empty; ``UserError`` for the first that cannot be used."""
    wrong = [state for state in states.values() if isinstance(state, str)]
    if wrong:
        raise UserError(wrong[0] + (f" ({len(wrong) - 1} more annotations cannot be used)" if len(wrong) > 1 else ""))
    given = {name: state for name, state in states.items() if state is not None}
    common_plane(given)
    return given


def common_plane(given: dict[str, Annotation]) -> str:
    """The plane that all of ``given`` (annotations of a folder) are annotated in, ``auto`` for none.

    Raises ``UserError`` where they differ.
    """
    planes = {annotation.plane: annotation.label for annotation in given.values()}
    if len(planes) > 1:
        said = ", ".join(f"{plane} in {label}" for plane, label in planes.items())
        raise UserError(f"all cases must be annotated in the same plane, but that is {said}: redo one of them")
    return next(iter(planes), "auto")


def empty_annotations(settings: DataSettings) -> list[str]:
    """The cases of an annotation folder whose annotation is still empty."""
    path = Path(settings.annotations).expanduser()
    if not settings.annotations or not path.is_dir():
        return []
    return [name for name, state in folder_states(path, settings).items() if state is None]


def annotated_plane(settings: DataSettings) -> str:
    """The plane of the slices: the one that the annotation folder is annotated in, else ``settings.plane``.

    Raises ``UserError`` where both are given and differ.
    """
    given = read_annotations(settings)
    plane = common_plane({name: a for name, a in given.items() if a.label is not None})
    if plane == "auto":
        return settings.plane
    if settings.plane not in ("auto", plane):
        raise UserError(f"setting plane = {settings.plane}, but {settings.annotations} is annotated in the {plane} "
                        "plane: leave plane at auto")
    return plane


def check_annotations(cases: list[Case], settings: DataSettings) -> None:
    """Raises ``UserError`` for annotations of a folder that are of no scan, or do not lie on their scan's grid."""
    path = Path(settings.annotations).expanduser()
    if settings.annotations and path.is_dir():
        usable(folder_states(path, settings, cases))


def folder_states(
    folder: Path, settings: DataSettings, cases: list[Case] | None = None
) -> dict[str, Annotation | str | None]:
    """Per case of an annotation folder its annotation, None where that is still empty, or what is wrong with it;
    compared with its scan where ``cases`` are given.

    ``folder/CASE/annotation.nii.gz`` (or another ending) is a label map of the scan, or of the scan padded as
    ``suggest`` does, empty but for one slice along any axis, and ``folder/slices.csv`` (``case,axis,slice``), where
    there is one, names the slices that were suggested. Raises ``UserError`` where the folder holds no annotation at
    all.
    """
    suggested = read_slices(folder / SLICES) if (folder / SLICES).exists() else {}
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not names:
        raise UserError(f"{folder} holds no annotations: CASE/{ANNOTATION}.nii.gz is looked for")
    states = {name: _state(folder / name, suggested.get(name), settings) for name in sorted(names | set(suggested))}
    if cases is not None:
        scans = {case.name: case for case in cases}
        for name, state in states.items():
            try:
                if name not in scans:
                    raise UserError(f"{folder / name} annotates no scan of the data folder: name it after its case")
                if isinstance(state, Annotation):
                    _check_on_scan(state, scans[name])
            except UserError as error:
                states[name] = str(error)
    return states


def _check_on_scan(annotation: Annotation, case: Case) -> None:
    scan = source_grid(case)
    padding_before(scan, annotation.grid, case.image, annotation.label)
    if not 0 <= annotation.index_in(scan) < scan.size[annotation.axis]:
        raise UserError(f"{annotation.label} is annotated beyond the end of {case.image.name} (slice "
                        f"{annotation.index} of the padded scan): annotate a slice of the scan itself")


def _state(folder: Path, suggested: Annotation | None, settings: DataSettings) -> Annotation | str | None:
    files = [path for path in sorted(folder.glob("*")) if stem(path).lower() == ANNOTATION]
    if len(files) != 1:
        found = "no" if not files else "more than one"
        strike = f", or strike the case from {SLICES}" if suggested and not files else ""
        mend = f"save the annotated slice as {ANNOTATION}.nii.gz in it{strike}"
        return f"{folder} holds {found} {ANNOTATION} file: {mend}"
    try:
        stat = files[0].stat()
        return _find_slice(files[0], (stat.st_mtime_ns, stat.st_size), suggested, _learnt(settings))
    except OSError as error:
        return f"{files[0]} cannot be opened ({error.strerror})"
    except UserError as error:
        return str(error)


def _learnt(settings: DataSettings) -> tuple[str, tuple[int, ...]]:
    """The setting that names the label values to learn, and those; none where all of them are."""
    name = "classes" if settings.classes else "foreground"
    return name, tuple(getattr(settings, name))


@lru_cache(maxsize=256)
def _find_slice(
    path: Path, stamp: tuple[int, int], suggested: Annotation | None, learnt: tuple[str, tuple[int, ...]]
) -> Annotation | None:
    """The annotation in a file, or None where it is empty; read once however often it is asked for (``stamp``: its
    time and size, which make another file of it)."""
    image = read_image(path)
    label = whole_numbers(sitk.GetArrayFromImage(image), path)
    voxels = np.flatnonzero(label)
    if not voxels.size:
        return None
    values = tuple(map(int, np.unique(label.ravel()[voxels])))
    setting, wanted = learnt
    if wanted and not set(wanted) & set(values):
        raise UserError(f"{path} is annotated with label value {', '.join(map(str, values))}, but {setting} = "
                        f"{', '.join(map(str, wanted))}: paint with that, or change {setting}")
    # SimpleITK's arrays have their axes in reverse order
    slices = [np.unique(index) for index in np.unravel_index(voxels, label.shape)[::-1]]
    single = [axis for axis in range(3) if slices[axis].size == 1]
    if suggested is not None and suggested.axis in single:
        single = [suggested.axis]
    if len(single) > 1:
        raise UserError(f"{path} holds {voxels.size} annotated voxels in a row, which could be of several planes: "
                        "annotate all of the structure in one slice")
    if not single:
        axis = suggested.axis if suggested is not None and suggested.axis is not None else (
            min(range(3), key=lambda axis: slices[axis].size))
        several = slices[axis]
        shown = some(several)
        raise UserError(f"{path} has {several.size} annotated slices along axis {axis} ({shown}): keep one")
    return Annotation(int(slices[single[0]][0]), single[0], path, Grid.of(image), values)


def read_slices(path: Path, columns: Sequence[str] = ("case", "slice")) -> dict[str, Annotation]:
    """The slices that a CSV file of at least ``columns`` names, by case and in its order, with their axis where it has
    such a column. Raises ``UserError`` for a file that is no such table."""
    slices: dict[str, Annotation] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not set(columns) <= set(rows.fieldnames or ()):
                raise UserError(f"{path} must begin with the line {','.join(columns)}")
            for row in rows:
                name = (row["case"] or "").strip()
                if name in slices:
                    raise UserError(f"{path}, line {rows.line_num}: {name} is there twice; keep one slice per case")
                numbers = {}
                for field in ("slice", *(["axis"] if "axis" in rows.fieldnames else [])):
                    try:
                        numbers[field] = int(row[field])
                    except (TypeError, ValueError) as error:
                        shown = f"{field} {row[field]!r} is not a whole number"
                        raise UserError(f"{path}, line {rows.line_num}: {shown}; correct it") from error
                slices[name] = Annotation(numbers["slice"], numbers.get("axis"))
    except OSError as error:
        raise UserError(f"cannot read the annotation file {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file of case,slice: {error}") from error
    return slices
