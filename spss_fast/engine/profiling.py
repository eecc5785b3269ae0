"""Where an iteration's time goes: a table by phase of the step, and a Chrome trace (``--profile``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

PHASES = ("data", "registration", "propagation", "teacher", "student", "losses", "optimizer")
WARMUP = 2  # iterations before the profiled ones: allocators and kernels settle in them


def phase(name: str) -> record_function:
    """A context whose time counts as ``name``, one of ``PHASES``; it costs microseconds where nobody profiles."""
    return record_function(f"spss_fast/{name}")


@contextlib.contextmanager
def profiler(iterations: int, device: torch.device, folder: Path, console: Console) -> Iterator[profile | None]:
    """Profile ``iterations`` iterations, the first two left out, and write ``trace.json.gz`` and the printed table.

    Yields the profiler, whose ``step()`` ends an iteration; None where ``iterations`` is 0.
    """
    if not iterations:
        yield None
        return

    def finish(done: profile) -> None:
        done.export_chrome_trace(str(folder / "trace.json.gz"))
        table = phase_table(done, iterations, device)
        console.print(table)
        with (folder / "profile.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(table)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan = schedule(wait=WARMUP - 1, warmup=1, active=iterations, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as running:
        yield running


def phase_table(done: profile, iterations: int, device: torch.device) -> Table:
    """Milliseconds an iteration and share of it, by phase; on a GPU also the time that its kernels ran."""
    events = list(done.events())
    steps = [e for e in events if e.name.startswith("ProfilerStep") and e.device_type == DeviceType.CPU]
    total = sum(event.time_range.elapsed_us() for event in steps)
    spent = dict.fromkeys(PHASES, 0.0)
    kernels = dict.fromkeys(PHASES, 0.0)
    for event in events:
        name = event.name.removeprefix("spss_fast/")
        if event.device_type == DeviceType.CPU and event.name != name:
            spent[name] += event.time_range.elapsed_us()
            kernels[name] += event.device_time_total
    on_gpu = device.type == "cuda"
    table = Table(title=f"an iteration (mean of {iterations})", title_justify="left")
    table.add_column("phase")
    for heading in ("ms", "share", *(["kernels ms"] if on_gpu else [])):
        table.add_column(heading, justify="right")
    for name, value in [*spent.items(), ("other", total - sum(spent.values())), ("all", total)]:
        cells = [f"{value / iterations / 1e3:.1f}", f"{100 * value / total:.1f}%"]
        if on_gpu:
            cells.append(f"{kernels.get(name, 0) / iterations / 1e3:.1f}")
        table.add_row(name, *cells)
    if on_gpu:
        table.caption = f"GPU idle {100 * idle_share(events, steps):.1f}% of the time"
    return table


def idle_share(events: list, steps: list) -> float:
    """The share of the profiled time in which no kernel ran on the GPU."""
    begin, end = min(s.time_range.start for s in steps), max(s.time_range.end for s in steps)
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation  # our phases, optimizers: marks
    )
    busy, until = 0.0, begin
    for start, stop in spans:
        start, stop = max(start, until), min(stop, end)
        busy += max(0.0, stop - start)
        until = max(until, stop)
    return 1 - busy / (end - begin)
