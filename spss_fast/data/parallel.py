"""Work on many scans at once, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import SimpleITK as sitk
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spss_fast.errors import UserError


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(
    function: Callable, jobs: list[tuple], workers: int, title: str, progress: bool = True
) -> Iterator[tuple[int, Any]]:
    """``function(*job)`` for every job, as (position of the job, result) in the order in which they end.

    ``workers`` processes (0: one per core); with one, or one job, all happens in this process. ``function`` and the
    jobs must be picklable. Jobs that have not begun are dropped when an exception or an interrupt ends the loop.
    """
    workers = min(len(jobs), workers or available_cores())
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=len(jobs))
        if workers <= 1:
            for position, job in enumerate(jobs):
                yield position, function(*job)
                bar.advance(task)
            return
        # a child that runs the parent's script once more to know its functions, and has got here
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise UserError(f"{title} takes several processes, and each of them begins by running your script: put "
                            "what it does under `if __name__ == \"__main__\":`, or set workers to 1")
        # spawn: a forked child would inherit ITK's and OpenMP's thread pools without their threads
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
        try:
            futures = {pool.submit(function, *job): position for position, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.advance(task)
        except BrokenProcessPool as error:
            raise UserError(
                f"{title}: a process ended before its work was done. A script of yours must do this under `if __name__ "
                f"== \"__main__\":`; if it does, memory ran out most likely: lower workers (now {workers})"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
