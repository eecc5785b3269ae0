"""Accuracy against full labels, where they exist: of the student, and of the registration labels it learnt from."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from spss_fast import metrics
from spss_fast.console import say
from spss_fast.data.cache import PreparedCase
from spss_fast.data.sampling import TrainingVolume
from spss_fast.engine.inference import sliding_window
from spss_fast.engine.pseudo_labels import registration_labels
from spss_fast.engine.registration import outward_flows
from spss_fast.files import atomically, write_json
from spss_fast.settings import Config, DataSettings

Rows = dict[str, dict[str, float]]  # case name to its metrics, as metrics.evaluate_classes names them
DIGITS = dict(zip(metrics.NAMES, (4, 4, 2, 2)))  # that a table shows behind the point


def window_stride(patch: Sequence[int]) -> tuple[int, int, int]:
    """LA's stride (18, 18, 4) of its patch (112, 112, 80), in proportion to ``patch``."""
    return tuple(max(1, round(side * share)) for side, share in zip(patch, (18 / 112, 18 / 112, 4 / 80)))


def measured_grid(settings: DataSettings) -> str:
    """On which voxels a run is measured, in words; empty where they are the scans' own."""
    if settings.resample is not None:
        return f"the {' x '.join(map(str, settings.resample))} voxels that scans are resampled to"
    return f"the {settings.downsample} times coarser grid that it trains on" if settings.downsample > 1 else ""


def evaluate_cases(
    student: nn.Module, cases: Iterable[PreparedCase], config: Config, stride: Sequence[int], amp: torch.dtype | None,
    spacing: bool = False,
) -> Rows:
    """Metrics of the student on prepared cases with full labels; distances in voxels, or mm with ``spacing``."""
    student.eval()
    rows, values = {}, config.data.class_values
    for case in cases:
        label = case.full_label()
        if label is None:
            continue
        probability = sliding_window(
            student, torch.from_numpy(case.image), config.data.patch, stride, amp, statistics=config.network.statistics
        )
        prediction = probability.argmax(0).cpu().numpy()
        rows[case.name] = metrics.evaluate_classes(prediction, label, values, case.spacing if spacing else None)
    return rows


def evaluate_labels(
    network: nn.Module, volumes: Sequence[TrainingVolume], config: Config, device: torch.device,
    amp: torch.dtype | None,
) -> Rows:
    """Metrics, in voxels, of the registration labels of whole annotated volumes that have full labels."""
    rows = {}
    for volume in volumes:
        if volume.reference is None:
            continue
        index = torch.tensor([volume.index], device=device)
        label = registration_labels(
            outward_flows(network, volume.image[None].to(device), index, amp), volume.annotation[None], index,
            config.data.class_count, config.registration,
        )
        rows[volume.name] = metrics.evaluate_classes(
            label[0].cpu().numpy(), volume.reference.numpy(), config.data.class_values
        )
    return rows


def mean_and_sd(rows: Rows) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over cases; what is undefined (distances of an empty prediction, all of a class that
    a case does not have) is left out."""
    return {
        name: (float(np.nanmean(values)), float(np.nanstd(values)))
        for name in _names(rows)
        if not np.isnan(values := [row[name] for row in rows.values()]).all()
    }


def _names(rows: Rows) -> list[str]:
    return list(next(iter(rows.values()), ()))


def _class_values(rows: Rows) -> list[str]:
    """The label values of classes that are kept apart, none where there is one foreground."""
    return [name.removeprefix("dice_") for name in _names(rows) if name.startswith("dice_")]


def dice_line(rows: Rows) -> str:
    """Dice over cases, mean ± sd: of all foreground, then of each class that is kept apart."""
    summary = mean_and_sd(rows)
    parts = {"Dice": "dice"} | {f"class {value}": f"dice_{value}" for value in _class_values(rows)}
    return ", ".join(
        "{} {:.4f} ± {:.4f}".format(title, *summary[name]) if name in summary else f"{title} undefined"
        for title, name in parts.items()
    )


def write_metrics(path: Path, rows: Rows) -> None:
    """One CSV row per case: ``case,dice,jaccard,hd95,asd``, then ``dice_VALUE`` and so on of classes kept apart."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", *_names(rows)])
            writer.writerows([case, *(f"{value:.6g}" for value in row.values())] for case, row in rows.items())

    atomically(path, write)


def write_summary(path: Path, rows: Rows, **about: Any) -> None:
    """JSON beside the CSV: what was measured (``about``), then mean and standard deviation over cases."""
    summary = {name: {"mean": mean, "sd": sd} for name, (mean, sd) in mean_and_sd(rows).items()}
    write_json(path, about | {"cases": len(rows), "metrics": summary})


def print_metrics(console: Console, title: str, rows: Rows, unit: str, cases: bool = True) -> None:
    """A table per case, and mean ± sd over the cases that have one: of each class that is kept apart, then of their
    average."""
    table = Table(title=Text(title, "table.title"), title_justify="left")  # brackets in names are no markup
    table.add_column("case", overflow="fold")  # in a narrow window names are broken, not cut
    for heading in ("Dice", "Jaccard", f"HD95 ({unit})", f"ASD ({unit})"):
        table.add_column(heading, justify="right", no_wrap=True)
    if cases:
        for case, row in rows.items():
            table.add_row(Text(case), *(f"{row[name]:.{digits}f}" for name, digits in DIGITS.items()))
        table.add_section()
    summary = mean_and_sd(rows)
    titles = {f"_{value}": f"class {value}, mean" for value in _class_values(rows)} | {"": "mean"}
    for suffix, title in titles.items():
        count = sum(not np.isnan(row[f"dice{suffix}"]) for row in rows.values())
        cells = [
            " ± ".join(f"{value:.{digits}f}" for value in summary.get(name + suffix, ())) or "-"
            for name, digits in DIGITS.items()
        ]
        table.add_row(f"{title} of {count}", *cells)
    console.print(table)
    whose = " of a class" * bool(_class_values(rows))
    for what, name, why in (
        ("distance", "hd95", "prediction or reference is empty there"), ("Dice", "dice", "both are empty there"),
    ):
        if without := [case for case, row in rows.items() if any(
            np.isnan(value) for column, value in row.items() if column.startswith(name)
        )]:
            say(console, f"no {what}{whose} for {', '.join(without)}: {why}")
