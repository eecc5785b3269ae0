"""What a folder of scans is like, and the settings that suit it: measured volume by volume, labels kept out of it.

The proposals are stated rules, not learnt ones, and of the size that the method was published with: a patch of at most
KiTS19's 176 x 176 x 64 voxels, volumes of about its 192 x 192 x 64.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from spss_fast.config import PRESETS, toml_literal
from spss_fast.data.dicom import find_slices
from spss_fast.data.folders import channel_names, dataset_json
from spss_fast.data.layouts import Case, read_case
from spss_fast.data.preparation import body_box, classes_shown, refuse_label_map, sampled
from spss_fast.data.splits import Lists
from spss_fast.errors import UserError, some
from spss_fast.settings import DataSettings, TrainingSettings

PATCH_VOXELS = int(np.prod(PRESETS["kits"]["patch"]))
VOLUME_VOXELS = int(np.prod(PRESETS["kits"]["resample"]))
LARGE = 4 * PATCH_VOXELS  # voxels beyond which a patch would see too little of a volume
UNEVEN = 1.5  # ratio of the coarsest to the finest spacing beyond which voxels stand for too different things
WINDOW = PRESETS["kits"]["window"]
GIVEN = {"data_dir": "the scans that were measured", "plane": "the plane of the slices that are annotated"}


@dataclass(frozen=True)
class Measured:
    """One scan; ``size`` in voxels and ``spacing`` in mm are height, width, slices, as prepared volumes have them."""

    name: str
    modality: str  # CT, MR or other
    said: bool  # by the files, not concluded from the intensities
    orientation: str  # of the file's axes, like LPS
    plane: str
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    body: tuple[int, int, int]  # size of the box around the body, of a CT
    lowest: float
    percentiles: tuple[float, float, float]  # 0.5, 50, 99.5
    highest: float
    values: tuple[int, ...]  # label values above 0
    full: bool  # whether the label shows more than one slice


def measure(case: Case, said: str, settings: DataSettings) -> Measured | str:
    """What a case is like, or the line for the user where it cannot be used; ``said``: the modality, where known."""
    try:
        if case.image.is_dir():
            said = known_modality(find_slices(case.image).modality) or said
        scan = read_case(case, settings.plane)
        image = scan.image
        refuse_label_map(image, case)
        sample = sampled(image)
        percentiles = tuple(map(float, np.percentile(sample, (0.5, 50, 99.5))))
        lowest, highest = float(image.min()), float(image.max())
        whole = image.dtype.kind in "iu" or bool((sample == np.round(sample)).all())
        modality = said or concluded_modality(lowest, percentiles, whole)
        body = scan.grid.size
        if modality == "CT":
            with contextlib.suppress(UserError):  # no body: nothing to crop to
                start, stop = body_box(image, case)
                body = tuple(int(n) for n in stop - start)
    except UserError as error:
        return str(error)
    except MemoryError:
        return f"{case.image} does not fit into memory: lower workers, or free some"
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(scan.source.direction)
    plane = ("sagittal", "coronal", "axial")[scan.grid.patient_axes()[2]]
    values, full = ((), False) if scan.label is None else (
        label_values(scan.label), np.count_nonzero(classes_shown(scan.label, settings)) > 1)
    return Measured(case.name, modality, bool(said), code, plane, scan.grid.size, scan.grid.spacing, body, lowest,
                    percentiles, highest, values, full)


def label_values(label: np.ndarray) -> tuple[int, ...]:
    """The values above 0 in a label map (uint8)."""
    seen = np.zeros(256, bool)
    for slab in np.moveaxis(label, int(np.abs(label.strides).argmax()), 0):  # in memory order
        seen[slab] = True
    return tuple(map(int, np.flatnonzero(seen[1:]) + 1))


def known_modality(text: str) -> str:
    """CT, MR or other for what DICOM or a ``dataset.json`` calls a modality; empty where it says nothing."""
    text = text.strip().upper()
    if text.startswith("CT"):
        return "CT"
    if text.startswith(("MR", "T1", "T2", "FLAIR", "DWI", "ADC")):
        return "MR"
    return "other" if text in ("PT", "PET", "US", "NM", "XA") else ""


def concluded_modality(lowest: float, percentiles: Sequence[float], whole: bool) -> str:
    """CT where the intensities are Hounsfield units: whole numbers from air to bone. MR intensities are never negative,
    in units of their own; what is negative otherwise was normalised by somebody."""
    if whole and lowest < -200 and percentiles[1] > -1100 and -100 < percentiles[2] < 4000:
        return "CT"
    return "MR" if lowest >= 0 else "other"


def modality_of_folder(data_dir: Path) -> str:
    """What ``dataset.json`` says, where there is one."""
    names = channel_names(data_dir)
    return known_modality(names[0]) if names else ""


@dataclass
class Proposal:
    """Settings and why each has its value, in the order in which they are written; None leaves a setting unset."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  # what a person should look at

    def add(self, name: str, value: Any, why: str) -> None:
        self.values[name], self.reasons[name] = value, why


def propose(
    scans: list[Measured], data_dir: Path, given: dict[str, Any], named: Collection[str], lists: Lists
) -> Proposal:
    """Settings for the scans of a folder.

    ``given`` are settings that the user chose already: they stay, and the others follow from them. ``named`` are the
    cases that ``annotations`` says are annotated, none where it is not set, and ``lists`` those of ``train.list`` and
    ``test.list``, None for one that is not there.
    """
    result = Proposal()

    def add(name: str, value: Callable[[], tuple[Any, str]]) -> Any:
        proposed, why = (given[name], "as given") if name in given else value()
        result.add(name, proposed, why)
        return proposed

    modality = Counter(scan.modality for scan in scans).most_common(1)[0][0]
    add("window", lambda: _window(modality))
    crop = add("body_crop", lambda: _body_crop(scans, modality))
    sizes = np.array([scan.body if crop else scan.size for scan in scans])
    if given.get("max_in_plane"):
        sizes[:, :2] = np.minimum(sizes[:, :2], given["max_in_plane"])
    spacings, factor = np.array([scan.spacing for scan in scans]), given.get("downsample", 1)
    resample = add("resample", lambda: _resample(sizes, spacings, factor))
    spacing = np.median(sizes * spacings, axis=0) / resample if resample else np.median(spacings, axis=0) * factor
    sizes = np.tile(resample, (len(scans), 1)) if resample else -(-sizes // factor)
    add("patch", lambda: _patch(sizes, spacing, PATCH_VOXELS // factor**3))
    if not given.get("classes"):
        add("foreground", lambda: _foreground(scans, data_dir))
    training, listed = _training(scans, lists), lists != (None, None)
    annotated = sum(scan.name in named for scan in training)
    labelled = sum(1 for _ in takewhile(lambda scan: scan.values, training))
    full = sum(scan.full for scan in scans if scan.name not in named)
    n_test = add("n_test", lambda: _n_test(len(scans), full, annotated, listed))
    add("n_labeled", lambda: _n_labeled(len(training), labelled, annotated, 0 if listed else n_test))
    for name, value in given.items():
        if name not in result.values:
            result.add(name, value, GIVEN.get(name, "as given"))
    result.remarks = _remarks(scans, modality, len(training), labelled, annotated)
    if _in_plane_ratio(spacing) > UNEVEN:
        height, width = spacing[:2]
        result.remarks.append(f"slices have voxels of {height:.2f} x {width:.2f} mm, and training turns them by 90 "
                              "degrees, which shows what they hold stretched: choose a --resample that makes them "
                              "about square, or another --plane")
    like_ct = [s.name for s in scans if s.modality == "other" and not s.said and s.lowest < -900 and s.highest > 200]
    if like_ct and result.values["window"] is None:
        low, high = WINDOW
        result.remarks.append(f"{len(like_ct)} scans look like CT in HU, but resampled, as their values are not whole: "
                              f"{some(like_ct)}; if so, add --window {low:g},{high:g} (soft tissue) and --body-crop")
    return result


def _window(modality: str) -> tuple[Any, str]:
    if modality == "CT":
        return WINDOW, ("CT: soft tissue, in HU, as published for KiTS19; lung would be [-1000, 400], bone [-200, "
                        "1000]; values beyond it are clipped, [low, high] becomes [0, 1]")
    return None, "no unit that volumes share, so none: each volume is z-scored by its own mean and deviation"


def _body_crop(scans: list[Measured], modality: str) -> tuple[Any, str]:
    if modality != "CT":
        return False, "only CT has units that tell a body (above -500 HU) from air"
    share = float(np.median([np.prod(scan.body) / np.prod(scan.size) for scan in scans]))
    why = f"the body's box takes {share:.0%} of a volume (median); the rest is air and table"
    return share < 0.9, why


def _resample(sizes: np.ndarray, spacings: np.ndarray, factor: int) -> tuple[Any, str]:
    extent, finest = np.median(sizes * spacings, axis=0), np.median(spacings, axis=0)
    ratio, within = float((spacings.max(0) / spacings.min(0)).max()), _in_plane_ratio(finest)
    voxels = float(np.median(sizes.prod(1)))
    if max(ratio, within) <= UNEVEN and voxels <= LARGE:
        return None, (f"volumes keep their grid: spacings differ by a factor of {max(ratio, within):.2f} at most, "
                      f"between scans or within slices (limit {UNEVEN}), and the median volume has "
                      f"{voxels / 1e6:.1f} million voxels (limit {LARGE / 1e6:.1f})")
    finest[:2] = finest[:2].min()  # square, as patches are turned
    # the isotropic spacing, or the scans' own where that is coarser, that gives the volume of the published grid
    low, high = float(finest.min()) / 2, float(extent.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.prod(extent / np.maximum(finest, middle)) > VOLUME_VOXELS else (low, middle)
    counts = extent / np.maximum(finest, high)
    rounded = tuple(max(16, 16 * round(float(n) / 16)) // factor for n in counts)
    if ratio > UNEVEN:
        reason = f"spacings differ by a factor of {ratio:.2f}"
    elif within > UNEVEN:
        reason = f"spacings within slices, which training turns by 90 degrees, differ by a factor of {within:.2f}"
    else:
        reason = f"the median volume has {voxels / 1e6:.0f} million voxels"
    now = " x ".join(f"{side:.2f}" for side in extent / rounded)
    return rounded, f"{reason}: every volume becomes this many voxels, {now} mm in the median one"


def _in_plane_ratio(spacing: np.ndarray) -> float:
    return float(spacing[:2].max() / spacing[:2].min())


def _patch(sizes: np.ndarray, spacing: np.ndarray, budget: int) -> tuple[Any, str]:
    height, width, slices = sizes.min(0)
    # square, as patches are turned; a little less than the slice, so that crops vary
    side = max(16, 16 * int(0.93 * min(height, width) // 16))
    depth = max(16, 16 * int(slices // 16))
    while side * side * depth > budget and max(side, depth) > 16:
        if side > 16 and (side * spacing[0] >= depth * spacing[2] or depth == 16):
            side -= 16
        else:
            depth -= 16
    mm = " x ".join(f"{n * s:.0f}" for n, s in zip((side, side, depth), spacing))
    return (side, side, depth), (
        f"multiples of 16 within the smallest prepared volume of {height} x {width} x {slices} and at most "
        f"{budget / 1e6:.1f} million voxels: {mm} mm in the median one")


def _foreground(scans: list[Measured], data_dir: Path) -> tuple[Any, str]:
    counts = Counter(value for scan in scans for value in scan.values)
    names = {}
    for name, value in dict(dataset_json(data_dir).get("labels", {})).items():
        number, text = (value, name) if str(value).isdigit() else (name, value)  # nnU-Net 2, or nnU-Net 1 and Decathlon
        if str(number).isdigit():
            names[int(number)] = str(text)
    if not counts:
        return (), "no labels beside the scans; of annotations every value above 0"
    found = ", ".join(f"{value}{f' ({names[value]})' if value in names else ''} in {count} of {len(scans)}"
                      for value, count in sorted(counts.items()))
    ignored = {value for value, name in names.items() if name.lower() == "ignore"}
    if ignored & set(counts):
        return tuple(sorted(set(counts) - ignored)), f"all label values but ignore, merged; found: {found}"
    return (), f"every label value above 0, merged; found: {found}"


def _training(scans: list[Measured], lists: Lists) -> list[Measured]:
    """The scans that may train, in the order in which training takes them for annotated where ``annotations`` names
    none: that of ``train.list``, else those with a label first."""
    train, test = lists
    if train is None:
        return sorted((scan for scan in scans if scan.name not in (test or ())), key=lambda scan: not scan.values)
    usable = {scan.name: scan for scan in scans}
    return [usable[name] for name in train if name in usable]


def _n_test(count: int, full: int, annotated: int, listed: bool) -> tuple[Any, str]:
    if listed:
        return 20, "not used: train.list or test.list in the data folder make the split"
    number = min(20, count // 5, max(0, full - (0 if annotated else 2)))
    return number, f"a fifth of the {count} scans, at most 20, of the {full} with full labels that annotations does " \
                   "not name; 0 tests on the unlabelled training scans"


def _n_labeled(count: int, labelled: int, annotated: int, n_test: int) -> tuple[Any, str]:
    if annotated:
        return annotated, "the cases that annotations names"
    available = labelled - n_test if labelled else count
    number = max(2, min(16, available, count - n_test - 2))
    if not labelled:
        return number, ("no labels yet on the scans that come first in training: annotate one slice in this many, at "
                        "most 16, and name them by annotations")
    return number, ("16 as published, or what there is of labelled scans that come first in training; one slice of "
                    "each is used, drawn at random without annotations")


def _remarks(scans: list[Measured], modality: str, training: int, labelled: int, annotated: int) -> list[str]:
    remarks = []
    for what, attribute, mend in (
        ("modality", "modality", "keep one modality per data set"),
        ("plane of the slices", "plane", "set plane if they should be the same"),
    ):
        values = Counter(getattr(scan, attribute) for scan in scans)
        usual = values.most_common(1)[0][0]
        others = [f"{scan.name} ({getattr(scan, attribute)})" for scan in scans if getattr(scan, attribute) != usual]
        if others:
            remarks.append(f"the {what} of {len(others)} scans is not {usual}: {some(others)}; {mend}")
    if not all(scan.said for scan in scans):
        remarks.append(f"modality {modality} was concluded from the intensities; no file says it")
    few = [scan.name for scan in scans if scan.size[2] < 16]
    if few:
        remarks.append(f"{len(few)} scans have fewer than 16 slices: {some(few)}; patches are padded there")
    thin = [scan.name for scan in scans if scan.values and not scan.full]
    if thin:
        remarks.append(f"{len(thin)} labels show one slice or none: {some(thin)}; such a label can be a scan's "
                       "annotation, but nothing is tested on it")
    if annotated > max(0, training - TrainingSettings.batch_unlabeled):
        remarks.append(f"annotations names {annotated} of the {training} scans to train on, which leaves too few "
                       "without: add scans, or train with --batch-unlabeled 0, on annotated ones alone")
    if not labelled and not annotated:
        which = "of those that come first in training " if any(scan.values for scan in scans) else ""
        remarks.append(f"no scan {which}has a label: annotate one slice in each of n_labeled scans, then set "
                       "annotations")
    return remarks


def describe(scans: list[Measured]) -> list[str]:
    """The fingerprint in lines for a person."""
    def span(values: Sequence[float], form: str) -> str:
        low, middle, high = np.min(values), np.median(values), np.max(values)
        return f"{middle:{form}} ({low:{form}} to {high:{form}})" if low != high else f"{middle:{form}}"

    def counted(values: Sequence[str]) -> str:
        return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())

    axes = ("height", "width", "slices")
    return [
        f"modality: {counted([scan.modality for scan in scans])}",
        f"plane of the slices: {counted([scan.plane for scan in scans])}; "
        f"axes of the files: {counted([scan.orientation for scan in scans])}",
        *(f"{name}: {span([scan.size[a] for scan in scans], '.0f')} voxels of "
          f"{span([scan.spacing[a] for scan in scans], '.3f')} mm" for a, name in enumerate(axes)),
        f"intensities: lowest {span([scan.lowest for scan in scans], '.5g')}, 0.5% "
        f"{span([scan.percentiles[0] for scan in scans], '.5g')}, median "
        f"{span([scan.percentiles[1] for scan in scans], '.5g')}, 99.5% "
        f"{span([scan.percentiles[2] for scan in scans], '.5g')}, highest "
        f"{span([scan.highest for scan in scans], '.5g')}",
        f"labels: {sum(bool(scan.values) for scan in scans)} of {len(scans)} scans, "
        f"{sum(scan.full for scan in scans)} of more than one slice",
    ]


def to_toml(scans: list[Measured], proposal: Proposal, unusable: Sequence[str] = ()) -> str:
    """The fingerprint as a settings file that ``train --settings`` takes: comments, and the data settings."""
    lines = [f"# {len(scans)} scans, as measured (median, least to most):"]
    lines += [f"#   {line}" for line in describe(scans)]
    for line in (*(f"look at: {line}" for line in proposal.remarks), *(f"left out: {line}" for line in unusable),
                 "Edit what you know better; prepare --settings then prepares by it, and training takes it as it is."):
        lines += _comment(line)
    lines += ["", "[data]"]
    for name, value in proposal.values.items():
        lines += _comment(proposal.reasons[name])
        lines.append(f"# {name} is not set" if value is None else f"{name} = {toml_literal(value)}")
    lines += ["", "# [registration]",
              "# paired organs, each carried through the volume on its own:", "# structures = 2",
              "# small structures, which the published cleaning of labels would wipe out:",
              "# opening = 3", "# closing = 3", "# far_iterations = 1", ""]
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    # control characters, which a file's name may have, would end a comment
    text = "".join(character if character.isprintable() else "?" for character in text)
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False,
                         break_on_hyphens=False)
