"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from spss_fast.errors import UserError


def resolve_device(name: str) -> torch.device:
    """``auto``: the first GPU if there is one, else the CPU. Raises ``UserError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name} cannot be used ({reason}): use --device auto, cpu or cuda") from error
    return device


def resolve_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: ``auto`` is bf16 where the hardware multiplies it natively, else float32 (None)."""
    if name == "off":
        return None
    if name == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # AMX tiles or AVX512-BF16; without them bf16 is emulated, and slower than float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else None
