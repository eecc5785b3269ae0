"""What the operators' argument checks share: one-line errors that name the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def is_tensor(name: str, value: object, *dtypes: torch.dtype) -> None:
    """TypeError unless ``value`` is a tensor of one of ``dtypes``; of any floating dtype where none is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).split('.')[-1] for d in dtypes)}, not {value.dtype}")
    if not dtypes and not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, not {value.dtype}")


def has_channels(name: str, value: Tensor) -> None:
    """ValueError unless ``value`` is (B, C, *spatial) with C >= 1 and at least one spatial axis."""
    if value.ndim < 3 or value.shape[1] < 1:
        raise ValueError(f"{name} must be (B, C, *spatial) with C >= 1, not of shape {tuple(value.shape)}")


def has_shape(name: str, value: Tensor, shape: tuple[int, ...], source: str, like: Tensor) -> None:
    """ValueError unless ``value`` has the shape that goes with ``source`` and lies on its device."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)} for this {source}, not {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {source} on {like.device}")


def is_number(name: str, value: object) -> None:
    """TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")


def fits_32_bits(name: str, voxels: int) -> None:
    """ValueError where a selection among so many voxels would count beyond 32 bits."""
    if voxels >= 2**32:
        raise ValueError(f"{name} must hold fewer than 2**32 voxels, not {voxels}")


def is_count(name: str, value: object, least: int) -> None:
    """TypeError unless ``value`` is an integer, ValueError where it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
