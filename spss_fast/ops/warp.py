"""Spatial-transformer warp: ``warped(p) = image(p + u(p))``, the displacement u in voxels.

Source: Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015; voxel displacements as in VoxelMorph
(Balakrishnan et al., IEEE TMI 2019). Zero displacement is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(image: Tensor, displacement: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """The definition in plain PyTorch, any device and floating dtype; differentiable in both arguments."""
    spatial = image.shape[2:]
    axes = [torch.arange(side, device=image.device, dtype=displacement.dtype) for side in spatial]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement  # (B, nd, *spatial)
    if padding == "border":
        position = torch.stack([position[:, i].clamp(0, side - 1) for i, side in enumerate(spatial)], 1)
    flat = image.flatten(2)

    def at(corner: list[Tensor]) -> Tensor:
        inside = torch.ones_like(corner[0], dtype=torch.bool)
        index = torch.zeros_like(corner[0], dtype=torch.long)
        for coordinate, side in zip(corner, spatial):
            inside = inside & (coordinate >= 0) & (coordinate <= side - 1)
            index = index * side + coordinate.clamp(0, side - 1).long()
        values = flat.gather(2, index.flatten(1)[:, None].expand(-1, image.shape[1], -1))
        return (values * inside.flatten(1)[:, None]).view_as(image)

    if mode == "nearest":
        return at([position[:, i].round() for i in range(len(spatial))])
    low = position.detach().floor()
    fraction = position - low
    warped = torch.zeros_like(image)
    for bits in range(2 ** len(spatial)):
        corner, weight = [], torch.ones_like(position[:, 0])
        for i in range(len(spatial)):
            upper = bits >> i & 1
            corner.append(low[:, i] + upper)
            weight = weight * (fraction[:, i] if upper else 1 - fraction[:, i])
        warped = warped + at(corner) * weight[:, None].to(image.dtype)
    return warped


warp = reference
