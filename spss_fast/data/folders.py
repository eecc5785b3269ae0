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
    "label": "labels?|segmentations?|seg|masks?|msks?|gt|ground[-_. ]?truth|annotations?|rois?|contours?|laendo",
    "image": "images?|imgs?|imaging|scans?|volumes?|ct|mri?|lgemri",
}
SEPARATOR = "[-_. ]"  # between the words of a name
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
    """An image or a label in a plain folder, and the case that its name says it belongs to.

    ``before`` are the cases whose label it may be instead, by a word for labels in the middle of its name.
    """

    role: str
    case: str
    path: Path
    before: tuple[str, ...] = ()


def find_plain(data_dir: Path) -> list[Found]:
    """Images alone or with labels, by name, and DICOM series.

    A case is a file (``CASE.nii.gz``) or a folder that holds one image (``CASE/image.nii.gz``, whatever its name) or
    DICOM series. Its label says so by a word of ``WORDS`` as its whole name (``CASE/label.nii.gz``), at its end
    (``CASE_seg.nii.gz``) or beginning (``mask_CASE.nii.gz``, ``segmentation-7.nii`` beside ``volume-7.nii``), in the
    middle where there is an image of what stands before it (``CASE_seg_v2.nii.gz`` beside ``CASE.nii.gz``), or by its
    folder (``labels/CASE.nii.gz`` beside ``images/CASE.nii.gz``). A case in folders within folders is named after all
    of them, joined by ``_``.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    items = _items(data_dir)
    for item in items:
        if item.role == "image":
            _add(images, item.case, item)
    alike: dict[str, list[str]] = {}
    for case in images:
        alike.setdefault(_bare(case), []).append(case)
    for item in items:
        if item.role == "label":
            bare = _bare(item.case)
            same = [case for case in (item.case, bare) if case in images][:1] or alike.get(bare, [])
            _add(labels, same[0] if len(same) == 1 else item.case, item)
    _refuse_single(data_dir, images, labels)
    return _paired(images, labels, data_dir)


def _add(found: dict[str, Path], case: str, item: _Item) -> None:
    other, path = found.setdefault(case, item.path), item.path
    if other is not path:
        raise UserError(
            f"{other} and {path.name} in {path.parent} both look like the {item.role} of the case {case}: keep one (a "
            "single channel); a folder of several cases is a data folder of its own")


def _refuse_single(data_dir: Path, images: dict[str, Path], labels: dict[str, Path]) -> None:
    """``UserError`` for the folder of one case, as ``CASE`` that holds ``image.nii.gz`` and ``label.nii.gz``."""
    if len(images) != 1 or data_dir not in (image := next(iter(images.values())), image.parent):
        return
    for case, path in labels.items():
        if case not in images and path.parent == data_dir and _role_of(stem(path)) == "label":
            raise UserError(f"{data_dir} is the folder of a single case, whose label is {path.name}: give the folder "
                            f"that it lies in, {data_dir.resolve().parent}, as the data folder")


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


def _items(data_dir: Path) -> list[_Item]:
    """What a plain folder holds, those first whose names say the least."""
    items = sorted(_files_and_series(data_dir), key=lambda item: len(item.before))
    cases: set[str] = set()
    for place, item in enumerate(items):
        owner = next((case for case in reversed(item.before) if case in cases), None)
        if owner is not None:
            items[place] = item._replace(role="label", case=owner)
        elif item.role == "image":
            cases.add(item.case)
    return items


def _files_and_series(data_dir: Path) -> Iterator[_Item]:
    """Each as what its own name and its folders say."""
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


def says_label(path: Path) -> bool:
    """Whether the name of a file says that it is a label map."""
    return "label" in (_role_of(stem(path)), _split(stem(path))[0])


def _item(path: Path, folders: list[str], role: str | None) -> _Item:
    """What a file is: by ``role``, the one its folders give it, else by its own name."""
    name, before = stem(path), []
    said = _role_of(name)
    if said is None:
        words = re.finditer(rf"(?<=.){SEPARATOR}({WORDS['label']})\d*(?={SEPARATOR}|$)", name, re.IGNORECASE)
        before = [name[: word.start()] for word in words]
        said, name = _split(name)
    joined = _joined(folders, path)
    return _Item(role or said or "image", joined or name, path, tuple(joined or part for part in before))


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
        if match := re.fullmatch(rf"(.+){SEPARATOR}({words})", name, re.IGNORECASE):
            return role, match[1]
    for role, words in WORDS.items():
        if re.fullmatch(rf"({words})({SEPARATOR}.|\d).*", name, re.IGNORECASE):
            return role, name
    return None, name


def _bare(name: str) -> str:
    """A name without the word that begins it: what ``volume-7`` and ``segmentation-7`` have in common."""
    return re.sub(rf"^({'|'.join(WORDS.values())})({SEPARATOR}(?=.)|(?=\d))", "", name, flags=re.IGNORECASE)


FOLDERS = {
    "nnunet": Layout(find_nnunet, "imagesTr/*_0000.*"),
    "decathlon": Layout(find_decathlon, "imagesTr/*.nii.gz"),
    "plain": Layout(find_plain, "*" + ENDINGS[0]),
}
