"""Which implementation of each operator runs on which device: one table, one environment variable, one context manager.

Every operator is ``torch.ops.spss_fast.<name>``. Its kernels come from the compiled extension (backends ``cpu`` and
``cuda``, csrc/) and from ``spss_fast.kernels`` (backend ``triton``); ``reference`` is the plain PyTorch definition
beside the public function, which that function calls directly. ``TABLE`` lists, per operator and device, what there is,
the measured winner first; what runs is the first that exists on this machine, unless ``SPSS_FAST_BACKEND`` or
``backend(...)`` prefers another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
VARIABLE = "SPSS_FAST_BACKEND"

# operator -> device type -> backends, the measured winner first
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "warp": {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")},
    "propagate": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
    "fill_holes": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
    "uncertainty": {"cpu": ("cpu", "triton", "reference"), "cuda": ("triton", "reference")},
    "contrastive": {"cpu": ("cpu", "triton", "reference"), "cuda": ("triton", "reference")},
    "losses": {"cpu": ("cpu", "triton", "reference"), "cuda": ("triton", "reference")},
    "norm": {"cpu": ("cpu", "triton", "reference"), "cuda": ("triton", "reference")},
    "activation": {"cpu": ("cpu", "triton", "reference"), "cuda": ("triton", "reference")},
    "convolution": {"cpu": ("cpu", "reference"), "cuda": ("reference",)},
}
# public operator -> the torch.ops.spss_fast.* it is made of; kernels/<operator>.py has Triton functions of these names
PARTS: dict[str, tuple[str, ...]] = {
    "warp": ("warp", "warp_backward"),
    "propagate": ("propagate",),
    "fill_holes": ("fill_holes",),
    "uncertainty": ("accumulate_softmax", "uncertainty_mask"),
    "contrastive": ("select_prototypes", "contrastive_loss"),
    "losses": (
        "masked_ce_dice", "masked_ce_dice_backward", "weighted_ce_dice", "weighted_ce_dice_backward",
    ),
    "norm": ("batch_norm_relu", "batch_norm_relu_backward"),
    "activation": ("bias_leaky_relu", "bias_leaky_relu_backward"),
    "convolution": (
        "convolve", "convolve_backward", "convolve_transposed", "convolve_moments", "convolve_upsampled",
        "convolve_upsampled_backward", "flow_head", "flow_head_backward",
    ),
}

_preferred: str | None = None
_swapped: torch.library.Library | None = None  # holds the kernels that differ from the extension's own
_active: dict[tuple[str, str], str] = {}  # (operator, device type) -> what runs now


def _pairs() -> list[tuple[str, str]]:
    return [(operator, device) for operator, devices in TABLE.items() for device in devices]


def _load_extension() -> str | None:
    """Load the compiled operators; without them define their schemas from Python, and return why they are not there.

    RuntimeError if they were compiled from sources older than this file's.
    """
    text = Path(__file__).with_name("schemas.inc").read_text()
    schemas = re.findall(r'^SPSS_FAST_OPERATOR\("(.+)"\)$', text, re.MULTILINE)
    try:
        import_module("spss_fast._C")
    except ImportError as error:
        for schema in schemas:
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        return "is not built" if importlib.util.find_spec("spss_fast._C") is None else f"does not load ({error})"
    names = [schema.partition("(")[0] for schema in schemas]
    absent = [name for name in names if not hasattr(torch.ops.spss_fast, name)]
    if absent:
        raise RuntimeError(
            f"the compiled extension of spss_fast is older than its Python part and lacks {', '.join(absent)}: "
            "`pip install --no-build-isolation -e .` in the checkout builds it anew"
        )
    return None


@functools.cache  # so that each text is said once
def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _say_slow(operator: str, tensor: torch.Tensor, instead: str) -> None:
    """Say, when it first matters, that compiled operators are missing, or not compiled for the machine."""
    if torch.compiler.is_compiling() or _preferred == "reference":
        return
    build = f"`pip install --no-build-isolation {_place}` beside an installed torch and"
    if _missing:
        _say(f"spss_fast: the compiled extension {_missing}, so operators run on the slower reference backend where "
             f"there is no Triton; {build} a C++ compiler builds it")
    elif tensor.device.type == "cuda" and "cuda" in TABLE[operator].get("cuda", ()):
        _say(f"spss_fast: the CUDA operators are not built, so {operator} runs on {instead}; {build} the nvcc of "
             "torch's CUDA builds them")
    elif _without_fma and tensor.device.type == "cpu":
        _say("spss_fast: the extension was compiled without FMA and AVX-512, so operators on a CPU can take up to "
             f"three times as long; {build} GCC 12 or newer (CXX=g++-12, say) builds them with both")


def _has_kernel(operator: str, device: str) -> bool:
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"spss_fast::{part}", device.upper()) for part in PARTS[operator]
    )


@functools.cache
def available(operator: str, device: str) -> tuple[str, ...]:
    """The backends of a public operator that can run here on tensors of a device type, in the table's order.

    Triton kernels run on CPU tensors only in Triton's interpreter (``TRITON_INTERPRET=1``): slow, and meant for tests.
    """
    if operator not in TABLE:
        raise ValueError(f"operator must be one of {', '.join(TABLE)}, not {operator!r}")

    def exists(backend: str) -> bool:
        if backend == "triton":
            runs = torch.backends.cuda.is_built() if device == "cuda" else os.environ.get("TRITON_INTERPRET") == "1"
            return runs and importlib.util.find_spec("triton") is not None
        return backend == "reference" or (operator, device) in _compiled

    return tuple(backend for backend in TABLE[operator].get(device, ("reference",)) if exists(backend))


def _install() -> None:
    """Make every operator run its first available backend, the preferred one before all others."""
    global _swapped
    if _swapped is not None:
        _swapped._destroy()
        _swapped = None
    _active.clear()
    for operator, device in _pairs():
        choice = available(operator, device)
        _active[operator, device] = _preferred if _preferred in choice else choice[0]
        if _active[operator, device] != "triton":
            continue
        _swapped = _swapped or torch.library.Library("spss_fast", "IMPL")
        for part in PARTS[operator]:
            with warnings.catch_warnings():  # replacing the compiled kernel is the point
                warnings.filterwarnings("ignore", message=".*[Oo]verrid")
                _swapped.impl(part, _triton(operator, part), device.upper())


def _triton(operator: str, part: str) -> Callable[..., Any]:
    """The Triton kernel's launcher; Triton itself is imported by the first call, not by ``import spss_fast.ops``."""

    def launch(*arguments: Any) -> Any:
        device = arguments[0].device  # Triton launches on the current device, not on that of its arguments
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return getattr(import_module(f"spss_fast.kernels.{operator}"), part)(*arguments)

    return launch


def _prefer(name: str | None, source: str) -> None:
    global _preferred
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, not {name!r}")
    here = {name for operator, device in _pairs() for name in available(operator, device)}
    if name is not None and name not in here:
        raise ValueError(f"{source}: the backend {name!r} does not exist here; there are {', '.join(sorted(here))}")
    _preferred = name
    _install()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer one backend for every operator within a ``with`` block, over the table and ``SPSS_FAST_BACKEND``.

    ``name``: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; operators that lack it on a tensor's device keep
    their own choice. It holds for the whole process, as backward passes run in threads of their own; enter it outside
    compiled functions. Raises ValueError for a name that is unknown or exists nowhere on this machine.
    """
    before = _preferred
    _prefer(name, "name")
    try:
        yield
    finally:
        _prefer(before, VARIABLE)


def active(operator: str, device: str) -> str:
    """The backend that a public operator runs on tensors of a device type (``"cpu"``, ``"cuda"``) right now."""
    return _active.get((operator, device), "reference")


def use_reference(operator: str, tensor: torch.Tensor) -> bool:
    """Whether a public function is to call its ``reference`` rather than ``torch.ops.spss_fast.*``."""
    chosen = active(operator, tensor.device.type)
    if chosen == "reference" or (chosen == "cpu" and _without_fma):
        _say_slow(operator, tensor, "the slower reference backend")
    return chosen == "reference"


def use_host(operator: str, tensor: torch.Tensor) -> bool:
    """Whether a CUDA tensor has only the reference, not asked for, while the host has a compiled operator: where the
    reference waits for the GPU again and again, copies to the host and back cost less."""
    on_host = (
        tensor.device.type == "cuda" and _preferred != "reference"
        and active(operator, "cuda") == "reference" and active(operator, "cpu") == "cpu"
    )
    if on_host:
        _say_slow(operator, tensor, "copies on the CPU")
    return on_host


_library = torch.library.Library("spss_fast", "FRAGMENT")
_missing = _load_extension()  # why there are no compiled operators; None where there are
_compiled = {pair for pair in _pairs() if _has_kernel(*pair)}
# csrc/cpu/multiarch.h: convolve has a kernel where the compiler makes code for FMA and AVX-512, for CPUs that have them
_without_fma = (
    _missing is None and (sys.platform, platform.machine()) == ("linux", "x86_64")
    and ("convolution", "cpu") not in _compiled
)
# in a checkout's folder Python imports its files, whatever else is installed
_place = "-e ." if Path(__file__).parents[2].joinpath("setup.py").is_file() else "."
_prefer(os.environ.get(VARIABLE) or None, VARIABLE)
