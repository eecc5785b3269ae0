"""How much an iteration keeps for its backward pass: ``python benchmarks/saved_tensors.py``.

On a GPU these tensors are most of the peak, and no GPU is needed to count them. An iteration of a smaller patch is run
(a fifth of LA's voxels, a seventh of KiTS's), and its bytes are scaled by the voxels: right for all but the weights,
which so count for too much.
"""

from __future__ import annotations

import math

import torch
from bench_step import data

from spss_fast.config import resolve
from spss_fast.engine.step import State, joint_iteration

SMALL = {"la": "64,64,48", "kits": "96,96,32"}
TYPES = {"bf16": torch.bfloat16, "float32": None}


def saved_bytes(preset: str, amp: torch.dtype | None) -> float:
    """Bytes of the distinct storages that autograd keeps in one iteration at the preset's own patch and batch."""
    full = resolve(preset, {}).data.patch
    config = resolve(preset, {"patch": SMALL[preset], "resample": SMALL[preset], "registration_steps": 1, "passes": 1})
    state = State(config, torch.device("cpu"), amp)
    storages: dict[int, int] = {}  # address to size: all live until the backward pass

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        joint_iteration(state, data(config.data.patch))
    return sum(storages.values()) * math.prod(full) / math.prod(config.data.patch)


if __name__ == "__main__":
    for preset in SMALL:
        for name, amp in TYPES.items():
            print(f"{preset} {name}: {saved_bytes(preset, amp) / 2**30:.1f} GiB")
