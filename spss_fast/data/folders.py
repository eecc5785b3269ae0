"""Layouts that are no data set's own: nnU-Net's raw one, the Medical Segmentation Decathlon's, and plain folders.

Each finder gives (case name, image, label or None) for a folder, and nothing where the layout is another one. An image
is a file, or the folder of a DICOM series.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spss_fast.data.dicom import LABELS, has_series, is_dicom, no_scan
from spss_fast.data.images import ENDINGS, stem
from spss_fast.errors import UserError, some

DEPTH = 4  # folders below the data folder in which plain scans are looked for: patient/study/series, and one more
LONGEST = 200  # bytes of a case's name: file systems allow 255, some of which what it is followed by takes
WORDS = {
    "label": "labels?|segmentations?|seg|masks?|gt|laendo",
    "image": "images?|imgs?|imaging|scans?|volumes?|ct|mri?|lgemri",
}
# what `suggest` exports beside an image: one annotated slice is no label map
ANNOTATION = "annotation"

Found = tuple[str, Path, "Path | None"]


class Layout(NamedTuple):
    """A finder, and the pattern that shows where it looks."""

    find: Callable[[Path], list[Found]]
    pattern: str


def dataset_json(data_dir: Path) -> dict[str, Any]:
    """What ``dataset.json`` of nnU-Net and the Decathlon says; empty where there is none."""
    path = data_dir / "dataset.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no description of a data set: it must hold a JSON object")
    return content


def channel_names(data_dir: Path) -> list[str]:
    """The channels that ``dataset.json`` names (nnU-Net 2: channel_names; nnU-Net 1 and the Decathlon: modality)."""
    content = dataset_json(data_dir)
    named = content.get("channel_names", content.get("modality", {}))
    return [str(value) for value in (named.values() if isinstance(named, dict) else named)]


def find_nnunet(data_dir: Path) -> list[Found]:
    """``imagesTr/CASE_0000.nii.gz`` (or another ending) and ``labelsTr/CASE.nii.gz``."""
    images, labels = _files(data_dir / "imagesTr"), _files(data_dir / "labelsTr")
    numbered = {name: re.fullmatch(r"(.+)_(\d{4})", name) for name in images}
    if not images or not all(numbered.values()) or set(images) & set(labels):
        return []
    channels = sorted({match[2] for match in numbered.values()})
    _one_channel(data_dir, max(len(channels), len(channel_names(data_dir))), "copy the images of one channel")
    cases = {match[1]: images[name] for name, match in numbered.items()}
    return _paired(cases, labels, data_dir / "imagesTr")


def find_decathlon(data_dir: Path) -> list[Found]:
    """``imagesTr/CASE.nii.gz`` and ``labelsTr/CASE.nii.gz``."""
    images = _files(data_dir / "imagesTr")
    if images:
        _one_channel(data_dir, len(channel_names(data_dir)), "split the 4-D files, keep the 3-D ones of one channel")
    return _paired(images, _files(data_dir / "labelsTr"), data_dir / "imagesTr")


def _one_channel(data_dir: Path, count: int, mend: str) -> None:
    if count > 1:
        names = ", ".join(channel_names(data_dir)) or "numbered _0000, _0001, ..."
        raise UserError(f"{data_dir / 'imagesTr'} has {count} channels per case ({names}), and one is taken: {mend}, "
                        "and put them, with labelsTr, into a folder without this dataset.json")


def _files(folder: Path) -> dict[str, Path]:
    """The images in a folder by their stem; hidden ones (``._CASE``, which macOS leaves) are none."""
    if not folder.is_dir():
        return {}
    paths = [path for path in sorted(folder.iterdir()) if stem(path) and not path.name.startswith(".")]
    return {stem(path): path for path in paths}


def _paired(images: dict[str, Path], labels: dict[str, Path], where: Path) -> list[Found]:
    alone = sorted(set(labels) - set(images))
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        below = [name for name in sorted(images) if name.startswith(f"{alone[0]}_")]  # scans in folders below the label
        near = below or difflib.get_close_matches(alone[0], images, 1)
        hint = f", name the label after its case (like {near[0]})" if near else ""
        raise UserError(f"{labels[alone[0]]}{more} is a label without a scan in {where} (none is the case {alone[0]}): "
                        f"add the scan{hint}, or take it away")
    return [(name, path, labels.get(name)) for name, path in images.items()]


class _Item(NamedTuple):
    """An image or a label in a plain folder, and the case that its name says it belongs to."""

    role: str
    case: str
    path: Path


def find_plain(data_dir: Path) -> list[Found]:
    """Images alone or with labels, by name, and DICOM series.

    A case is a file (``CASE.nii.gz``) or a folder that holds one image (``CASE/image.nii.gz``, whatever its name) or
    DICOM series. Its label says so by a word of ``WORDS`` as its whole name (``CASE/label.nii.gz``), at its end
    (``CASE_seg.nii.gz``) or beginning (``segmentation-7.nii`` beside ``volume-7.nii``), or by its folder
    (``labels/CASE.nii.gz`` beside ``images/CASE.nii.gz``). A case in folders within folders is named after all of
    them, joined by ``_``.
    """
    found: dict[str, dict[str, Path]] = {"image": {}, "label": {}}
    for role, case, path in _items(data_dir):
        other = found[role].setdefault(case, path)
        if other is not path:
            raise UserError(
                f"{other} and {path.name} in {path.parent} both look like the {role} of the case {case}: keep one "
                "(a single channel); a folder of several cases is a data folder of its own")
    images, labels = found["image"], {}
    numbers = {_number(case): case for case in images}
    for case, path in found["label"].items():
        labels[case if case in images else numbers.get(_number(case), case)] = path
    return _paired(images, labels, data_dir)


def find_images(data_dir: Path) -> list[tuple[str, Path]]:
    """Case name and image of all that :func:`find_plain` takes for an image, whatever labels lie beside them."""
    return [(item.case, item.path) for item in _items(data_dir) if item.role == "image"]


def left_out(data_dir: Path) -> list[str]:
    """What lies in a folder as DICOM but is no scan, and so is left out: a line for the user for each kind."""
    found: dict[str, list[Path]] = {}
    for _, _, files in _walk(data_dir):
        for path in files:
            if not stem(path) and is_dicom(path) and (kind := no_scan(path)):
                found.setdefault(kind, []).append(path.relative_to(data_dir))
    mend = "; a label must be NIfTI or NRRD, which 3D Slicer exports for one"
    return [f"left out, as no scan: {len(paths)} DICOM {kind} ({some(paths)}){mend * (kind in LABELS)}"
            for kind, paths in found.items()]


def _walk(data_dir: Path) -> Iterator[tuple[Path, tuple[str, ...], list[Path]]]:
    """Each folder of a plain one, its parts below that, and the files in it, all by name and none hidden."""
    for parent, folders, names in os.walk(data_dir, onerror=_refuse_closed, followlinks=True):
        folder = Path(parent)
        parts = folder.relative_to(data_dir).parts
        # a data set of another layout below this folder is not a case of it, and a link upwards is none at all
        folders[:] = sorted(name for name in folders if not name.startswith(".") and len(parts) < DEPTH
                            and not os.path.isdir(folder / name / "imagesTr")
                            and not folder.resolve().is_relative_to((folder / name).resolve()))
        yield folder, parts, [folder / name for name in sorted(names) if not name.startswith(".")]


def _items(data_dir: Path) -> Iterator[_Item]:
    for folder, parts, files in _walk(data_dir):
        roles = {_role_of(part) for part in parts}
        inside = [part for part in parts if _role_of(part) is None]
        for path in files:
            if stem(path) and stem(path).lower() != ANNOTATION:
                yield _item(path, inside, "label" if "label" in roles else None)
        if has_series(path for path in files if not stem(path)):
            name = _joined(inside, folder) or data_dir.resolve().name
            yield _Item("image", name, folder)


def _refuse_closed(error: OSError) -> None:
    """``os.walk`` would pass over a folder that it cannot open, and its cases would be missing without a word."""
    why = f"{error.filename} cannot be opened ({error.strerror})"
    raise UserError(f"{why}: make it readable, or take it away") from error


def _role_of(text: str) -> str | None:
    """The role that a whole name of a file or folder says, like ``labels``."""
    text = text.lower().removesuffix("tr")
    return next((role for role, words in WORDS.items() if re.fullmatch(words, text)), None)


def _item(path: Path, folders: list[str], role: str | None) -> _Item:
    """What a file is: by ``role``, the one its folders give it, else by its own name."""
    name = stem(path)
    said = _role_of(name)
    if said is None:
        said, name = _split(name)
    return _Item(role or said or "image", _joined(folders, path) or name, path)


def _joined(folders: list[str], path: Path) -> str:
    """The name of the case at ``path``, in ``folders`` within each other."""
    name = "_".join(folders)
    if len(name.encode()) > LONGEST:
        raise UserError(f"{path}: its folders' names, joined, are the case's name, and as a file's too long with more "
                        f"than {LONGEST} bytes: rename them")
    return name


def _split(name: str) -> tuple[str | None, str]:
    """The role that a name's last or first word says, and the name without it where it was the last."""
    for role, words in WORDS.items():
        if match := re.fullmatch(rf"(.+)[-_. ]({words})", name, re.IGNORECASE):
            return role, match[1]
    for role, words in WORDS.items():
        if re.fullmatch(rf"({words})[-_. ]?\d.*", name, re.IGNORECASE):
            return role, name
    return None, name


def _number(name: str) -> str:
    """A name without the word that begins it: what ``volume-7`` and ``segmentation-7`` have in common."""
    return re.sub(rf"^({'|'.join(WORDS.values())})[-_. ]?(?=\d)", "", name, flags=re.IGNORECASE)


FOLDERS = {
    "nnunet": Layout(find_nnunet, "imagesTr/*_0000.*"),
    "decathlon": Layout(find_decathlon, "imagesTr/*.nii.gz"),
    "plain": Layout(find_plain, "*" + ENDINGS[0]),
}
