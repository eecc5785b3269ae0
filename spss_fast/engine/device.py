"""Where a run computes, and in which precision."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

import torch

from spss_fast.errors import UserError


def resolve_device(name: str) -> torch.device:
    """``auto``: the first GPU if there is one, else the CPU. Raises ``UserError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and Triton's kernels go where the current device is
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        others = ["auto", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"device {name} cannot be used ({reason}): use --device {', '.join(others)} or cpu") from error
    return device


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` from the CPU on ``device``; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resolve_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: ``auto`` is bf16 where the hardware multiplies it natively, else float32 (None)."""
    if name == "off":
        return None
    if name in ("bf16", "fp16"):
        return torch.bfloat16 if name == "bf16" else torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # AMX tiles or AVX512-BF16; without them bf16 is emulated, and slower than float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else None


def peak_memory(device: torch.device) -> int | None:
    """The most memory in use so far, in bytes, by the whole process on a CPU; None if unknown. On a GPU what PyTorch
    holds: CUDA graphs keep theirs, though no tensor is in it between their launches."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Have this process keep the memory that tensors on the CPU free, for those that follow.

    PyTorch leaves them to the C library, which gives large blocks back to the system and gets them again page by page.
    One iteration allocates what the last one did, so it need not. Threads share one heap, as others would give back
    what they free. Only glibc is told; elsewhere nothing happens.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(arena_max, 1)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within it, if ``wanted``, a seed gives the same bits on the same machine again, or an error says what cannot."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
