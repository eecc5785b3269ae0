"""Batches from the prepared cache, loader only: DALI beside plain PyTorch, asked for batch after batch.

A row's time is that of :data:`BATCHES` batches of four patches, noise included; each loader holds a few ready, so that
one batch would tell little. Both give the same batches; ``spss_fast`` is the one that ``--loader auto`` takes here.
"""

from __future__ import annotations

import functools
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from spss_fast.config import resolve
from spss_fast.data.loader import batches, resolve_loader
from spss_fast.data.sampling import Sampler, TrainingVolume

BATCHES = 8
# patch, and the volumes that the presets prepare for it
LA = (112, 112, 80), (320, 320, 88)
KITS = (176, 176, 64), (192, 192, 64)
PHANTOM = (64, 64, 32), (64, 64, 32)
ROWS = [(case, loader) for case in (KITS, LA, PHANTOM) for loader in ("torch", "dali")]
NAMES = {KITS: "kits", LA: "la", PHANTOM: "phantom"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def volume(folder: Path, name: str, shape: tuple[int, ...], annotated: bool) -> TrainingVolume:
    """A prepared volume as the cache has it: noise in a mapped file, with a ball for its label."""
    random = np.random.default_rng([*name.encode()])
    arrays = {"image": random.standard_normal(shape, dtype=np.float32)}
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij", sparse=True)
    arrays["label"] = (sum(axis**2 for axis in axes) < 0.3).astype(np.uint8)
    for part, array in arrays.items():
        np.save(folder / f"{name}-{part}.npy", array)
    image, label = (torch.from_numpy(np.load(folder / f"{name}-{part}.npy", mmap_mode="c")) for part in arrays)
    index = shape[2] // 2
    return TrainingVolume(name, image, *((index, label[:, :, index].clone(), label) if annotated else ()))


@functools.lru_cache(maxsize=1)
def sampler_of(folder: Path, patch: tuple[int, ...], shape: tuple[int, ...]) -> Sampler:
    labeled, unlabeled = ([volume(folder, f"{role}{i}", shape, role == "l") for i in range(4)] for role in "lu")
    return Sampler(labeled, unlabeled, resolve("la", {"patch": patch}), seed=0)


@pytest.mark.parametrize("case, loader", ROWS, ids=lambda value: value if type(value) is str else NAMES[value])
def bench_loader(measure, device, folder, case, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install spss_fast[dali])")
    patch, _ = case
    sampler, where = sampler_of(folder, *case), torch.device(device)
    with closing(batches(sampler, where, 0, loader)) as row:
        first = next(row)
        assert torch.equal(first.image.cpu(), sampler.patches(sampler.draw(0)).image)
        voxels = BATCHES * first.image.numel()
        # two crops are read and written, one of them twice, and the labels of the annotated volumes
        moved = voxels * 4 * (2 + 3) + BATCHES * 2 * (first.annotation.nbytes + first.reference.nbytes)
        provider = "spss_fast" if loader == resolve_loader("auto", where) else loader
        measure(
            lambda: [None for _ in islice(row, BATCHES)], operator="loader", case=f"{BATCHES} batches",
            size="x".join(map(str, (len(first.names), *patch))), provider=provider, elements=voxels, bytes=moved,
        )
