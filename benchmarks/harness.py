"""One table for every benchmark: a row is an operator, a case, a size and a provider; the report is made of rows.

A benchmark file calls the ``measure`` fixture once per provider; the provider ``spss_fast`` is what the others are
compared with, within one (operator, case, size) of one run.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
OURS = "spss_fast"


@dataclass
class Row:
    operator: str
    case: str
    size: str
    provider: str
    elements: int  # what the cost should be linear in: voxels, mostly
    bytes: int  # that must move at least: inputs read once, outputs written once; 0 where that says nothing
    median: float  # seconds of one call
    iqr: float
    rounds: int
    peak_memory: int | None = None  # bytes, on a GPU


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a plain copy of 256 MiB into existing memory, the best of a few."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)
    best = math.inf
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def time_calls(benchmark, run: Callable[[], object], device: str, seconds: float) -> tuple[float, float, int]:
    """Median and interquartile range of one call, through pytest-benchmark; the first calls are not counted.

    A GPU call is queued several times before one wait, so that launch gaps count only where they cannot be hidden.
    """
    for _ in range(2):
        run()
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    once = max(time.perf_counter() - start, 1e-6)
    calls = max(1, min(50, round(0.02 / once))) if device == "cuda" else 1

    def several() -> None:
        for _ in range(calls):
            run()
        synchronise(device)

    rounds = int(min(max(seconds / (once * calls), 5), 60))
    benchmark.pedantic(several, rounds=rounds, iterations=1, warmup_rounds=1)
    samples = sorted(sample / calls for sample in benchmark.stats.stats.data)
    quartiles = statistics.quantiles(samples, n=4)
    return statistics.median(samples), quartiles[2] - quartiles[0], rounds


def environment(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "monai", "cv2", "SimpleITK"):
        try:
            versions[name] = __import__(name).__version__
        except (ImportError, AttributeError):
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit.stdout.strip() or None,
        "versions": versions,
    }


def ratios(rows: list[Row]) -> dict[int, float]:
    """For each row (by identity) how many times longer it takes than ours in the same operator, case and size."""
    ours = {(r.operator, r.case, r.size): r.median for r in rows if r.provider == OURS}
    return {id(r): r.median / ours[key] for r in rows if (key := (r.operator, r.case, r.size)) in ours}


def exponent(rows: list[Row]) -> float | None:
    """The slope of log time over log elements of our own rows of one case: 1 is linear cost."""
    points = sorted({(math.log(r.elements), math.log(r.median)) for r in rows if r.provider == OURS})
    if len(points) < 3:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def table(rows: list[Row], bandwidth: float) -> list[list[str]]:
    """Header and lines, largest size first within a case, ours first within a size."""
    ratio = ratios(rows)
    lines = ["operator,case,size,provider,median,IQR,ours is faster by,of copy bandwidth,peak".split(",")]
    order = sorted(rows, key=lambda r: (r.operator, r.case, -r.elements, r.provider != OURS, r.median))
    for r in order:
        lines.append([
            r.operator, r.case, r.size, r.provider, f"{1e3 * r.median:.3f} ms", f"{1e3 * r.iqr:.3f} ms",
            "" if r.provider == OURS or id(r) not in ratio else f"{ratio[id(r)]:.1f}x",
            f"{100 * r.bytes / r.median / bandwidth:.0f}%" if r.bytes else "",
            f"{r.peak_memory / 2**20:.0f} MiB" if r.peak_memory is not None else "",
        ])
    return lines


def markdown(rows: list[Row], bandwidth: float, about: dict) -> str:
    lines = table(rows, bandwidth)
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, f"|{'---|' * len(lines[0])}")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [f"{about['device']}; commit {about['commit']}; {versions}; copy bandwidth {bandwidth / 1e9:.1f} GB/s.", ""]
    tail = [""]
    for case in dict.fromkeys(r.case for r in rows):
        slope = exponent([r for r in rows if r.case == case])
        if slope is not None:
            tail.append(f"Cost of {case} over {OURS}'s sizes grows as elements^{slope:.2f}.")
    return "\n".join([*head, *text, *tail]).rstrip() + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(r.case for r in rows))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False)
    for axis, case in zip(axes[0], cases):
        for provider in dict.fromkeys(r.provider for r in rows if r.case == case):
            points = sorted((r.elements, 1e3 * r.median) for r in rows if r.case == case and r.provider == provider)
            axis.plot(*zip(*points), marker="o", label=provider)
        axis.set(title=f"{rows[0].operator}: {case}", xlabel="elements", ylabel="ms a call", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(rows: list[Row], device: str, bandwidth: float) -> list[Path]:
    """Per operator: benchmarks/results/<operator>-<device>.json, .md and .png."""
    RESULTS.mkdir(exist_ok=True)
    about, written = environment(device), []
    for operator in dict.fromkeys(r.operator for r in rows):
        own = [r for r in rows if r.operator == operator]
        stem = RESULTS / f"{operator}-{device}"
        body = {**about, "copy_bandwidth": bandwidth, "rows": [asdict(r) for r in own]}
        stem.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(own, bandwidth, about))
        plot(own, stem.with_suffix(".png"))
        written += [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    return written
