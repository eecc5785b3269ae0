"""Batches made ahead of the step that trains on them: by DALI, or in plain PyTorch where DALI is not installed.

:class:`Sampler` draws what a batch holds, and a loader cuts the patches. The noise of the views is torch's in both: the
random operators of a DALI pipeline carry a state from batch to batch, with which no run could go on at any batch, and
on a CPU they take over ten times as long. So both loaders give the same batches from the same seed, voxel by voxel, and
a run may go on with the other one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import torch

from spss_fast.data.sampling import Batch, Draw, Sampler
from spss_fast.errors import UserError

PREFETCH = 2  # batches made ahead
T = TypeVar("T")


def resolve_loader(name: str, device: torch.device) -> str:
    """``dali`` or ``torch``. ``auto`` is DALI on a GPU where it is installed, else torch.

    On a CPU torch is the measured winner, in time (``benchmarks/bench_loader.py``) and in CPU time, which a step on the
    same cores pays. On a GPU neither has been measured: DALI is assumed to win, as it cuts on the device what fits
    there, and copies patches to it beside the step where that does not. Raises ``UserError`` where DALI is asked for
    and cannot be imported.
    """
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        if name == "auto":
            return "torch"
        raise UserError(f"--loader dali: DALI cannot be imported ({error}): pip install nvidia-dali-cuda130 (for a "
                        "driver of CUDA 12: -cuda120), or use --loader torch") from error
    return "dali"


def batches(
    sampler: Sampler, device: torch.device, start: int = 0, loader: str = "auto"
) -> Generator[Batch, None, None]:
    """Batches ``start``, ``start`` + 1, ... of ``sampler`` without end, made ahead; images and views on ``device``.

    A generator: close it to end its threads. ``loader`` is chosen by :func:`resolve_loader`.
    """
    if resolve_loader(loader, device) == "torch":
        return torch_batches(sampler, device, start)
    from spss_fast.data.dali import dali_batches

    return dali_batches(sampler, device, start)


def torch_batches(sampler: Sampler, device: torch.device, start: int) -> Generator[Batch, None, None]:
    """:func:`batches` in plain PyTorch: a thread cuts the patches on the CPU; a GPU takes them from pinned memory."""
    return ahead(sampler.batch, start) if device.type == "cpu" else _copied(sampler, device, start)


def _copied(sampler: Sampler, device: torch.device, start: int) -> Generator[Batch, None, None]:
    def pinned(step: int) -> tuple[Draw, Batch]:
        draw = sampler.draw(step)
        batch = sampler.patches(draw)
        return draw, batch.with_images(batch.image.pin_memory(), batch.view1.pin_memory())

    for draw, batch in ahead(pinned, start):
        image, view = (patches.to(device, non_blocking=True) for patches in (batch.image, batch.view1))
        yield sampler.add_noise(batch.with_images(image, view), draw)


def ahead(make: Callable[[int], T], start: int) -> Generator[T, None, None]:
    """``make(start)``, ``make(start + 1)``, ... from one thread, :data:`PREFETCH` of them before they are asked for."""
    # of one core: more would take them from the step, and wait for each other
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,)) as thread:
        thread.submit(torch.get_num_threads).result()
        # all threads take over what one has set, each library when it first runs a loop: let them find the old number
        torch.set_num_threads(threads)
        waiting: deque[Future[T]] = deque()
        try:
            for step in count(start):
                waiting.append(thread.submit(make, step))
                if len(waiting) > PREFETCH:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
