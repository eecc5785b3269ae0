"""CUDA graphs: on a GPU, a function of tensors is recorded once and then launched whole, without its host work.

Source: torch.cuda.graph, whole-network capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spss_fast.engine.profiling import phase

Output = Tensor | tuple[Tensor, ...]


def each(function: Callable[[Tensor], Any], output: Output) -> Any:
    """``function`` of a tensor, or of every one of a tuple."""
    return function(output) if isinstance(output, Tensor) else tuple(map(function, output))


@dataclass
class Recording:
    """A graph, the inputs that it reads, and the outputs and gradients that it writes, at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Output
    gradients: list[tuple[Tensor, Tensor | None]]  # of each parameter

    def __call__(self, *inputs: Tensor | None) -> Output:
        for own, given in zip(self.inputs, inputs):
            if own is not None:
                own.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return each(Tensor.clone, self.output)


class Replayed:
    """``function`` of GPU tensors (or None in their place), replayed as a CUDA graph; it returns a tensor or several.

    The first call with inputs of a shape runs as any other code: it does its work, and brings what recording must find
    in place, compiled kernels and the state of optimizers. The second one records a graph, which that call and all
    later ones launch. Random numbers are those that the same calls would draw unrecorded: the generator is read at
    every launch. ``function`` may not wait for the GPU, and what it changes, such as weights, has to stay where it is
    in memory. Where it leaves gradients in ``parameters``, it begins by setting them to None. What a recording does not
    see stays as it was: a network's ``training``, the backend of an operator. Launches count as ``name`` where an
    iteration is profiled, whatever phases ``function`` has. Kernels run with ``priority``, lower numbers first.
    """

    def __init__(
        self, function: Callable[..., Output], name: str, parameters: Iterable[Tensor] = (), priority: int = 0
    ) -> None:
        self.function, self.name, self.parameters, self.priority = function, name, list(parameters), priority
        self.recordings: dict[tuple, Recording | None] = {}  # None after a first call

    def __call__(self, *inputs: Tensor | None) -> Output:
        key = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        if key not in self.recordings:
            self.recordings[key] = None
            return self._first(*inputs)
        if self.recordings[key] is None:
            self.recordings[key] = self._record(*inputs)
        with phase(self.name):
            return self.recordings[key](*inputs)

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where the first call runs and recordings are made, nobody else's: a graph keeps its stream's priority, and
        cuBLAS's workspaces for it, which graphs that run at once must not share."""
        return torch.cuda.Stream(priority=self.priority)

    def _first(self, *inputs: Tensor | None) -> Output:
        """On the stream of recordings: autograd keeps what it makes on the stream where it made it."""
        outside, stream = torch.cuda.current_stream(), self.stream
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            output = self.function(*inputs)
        outside.wait_stream(stream)
        each(lambda tensor: tensor.record_stream(outside), output)
        return output

    def _record(self, *inputs: Tensor | None) -> Recording:
        own = tuple(None if x is None else x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # a loader's thread may use the GPU meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            output = self.function(*own)
        return Recording(graph, own, output, [(parameter, parameter.grad) for parameter in self.parameters])
