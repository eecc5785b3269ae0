"""Which cases train and which test, and which slice of an annotated case is the annotated one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from spss_fast.data.annotations import Annotation, empty_annotations, read_annotations
from spss_fast.data.cache import PreparedCase
from spss_fast.data.images import stem
from spss_fast.data.layouts import Case
from spss_fast.errors import UserError, some
from spss_fast.settings import Config, DataSettings

Lists = tuple[list[str] | None, list[str] | None]  # the cases of train.list and test.list, None without the file


@dataclass
class Split:
    """Case names; the first ``n_labeled`` of ``train`` are the annotated ones.

    ``held_out`` tells whether the test volumes were kept from training: False where they are the unlabelled training
    volumes, whose images training sees and whose labels it does not.
    """

    train: list[str]
    test: list[str]
    held_out: bool


def make_split(cases: list[PreparedCase], data_dir: Path, config: Config) -> Split:
    """The split that ``train.list`` and ``test.list`` in the data folder give, else one drawn by seed and case name.

    With lists: their order is kept, but that the annotated cases come first: those that ``annotations`` names, and as
    many of the list's first as ``n_labeled`` leaves. Cases that are in no given list make up the other one; with a
    ``train.list`` that names every case, the unlabelled training cases are the test. Without: ``n_test`` cases with a
    full label test, and the order of the others is drawn; cases that ``annotations`` names come first in training,
    cases without any label last. A case's place in the draw depends on its own name and the seed only. Raises
    ``UserError`` for names without a scan, for overlap, and where too few volumes are left to train on.
    """
    settings, training = config.data, config.training
    known = {case.name: case for case in cases}
    data_dir = Path(data_dir)
    train, test = read_lists(data_dir, known)
    drawn = sorted(known, key=lambda name: hashlib.sha256(f"{training.seed}:{name}".encode()).digest())
    named = read_annotations(settings)
    held_out = True
    if train is not None:
        train = _annotated_first(train, named, settings.n_labeled)
    if train is not None and test is None:
        test = sorted(set(known) - set(train))
        if not test:
            test, held_out = train[settings.n_labeled :], False
    elif train is None:
        if test is None:
            full = (name for name in drawn if name not in named and known[name].has_full_label)
            test = list(islice(full, settings.n_test))
        rank = {name: 0 if name in named else 1 if known[name].has_label else 2 for name in known}
        train = sorted((name for name in drawn if name not in test), key=rank.__getitem__)
        if not test:
            test, held_out = train[settings.n_labeled :], False
    needed = settings.n_labeled + training.batch_unlabeled
    if len(train) < needed:
        raise UserError(
            f"{data_dir} leaves {len(train)} volumes to train on ({len(known)} in all, {len(test) if held_out else 0} "
            f"for testing), but n_labeled = {settings.n_labeled} and batch_unlabeled = {training.batch_unlabeled} need "
            f"{needed}: add scans, lower n_labeled or n_test, or set batch_unlabeled = 0 to train on annotated scans "
            "alone")
    bare = [name for name in train[: settings.n_labeled] if not known[name].has_label and (
        name not in named or named[name].label is None)]
    if bare:
        empty = empty_annotations(settings)
        still = f"; still empty: {some(empty)}" if empty else ""
        left = settings.n_labeled - len(bare)
        otherwise = f", or lower n_labeled to {left}"
        if left < training.batch_labeled:
            otherwise = (f"; training needs {training.batch_labeled} annotated slices at least (spss_fast.suggest "
                         "proposes which, --annotations takes them)")
        raise UserError(
            f"{known[bare[0]].case.image} is of the first n_labeled = {settings.n_labeled} training cases but has no "
            f"label with foreground{_wanted(settings)} ({len(bare)} such{still}): annotate a slice of it{otherwise}")
    return Split(train, test, held_out)


def _wanted(settings: DataSettings) -> str:
    values = settings.foreground or settings.classes
    return f" (value {', '.join(map(str, values))})" if values else ""


def taking_part(cases: list[Case], data_dir: Path) -> list[Case]:
    """The cases that ``train.list`` and ``test.list`` name where both are there, else all: those to prepare."""
    lists = read_lists(data_dir, {case.name for case in cases})
    return cases if None in lists else [case for case in cases if any(case.name in names for names in lists)]


def _annotated_first(train: list[str], named: Collection[str], count: int) -> list[str]:
    """``train`` with the ``count`` annotated cases first, those that are ``named`` among them; else in its order."""
    annotated = set(sorted(train, key=lambda name: name not in named)[:count])
    return sorted(train, key=lambda name: name not in annotated)


def read_lists(data_dir: Path, known: Collection[str]) -> Lists:
    """What ``train.list`` and ``test.list`` in the data folder name; None for one that is not there.

    Raises ``UserError`` for a list that cannot be read or is empty, a name without a scan, and one that is named twice.
    """
    train, test = (_read_list(data_dir / name, known) for name in ("train.list", "test.list"))
    if train is not None and test is not None and (both := sorted(set(train) & set(test))):
        raise UserError(f"{data_dir / 'test.list'} names {both[0]}, as train.list does: keep it in one of them")
    return train, test


def _read_list(path: Path, known: Collection[str]) -> list[str] | None:
    """Case names, one a line, with or without a file ending; None where there is no such list."""
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin files with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of case names: {error}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    names = [name if name in known else stem(Path(name)) or name.removesuffix(".h5") for name in names]
    if not names:
        raise UserError(f"{path} names no case: fill it, or take it away for a split by seed")
    absent = [name for name in names if name not in known]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"{path} names {absent[0]}{more}, but {path.parent} has no such scan: add it, or strike it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names {twice} twice: strike one of them")
    return names


def annotated_slices(cases: list[PreparedCase], settings: DataSettings, seed: int) -> dict[str, int]:
    """The annotated slice of each annotated case, as an index of its prepared volume's last axis.

    Taken from ``annotations`` (a CSV or a folder) where that names the case, else drawn uniformly from the middle three
    fifths of the slices that hold foreground, by seed and case name; with several classes, from those of them that show
    the most classes. Raises ``UserError`` for a case that is named but not one of ``cases``, a slice that does not
    exist, that lies in another plane, or that is without foreground.
    """
    given = read_annotations(settings)
    unknown = [name for name in given if name not in {case.name for case in cases}]
    if unknown:
        raise UserError(
            f"{settings.annotations} names {unknown[0]}, which is not one of the {len(cases)} annotated cases "
            "(n_labeled of the training cases, named ones first): correct the name, the lists or n_labeled")
    return {
        case.name: _given_slice(case, given[case.name], settings) if case.name in given else
        _drawn_slice(case, settings, seed)
        for case in cases
    }


def _given_slice(case: PreparedCase, annotation: Annotation, settings: DataSettings) -> int:
    axis = case.slice_axis()
    if annotation.axis not in (None, axis):
        raise UserError(f"{settings.annotations}: {case.name} is annotated along axis {annotation.axis} of its file, "
                        f"but its slices lie along axis {axis}: set plane to that of the annotation")
    index, count = annotation.index_in(case.source), case.source.size[axis]
    if not 0 <= index < count:
        raise UserError(f"{settings.annotations}: slice {index} of {case.name} does not exist; its last is {count - 1}")
    file = annotation.label or case.case.label
    if file is None:
        raise UserError(f"{settings.annotations} names slice {index} of {case.name}, but {case.case.image} has no "
                        "label: add the label that holds the slice")
    prepared = case.slice_from_source(index)
    if not 0 <= prepared < case.grid.size[2]:
        raise UserError(f"{settings.annotations}: slice {index} of {case.name} lies outside of what is left of its "
                        "scan: annotate a slice within the body, or turn body_crop off")
    if not case.annotation_from_source(annotation, settings).any():
        raise UserError(f"{settings.annotations}: slice {index} of {case.name} holds no foreground in {file}; name the "
                        "slice that is annotated")
    return prepared


def _drawn_slice(case: PreparedCase, settings: DataSettings, seed: int) -> int:
    label, only = case.label(), case.only_slice
    slices = np.flatnonzero(label.any(axis=(0, 1)))
    if only is not None:
        index = case.slice_from_source(only)
        kept = 0 <= index < case.grid.size[2] and case.annotation_from_source(Annotation(only), settings).any()
        slices = np.array([index] if kept else [], int)
    if not slices.size:
        raise UserError(f"{case.case.label}: its foreground does not survive cropping and resampling to "
                        f"{case.grid.size} voxels; resample to more, or leave the case out")
    margin = slices.size // 5
    name = int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "little")
    middle = slices[margin : slices.size - margin]
    shown = np.array([np.count_nonzero(np.unique(label[:, :, index])) for index in middle])
    return int(np.random.default_rng([seed, name]).choice(middle[shown == shown.max()]))
