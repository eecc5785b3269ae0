"""Live progress with an ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from spss_fast.console import say

LINE_EVERY = 15.0  # seconds between lines where there is no terminal to redraw


class Progress:
    """Progress of one stage: a bar where ``console`` is a terminal, else a line every few seconds.

    ``awaited`` is what it says until the first update, where that takes long.
    """

    def __init__(self, console: Console, title: str, total: int, done: int = 0, awaited: str = "") -> None:
        self._console, self._title, self._total, self._first = console, title, total, done
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[status]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, status=awaited)
        elif awaited and done < total:
            say(console, f"{title} {done}/{total}: {awaited}")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, status: str) -> None:
        """``done`` of the total are finished; ``status`` says how it goes."""
        if self._bar:
            self._bar.update(self._task, completed=done, status=status)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY and done < self._total:
            return
        self._last_line = now
        elapsed = now - self._started
        remaining = elapsed / max(1, done - self._first) * (self._total - done)
        say(self._console, f"{self._title} {done}/{self._total}, {elapsed:.0f} s, ETA {remaining:.0f} s: {status}")
