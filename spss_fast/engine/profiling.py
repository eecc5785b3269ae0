"""Where an iteration's time goes: a table by phase of the step, and a Chrome trace (``--profile``)."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from spss_fast.console import say

PHASES = ("data", "registration", "propagation", "teacher", "student", "losses", "optimizer")
PREFIX = "spss_fast/"
WARMUP = 2  # iterations before the profiled ones: allocators and kernels settle in them


def phase(name: str) -> record_function:
    """A context whose time counts as ``name``, one of ``PHASES``; it costs microseconds where nobody profiles."""
    return record_function(PREFIX + name)


@contextlib.contextmanager
def profiler(iterations: int, device: torch.device, folder: Path, console: Console) -> Iterator[profile | None]:
    """Profile ``iterations`` iterations, the first two left out, and write ``trace.json.gz`` and the printed table: of
    those that there were, where a run ends before.

    Yields the profiler, whose ``step()`` ends an iteration; None where ``iterations`` is 0.
    """
    if not iterations:
        yield None
        return

    def finish(done: profile) -> None:
        profiled = done.step_num - WARMUP
        if profiled < 1:
            return
        trace = folder / "trace.json.gz"
        done.export_chrome_trace(str(trace))
        table = phase_table(trace, profiled)
        console.print(table)
        with (folder / "profile.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(table)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan = schedule(wait=WARMUP - 1, warmup=1, active=iterations, repeat=1)
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=finish, experimental_config=every_thread
    ) as running:
        yield running
    if running.step_num <= WARMUP:
        say(console, f"nothing was profiled: --profile leaves out the first {WARMUP} iterations, and this run had "
                     f"{running.step_num}")


def phase_table(trace: Path, iterations: int) -> Table:
    """Milliseconds an iteration and share of it, by phase, from a Chrome trace (.json.gz) of that many ``iterations``;
    on a GPU also the time that the kernels ran which a phase launched. Phases of another thread than the iterations'
    stand apart, and count towards no sum."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    marks = [e for e in events if e.get("cat") == "user_annotation"]
    steps = sorted((e for e in marks if e["name"].startswith("ProfilerStep")), key=lambda e: e["ts"])
    steps = steps[:iterations]  # where a run ends, one more has just begun
    begin, total = steps[0]["ts"], sum(e["dur"] for e in steps)
    end = steps[-1]["ts"] + steps[-1]["dur"]
    phases = [e for e in marks if e["name"].removeprefix(PREFIX) in PHASES and e["ts"] < end]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and e["ts"] >= begin]
    spent, beside, kernels = Counter(), Counter(), Counter()
    for event in phases:
        (spent if event["tid"] == steps[0]["tid"] else beside)[event["name"].removeprefix(PREFIX)] += event["dur"]
    launches = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    for event in on_gpu:
        launch = launches.get(event["args"].get("correlation"), -1)
        name = next((p["name"] for p in phases if p["ts"] <= launch < p["ts"] + p["dur"]), "other")
        kernels[name.removeprefix(PREFIX)] += event["dur"]
    table = Table(title=f"an iteration (mean of {iterations})", title_justify="left")
    table.add_column("phase")
    for heading in ("ms", "share", *(["kernels ms"] if on_gpu else [])):
        table.add_column(heading, justify="right")
    rows = {name: spent[name] for name in PHASES if name in spent}
    rows |= {"other": total - sum(rows.values()), "all": total}
    kernels["all"] = sum(kernels.values())
    for name, value in rows.items():
        cells = [f"{value / iterations / 1e3:.1f}", f"{100 * value / total:.1f}%"]
        if on_gpu:
            cells.append(f"{kernels[name] / iterations / 1e3:.1f}")
        table.add_row(name, *cells, end_section=name == "all")
    for name, value in beside.items():
        table.add_row(f"{name}, beside", f"{value / iterations / 1e3:.1f}", f"{100 * value / total:.1f}%")
    if beside:
        table.caption = "beside: at the same time, in a thread with half of the cores"
    if on_gpu:
        table.caption = (f"ms: of the host, which launches and waits. A student's launch holds its losses.\n"
                         f"GPU idle {100 * idle_share(on_gpu, begin):.1f}% of the time")
    return table


def idle_share(kernels: list[dict[str, Any]], begin: float) -> float:
    """The share of the time from ``begin`` to the end of the last of ``kernels`` in which none ran."""
    busy, until = 0.0, begin
    for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in kernels):
        busy += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return 1 - busy / (until - begin)
