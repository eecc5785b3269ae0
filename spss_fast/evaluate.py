"""Measure a trained run: ``python -m spss_fast.evaluate --run RUN [--data-dir DATA]``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spss_fast import cli
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.layouts import find_cases
from spss_fast.engine import checkpoint
from spss_fast.engine.device import resolve_amp, resolve_device
from spss_fast.engine.evaluation import (
    Rows,
    dice_line,
    evaluate_cases,
    print_metrics,
    window_stride,
    write_metrics,
    write_summary,
)
from spss_fast.engine.run_folder import RunFolder
from spss_fast.engine.weights import build_network
from spss_fast.errors import UserError
from spss_fast.nets.vnet import VNet

DESCRIPTION = """Dice, Jaccard, 95% Hausdorff distance and average surface distance of a run's student: on the run's
test cases, or on every case with a label in another data folder. Of several classes, the average and each one's own."""


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary."""
    parser = cli.Parser(prog="spss_fast.evaluate", description=DESCRIPTION)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--data-dir", type=Path, help="folder of scans (default: the run's own)")
    parser.add_argument("--stride", help="voxels between windows, like 18,18,4 (default: LA's, in proportion)")
    parser.add_argument("--units", choices=("voxel", "mm"), default="voxel", help="unit of the distances")
    parser.add_argument("--out", type=Path, help="CSV of the metrics per case, with a JSON of the same name that says "
                        "what was measured (default: RUN/evaluation.csv)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return vars(parser.parse_args(arguments))


def load_student(content: dict[str, Any], device: torch.device) -> VNet:
    """The student of a checkpoint, ready for inference."""
    return build_network(content["student"], "the checkpoint").to(device, memory_format=torch.channels_last_3d)


def cases_to_measure(
    run: Path, content: dict[str, Any], data_dir: Path | None
) -> tuple[list[PreparedCase], str]:
    """The cases to measure, and what they are to the run."""
    settings = checkpoint.config_of(content).data
    recorded = RunFolder(run).cases()
    own = Path(recorded["data_dir"])
    folder = data_dir or own
    ours = folder.resolve() == own.resolve()
    cases = find_cases(settings.dataset if ours else "folder", folder)  # another one may be in any layout
    if ours:
        cases = [case for case in cases if case.name in set(recorded["test"])]
        meaning = "held-out cases" if recorded["held_out"] else "unlabelled training cases: images seen, labels never"
    else:
        cases = [case for case in cases if case.label is not None]
        meaning = f"cases of {folder}"
    return prepare(cases, settings), meaning


def evaluate(
    run: Path, data_dir: Path | None = None, stride: tuple[int, int, int] | None = None, units: str = "voxel",
    device: str = "auto",
) -> tuple[Rows, str]:
    """Metrics per case of the student of the folder ``run``, and what the cases are to it.

    The cases are prepared as for training (so a ``downsample 2`` run is measured at half resolution). Raises
    ``UserError`` where the run or the data cannot be read, or no case has a full label.
    """
    where = resolve_device(device)
    content = checkpoint.read(RunFolder(run).checkpoint, where)
    config = checkpoint.config_of(content)
    cases, meaning = cases_to_measure(run, content, data_dir)
    student = load_student(content, where)
    rows = evaluate_cases(
        student, cases, config, stride or window_stride(config.data.patch), resolve_amp(config.training.amp, where),
        spacing=units == "mm",
    )
    if not rows:
        raise UserError(f"none of the {len(cases)} test cases has a full label: nothing to measure")
    if content["iteration"] < config.training.iterations:
        meaning += f"; training stopped at iteration {content['iteration']} of {config.training.iterations}"
    if config.data.downsample > 1:
        meaning += f"; on the {config.data.downsample} times coarser grid that it trains on"
    return rows, meaning


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = parse(arguments)
    run, out, stride = given.pop("run"), given.pop("out"), given.pop("stride")
    if stride is not None:
        try:
            stride = tuple(int(part) for part in stride.split(","))
        except ValueError:
            stride = ()
        if len(stride) != 3 or min(stride) < 1:
            raise UserError("--stride needs three voxel counts of at least 1, like 18,18,4")
    out = out or run / "evaluation.csv"
    if out.suffix.lower() == ".json":
        raise UserError(f"--out {out} is the name of the summary beside the table of metrics: name the table, "
                        f"{out.with_suffix('.csv')}")
    console = Console()
    rows, meaning = evaluate(run, stride=stride, **given)
    print_metrics(console, f"{len(rows)} {meaning}", rows, given["units"])
    write_metrics(out, rows)
    folder = given["data_dir"] or RunFolder(run).cases()["data_dir"]
    write_summary(out.with_suffix(".json"), rows, measured=meaning, data_dir=str(Path(folder).resolve()),
                  units=given["units"])
    labels = run / "registration_labels.csv"
    if labels.exists():
        with labels.open(newline="") as file:
            annotated = {row.pop("case"): {name: float(v) for name, v in row.items()} for row in csv.DictReader(file)}
        console.print(f"registration labels of {len(annotated)} annotated training volumes: {dice_line(annotated)}")


if __name__ == "__main__":
    cli.run(main)
