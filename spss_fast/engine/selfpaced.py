"""The paces of self-paced selection, and the views it works on (METHOD, stage 2, steps 4, 5 and 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spss_fast.ops.uncertainty import accumulate_softmax
from spss_fast.settings import SelectionSettings


def ramp(iteration: int, settings: SelectionSettings) -> float:
    """w(t) = ramp_max * exp(-5 (1 - min(floor(t/150), 40)/40)^2)."""
    progress = min(iteration // settings.ramp_every, settings.ramp_length) / settings.ramp_length
    return settings.ramp_max * math.exp(-5 * (1 - progress) ** 2)


def threshold(epoch: int, settings: SelectionSettings) -> float:
    """lambda: the loss below which selection opens; 1% more every epoch of stage 2."""
    return settings.lambda_start * settings.lambda_growth**epoch


def tau(iteration: int, settings: SelectionSettings) -> float:
    """tau: 1.4 times more every 500 iterations."""
    return settings.tau_start * settings.tau_growth ** (iteration // settings.tau_every)


def keep_count(voxels: int, last_loss: Tensor, lam: float, rate: float) -> Tensor:
    """K, a 0-d int64 tensor on the device of ``last_loss`` (L_pace of the last iteration; inf if there is none yet).

    ``voxels`` is h w d of one volume and ``rate`` is w(t) tau: R = min(rate, 1), K = floor(h w d * 0.1 R) if
    L_pace >= lambda, else floor(h w d * (1 - L_pace/lambda) R).
    """
    last_loss = last_loss.double()
    share = torch.where(last_loss >= lam, 0.1, 1 - last_loss / lam)
    return (voxels * share * min(rate, 1.0)).floor().long()


def fusion_weight(progress: float, final: float, power: float) -> float:
    """w_p = 0.9 progress^0.2, the teacher's share of the fused labels; ``progress`` is t / ``fusion_iterations``, and
    beyond 1 as 1."""
    return final * min(progress, 1.0) ** power


def clipped_noise(x: Tensor, settings: SelectionSettings) -> Tensor:
    """``x`` plus fresh N(0, 0.1) clipped to +-0.2."""
    noise = torch.empty_like(x).normal_(0, settings.noise)
    return noise.clamp_(-settings.noise_clip, settings.noise_clip).add_(x)


@torch.no_grad()
def monte_carlo(
    teacher: nn.Module, mixed: Tensor, classes: int, settings: SelectionSettings, amp: torch.dtype | None
) -> Tensor:
    """Sum of the softmax of T passes of ``teacher``, in training mode, over ``mixed`` (B, 1, h, w, d), each with fresh
    noise and dropout and under autocast to ``amp``: float32 (B, C = ``classes``, h, w, d), channels last."""
    total = torch.zeros(len(mixed), classes, *mixed.shape[2:], device=mixed.device).contiguous(
        memory_format=torch.channels_last_3d
    )
    with torch.autocast(mixed.device.type, amp, enabled=amp is not None):
        for _ in range(settings.passes):
            accumulate_softmax(total, teacher(clipped_noise(mixed, settings)))
    return total


@dataclass(frozen=True)
class Box:
    """The CutMix box: a rectangle in plane, through every slice."""

    top: int
    left: int
    height: int
    width: int

    def paste(self, onto: Tensor, source: Tensor) -> Tensor:
        """``onto`` (..., h, w, d) with this box of ``source``, as a new tensor."""
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        mixed = onto.clone()
        mixed[..., rows, columns, :] = source[..., rows, columns, :]
        return mixed


def random_box(height: int, width: int) -> Box:
    """A box of 10 to 90% of the height and of the width, anywhere inside (step 5)."""
    share = 0.1 + 0.8 * torch.rand(2)
    box_height, box_width = round(float(share[0]) * height), round(float(share[1]) * width)
    top = int(torch.randint(height - box_height + 1, ()))
    left = int(torch.randint(width - box_width + 1, ()))
    return Box(top, left, box_height, box_width)
