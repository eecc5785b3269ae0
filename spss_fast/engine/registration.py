"""Registration between neighbouring slices: stage 1, and steps 1 and 10 of stage 2 (METHOD)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spss_fast.engine.padding import padded
from spss_fast.ops.losses import SMOOTH
from spss_fast.ops.warp import warp
from spss_fast.settings import RegistrationSettings

SMALLEST_SIDE = 16  # voxels of a slice, of which the network's four halvings leave one
FLOW_PIXELS = 2**23  # of all pairs of one forward: some 2 GB of feature maps; every preset's batch has fewer


def negative_ncc(warped: Tensor, fixed: Tensor, window: int = 9) -> Tensor:
    """Negative mean of the squared local normalised cross correlation of slices (B, 1, h, w), as in VoxelMorph."""
    area = window * window

    def local_sum(x: Tensor) -> Tensor:  # exact, where a GPU's convolution rounds to TF32
        return F.avg_pool2d(x, window, 1, window // 2, divisor_override=1)

    sum_i, sum_j = local_sum(fixed), local_sum(warped)
    mean_i, mean_j = sum_i / area, sum_j / area
    cross = local_sum(fixed * warped) - mean_j * sum_i - mean_i * sum_j + mean_i * mean_j * area
    variance_i = local_sum(fixed * fixed) - 2 * mean_i * sum_i + mean_i * mean_i * area
    variance_j = local_sum(warped * warped) - 2 * mean_j * sum_j + mean_j * mean_j * area
    return -(cross * cross / (variance_i * variance_j + 1e-5)).mean()


def soft_dice_loss(warped: Tensor, fixed: Tensor) -> Tensor:
    """1 - Dice of two foreground maps (B, C - 1, h, w), squared denominators, over all voxels of all pairs, averaged
    over classes."""
    over = (0, 2, 3)
    dice = (2 * (warped * fixed).sum(over) + SMOOTH) / ((warped**2).sum(over) + (fixed**2).sum(over) + SMOOTH)
    return (1 - dice).mean()


def sample_pairs(volumes: Tensor, settings: RegistrationSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Random neighbouring slices of ``volumes`` (B, h, w, d), some for every step: the indices (volume, moving z,
    fixed z), each (registration_steps, registration_pairs) int64."""
    batch, depth = volumes.shape[0], volumes.shape[-1]
    shape = settings.registration_steps, settings.registration_pairs
    volume = torch.randint(batch, shape, device=volumes.device)
    lower = torch.randint(depth - 1, shape, device=volumes.device)
    upwards = torch.randint(2, shape, device=volumes.device)
    return volume, lower + 1 - upwards, lower + upwards


def registration_steps(
    network: nn.Module, optimizer: torch.optim.Optimizer, volumes: Tensor, labels: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor], settings: RegistrationSettings, amp: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Optimizer steps, each on the next row of ``pairs``; returns the last loss, a detached scalar.

    ``volumes`` (B, h, w, d) images, ``pairs`` their neighbouring slices by :func:`sample_pairs`. Without ``labels`` the
    loss is the image similarity (stage 1, step 1); with ``labels``, the fused ones as foreground masks
    (B, C - 1, h, w, d), their Dice after the warp joins it (step 10). The network runs in ``amp``, everything after it
    in float32. ``scaler`` keeps fp16 gradients from vanishing.
    """
    scaler = scaler or torch.amp.GradScaler(volumes.device.type, enabled=False)
    parameters = list(network.parameters())
    # autocast would cast every parameter, and its gradient back, on its own
    fast = network if amp is None else copy.deepcopy(network).to(amp)
    fast_parameters = list(fast.parameters())
    slices = volumes.movedim(-1, 1).contiguous()  # (B, d, h, w): a pair is two rows
    label_slices = None if labels is None else labels.movedim(-1, 1).to(volumes.dtype).contiguous()
    loss = volumes.new_zeros(())
    for volume, from_z, to_z in zip(*pairs):
        moving, fixed = slices[volume, from_z][:, None], slices[volume, to_z][:, None]
        if amp is not None:
            with torch.no_grad():
                torch._foreach_copy_(fast_parameters, parameters)
        displacement = fast(moving.to(amp or moving.dtype), fixed.to(amp or fixed.dtype))
        if label_slices is None:
            warped = warp(moving, displacement)
        else:
            both = warp(torch.cat([moving, label_slices[volume, from_z]], 1), displacement)
            warped, warped_labels = both[:, :1], both[:, 1:]
        loss = F.mse_loss(warped, fixed) if settings.similarity == "mse" else negative_ncc(warped, fixed)
        if label_slices is not None:
            loss = loss + soft_dice_loss(warped_labels, label_slices[volume, to_z])
        fast.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if amp is not None:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_([p.grad for p in parameters], [p.grad for p in fast_parameters])
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


@torch.no_grad()
def outward_flows(network: nn.Module, volumes: Tensor, index: Tensor, amp: torch.dtype | None) -> Tensor:
    """Displacements between neighbouring slices of ``volumes`` (B, h, w, d), away from the slices ``index`` (B,) int64,
    in one batched forward, or in several where they hold more than :data:`FLOW_PIXELS`.

    Returns (B, d - 1, 2, h, w) in voxels: [b, z] takes slice z to z + 1 from index[b] on, and slice z + 1 to z before
    it. The ways back carry no label.
    """
    batch, _, _, depth = volumes.shape
    volumes, (rows, columns, _) = padded(volumes, (SMALLEST_SIDE, SMALLEST_SIDE, depth))
    slices = volumes.movedim(-1, 1)
    lower, upper = slices[:, :-1], slices[:, 1:]
    upwards = (torch.arange(depth - 1, device=index.device) >= index[:, None])[..., None, None]
    moving, fixed = (torch.where(upwards, *pair).flatten(0, 1)[:, None] for pair in ((lower, upper), (upper, lower)))
    count = max(1, FLOW_PIXELS // moving[0].numel())
    with torch.autocast(volumes.device.type, amp, enabled=amp is not None):
        displacement = torch.cat([network(m, f) for m, f in zip(moving.split(count), fixed.split(count))])
    return displacement[..., rows, columns].contiguous().unflatten(0, (batch, depth - 1))
