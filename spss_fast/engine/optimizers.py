"""SGD, Adam and the teacher's moving average: torch's fused ones, or those of NVIDIA apex (``--optimizer apex``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from spss_fast.errors import UserError
from spss_fast.settings import Config

Average = Callable[[list[Tensor], list[Tensor], float], object]  # (targets, sources, weight)
BUILD_APEX = (
    "build it from github.com/NVIDIA/apex, beside the installed torch and its CUDA toolkit: APEX_CPP_EXT=1 "
    "APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (pip install apex fetches another project of that name)"
)


def _apex(device: torch.device) -> tuple[Any, Any, Any]:
    """Apex's optimizers, its multi-tensor applier and its kernels; UserError where the real one is not there."""
    if device.type != "cuda":
        raise UserError(f"--optimizer apex needs a GPU, and this run is on {device}: leave it out or use --device cuda")
    try:
        import amp_C
        from apex import optimizers
        from apex.multi_tensor_apply import multi_tensor_applier

        optimizers.FusedSGD, optimizers.FusedAdam, amp_C.multi_tensor_axpby  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--optimizer apex: NVIDIA apex with its CUDA kernels is not installed ({error}); {BUILD_APEX}"
        ) from error
    return optimizers, multi_tensor_applier, amp_C


def build(
    config: Config, student: Iterable[Tensor], registration: Iterable[Tensor], device: torch.device,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """SGD of the student's parameters and Adam of the registration network's. UserError where apex is asked for and
    not there."""
    training, adam_lr = config.training, config.registration.registration_lr
    sgd = dict(lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    if training.optimizer == "apex":
        apex, _, _ = _apex(device)
        return apex.FusedSGD(student, **sgd), apex.FusedAdam(registration, lr=adam_lr, adam_w_mode=False)
    adam = torch.optim.Adam(registration, adam_lr, fused=True, capturable=device.type == "cuda")
    descent = torch.optim.SGD(student, **sgd, fused=True)
    # made by a first step that gradient scaling skips, they would hold whatever lay in their memory
    for parameter in descent.param_groups[0]["params"]:
        descent.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return descent, adam


def moving_average(name: str, device: torch.device) -> Average:
    """``average(targets, sources, weight)``: targets += weight (sources - targets), all of them in a few launches."""
    if name != "apex":
        return torch._foreach_lerp_
    _, apply, kernels = _apex(device)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)

    def average(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
        apply(kernels.multi_tensor_axpby, overflow, [targets, sources, targets], 1 - weight, weight, -1)

    return average
