"""Prepare a folder of scans: ``python -m spss_fast.prepare --data-dir SCANS [--annotations FOLDER]``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast import cli
from spss_fast.config import resolve
from spss_fast.console import say
from spss_fast.data import cache
from spss_fast.data.annotations import (
    Annotation,
    common_plane,
    folder_states,
    read_annotations,
    refuse_all_empty,
    saved_beside,
)
from spss_fast.data.cache import PreparedCase
from spss_fast.data.fingerprint import Measured, describe, measure, modality_of_folder, propose, to_toml
from spss_fast.data.folders import ANNOTATION, left_out
from spss_fast.data.layouts import Case, find_cases, source_grid
from spss_fast.data.parallel import parallel
from spss_fast.data.splits import Lists, read_lists
from spss_fast.errors import UserError, some
from spss_fast.settings import SECTION_OF, Config

DESCRIPTION = """Measure a folder of scans, write down the settings that suit them as FILE.toml, and prepare the
volumes, so that training begins at once. Plain folders of NIfTI, NRRD and MetaImage files (alone, or with labels),
DICOM series, nnU-Net's raw layout and the Medical Segmentation Decathlon's are recognised. Flags replace what would be
proposed; with --settings the volumes are prepared by a file that was written and edited before."""
SKIPPED = ("dataset", "data_dir", "loader", "phantoms")


@dataclass
class Preparation:
    """What became of a folder: its settings file, the configuration, the prepared volumes, and a line for every file
    that cannot be used."""

    settings: Path
    config: Config
    cases: list[PreparedCase]
    unusable: list[str]


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary; settings that were not given are absent."""
    parser = cli.Parser(prog="spss_fast.prepare", description=DESCRIPTION)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the scans")
    parser.add_argument("--out", type=Path, metavar="FILE.toml", help="settings file to write (default: named after "
                        "the data folder, in the working directory)")
    parser.add_argument("--settings", type=Path, metavar="FILE.toml", help="prepare by this file instead of proposing")
    other = tuple(name for name, section in SECTION_OF.items() if section != "data")
    cli.add_settings(parser, skip=SKIPPED + other)
    return vars(parser.parse_args(arguments))


def prepare_folder(
    data_dir: Path, out: Path | None = None, settings: Path | None = None, flags: dict[str, Any] | None = None,
    console: Console | None = None,
) -> Preparation:
    """Measures the scans in ``data_dir``, writes the settings that suit them to ``out``, and prepares the volumes.

    ``flags`` are data settings that replace proposed ones. With ``settings``, a file written before, nothing is
    measured or written, and the volumes are prepared by that file. Scans and annotations that cannot be used are left
    out, each with a line in the result. Raises ``UserError`` where nothing can be prepared, ``out`` exists already, a
    ``train.list`` or ``test.list`` does not fit the scans, or annotations are of different planes.
    """
    console, flags, data_dir = console or Console(), dict(flags or {}), Path(data_dir)
    if settings is None:
        out = out or Path(f"{data_dir.resolve().name}.toml")
    elif out is not None:
        raise UserError("--settings prepares by a file, --out writes one: give one of them")
    cases = find_cases("folder", data_dir)
    lists = read_lists(data_dir, {case.name for case in cases})
    for line in left_out(data_dir):
        say(console, line)
    config = resolve("folder", flags, settings)
    unusable, annotated = [], []
    if config.data.annotations:
        flags["annotations"] = str(Path(config.data.annotations).expanduser().resolve())
        annotated, unusable = _annotated(cases, config, flags, console)
        config = resolve("folder", flags, settings)
        needed = config.training.batch_labeled
        if settings is None and "n_labeled" not in flags and 0 < len(annotated) < needed:
            mend = f"; {len(unusable)} cannot be used: {'; '.join(unusable)}" if unusable else ""
            raise UserError(f"{flags['annotations']} annotates {len(annotated)} scan, and training needs {needed}: "
                            f"annotate {needed - len(annotated)} more{mend}")
    if settings is None:
        if out.exists():  # once what is given is known to be right
            raise UserError(f"{out} exists already: prepare by it with --settings {out}; for new proposals (after "
                            "annotating, say) remove it, or choose another --out")
        flags["data_dir"] = str(data_dir.resolve())
        measured, failures = _measure(cases, config, data_dir)
        unusable += failures.values()
        if not measured:
            raise UserError(f"none of the {len(cases)} scans in {data_dir} can be used: {unusable[0]}")
        cases = [case for case in cases if case.name not in failures]
        _write(out, measured, data_dir, flags, annotated, lists, unusable, console)
        config = resolve("folder", {}, out)
    prepared, failures = _prepare(cases, config)
    unusable += failures
    if empty := [case.name for case in prepared if case.shown and not case.has_label and case.name not in annotated]:
        say(console, f"look at: {len(empty)} labels hold no foreground: {some(empty)}; their scans count as unlabelled")
    return Preparation(out or settings, config, prepared, unusable)


def _annotated(
    cases: list[Case], config: Config, flags: dict[str, Any], console: Console
) -> tuple[list[str], list[str]]:
    """Says which cases are annotated, and sets the plane where a folder shows it; returns their names, and a line for
    every annotation that cannot be used."""
    folder = Path(flags["annotations"])
    if not folder.is_dir():
        return _named(cases, config, console)
    states = folder_states(folder, config.data, cases)
    refuse_all_empty(states, folder)
    good = {name: state for name, state in states.items() if isinstance(state, Annotation)}
    empty = [name for name, state in states.items() if state is None]
    say(console, f"{len(good)} of {len(states)} annotations in {folder} are there")
    scans = {case.name: case for case in cases}
    for name, annotation in good.items():
        values, index = ", ".join(map(str, annotation.values)), annotation.index_in(source_grid(scans[name]))
        say(console, f"  {name}: {annotation.plane} slice {index} (axis {annotation.axis} of the file), label value "
                     f"{values}")
    if empty:
        say(console, f"  still empty: {', '.join(empty)}")
        if others := saved_beside(folder, empty):
            say(console, f"  but {some(others)} is there: save it as {ANNOTATION}.nii.gz")
    if good:
        plane = common_plane(good)
        if config.data.plane not in ("auto", plane):
            raise UserError(f"setting plane = {config.data.plane}, but {folder} is annotated in the {plane} plane: "
                            "leave plane at auto")
        flags["plane"] = plane
    return list(good), [state for state in states.values() if isinstance(state, str)]


def _named(cases: list[Case], config: Config, console: Console) -> tuple[list[str], list[str]]:
    """As :func:`_annotated`, of a CSV of slices."""
    table, scans, good, wrong = config.data.annotations, {case.name: case for case in cases}, [], []
    for name, annotation in read_annotations(config.data).items():
        if name not in scans:
            wrong.append(f"{table} names {name}, which is no scan of the data folder: correct the name, or strike it")
        elif scans[name].label is None:
            wrong.append(f"{table} names slice {annotation.index} of {name}, but {scans[name].image} has no label: add "
                         "the label that holds the slice")
        else:
            good.append(name)
    say(console, f"{table} names a slice of {len(good)} scans")
    return good, wrong


def _measure(cases: list[Case], config: Config, data_dir: Path) -> tuple[list[Measured], dict[str, str]]:
    """The scans that can be used, as measured, and by case name what is wrong with the others."""
    said = modality_of_folder(data_dir)
    results = dict(parallel(measure, [(case, said, config.data) for case in cases], config.data.workers,
                            "measuring scans"))
    measured = [results[i] for i in range(len(cases)) if isinstance(results[i], Measured)]
    return measured, {case.name: results[i] for i, case in enumerate(cases) if isinstance(results[i], str)}


def _write(
    out: Path, measured: list[Measured], data_dir: Path, flags: dict[str, Any], annotated: list[str], lists: Lists,
    unusable: list[str], console: Console,
) -> None:
    given = {name: getattr(resolve("folder", flags).data, name) for name in flags}
    proposal = propose(measured, data_dir, given, annotated, lists)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(to_toml(measured, proposal, unusable), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    say(console, f"{len(measured)} scans")
    for line in [*describe(measured), *(f"look at: {remark}" for remark in proposal.remarks)]:
        say(console, f"  {line}")
    shown = ("window", "body_crop", "resample", "patch", "n_labeled", "n_test")
    text = ", ".join(f"{name} {proposal.values[name]}" for name in shown)
    say(console, f"proposed in {out}: {text}")


def _prepare(cases: list[Case], config: Config) -> tuple[list[PreparedCase], list[str]]:
    """The prepared volumes, and what is wrong with those that cannot be: all in one go where all is well."""
    try:
        return cache.prepare(cases, config.data), []
    except UserError:
        prepared, failures = [], []
        for case in cases:  # the good ones are in the cache by now
            try:
                prepared += cache.prepare([case], config.data, progress=False)
            except UserError as error:
                failures.append(str(error))
        if len(failures) > 1 and len(set(failures)) == 1:  # no file's fault, but the cache's
            raise UserError(failures[0]) from None
        return prepared, failures


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 where a file could not be used."""
    given = parse(arguments)
    console = Console()
    folder = given.pop("data_dir")
    result = prepare_folder(folder, given.pop("out"), given.pop("settings"), given, console)
    where = cache.cache_root(result.config.data)
    say(console, f"{len(result.cases)} volumes prepared in {where}")
    for line in result.unusable:
        say(console, f"cannot be used: {line}")
    if result.unusable:
        say(console, f"{len(result.unusable)} files cannot be used: mend them, take them away or leave them out of "
                     "both train.list and test.list, or training will stop at them")
        return 1
    labelled, needed = sum(case.has_label for case in result.cases), result.config.training.batch_labeled
    if not result.config.data.annotations and labelled < needed:
        suggest = cli.command_line(
            "suggest", "--data-dir", folder, "--out", "TO_ANNOTATE", "--budget", result.config.data.n_labeled
        )
        say(console, f"{labelled} scans have a label, and training needs {needed} annotated slices at least: choose "
                     f"them with {suggest}, remove {result.settings} and prepare anew with --annotations TO_ANNOTATE")
        return 0
    train = cli.command_line(
        "train", "--dataset", "folder", "--settings", result.settings, "--out", Path("runs", result.settings.stem)
    )
    say(console, f"train with: {train}")
    return 0


if __name__ == "__main__":
    cli.run(main)
