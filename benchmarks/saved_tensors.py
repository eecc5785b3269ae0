"""How much an iteration keeps at once for its backward passes: ``python benchmarks/saved_tensors.py``.

On a GPU these tensors are most of the peak, and no GPU is needed to count them. An iteration of a smaller patch is run
(a fifth of LA's voxels, a seventh of KiTS's), and its bytes are scaled by the voxels: right for all but the weights,
which so count for too much.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from bench_step import data

from spss_fast.config import resolve
from spss_fast.engine.step import State, joint_iteration

SMALL = {"la": "64,64,48", "kits": "96,96,32"}
TYPES = {"bf16": torch.bfloat16, "float32": None}


def saved_bytes(preset: str, amp: torch.dtype | None) -> float:
    """Most bytes of distinct storages that autograd keeps in one iteration at the preset's own patch and batch, where
    nothing runs beside, as on a GPU."""
    full = resolve(preset, {}).data.patch
    changes = {"patch": SMALL[preset], "resample": SMALL[preset], "registration_steps": 1, "passes": 1}
    config = resolve(preset, changes | {"deterministic": True})
    state = State(config, torch.device("cpu"), amp)
    held: Counter[int] = Counter()  # how often, by address
    now = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.address, self.size = storage.data_ptr(), storage.nbytes()
            held[self.address] += 1
            now += self.size if held[self.address] == 1 else 0
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            held[self.address] -= 1
            now -= 0 if held[self.address] else self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        joint_iteration(state, data(config.data.patch))
    return most * math.prod(full) / math.prod(config.data.patch)


if __name__ == "__main__":
    for preset in SMALL:
        for name, amp in TYPES.items():
            print(f"{preset} {name}: {saved_bytes(preset, amp) / 2**30:.1f} GiB")
