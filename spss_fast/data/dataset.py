"""From a data folder to the volumes that train and the cases that test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast.console import say
from spss_fast.data.annotations import check_annotations
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.layouts import find_cases, sources
from spss_fast.data.phantom import ORGANS, write_phantoms
from spss_fast.data.sampling import TrainingVolume, training_volumes, unlabeled_volumes
from spss_fast.data.splits import Split, make_split, taking_part
from spss_fast.errors import UserError
from spss_fast.settings import Config, DataSettings

PHANTOM_FOLDER = "phantoms"  # in the working directory, where --data-dir is not given


@dataclass
class Dataset:
    """The volumes of a run. ``labeled`` and ``unlabeled`` are all that training sees of them."""

    folder: Path
    split: Split
    labeled: list[TrainingVolume]
    unlabeled: list[TrainingVolume]
    test: list[PreparedCase]

    def describe(self) -> dict[str, Any]:
        """Who is annotated where, who trains, who tests: what ``cases.json`` keeps.

        ``annotated`` counts slices of the prepared volumes, which may be mirrored, cropped and resampled, and
        ``annotated_in_file`` those of the files, as ``annotations`` does.
        """
        return {
            "data_dir": str(self.folder.resolve()),
            "annotated": {volume.name: volume.index for volume in self.labeled},
            "annotated_in_file": {volume.name: volume.index_in_file for volume in self.labeled},
            "train": self.split.train, "test": self.split.test, "held_out": self.split.held_out,
        }

    def summary(self) -> str:
        """One line for a person."""
        tested = sum(case.has_full_label for case in self.test)
        among = "held out" if self.split.held_out else "among those"
        test = f"{tested} test cases {among}" if tested else "none with a label to test on"
        return f"{len(self.labeled)} annotated volumes (one slice each), {len(self.unlabeled)} unlabelled, {test}"


def data_folder(config: Config, console: Console) -> Path:
    """The run's data folder; phantoms are written where there are none yet."""
    settings = config.data
    if settings.dataset != "phantom":
        if not settings.data_dir:
            raise UserError(f"--data-dir is missing: the folder with the scans; {sources(settings.dataset)}")
        return Path(settings.data_dir)
    folder = Path(settings.data_dir or PHANTOM_FOLDER)
    # nothing where scans are; the rest of them where it was interrupted
    organs = any(value in ORGANS for value in settings.classes)
    written = write_phantoms(folder, settings.phantoms, config.training.seed, organs=organs)
    if written:
        say(console, f"wrote {written} phantom volumes to {folder}")
    return folder


def load(config: Config, console: Console) -> Dataset:
    """Find, split, prepare and annotate the cases of a run. Raises ``UserError`` before anything is trained."""
    folder = data_folder(config, console)
    found = find_cases(config.data.dataset, folder)
    check_annotations(found, config.data)  # before hours of preparation
    prepared = prepare(taking_part(found, folder), config.data)
    split = make_split(prepared, folder, config)
    cases = {case.name: case for case in prepared}
    annotated = [cases[name] for name in split.train[: config.data.n_labeled]]
    labeled = training_volumes(annotated, config.data, config.training.seed)
    _check_classes(labeled, config.data)
    return Dataset(
        folder, split, labeled=labeled,
        unlabeled=unlabeled_volumes([cases[name] for name in split.train[config.data.n_labeled :]]),
        test=[cases[name] for name in split.test],
    )


def _check_classes(volumes: list[TrainingVolume], settings: DataSettings) -> None:
    """Raise ``UserError`` for a class that no annotated slice shows: nothing could be learnt of it."""
    shown = {int(c) for volume in volumes for c in volume.annotation.unique()}
    for c, value in enumerate(settings.class_values):
        if c and c not in shown:
            raise UserError(f"no annotated slice of the {len(volumes)} holds label value {value}, a class of its own: "
                            "name slices that do with --annotations, or strike it from --classes")
