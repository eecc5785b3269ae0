"""Suggest what to annotate: ``python -m spss_fast.suggest --data-dir SCANS --out FOLDER --budget 8``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast import cli
from spss_fast.config import PRESETS, resolve
from spss_fast.console import say
from spss_fast.data.annotation_export import (
    Suggestion,
    export_case,
    read_table,
    write_readme,
    write_table,
)
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.folders import left_out
from spss_fast.data.geometry import PLANES
from spss_fast.data.layouts import find_cases, sources
from spss_fast.data.selection import distances, halving_slice, k_medoids, thumbnail
from spss_fast.data.splits import read_lists
from spss_fast.errors import UserError, some
from spss_fast.files import refuse_among_scans
from spss_fast.settings import SECTION_OF, DataSettings

DESCRIPTION = """Which volumes to annotate, and which slice of each, as image + empty label pairs that 3D Slicer and
ITK-SNAP open on that slice. Volumes: those that are most like all others (k-medoids of thumbnails). Slice: the one that
halves the brightness of the middle of the scan. No label is looked at. Run it again with a larger --budget for more
volumes: what --out already holds stays as it is."""
# what shapes a prepared image; the rest of the settings has no say here
USED = ("data_dir", "plane", "window", "body_crop", "resample", "max_in_plane", "downsample", "cache_dir", "workers")
BUDGET = 8


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary; settings that were not given are absent."""
    parser = cli.Parser(prog="spss_fast.suggest", description=DESCRIPTION)
    parser.add_argument("--dataset", choices=sorted(PRESETS), default="folder", help="data set, and its preset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to annotate in")
    parser.add_argument("--budget", type=int, default=BUDGET, help="volumes to annotate, with those in --out already")
    parser.add_argument("--settings", type=Path, metavar="FILE.toml", help="settings that override the preset")
    cli.add_settings(parser, skip=tuple(name for name in SECTION_OF if name not in USED))
    return vars(parser.parse_args(arguments))


def choose(cases: list[PreparedCase], count: int, fixed: tuple[str, ...] = ()) -> list[PreparedCase]:
    """The ``count`` most representative of ``cases``, the ``fixed`` ones (by name) among and before them.

    K-medoids of the prepared images' thumbnails; no label is read. Raises ``ValueError`` as :func:`k_medoids` does.
    """
    places = {case.name: place for place, case in enumerate(cases)}
    between = distances([thumbnail(case.image) for case in cases])
    return [cases[place] for place in k_medoids(between, count, [places[name] for name in fixed])]


def suggest(
    settings: DataSettings, out: Path, budget: int = BUDGET, console: Console | None = None
) -> list[Suggestion]:
    """Fill ``out`` with ``budget`` cases to annotate, and return them: which case, along which axis, which slice.

    The scans of ``settings.data_dir`` compete, but for those that a ``test.list`` there names or a ``train.list`` does
    not; their labels, if there are any, are not looked at. Cases that ``out`` already holds count, are kept and are not
    written to. Raises ``UserError`` where there are too few scans, and for scans or an ``out`` that cannot be used.
    """
    console = console or Console()
    if budget < 1:
        raise UserError("--budget must be 1 or more")
    if not settings.data_dir:
        raise UserError(f"--data-dir is missing: the folder with the scans; {sources(settings.dataset)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    folder = Path(settings.data_dir)
    refuse_among_scans(out, [folder], "copies of them")
    found = {case.name: case for case in find_cases(settings.dataset, folder)}
    for line in left_out(folder):
        say(console, line)
    trained, tested = read_lists(folder, found)
    listed = read_table(out)
    wanted = budget - len(listed)
    if wanted <= 0:
        say(console, f"{out} already holds {len(listed)} cases to annotate; a larger --budget adds more")
        return listed
    pool = [case for name, case in found.items() if name in (trained or found) and name not in (tested or ())]
    fixed = tuple(item.case for item in listed if item.case in {case.name for case in pool})
    if wanted > len(pool) - len(fixed):
        others = len(found) - len(pool)
        unlisted = f", {others} more are in test.list or not in train.list" if others else ""
        raise UserError(f"--budget {budget} needs {wanted} scans more than {out} holds, but {folder} has "
                        f"{len(pool) - len(fixed)}{unlisted}: lower it, or add scans")
    prepared = prepare([replace(case, label=None) for case in pool], settings)
    chosen = choose(prepared, len(fixed) + wanted, fixed)
    _refuse_planes(chosen, listed)
    for case in chosen[len(fixed) :]:
        place = case.slice_to_source(halving_slice(case.image))
        item = Suggestion(case.name, case.slice_axis(), place)
        export_case(out, case, item)
        listed.append(item)
        write_table(out, listed)
        say(console, f"{item.case}: slice {item.slice} of the scan along axis {'xyz'[item.axis]}, counted from 0")
    write_readme(out, listed)
    then = cli.command_line("prepare", "--data-dir", settings.data_dir, "--annotations", out)
    say(console, f"annotate one slice in each of the {len(listed)} folders of {out} (README.txt there says how), "
                 f"then: {then}")
    return listed


def _refuse_planes(chosen: list[PreparedCase], listed: list[Suggestion]) -> None:
    """Raise ``UserError`` where ``chosen`` cases would be annotated in different planes, as their slices lie, or those
    that are ``listed`` are to be: training takes one plane."""
    axes = {item.case: item.axis for item in listed}
    names = {axis: name for name, axis in PLANES.items()}
    planes: dict[str, list[str]] = {}
    for case in chosen:
        plane = names[case.source.patient_axes()[axes.get(case.name, case.slice_axis())]]
        planes.setdefault(plane, []).append(case.name)
    if len(planes) > 1:
        shown = "; ".join(f"{plane}: {some(cases)}" for plane, cases in planes.items())
        usual = next(iter(planes)) if listed else max(planes, key=lambda plane: len(planes[plane]))
        raise UserError(f"slices lie in different planes ({shown}), and all scans must be annotated in the same one: "
                        f"choose it, like --plane {usual}")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = parse(arguments)
    dataset, out, budget, file = (given.pop(name) for name in ("dataset", "out", "budget", "settings"))
    suggest(resolve(dataset, given, file).data, out, budget)


if __name__ == "__main__":
    cli.run(main)
