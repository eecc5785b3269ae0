"""Registration of neighbouring slices: the 2-D VoxelMorph-2 U-Net.

Source: Balakrishnan et al., "VoxelMorph", IEEE TMI 2019 (METHOD, Networks); the parameter names are this literature's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spss_fast.ops.activation import bias_leaky_relu
from spss_fast.ops.convolution import convolve, is_faster_on_slices
from spss_fast.ops.flow_head import flow_head, is_faster
from spss_fast.ops.upsampling import convolve_upsampled
from spss_fast.ops.upsampling import is_faster as is_faster_upsampled

# a GPU's matrix units take channels by so many; of fewer cuDNN 9.19 pads some bf16 maps, and turns others to float32
GPU_CHANNELS = 8


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, 1), nn.LeakyReLU(0.2, inplace=True))


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _layer(block: nn.Sequential, x: Tensor, weight: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """``block`` of ``x``, by another ``weight`` of the convolution if given, and ``added`` to what it activates.

    One operator does what follows a convolution, but for those of torch on a CPU, which add the bias as they go: on a
    GPU that is a pass over the feature map of its own, and the gradient's sum another. ``x`` may have further channels,
    of zeros.
    """
    convolution, activation = block
    weight, bias = convolution.weight if weight is None else weight, convolution.bias
    if is_faster_on_slices(x, weight):
        y = convolve(x, weight.float())
    elif _on_gpu(x):
        if zeros := x.shape[1] - weight.shape[1]:
            weight = F.pad(weight, (0, 0, 0, 0, 0, zeros))
        y = F.conv2d(x, weight, None, convolution.stride, convolution.padding)
    else:
        y = F.conv2d(x, weight, bias, convolution.stride, convolution.padding)
        return activation(y if added is None else added + y)
    return bias_leaky_relu(y, bias, added, activation.negative_slope)


def _flow(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """``convolution(x)``; on a GPU with channels that nobody reads."""
    if not _on_gpu(x):
        if is_faster(x):
            return flow_head(x, convolution.weight.float(), convolution.bias.float())
        return convolution(x)
    count = convolution.out_channels
    weight = F.pad(convolution.weight, (0, 0, 0, 0, 0, 0, 0, GPU_CHANNELS - count))
    # cut with the channels last, so that the gradient is padded where it lies
    y = F.conv2d(x, weight, padding=1).movedim(1, -1)[..., :count].movedim(-1, 1)
    return y + convolution.bias[:, None, None]


def _up(block: nn.Sequential, x: Tensor, skip: Tensor, summed: Tensor) -> Tensor:
    """``block`` of ``x`` upsampled to the sides of ``skip`` (nearest) and ``skip`` beside it: ``convolve_upsampled``
    where that is faster.

    Elsewhere doubling, then a 3x3 kernel, is one transposed convolution of stride 2: its 4x4 kernel holds the sums of
    the taps that read the same coarse pixel, 4 to an output in place of 9; ``summed`` says which, see
    :func:`_summed_taps`. So neither the upsampled map nor the concatenation is ever made.
    """
    if skip.shape[2:] != torch.Size(2 * side for side in x.shape[2:]):  # the sides are no multiples of 16
        return _layer(block, torch.cat([F.interpolate(x, size=skip.shape[2:]), skip.to(x.dtype)], 1))
    weight = block[0].weight
    if is_faster_upsampled(x, skip, weight):
        bias, slope = block[0].bias, block[1].negative_slope
        return convolve_upsampled(x, skip.to(x.dtype), weight.float(), bias.float(), slope)
    # split, of all that cuts, is put together again in one piece by its gradient
    coarse, fine = weight.split([x.shape[1], weight.shape[1] - x.shape[1]], 1)
    with torch.autocast(x.device.type, enabled=False):  # sums in the weights' precision, as its caller holds them
        kernel = (coarse.flatten(2) @ summed).unflatten(2, (4, 4)).transpose(0, 1)
    return _layer(block, skip, fine, F.conv_transpose2d(x, kernel, stride=2, padding=1))


def _summed_taps() -> Tensor:
    """(9, 16) ones and zeros: which taps of a 3x3 kernel each tap of a transposed convolution's 4x4 kernel sums."""
    tap, place = torch.arange(3), torch.arange(4)
    along = (2 - tap[:, None] == place) | (2 - tap[:, None] == place - 1)
    return torch.kron(along, along)


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
        # each network's own: made under an export or in inference mode, shared ones would be of no use to others
        self.register_buffer("summed_taps", _summed_taps().to(self.flow.weight), persistent=False)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Displacement (B, 2, h, w) that warps ``moving`` onto ``fixed``, both (B, 1, h, w): as ``warp`` takes it, so
        float32 if they are, or autocast is, of a half type."""
        pair = [moving, fixed]
        if _on_gpu(moving):
            pair.append(moving.new_zeros(1).expand(len(moving), GPU_CHANNELS - len(pair), *moving.shape[2:]))
        levels = [torch.cat([x.movedim(1, -1) for x in pair], -1).movedim(-1, 1)]  # channels last
        for block in self.enc:
            levels.append(_layer(block, levels[-1]))
        x = _layer(self.dec[0], levels.pop())
        for block in self.dec[1:4]:
            x = _up(block, x, levels.pop(), self.summed_taps)
        x = _up(self.dec[5], _layer(self.dec[4], x), levels.pop(), self.summed_taps)
        displacement = _flow(self.flow, _layer(self.vm2_conv, x))
        return displacement.to(torch.promote_types(displacement.dtype, torch.float32))
