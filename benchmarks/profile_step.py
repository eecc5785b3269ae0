"""Where the time of a joint iteration goes, on the made-up scans of bench_step: time, peak memory, table and trace.

    python benchmarks/profile_step.py OUT [--device cpu]

writes OUT/trace-<preset>.json.gz for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_step import PRESETS, iteration, settings
from harness import synchronise
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from spss_fast.engine.device import peak_memory
from spss_fast.engine.profiling import phase_table

ITERATIONS = 4  # profiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for preset in reversed(PRESETS):  # the larger last: memory is that of all so far
        run = iteration("spss_fast", settings(preset), arguments.device)
        for _ in range(3):  # one that compiles, one that records, one as the others
            run()
        took, peak = statistics.median(times(run, arguments.device)), peak_memory(torch.device(arguments.device))
        print(f"{preset}: {1e3 * took:.1f} ms an iteration of five in a row, peak memory {peak / 2**30:.1f} GiB")
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if arguments.device == "cuda" else [])
        with profile(activities=kinds) as done:
            for i in range(ITERATIONS):
                with record_function(f"ProfilerStep#{i}"):
                    run()
            synchronise(arguments.device)
        trace = arguments.out / f"trace-{'half' if 'downsample' in preset else 'full'}.json.gz"
        done.export_chrome_trace(str(trace))
        Console(width=100).print(phase_table(trace, ITERATIONS))


def times(run, device: str) -> list[float]:
    """Seconds an iteration, of five in a row, three times: on a GPU one begins before the last has ended."""
    seconds = []
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(5):
            run()
        synchronise(device)
        seconds.append((time.perf_counter() - start) / 5)
    return seconds


if __name__ == "__main__":
    main()
