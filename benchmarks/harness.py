"""One table for every benchmark: a row is an operator, a case, a size and a provider; the report is made of rows.

A benchmark file calls the ``measure`` fixture once per provider; the provider ``spss_fast`` is what the others are
compared with, within one (operator, case, size) of one run.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from spss_fast.engine.device import resolve_amp
from spss_fast.ops import backend

RESULTS = Path(__file__).parent / "results"
LEGEND = (
    "Of copy bandwidth: the bytes that a call must move at least, in its median time, against a copy of 256 MiB; more "
    "than 100% where they stay in a cache. Growth is that of the fastest call."
)
OURS = "spss_fast"
# seconds: of a longer call one is warm-up enough, and three more show the spread; a shorter iteration takes a few until
# it has the memory that it keeps (2.1, 1.7, 1.5, 1.5, 1.4 seconds)
SLOW = 10.0


@dataclass
class Row:
    operator: str
    case: str
    size: str
    provider: str
    elements: int  # what the cost should be linear in: voxels, mostly
    bytes: int  # that must move at least: inputs read once, outputs written once; 0 where that says nothing
    median: float  # seconds of one call
    fastest: float  # what else runs on the machine only ever adds time
    iqr: float
    rounds: int
    peak_memory: int | None = None  # bytes, on a GPU
    flops: int = 0  # of its convolutions and matrix products, forward and backward; 0 where that says nothing


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a plain copy of 256 MiB into existing memory, the best of a few."""
    source = torch.ones(2**26, device=device)
    target = torch.zeros_like(source)
    copies = 20 if device == "cuda" else 1  # a launch and a wait take a tenth as long as one on a GPU
    best = math.inf
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return copies * 2 * source.nbytes / best


def matmul_rate(device: str) -> float:
    """FLOP/s of a square matrix product, the best of a few: in bfloat16 where that is native and faster, or float32."""
    side = 8192 if device == "cuda" else 2048
    best = math.inf
    native = resolve_amp("auto", torch.device(device))  # emulated, one product takes a minute
    for dtype in {torch.float32, native or torch.float32}:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(4):
            synchronise(device)
            start = time.perf_counter()
            a @ b
            synchronise(device)
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


@dataclass
class Alone:
    """A function in another process: calling it here runs it there, and waits."""

    pipe: Connection

    def __call__(self) -> None:
        self.ask(_call)

    def ask(self, question: Callable[[Callable], object]) -> object:
        """What ``question`` of the function returns, in its process."""
        self.pipe.send(question)
        return self.pipe.recv()


@contextlib.contextmanager
def alone(
    device: str, make: Callable[..., Callable[[], object]], *arguments: object, prefer: str | None = None
) -> Iterator[Callable[[], object]]:
    """``make(*arguments)``, a function to be timed; on a CPU in a process of its own, which begins as training does.
    The operators' backend ``prefer`` is entered around it, not in the time of a call.

    After what other benchmarks allocated and freed in a process, large tensors lie wherever there is room: a joint
    iteration was seen to take 12% longer. On a GPU PyTorch keeps the memory, and the function is made right here.
    """
    if device != "cpu":
        with _preferred(prefer):
            yield make(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, make, arguments, prefer), daemon=True)
    process.start()
    there.close()  # so that a process that fails ends the waiting for it
    try:
        yield Alone(here)
    finally:
        here.close()
        process.join()


def _call(run: Callable[[], object]) -> None:
    run()


def _preferred(name: str | None) -> contextlib.AbstractContextManager:
    return backend(name) if name else contextlib.nullcontext()


def _answer(
    pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple, prefer: str | None
) -> None:
    with _preferred(prefer), contextlib.suppress(EOFError):  # nobody will ask any more
        run = make(*arguments)
        while True:
            pipe.send(pipe.recv()(run))


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the convolutions and matrix products of one call, forward and backward."""
    if isinstance(run, Alone):
        return run.ask(count_flops)
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def time_calls(benchmark, run: Callable[[], object], device: str, seconds: float) -> dict[str, float]:
    """A Row's times of one call in seconds, and their rounds, through pytest-benchmark; the first calls do not count.

    A GPU call is queued several times before one wait, so that launch gaps count only where they cannot be hidden; its
    fastest time is that of the fastest such round.
    """
    def timed() -> float:
        start = time.perf_counter()
        run()
        synchronise(device)
        return max(time.perf_counter() - start, 1e-6)

    once = timed()
    slow = once > SLOW
    if not slow:
        timed()
        once = timed()
    calls = max(1, min(50, round(0.5 / once))) if device == "cuda" else 1

    def several() -> None:
        for _ in range(calls):
            run()
        synchronise(device)

    rounds = 3 if slow else int(min(max(seconds / (once * calls), 5), 60))
    benchmark.pedantic(several, rounds=rounds, iterations=1, warmup_rounds=0 if slow else 1)
    samples = sorted(sample / calls for sample in benchmark.stats.stats.data)
    quartiles = statistics.quantiles(samples, n=4)
    return {
        "median": statistics.median(samples), "fastest": samples[0], "iqr": quartiles[2] - quartiles[0],
        "rounds": rounds,
    }


def environment(device: str) -> dict:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except OSError:  # no git here
        commit = ""
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
        "commit": os.environ.get("COMMIT") or commit,  # given where git is not, or knows another one
        "versions": versions,
    }


def ratios(rows: list[Row]) -> dict[int, float]:
    """For each row (by identity) how many times longer it takes than ours in the same operator, case and size."""
    ours = {(r.operator, r.case, r.size): r.median for r in rows if r.provider == OURS}
    return {id(r): r.median / ours[key] for r in rows if (key := (r.operator, r.case, r.size)) in ours}


def growth(rows: list[Row]) -> list[list[str]]:
    """Header, and per case of three sizes or more how our own fastest call grows with the elements; [] without any.

    The exponent is the slope of log time over log elements, 1 for linear cost; then the time per element at each size,
    relative to that at the largest.
    """
    lines = ["operator,case,grows as,time per element relative to the largest size".split(",")]
    for operator, case in dict.fromkeys((r.operator, r.case) for r in rows):
        own = [r for r in rows if (r.operator, r.case, r.provider) == (operator, case, OURS)]
        own.sort(key=lambda r: r.elements)
        if len(own) < 3:
            continue
        fit = statistics.linear_regression([math.log(r.elements) for r in own], [math.log(r.fastest) for r in own])
        each = [r.fastest / r.elements for r in own]
        relative = ", ".join(f"{r.size}: {cost / each[-1]:.2f}" for r, cost in zip(own, each))
        lines.append([operator, case, f"elements^{fit.slope:.2f}", relative])
    return lines if len(lines) > 1 else []


def table(rows: list[Row], bandwidth: float, matmul: float) -> list[list[str]]:
    """Header and lines, largest size first within a case, ours first within a size; columns without a cell are left
    out. ``bandwidth`` in bytes/s and ``matmul`` in FLOP/s are what the machine was seen to reach."""
    ratio = ratios(rows)
    lines = ["operator,case,size,provider,median,fastest,IQR,ours is faster by,of copy bandwidth,of matmul rate,peak"
             .split(",")]
    order = sorted(rows, key=lambda r: (r.operator, r.case, -r.elements, r.provider != OURS, r.median))
    for r in order:
        lines.append([
            r.operator, r.case, r.size, r.provider, f"{1e3 * r.median:.3f} ms", f"{1e3 * r.fastest:.3f} ms",
            f"{1e3 * r.iqr:.3f} ms",
            "" if r.provider == OURS or id(r) not in ratio else f"{ratio[id(r)]:.1f}x",
            f"{100 * r.bytes / r.median / bandwidth:.0f}%" if r.bytes else "",
            f"{100 * r.flops / r.median / matmul:.0f}%" if r.flops else "",
            f"{r.peak_memory / 2**20:.0f} MiB" if r.peak_memory is not None else "",
        ])
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in kept] for line in lines]


def rates(bandwidth: float, matmul: float) -> str:
    return f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, matmul rate {matmul / 1e12:.2f} TFLOP/s"


def markdown(rows: list[Row], bandwidth: float, matmul: float, about: dict) -> str:
    def as_markdown(lines: list[list[str]]) -> list[str]:
        text = [f"| {' | '.join(line)} |" for line in lines]
        return ["", text[0], f"|{'---|' * len(lines[0])}", *text[1:]] if text else []

    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [f"{about['device']}; commit {about['commit']}; {versions}; {rates(bandwidth, matmul)}.", "", LEGEND]
    return "\n".join([*head, *as_markdown(table(rows, bandwidth, matmul)), *as_markdown(growth(rows))]) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """One operator's cases side by side: median over elements, and what linear growth up to our largest would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    ratio = ratios(rows)
    cases = list(dict.fromkeys(r.case for r in rows))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 5), squeeze=False)
    for axis, case in zip(axes[0], cases):
        own = sorted((r for r in rows if r.case == case), key=lambda r: (r.provider != OURS, r.provider, r.elements))
        for provider in dict.fromkeys(r.provider for r in own):
            line = [r for r in own if r.provider == provider]
            times = "" if provider == OURS or id(line[-1]) not in ratio else f": {ratio[id(line[-1])]:.1f}x ours"
            axis.plot([r.elements for r in line], [1e3 * r.median for r in line], marker="o", label=provider + times)
        sizes = sorted({r.elements for r in own})
        largest = max((r for r in own if r.provider == OURS), key=lambda r: r.elements, default=None)
        if largest is not None and len(sizes) > 1:
            linear = [1e3 * largest.median * size / largest.elements for size in sizes]
            axis.plot(sizes, linear, color="grey", linestyle="dotted", label="linear", zorder=0)
        axis.set(title=f"{rows[0].operator}: {case}", xlabel="elements", ylabel="ms a call", xscale="log", yscale="log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize="small")
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.margins(x=0.1, y=0.15)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17))  # below: it would hide points
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(rows: list[Row], device: str, bandwidth: float, matmul: float, folder: Path) -> list[Path]:
    """Per operator: <operator>-<device>.json, .md and .png in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    about, written = environment(device), []
    for operator in dict.fromkeys(r.operator for r in rows):
        own = [r for r in rows if r.operator == operator]
        stem = folder / f"{operator}-{device}"
        body = {**about, "copy_bandwidth": bandwidth, "matmul_rate": matmul, "rows": [asdict(r) for r in own]}
        stem.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(own, bandwidth, matmul, about))
        plot(own, stem.with_suffix(".png"))
        written += [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    return written
