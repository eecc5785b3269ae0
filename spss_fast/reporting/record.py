"""What a run folder holds, read back: settings, cases, curves, metrics, and how far training got."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spss_fast.config import resolve, tomllib
from spss_fast.engine import checkpoint
from spss_fast.engine.evaluation import Rows
from spss_fast.engine.run_folder import STAGES, RunFolder, no_run
from spss_fast.errors import UserError
from spss_fast.evaluate import described
from spss_fast.settings import Config

Curves = dict[str, np.ndarray]  # column to values, "step" among them; empty where nothing is logged yet


@dataclass
class Record:
    """One run as its folder tells it. ``content`` is the checkpoint, None before the first one."""

    path: Path
    config: Config
    cases: dict[str, Any]
    environment: dict[str, Any]
    registration: Curves  # stage 1, by epoch
    joint: Curves  # stage 2, by iteration
    evaluation: Rows | None  # None: `evaluate` has not been run
    about: dict[str, Any]  # what the evaluation says of itself: the folder, whose cases, the unit of distances
    stale: bool  # the checkpoint is newer than the evaluation
    labels: Rows | None  # metrics of the registration labels; None before the end, and without full labels
    content: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def iteration(self) -> int:
        """Joint iterations behind the checkpoint."""
        return self.content["iteration"] if self.content else 0

    @property
    def reached(self) -> int:
        """Joint iterations that were done, which a run under way or broken off logs ahead of its checkpoint."""
        return max(self.iteration, int(self.joint["step"][-1]) if self.joint else 0)

    @property
    def finished(self) -> bool:
        return self.iteration >= self.config.training.iterations

    @property
    def foreign(self) -> bool:
        """Whether another folder than the run's own was evaluated (``evaluate --data-dir``)."""
        own = self.cases["data_dir"]
        return self.about.get("foreign", self.about.get("data_dir", own) != own)  # older evaluations do not say

    @property
    def data_dir(self) -> Path:
        """Where the run's scans lie: where training found them, or, if they are gone from there, ``evaluate``."""
        own = Path(self.cases["data_dir"])
        return own if self.foreign or own.is_dir() else Path(self.about.get("data_dir", own))

    @property
    def evaluated(self) -> str:
        """What the evaluated cases are to the run, in the plural."""
        folder = Path(self.about.get("data_dir", self.cases["data_dir"]))
        return described(self.evaluation or (), self.cases, folder, self.foreign)


def read(run: Path, device: torch.device | str = "cpu") -> Record:
    """The run in the folder ``run``, finished or not.

    Raises ``UserError`` where there is no run, or where one of its files cannot be read.
    """
    run, folder = Path(run), RunFolder(Path(run))
    settings = run / "config.toml"
    if not settings.exists():
        raise no_run(run, settings.name)
    content = checkpoint.read(folder.checkpoint, device) if folder.checkpoint.exists() else None
    evaluation = run / "evaluation.csv"
    about = evaluation.with_suffix(".json")
    return Record(
        run, checkpoint.config_of(content) if content else _config(settings),
        _json(run / "cases.json"), _json(run / "environment.json"),
        *(_curves(run / f"{stage}.csv") for stage in STAGES),
        evaluation=_metrics(evaluation),
        about=_json(about) if evaluation.exists() and about.exists() else {},
        stale=content is not None and evaluation.exists()
        and evaluation.stat().st_mtime < folder.checkpoint.stat().st_mtime,
        labels=_metrics(run / "registration_labels.csv"), content=content,
    )


def _config(path: Path) -> Config:
    """The settings of a run that has no checkpoint yet."""
    try:
        dataset = tomllib.loads(path.read_text())["data"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the run's settings in {path} ({error}): restore it") from error
    return resolve(dataset, file=path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): a run folder is copied whole, with all its files") from error


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; one that is not complete is being written right now, or was when training was killed."""
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): restore it as the run wrote it") from error


def _numbers(path: Path, row: dict[str, str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in row.items()}
    except ValueError as error:
        raise UserError(f"{path} is not as the run wrote it ({error}): restore it") from error


def _curves(path: Path) -> Curves:
    if not path.exists():
        return {}
    rows = [_numbers(path, row) for row in _rows(path)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _metrics(path: Path) -> Rows | None:
    """Metrics by case, worst Dice first, and last those that have none."""
    if not path.exists():
        return None
    rows = _rows(path)
    if not rows or not {"case", "dice"} <= set(rows[0]):
        raise UserError(f"{path} has no rows of case,dice,...: make it again with spss_fast.evaluate, or remove it")
    read = {row.pop("case"): _numbers(path, row) for row in rows}
    return dict(sorted(read.items(), key=lambda item: (math.isnan(item[1]["dice"]), item[1]["dice"])))


def measured(rows: Rows) -> Rows:
    """The rows that have a Dice: it is NaN of a case in which neither prediction nor reference shows anything."""
    return {case: row for case, row in rows.items() if not math.isnan(row["dice"])}


def defined(rows: Rows, name: str) -> np.ndarray:
    """The values of one metric, NaN left out."""
    values = np.array([row[name] for row in rows.values()])
    return values[~np.isnan(values)]
