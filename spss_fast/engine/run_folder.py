"""The folder of a run: settings, environment, metrics, checkpoints and previews."""

from __future__ import annotations

import csv
import json
import math
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from spss_fast import __version__
from spss_fast.config import to_toml
from spss_fast.errors import UserError, some
from spss_fast.files import atomically, write_json
from spss_fast.settings import Config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGES = ("registration", "joint")


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a run's figures: versions, device, command."""
    names = ("triton", "numpy", "scipy", "SimpleITK", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "spss_fast": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "device": str(device), "device_name": device_name, "threads": torch.get_num_threads(),
        # torch's own word says which build it is, +cpu or +cu130, which its distribution's may leave out
        "versions": {"torch": torch.__version__} | {name: installed[name] for name in names if name in installed},
        "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def no_run(folder: Path, lacks: str) -> UserError:
    """The error of a ``folder`` that is no run, as it ``lacks`` something: which runs lie in it, if any do."""
    if not folder.is_dir():
        return UserError(f"there is no folder {folder.absolute()}: give the folder of a training, its --out")
    below = sorted(path.parent for path in folder.glob("*/config.toml"))
    give = f"one of those in it, {some(below)}" if below else "the folder of a training, its --out"
    return UserError(f"no run in {folder}, as there is no {lacks}: give {give}")


class RunFolder:
    """Paths and writers of one run.

    Layout: ``config.toml``, ``environment.json``, ``cases.json`` (who was annotated where, who trains, who tests),
    ``registration.csv`` and ``joint.csv`` (metrics of the two stages), ``registration_labels.csv``,
    ``checkpoints/last.pt``, ``previews/*.png`` and TensorBoard events.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoints" / "last.pt"
        self.previews = path / "previews"
        self._writer: SummaryWriter | None = None
        self._held: TextIO | None = None
        self._shown: int | None = None  # the step up to which TensorBoard keeps what an interrupted run logged

    def create(self, config: Config, device: torch.device, cases: dict[str, Any]) -> None:
        """Start a run here; ``UserError`` if the folder already holds one (see :meth:`refuse_if_used`)."""
        self.refuse_if_used()
        try:
            self.previews.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made ({error.strerror}): choose another --out") from error
        write_json(self.path / "environment.json", environment(device))
        write_json(self.path / "cases.json", cases)
        atomically(self.path / "config.toml", lambda temporary: temporary.write_text(to_toml(config)))

    def hold(self) -> None:
        """Keep other processes from training here until :meth:`close`, or until this one ends, however it does.

        Raises ``UserError`` where one trains here already: the two would write over each other. Without effect where
        the system or the file system has no locks.
        """
        if fcntl is None:
            return
        self._held = (self.path / "config.toml").open("r+")  # NFS locks only what may be written
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process trains in {self.path}: wait for it, stop it, or choose another "
                            "--out") from error
        except OSError:
            pass

    def refuse_if_used(self) -> None:
        """Raise ``UserError`` if this folder already holds a run, or is not a folder."""
        if (self.path / "config.toml").exists():
            raise UserError(f"{self.path} already holds a run: add --resume to go on with it, or choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: choose another --out")

    def cases(self) -> dict[str, Any]:
        """What ``cases.json`` says; ``UserError`` where it cannot be read."""
        path = self.path / "cases.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}): copy a run folder whole, with all its files") from error

    def refuse_other_cases(self, cases: dict[str, Any]) -> None:
        """Raise ``UserError`` where the data give other ``cases`` than this run began with."""
        before = self.cases()
        for part in ("annotated", "train", "test"):
            if before[part] != cases[part]:
                changed = sorted(set(before[part]) ^ set(cases[part]))
                what = f": {some(changed)}" if changed else ""
                raise UserError(
                    f"the {part} cases are not those that the run in {self.path} began with{what}; put scans, lists "
                    "and annotations back as they were, or begin another run with another --out")

    def log(self, stage: str, step: int, row: dict[str, float]) -> None:
        """Append one row of metrics to the stage's CSV and to TensorBoard."""
        if self._writer is None:
            self._writer = self._events()
        path = self.path / f"{stage}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *row])
            writer.writerow([step, *(f"{value:.6g}" for value in row.values())])
        self._add(self._writer, stage, step, row)

    def _events(self) -> SummaryWriter:
        """TensorBoard's events from here on.

        Of a run that goes on TensorBoard drops what it has beyond a step, of both stages alike: the rows that stay are
        written anew.
        """
        if self._shown is None:
            return SummaryWriter(self.path)
        writer = SummaryWriter(self.path, purge_step=self._shown + 1)
        for stage in STAGES:
            header, rows = _read(self.path / f"{stage}.csv")
            for step, *values in rows:
                if int(step) > self._shown:
                    self._add(writer, stage, int(step), dict(zip(header[1:], map(float, values))))
        return writer

    @staticmethod
    def _add(writer: SummaryWriter, stage: str, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            if not math.isnan(value):
                writer.add_scalar(f"{stage}/{name}", value, step)

    def rewind(self, epoch: int, iteration: int) -> None:
        """Drop rows after ``epoch`` of stage 1 and ``iteration``: what an interrupted run logged beyond its last
        checkpoint is computed again."""
        self._shown = min(epoch, iteration)
        self._rewind("registration", epoch)
        self._rewind("joint", iteration)

    def _rewind(self, stage: str, step: int) -> None:
        path = self.path / f"{stage}.csv"
        if not path.exists():
            return
        header, rows = _read(path)
        kept = [header, *(row for row in rows if int(row[0]) <= step)]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                csv.writer(file).writerows(kept)

        atomically(path, write)

    def close(self) -> None:
        """Flush TensorBoard's events, and let others train here."""
        if self._writer is not None:
            self._writer.close()
        if self._held is not None:
            self._held.close()


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV; none where there is no such file."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows
