"""Registration of neighbouring slices: the 2-D VoxelMorph-2 U-Net.

Source: Balakrishnan et al., "VoxelMorph", IEEE TMI 2019 (METHOD, Networks); the parameter names are this literature's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, 1), nn.LeakyReLU(0.2))


class RegistrationNet(nn.Module):
    """Displacement of a (moving, fixed) pair of slices, in voxels.

    Encoder 16, 32, 32, 32 (4x4 convolutions of stride 2), decoder 32, 32, 32, 32, 32, 16, 16 with nearest upsampling
    and skips. The flow head starts near zero, N(0, 1e-5), hence near the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList(_block(i, o, 4, 2) for i, o in ((2, 16), (16, 32), (32, 32), (32, 32)))
        self.dec = nn.ModuleList(
            _block(i, o) for i, o in ((32, 32), (64, 32), (64, 32), (48, 32), (32, 32), (34, 16))
        )
        self.vm2_conv = _block(16, 16)
        self.flow = nn.Conv2d(16, 2, 3, padding=1)
        nn.init.normal_(self.flow.weight, 0, 1e-5)
        nn.init.zeros_(self.flow.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Displacement (B, 2, h, w) that warps ``moving`` onto ``fixed``, both (B, 1, h, w)."""
        levels = [torch.cat([moving, fixed], 1)]
        for block in self.enc:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in self.dec[:3]:
            skip = levels.pop()
            x = torch.cat([F.interpolate(block(x), size=skip.shape[2:]), skip], 1)
        x = self.dec[4](self.dec[3](x))
        skip = levels.pop()
        x = torch.cat([F.interpolate(x, size=skip.shape[2:]), skip.to(x.dtype)], 1)
        return self.flow(self.vm2_conv(self.dec[5](x)))
