"""Registration beside the V-Nets: neither needs the other but for the fused labels, and each leaves gaps that the other
fills.

On a GPU it has a stream of its own, on a CPU a thread of its own with half of the cores, which computes the supervised
loss's gradients, too; else it runs in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

# seconds for which either thread may keep Python's interpreter while the other waits for it; Python's own 5 ms are as
# long as a convolution
TURN = 0.001
T = TypeVar("T")


@dataclass
class Result(Generic[T]):
    """What a function returns that was given to :meth:`InTurn.run`."""

    value: T  # to be used beside, or after `settle`

    def receive(self) -> T:
        """The value, for what follows here."""
        return self.value


class InTurn:
    """No work beside any other: a function runs when it is given."""

    def run(self, function: Callable[..., T], *inputs: Tensor) -> Result[T]:
        """Run ``function(*inputs)`` after all that was given here before; ``inputs`` are those of its tensors that come
        from elsewhere."""
        return Result(function(*inputs))

    def place(self) -> contextlib.AbstractContextManager:
        """A context whose GPU work runs beside."""
        return contextlib.nullcontext()

    def settle(self) -> None:
        """Have what follows here wait for all that runs beside, and the reverse."""


@dataclass
class _OnStream(Result[T]):
    ready: torch.cuda.Event

    def receive(self) -> T:
        stream = torch.cuda.current_stream()
        stream.wait_event(self.ready)
        for tensor in self.value if isinstance(self.value, tuple) else (self.value,):
            tensor.record_stream(stream)  # its memory stays until the stream is done with it
        return self.value


class OnStream(InTurn):
    """Functions of GPU tensors, which return one or several, on a stream of ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # before the V-Nets: others wait for the labels
        self.must_wait = True  # has yet to wait for the current stream

    def run(self, function: Callable[..., T], *inputs: Tensor) -> Result[T]:
        self.must_wait |= bool(inputs)
        with self.place():
            for tensor in inputs:
                tensor.record_stream(self.stream)
            return _OnStream(function(*inputs), self.stream.record_event())

    def place(self) -> contextlib.AbstractContextManager:
        if self.must_wait:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self.must_wait = False
        return torch.cuda.stream(self.stream)

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.must_wait = True


class _InThread(Result[T]):
    def __init__(self, future: Future[T]) -> None:
        self.future = future

    @property
    def value(self) -> T:
        return self.future.result()


class InThread(InTurn):
    """Functions in a thread of their own, with half of the cores; this thread has the others while one runs, else all.

    How many cores an operator has can change its rounding, so two runs differ in their last bits.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.executor = ThreadPoolExecutor(1, "beside", torch.get_num_threads)  # which has torch set its own defaults
        self.last: Future[Any] | None = None

    def run(self, function: Callable[..., T], *inputs: Tensor) -> Result[T]:
        def with_its_cores() -> T:
            set_own_threads(self.threads // 2)
            before = sys.getswitchinterval()
            sys.setswitchinterval(TURN)
            try:
                return function(*inputs)
            finally:
                sys.setswitchinterval(before)

        self.last = self.executor.submit(with_its_cores)
        self.share()
        return _InThread(self.last)

    def share(self) -> None:
        """Leave this thread the cores that nothing beside uses."""
        beside = self.threads // 2 if self.last is not None and not self.last.done() else 0
        set_own_threads(self.threads - beside)

    def share_before_blocks(self, network: nn.Module) -> None:
        """Share anew whenever a block of ``network`` begins."""
        for block in network.children():
            block.register_forward_pre_hook(lambda *_: self.share())

    def settle(self) -> None:
        if self.last is not None:
            wait([self.last])
        self.share()


@functools.cache
def _openmp() -> Callable[[int], None] | None:
    """OpenMP's function that sets the calling thread's number of threads, of the library that torch runs on; None where
    that is another, or hidden."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (AttributeError, OSError):
        return None


def set_own_threads(count: int) -> None:
    """Let operators that this thread calls use ``count`` cores. ``torch.set_num_threads`` would say so to threads that
    begin later as well."""
    _openmp()(count)


def choose_beside(device: torch.device, networks: tuple[nn.Module, ...], deterministic: bool) -> InTurn:
    """How registration runs on ``device`` beside ``networks``, the V-Nets."""
    if device.type == "cuda":
        return OnStream(device)
    threads = torch.get_num_threads()
    if deterministic or threads < 2 or _openmp() is None:
        return InTurn()
    thread = InThread(threads)
    for network in networks:
        thread.share_before_blocks(network)
    return thread
