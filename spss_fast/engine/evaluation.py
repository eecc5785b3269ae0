"""Accuracy against full labels, where they exist: of the student, and of the registration labels it learnt from."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from spss_fast import metrics
from spss_fast.config import Config, RegistrationSettings
from spss_fast.data.cache import PreparedCase
from spss_fast.data.sampling import TrainingVolume
from spss_fast.engine.checkpoint import atomically
from spss_fast.engine.inference import sliding_window
from spss_fast.engine.pseudo_labels import registration_labels

Rows = dict[str, dict[str, float]]  # case name to its metrics


def window_stride(patch: Sequence[int]) -> tuple[int, int, int]:
    """LA's stride (18, 18, 4) of its patch (112, 112, 80), in proportion to ``patch``."""
    return tuple(max(1, round(side * share)) for side, share in zip(patch, (18 / 112, 18 / 112, 4 / 80)))


def evaluate_cases(
    student: nn.Module, cases: Iterable[PreparedCase], config: Config, stride: Sequence[int], amp: torch.dtype | None,
    spacing: bool = False,
) -> Rows:
    """Metrics of the student on prepared cases with full labels; distances in voxels, or mm with ``spacing``."""
    student.eval()
    rows = {}
    for case in cases:
        label = case.label()
        if label is None:
            continue
        probability = sliding_window(
            student, torch.from_numpy(case.image), config.data.patch, stride, amp, statistics=config.network.statistics
        )
        prediction = probability.argmax(0).cpu().numpy()
        rows[case.name] = metrics.evaluate(prediction, label, case.spacing if spacing else None)
    return rows


def evaluate_labels(
    network: nn.Module, volumes: Sequence[TrainingVolume], settings: RegistrationSettings, device: torch.device,
    amp: torch.dtype | None,
) -> Rows:
    """Metrics, in voxels, of the registration labels of whole annotated volumes that have full labels."""
    rows = {}
    for volume in volumes:
        if volume.reference is None:
            continue
        label = registration_labels(
            network, volume.image[None].to(device), volume.annotation[None],
            torch.tensor([volume.index], device=device), settings, amp,
        )
        rows[volume.name] = metrics.evaluate(label[0].cpu().numpy(), volume.reference.numpy())
    return rows


def mean_and_sd(rows: Rows) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over cases; undefined distances (an empty prediction) are left out."""
    return {
        name: (float(np.nanmean(values)), float(np.nanstd(values)))
        for name in metrics.NAMES
        if not np.isnan(values := [row[name] for row in rows.values()]).all()
    }


def write_metrics(path: Path, rows: Rows) -> None:
    """One CSV row per case."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", *metrics.NAMES])
            writer.writerows([case, *(f"{row[name]:.6g}" for name in metrics.NAMES)] for case, row in rows.items())

    atomically(path, write)


def print_metrics(console: Console, title: str, rows: Rows, unit: str, cases: bool = True) -> None:
    """A table per case, and mean ± sd."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for heading in ("Dice", "Jaccard", f"HD95 ({unit})", f"ASD ({unit})"):
        table.add_column(heading, justify="right")
    if cases:
        for case, row in rows.items():
            overlaps, distances = (row["dice"], row["jaccard"]), (row["hd95"], row["asd"])
            table.add_row(case, *(f"{value:.4f}" for value in overlaps), *(f"{value:.2f}" for value in distances))
        table.add_section()
    summary = mean_and_sd(rows)
    cells = [f"{summary[name][0]:.4f} ± {summary[name][1]:.4f}" if name in summary else "-" for name in metrics.NAMES]
    table.add_row(f"mean of {len(rows)}", *cells)
    console.print(table)
    empty = [case for case, row in rows.items() if np.isnan(row["hd95"])]
    if empty:
        console.print(f"no distance for {', '.join(empty)}: prediction or reference is empty there")
