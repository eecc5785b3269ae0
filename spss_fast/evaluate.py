"""Measure a trained run or other weights: ``python -m spss_fast.evaluate --run RUN [--data-dir DATA]``."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spss_fast import cli
from spss_fast.console import say
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.layouts import find_cases
from spss_fast.engine.device import resolve_amp, resolve_device
from spss_fast.engine.evaluation import (
    Rows,
    dice_line,
    evaluate_cases,
    measured_grid,
    print_metrics,
    window_stride,
    write_metrics,
    write_summary,
)
from spss_fast.engine.run_folder import RunFolder
from spss_fast.engine.weights import load_network
from spss_fast.errors import UserError, some
from spss_fast.predict import PREPARATION, add_preset, take_preset
from spss_fast.settings import Config, DataSettings

DESCRIPTION = """Dice, Jaccard, 95% Hausdorff distance and average surface distance of a run's student: on the run's
test cases, or on every case with a full label in another data folder. Of weights without a run, on every case with a
full label in --data-dir. Of several classes, the average and each one's own."""
# how scans and labels are read, and the network is run
READING = (*PREPARATION, "foreground", "classes", "cache_dir", "workers", "statistics")


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary."""
    parser = cli.Parser(prog="spss_fast.evaluate", description=DESCRIPTION)
    parser.add_argument("--run", type=Path, help="folder of a trained run")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="another V-Net's weights (.pth, .safetensors)")
    parser.add_argument("--data-dir", type=Path, help="where the run's scans lie now, or a folder of other scans "
                        "(default: where training found them)")
    parser.add_argument("--stride", help="voxels from window to window, at most the patch, like 18,18,4 (default: "
                        "LA's, in proportion)")
    parser.add_argument("--units", choices=("voxel", "mm"), default="voxel", help="unit of the distances")
    parser.add_argument("--out", type=Path, help="CSV of the metrics per case, with a JSON of the same name that says "
                        "what was measured (default: RUN/evaluation.csv; of --weights W.pth W.evaluation.csv)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    add_preset(parser, READING)
    return vars(parser.parse_args(arguments))


def cases_to_measure(
    settings: DataSettings, recorded: dict[str, Any] | None, folder: Path, layout: str = "folder"
) -> tuple[list[PreparedCase], bool, list[str]]:
    """The cases of ``folder`` to measure, whether they are others than the run's own, and the names of those with a
    label that are left out because they are, while all of the run's are there.

    ``recorded`` is the run's ``cases.json``, None where there is no run. A ``folder`` that holds a case of every name
    in it is the run's data, moved; of any other, in the ``layout`` of that data set, all cases with a label are
    measured (``folder`` is any layout).
    """
    same = recorded is not None and _is_where_it_was(folder, recorded)
    cases = find_cases(settings.dataset if same else layout, folder)
    labelled = [case for case in cases if case.label is not None]
    known = set() if recorded is None else {*recorded["train"], *recorded["test"]}
    if recorded is None or not (same or known <= {case.name for case in cases}):
        return prepare(labelled, settings), True, []
    own = [case for case in cases if case.name in set(recorded["test"])]
    return prepare(own, settings), False, [case.name for case in labelled if case.name not in known]


def _is_where_it_was(folder: Path, recorded: dict[str, Any]) -> bool:
    return folder.resolve() == Path(recorded["data_dir"]).resolve()


def described(names: Collection[str], recorded: dict[str, Any] | None, folder: Path, foreign: bool) -> str:
    """What measured cases are to the run whose ``cases.json`` is ``recorded``, if there is one, in the plural."""
    if recorded is None:
        return f"cases of {folder}"
    if not foreign:
        moved = "" if _is_where_it_was(folder, recorded) else f" of the run, now in {folder}"
        what = "held-out cases" if recorded["held_out"] else "unlabelled training cases (images seen, labels never)"
        return what + moved
    text = f"cases of another folder than the run's own, {folder}"
    if seen := set(names) & set(recorded["train"]):
        text += f" ({len(seen)} named as training cases of the run, {len(seen & set(recorded['annotated']))} annotated)"
    return text


def evaluate(
    run: Path | None = None, data_dir: Path | None = None, stride: tuple[int, int, int] | None = None,
    units: str = "voxel", device: str = "auto", weights: Path | None = None, config: Config | None = None,
) -> tuple[Rows, str]:
    """Metrics per case of the student of the folder ``run``, and what the cases are to it; or of the file ``weights``.

    ``data_dir`` is where the run's data lie now, if it holds cases of all their names, else a folder of which all cases
    with a full label are measured. They are measured as they are prepared for training: on the resampled voxels where
    the run has ``resample``, at half resolution where it has ``downsample = 2``; without a run, as ``config``, of whose
    data set they are then, or a checkpoint of ours given as ``weights`` says. Distances are in ``units``, ``voxel`` or
    ``mm``. Raises ``UserError`` where the network or the data cannot be read, the network has another number of classes
    than the labels, no case has a full label, ``stride`` exceeds the patch, or mm are asked for of HDF5 files, which
    keep no voxel size.
    """
    run, data_dir, weights = (path and Path(path) for path in (run, data_dir, weights))
    return _measure(run, data_dir, stride, units, device, weights, config)[:2]


def _measure(
    run: Path | None, data_dir: Path | None, stride: tuple[int, int, int] | None, units: str, device: str,
    weights: Path | None, config: Config | None,
) -> tuple[Rows, str, dict[str, Any], list[str], list[str]]:
    """:func:`evaluate`, whose the cases are, for the summary, which others were left out, and which of them have no
    full label."""
    where, layout = resolve_device(device), "folder" if config is None else config.data.dataset
    student, config, stopped = load_network(run, weights, config)
    if run is None and data_dir is None:
        raise UserError("--data-dir is missing: the folder of the labelled scans that the weights are measured on")
    patch, classes = config.data.patch, student.out_conv.out_channels
    if classes != config.data.class_count:
        mend = "leave --classes out" if classes == 2 else f"name the {classes - 1} others' values with --classes"
        raise UserError(f"the weights have {classes} classes, background included, but labels are read as "
                        f"{config.data.class_count}: {mend}")
    if stride is not None and any(s > p for p, s in zip(patch, stride)):
        shown = " x ".join(map(str, patch))
        raise UserError(f"--stride {','.join(map(str, stride))} exceeds the patch of {shown} voxels, and so leaves "
                        "voxels between the windows: lower it to the patch at most")
    recorded = None if run is None else RunFolder(run).cases()
    folder = Path(data_dir or recorded["data_dir"])
    if data_dir is None and not folder.is_dir():
        raise UserError(f"the run's data folder {folder} does not exist: if it has moved, say where to with --data-dir")
    cases, foreign, left_out = cases_to_measure(config.data, recorded, folder, layout)
    bare = [case for case in cases if case.case.preprocessed]
    if units == "mm" and bare:
        raise UserError(f"--units mm: {bare[0].case.image} is preprocessed HDF5, which keeps no voxel size: leave it "
                        "out, to measure in voxels")
    student.to(where, memory_format=torch.channels_last_3d)
    rows = evaluate_cases(
        student, cases, config, stride or window_stride(patch), resolve_amp(config.training.amp, where),
        spacing=units == "mm",
    )
    meaning = described(rows, recorded, folder, foreign)
    if not cases:
        raise UserError(f"nothing to measure: no case of {folder} has a full label")
    if not rows:
        raise UserError(f"nothing to measure: of the {len(cases)} {meaning}, none has a full label")
    if run is not None and weights is not None:
        meaning += f"; with other weights than the run's, {weights}"
    if stopped:
        meaning += f"; {stopped}"
    if grid := measured_grid(config.data):
        meaning += f"; on {grid}"
    bare = [case.name for case in cases if case.name not in rows]
    about = {"data_dir": str(folder.resolve()), "foreign": foreign}
    if weights is not None:
        about["weights"] = str(weights.resolve())
    return rows, meaning, about, left_out, bare


def _refuse_as_table(out: Path) -> None:
    """Raise ``UserError`` where the table of metrics cannot be written to ``out``, as far as that shows beforehand."""
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out {out} is to be the table of metrics, and beside it a summary of that name, .json: name "
                        f"it {out.with_suffix('.csv')}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"the metrics cannot be written to {out}: name another --out")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = parse(arguments)
    config = take_preset(given, READING)
    run, weights, out, stride = (given.pop(name) for name in ("run", "weights", "out", "stride"))
    if stride is not None:
        try:
            stride = tuple(int(part) for part in stride.split(","))
        except ValueError:
            stride = ()
        if len(stride) != 3 or min(stride) < 1:
            raise UserError("--stride needs three voxel counts of at least 1, like 18,18,4")
    if out is not None:
        _refuse_as_table(out)
    console = Console()
    rows, meaning, whose, left_out, bare = _measure(run, weights=weights, config=config, stride=stride, **given)
    out = out or (run / "evaluation.csv" if weights is None else weights.with_suffix(".evaluation.csv"))
    print_metrics(console, f"{len(rows)} {meaning}", rows, given["units"])
    if bare:
        say(console, f"not measured: {len(bare)} cases without a full label, one that shows two slices at least "
                     f"({some(bare)})")
    if left_out:
        say(console, f"not measured: {len(left_out)} labelled cases in {whose['data_dir']} that are not the run's "
                     f"({some(left_out)}); to measure them, copy or link them into a folder of their own, without the "
                     "run's cases, and give that as --data-dir")
    try:
        write_metrics(out, rows)
        write_summary(out.with_suffix(".json"), rows, measured=meaning, units=given["units"], **whose)
    except OSError as error:
        raise UserError(f"the metrics cannot be written to {out} ({error.strerror}): name another --out") from error
    say(console, f"metrics by case: {out}")
    if weights is None and (labels := run / "registration_labels.csv").exists():
        with labels.open(newline="") as file:
            annotated = {row.pop("case"): {name: float(v) for name, v in row.items()} for row in csv.DictReader(file)}
        say(console, f"registration labels of {len(annotated)} annotated training volumes: {dice_line(annotated)}")


if __name__ == "__main__":
    cli.run(main)
