"""What a run folder keeps of a run that was stopped, and what is said where there is none."""

import csv
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spss_fast.config import resolve
from spss_fast.engine import checkpoint
from spss_fast.engine.run_folder import RunFolder
from spss_fast.errors import UserError


def _log(folder: RunFolder, stage: str, steps: range, run: float) -> None:
    for step in steps:
        folder.log(stage, step, {"loss": step + run, "dice": float("nan")})


def _shown(path: Path, stage: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(f"{stage}/loss")]


@pytest.mark.parametrize("epoch, iteration", [(3, 0), (5, 0), (5, 2), (5, 8)])
def test_tensorboard_and_the_csv_hold_every_step_of_a_resumed_run_once(epoch, iteration, tmp_path):
    folder = RunFolder(tmp_path)
    _log(folder, "registration", range(1, 6), 0.25)
    if epoch == 5:
        _log(folder, "joint", range(1, 10), 0.25)
    folder.close()
    folder = RunFolder(tmp_path)  # of another process
    folder.rewind(epoch, iteration)
    _log(folder, "registration", range(epoch + 1, 6), 0.5)
    _log(folder, "joint", range(iteration + 1, 12), 0.5)
    folder.close()
    for stage, last, kept in (("registration", 5, epoch), ("joint", 11, iteration)):
        expected = [(step, step + (0.25 if step <= kept else 0.5)) for step in range(1, last + 1)]
        assert sorted(_shown(tmp_path, stage), key=lambda row: row[0]) == expected
        with (tmp_path / f"{stage}.csv").open() as file:
            assert [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)] == expected


def test_the_runs_in_a_folder_are_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"no run in .*: give one of those in it, \S+/one, \S+/two$"):
        checkpoint.read(RunFolder(tmp_path).checkpoint)
    with pytest.raises(UserError, match=r"no run in .* no checkpoints/last\.pt: give the folder of a training"):
        checkpoint.read(RunFolder(tmp_path / "one").checkpoint)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be made \(Not a directory\): choose another --out"):
        RunFolder(tmp_path / "file" / "run").create(resolve("phantom"), torch.device("cpu"), {})
