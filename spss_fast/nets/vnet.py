"""V-Net with a projector: logits, contrastive features, and the class map that goes with them.

Source: Milletari et al., "V-Net", 3DV 2016, in the batch-norm form and with the parameter names that this literature's
checkpoints use (METHOD, Networks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spss_fast.ops.convolution import (
    convolve,
    convolve_moments,
    convolve_transposed,
    halve,
    is_faster,
    is_faster_halving,
    is_faster_transposed,
)
from spss_fast.ops.norm import batch_norm_relu


def _layer(
    convolution: nn.Conv3d | nn.ConvTranspose3d, norm: nn.BatchNorm3d, x: Tensor, skip: Tensor | None = None
) -> Tensor:
    """``relu(norm(convolution(x))) + skip``, moving the running statistics as ``norm`` itself would."""
    if torch.compiler.is_exporting():  # plain operators: an exported network runs where this package is not
        y = F.relu(norm(convolution(x)))
        return y if skip is None else y + skip
    if x.shape[1] == 1 and x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # the image, as autocast would
    if norm.training and not norm.track_running_stats and not torch.is_grad_enabled():  # the teacher
        if (convolved := _with_moments(convolution, x)) is not None:
            y, *moments = convolved
            return batch_norm_relu(y, norm.weight, norm.bias, *moments, False, eps=norm.eps, skip=skip)
    momentum, running = norm.momentum, (norm.running_mean, norm.running_var)
    if norm.training and not norm.track_running_stats:
        running = None, None
    elif norm.training:
        norm.num_batches_tracked += 1
        if momentum is None:  # a cumulative average
            momentum = 1 / float(norm.num_batches_tracked)
    return batch_norm_relu(
        _convolve(convolution, x), norm.weight, norm.bias, *running, norm.training, momentum, norm.eps, skip,
        convolution.bias,
    )


def _convolve(convolution: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """``convolution(x)`` without its bias, which goes to the norm that follows: a GPU would add it in a pass over the
    feature map of its own, to a mean that is then taken off.

    In float32 where torch (2.13, CPU) errs in bfloat16: the weight gradient of the outer taps is left unwritten along
    an axis of one voxel, where they meet nothing but padding, and is wrong, or NaN, along a first axis of two; either
    was seen on one kind of CPU.
    """
    if isinstance(convolution, nn.ConvTranspose3d):
        if is_faster_transposed(x, convolution.weight):
            return convolve_transposed(x, convolution.weight)
        return F.conv_transpose3d(x, convolution.weight, stride=convolution.stride)
    if is_faster(x, convolution.weight):
        return convolve(x, convolution.weight)
    if convolution.stride == (2, 2, 2) and is_faster_halving(x, convolution.weight):
        return halve(x, convolution.weight)
    if x.device.type == "cpu" and 3 in convolution.kernel_size and (1 in x.shape[2:] or x.shape[2] == 2):
        amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            return convolution._conv_forward(x.float(), convolution.weight, None).to(amp)
    return convolution._conv_forward(x, convolution.weight, None)


def _with_moments(convolution: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> tuple[Tensor, ...] | None:
    """As :func:`_convolve`, and the mean and variance of each channel, where an operator takes them as it convolves."""
    transposed = isinstance(convolution, nn.ConvTranspose3d)
    faster = is_faster_transposed if transposed else is_faster
    if x.dtype == torch.bfloat16 and faster(x, convolution.weight):
        return convolve_moments(x, convolution.weight, transposed)
    return None


class _NarrowConvolution(nn.Conv3d):
    """A 3x3x3 convolution of few channels as one over groups of neighbours along the last axis, whose voxels are the
    channels: too few channels fill neither the vectors of a CPU nor the matrix units of a GPU.

    On a GPU a group of outputs reads its own group of inputs and those on either side, with the channels last a view of
    the same memory. Most of the larger kernel is zero, and yet it is up to five times as fast.

    On a CPU (fewer than 16 channels) a pair of outputs reads two pairs of inputs, so with pairs as channels the kernel
    is 3x3x2, and one product in four is with zero; oneDNN takes longer without, of a single channel twice as long.
    Pairs of outputs lie between those of inputs. So a single channel is padded by a voxel at either end, and of several
    the result is cut by as much: batch norm reads the slice where it is, and neither is copied.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neighbours = 16 if self.in_channels == 1 else 4  # in a group, on a GPU
        # each layer's own: made under an export or in inference mode, shared ones would be of no use to others
        self.register_buffer("placed_taps", _placed_taps(self.neighbours).to(self.weight), persistent=False)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_exporting():
            if x.device.type == "cuda" and x.shape[-1] % self.neighbours == 0:
                return self._in_groups(x, weight, bias)
            if x.device.type == "cpu" and x.shape[-1] % 2 == 0 and self.in_channels < 16:
                return self._in_pairs(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    def _in_groups(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = self.neighbours
        # (O, I, 3, 3, 3) to an output and an input of a group as channels: (count O, count I, 3, 3, 3)
        taps = (weight @ self.placed_taps).unflatten(-1, (count, 3, count))
        taps = taps.permute(4, 0, 6, 1, 2, 3, 5).flatten(2, 3).flatten(0, 1)
        groups = x.unflatten(-1, (-1, count)).movedim(-1, 1).flatten(1, 2)
        y = F.conv3d(groups, taps, None if bias is None else bias.repeat(count), padding=1)
        return y.movedim(1, -1).unflatten(-1, (count, -1)).flatten(3, 4).movedim(-1, 1)

    @staticmethod
    def _in_pairs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # the four taps that an output of either place in its pair lays over the four inputs
        taps = torch.stack([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])
        weight = taps.unflatten(-1, (2, 2)).movedim(-1, 2).flatten(2, 3).flatten(0, 1)
        pad = x.shape[1] == 1
        pairs = (F.pad(x, (1, 1)) if pad else x).unflatten(-1, (-1, 2)).movedim(-1, 1).flatten(1, 2)
        y = F.conv3d(pairs, weight, None if bias is None else bias.repeat(2), padding=(1, 1, 0 if pad else 1))
        y = y.movedim(1, -1).unflatten(-1, (2, -1)).flatten(3, 4)
        # cut with the channels last, so that the gradient is padded where it lies
        return (y if pad else y[..., 1:-1, :]).movedim(-1, 1)


def _placed_taps(count: int) -> Tensor:
    """(3, count * 3 * count) ones and zeros: which of the voxels of a group, and of those on either side, each tap of
    each output of the group reads."""
    tap, output, place = (torch.arange(n) for n in (3, count, 3 * count))
    placed = place == count - 1 + output[:, None] + tap[:, None, None]
    return placed.flatten(1)


class _Convolutions(nn.Module):
    """``count`` times [3x3x3 convolution, batch norm, ReLU]."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(count):
            channels = outputs if i else inputs
            convolution = nn.Conv3d if channels > 16 else _NarrowConvolution
            layers += [convolution(channels, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU()]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.conv)
        for convolution, norm, _ in zip(layers, layers, layers):
            x = _layer(convolution, norm, x)
        return x


class _Down(nn.Module):
    """[2x2x2 convolution of stride 2, batch norm, ReLU]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv3d(inputs, outputs, 2, stride=2), nn.BatchNorm3d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, _ = self.conv
        return _layer(convolution, norm, x)


class _Up(nn.Module):
    """[2x2x2 transposed convolution of stride 2, batch norm, ReLU], and the addition of the skip connection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.ConvTranspose3d(inputs, outputs, 2, stride=2), nn.BatchNorm3d(outputs), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        convolution, norm, _ = self.conv
        return _layer(convolution, norm, x, skip)


@dataclass
class Encoded:
    """What the encoder hands on."""

    skips: tuple[Tensor, Tensor, Tensor]  # full, 1/2 and 1/4 resolution
    first_level: Tensor  # (B, 8 filters, h/8, w/8, d/8): input of the first decoder level, its skip added


class VNet(nn.Module):
    """V-Net of five levels.

    Args:
        classes: output channels C.
        filters: channels of the first level; level i has ``filters * 2**i``.
        dropout: probability of the channel dropout at the bottleneck and before the last convolution.
        inputs: input channels.
        features: channels of the projector's output.

    Every side of an input must be a multiple of 16.
    """

    def __init__(
        self, classes: int = 2, filters: int = 16, dropout: float = 0.5, inputs: int = 1, features: int = 64,
    ) -> None:
        super().__init__()
        f = filters
        self.block_one = _Convolutions(1, inputs, f)
        self.block_one_dw = _Down(f, 2 * f)
        self.block_two = _Convolutions(2, 2 * f, 2 * f)
        self.block_two_dw = _Down(2 * f, 4 * f)
        self.block_three = _Convolutions(3, 4 * f, 4 * f)
        self.block_three_dw = _Down(4 * f, 8 * f)
        self.block_four = _Convolutions(3, 8 * f, 8 * f)
        self.block_four_dw = _Down(8 * f, 16 * f)
        self.block_five = _Convolutions(3, 16 * f, 16 * f)
        self.block_five_up = _Up(16 * f, 8 * f)
        self.block_six = _Convolutions(3, 8 * f, 8 * f)
        self.block_six_up = _Up(8 * f, 4 * f)
        self.block_seven = _Convolutions(3, 4 * f, 4 * f)
        self.block_seven_up = _Up(4 * f, 2 * f)
        self.block_eight = _Convolutions(2, 2 * f, 2 * f)
        self.block_eight_up = _Up(2 * f, f)
        self.block_nine = _Convolutions(1, f, f)
        self.out_conv = nn.Conv3d(f, classes, 1)
        self.dropout = nn.Dropout3d(dropout)
        self.projector = nn.Sequential(nn.Conv3d(8 * f, 8 * f, 1), nn.PReLU(), nn.Conv3d(8 * f, features, 1))

    def encode(self, x: Tensor) -> Encoded:
        """``x`` (B, 1, h, w, d) through the encoder, up to where the projector reads."""
        x1 = self.block_one(x)
        x2 = self.block_two(self.block_one_dw(x1))
        x3 = self.block_three(self.block_two_dw(x2))
        x4 = self.block_four(self.block_three_dw(x3))
        x5 = self.dropout(self.block_five(self.block_four_dw(x4)))
        return Encoded((x1, x2, x3), self.block_five_up(x5, x4))

    def decode(self, encoded: Encoded) -> Tensor:
        """The decoder: (B, filters, h, w, d), before the last dropout."""
        x1, x2, x3 = encoded.skips
        x6 = self.block_six(encoded.first_level)
        x7 = self.block_seven(self.block_six_up(x6, x3))
        x8 = self.block_eight(self.block_seven_up(x7, x2))
        return self.block_nine(self.block_eight_up(x8, x1))

    def project(self, encoded: Encoded) -> Tensor:
        """Contrastive features (B, 64, h/8, w/8, d/8)."""
        return self.projector(encoded.first_level)

    def classify(self, decoded: Tensor) -> Tensor:
        """Logits (B, C, h, w, d) of the decoder's output, after the last dropout.

        A channel that is dropped from a sample is a weight of zero for that sample: cheaper than a copy of the largest
        feature map.
        """
        if not self.training:
            return self.out_conv(decoded)
        kept = self.dropout(decoded.new_ones(*decoded.shape[:2], 1, 1, 1))  # 0 or 1 / (1 - p), as dropout scales
        weight = self.out_conv.weight * kept[:, None]
        if decoded.device.type != "cuda":
            return torch.cat([F.conv3d(x, w, self.out_conv.bias) for x, w in zip(decoded.split(1), weight)])
        # every sample with every sample's weight, still few channels: one convolution, and a quarter of the time
        every = F.conv3d(decoded, weight.flatten(0, 1)).unflatten(1, (len(decoded), -1))
        return every.diagonal(0, 0, 1).movedim(-1, 0) + self.out_conv.bias[:, None, None, None]

    def class_map(self, decoded: Tensor) -> Tensor:
        """Logits before the last dropout, trilinear at 1/8 resolution: (B, C, h/8, w/8, d/8).

        The last convolution is linear and of one voxel, so it may as well follow the interpolation, which leaves one
        voxel in 512.
        """
        coarse = [side // 8 for side in decoded.shape[2:]]
        return self.out_conv(F.interpolate(decoded, size=coarse, mode="trilinear", align_corners=False))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C, h, w, d) of images (B, 1, h, w, d)."""
        return self.classify(self.decode(self.encode(x)))


def teacher_of(student: VNet) -> VNet:
    """A copy of ``student`` to be its mean teacher, run in training mode and under ``torch.no_grad()`` only.

    Nobody reads its running statistics, so no pass moves them. Its parameters still ask for gradients: only of such
    parameters autocast keeps the cast for the passes that follow.
    """
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.track_running_stats = False
    return teacher


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, iteration: int, bound: float = 0.99,
    average: Callable[..., object] = torch._foreach_lerp_,
) -> None:
    """Exponential moving average of the parameters, alpha = min(1 - 1/(t + 1), bound); buffers are left alone.

    ``average(targets, sources, weight)`` moves all targets towards their sources by ``weight``, in place.
    """
    alpha = min(1 - 1 / (iteration + 1), bound)
    average(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
