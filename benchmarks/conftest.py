"""The ``measure`` fixture every benchmark uses, and the table, plot and files at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import RESULTS, Row, copy_bandwidth, growth, matmul_rate, rates, synchronise, table, time_calls, write

ROWS: list[Row] = []
REPORT = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("spss_fast benchmarks")
    group.addoption("--bench-device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    group.addoption("--bench-seconds", type=float, default=1.5, help="time for one row, about (default: %(default)s)")
    group.addoption("--bench-results", type=Path, default=RESULTS, help="folder to write to (default: %(default)s)")


def _device(config) -> str:
    return config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device(request) -> str:
    return _device(request.config)


@pytest.fixture
def measure(benchmark, device, request):
    """``measure(run, operator=, case=, size=, provider=, elements=, bytes=[, flops=])`` times ``run()`` and adds a
    row."""

    def timed(run: Callable[[], object], **what) -> Row:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            synchronise(device)
            what["peak_memory"] = torch.cuda.max_memory_allocated() - before
        row = Row(**what, **time_calls(benchmark, run, device, request.config.getoption("--bench-seconds")))
        ROWS.append(row)
        return row

    return timed


def pytest_sessionfinish(session):
    if not ROWS:
        return
    device = _device(session.config)
    reached = copy_bandwidth(device), matmul_rate(device)
    files = write(ROWS, device, *reached, session.config.getoption("--bench-results"))
    session.config.stash[REPORT] = {"reached": reached, "files": files}


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash.get(REPORT, None)
    if report is None:
        return
    for title, lines in (
        (f"against the peers ({rates(*report['reached'])})", table(ROWS, *report["reached"])),
        ("growth with size, by the fastest call", growth(ROWS)),
    ):
        if not lines:
            continue
        widths = [max(map(len, column)) for column in zip(*lines)]
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for path in report["files"]:
        terminalreporter.write_line(f"wrote {path}")
