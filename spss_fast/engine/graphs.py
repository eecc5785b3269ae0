"""CUDA graphs: on a GPU, a function of tensors is recorded once and then launched whole, without its host work.

Source: torch.cuda.graph, whole-network capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Recording:
    """A graph, the inputs that it reads and the output that it writes, at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        for own, given in zip(self.inputs, inputs):
            if own is not None:
                own.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Replayed:
    """``function`` of GPU tensors (or None in their place), replayed as a CUDA graph; it returns one tensor.

    The first call with inputs of a shape runs as any other code: it does its work, and brings what recording must find
    in place, compiled kernels and the state of optimizers. The second one records a graph, which that call and all
    later ones launch. Random numbers are those that the same calls would draw unrecorded: the generator is read at
    every launch. ``function`` may not wait for the GPU, and what it changes, such as weights, has to stay where it is
    in memory.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.recordings: dict[tuple, Recording | None] = {}  # None after a first call

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        key = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        if key not in self.recordings:
            self.recordings[key] = None
            return self._first(*inputs)
        if self.recordings[key] is None:
            self.recordings[key] = self._record(*inputs)
        return self.recordings[key](*inputs)

    def _first(self, *inputs: Tensor | None) -> Tensor:
        """On a stream of its own, as capture does: autograd keeps what it makes on the stream where it made it."""
        outside, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            output = self.function(*inputs)
        outside.wait_stream(stream)
        output.record_stream(outside)
        return output

    def _record(self, *inputs: Tensor | None) -> Recording:
        own = tuple(None if x is None else x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # a loader's thread may use the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.function(*own)
        return Recording(graph, own, output)
