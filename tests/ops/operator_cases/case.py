"""One row of the operator test matrix: how to call a public operator, and on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {  # of the dtype the operator returns its result in
    torch.float64: dict(rtol=1e-9, atol=1e-10),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}
LAYOUTS = ("contiguous", "strided", "channels_last")


@dataclass(frozen=True)
class Case:
    """``call(*make(shape, dtype, generator))`` runs the operator; gradients are compared too if ``gradients``."""

    operator: str  # its name in spss_fast.ops.backends.TABLE
    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[tuple[int, ...], torch.dtype, torch.Generator], tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    gradients: bool = True
    exact: bool = False  # masks and labels
    gradcheck_shape: tuple[int, ...] | None = None  # tiny; None where there is no gradient
    raw: Callable[..., list[tuple[object, tuple]]] | None = None  # inputs -> [(torch.ops overload, its arguments)]

    def inputs(self, shape, dtype, device: str, layout: str = "contiguous") -> list[Tensor]:
        made = self.make(shape, dtype, torch.Generator().manual_seed(sum(shape) + len(shape)))
        return [arrange(tensor.to(device), layout) for tensor in made]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "strided" and tensor.ndim:
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    if layout == "channels_last" and tensor.ndim > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor


def spread(tensor: Tensor, axis: int) -> Tensor:
    """The same values so far apart along an axis that the last one's offset does not fit into 32 bits.

    The memory between them is never touched, so on a CPU it costs addresses only.
    """
    size, rest = tensor.shape[axis], tensor.select(axis, 0)
    stride = 2**31 // (size - 1) + 1
    strides = [*torch.empty(rest.shape).stride()]
    strides.insert(axis, stride)
    numbers = (size - 1) * stride + rest.numel()
    return tensor.new_empty(numbers).as_strided(tensor.shape, strides).copy_(tensor)


def differentiate(
    case: Case, inputs: list[Tensor], layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of the floating inputs for a fixed upstream gradient of a layout."""
    leaves = [tensor.detach().requires_grad_(case.gradients and tensor.is_floating_point()) for tensor in inputs]
    outputs = case.call(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = [output for output in outputs if output.requires_grad]
    if not loss:
        return outputs, []
    # made on the device: nothing may be copied to it while a CUDA graph is captured
    numbers = [torch.arange(o.numel(), dtype=torch.float64, device=o.device).view(o.shape) for o in loss]
    upstream = [arrange(torch.sin(7 * n + 3).to(o.dtype), layout) for n, o in zip(numbers, loss)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, upstream, allow_unused=True)
    return outputs, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients)]
