"""What a command says of its progress: a bar on a terminal, lines in a log."""

import io
import itertools
import re

import pytest
from rich.console import Console

from spss_fast.engine import progress


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass between any two looks at the clock."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))


def test_a_log_gets_a_line_every_few_seconds_and_the_last(clock):
    console = Console(file=io.StringIO(), width=40)
    with progress.Progress(console, "stage 2", total=6, done=2, awaited="kernels are made") as bar:
        for done in range(3, 7):
            bar.update(done, "K 12 voxels of scan[v2], and whatever else makes a long line")
    assert console.file.getvalue().splitlines() == [
        "stage 2 2/6: kernels are made",
        "stage 2 4/6, 20 s, ETA 20 s: K 12 voxels of scan[v2], and whatever else makes a long line",
        "stage 2 6/6, 40 s, ETA 0 s: K 12 voxels of scan[v2], and whatever else makes a long line",
    ]


def test_what_is_done_already_is_not_awaited():
    console = Console(file=io.StringIO())
    with progress.Progress(console, "stage 1", total=6, done=6, awaited="kernels are made"):
        pass
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_and_names_as_they_are():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with progress.Progress(console, "predicting", total=2) as bar:
        bar.update(1, "scan[v2] 3.2 ml")
        bar.update(2, "scan[/v2] 4.1 ml")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "predicting" in shown and "2/2" in shown and "scan[/v2] 4.1 ml" in shown
