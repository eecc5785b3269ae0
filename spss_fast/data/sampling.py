"""Training batches from prepared volumes, in plain PyTorch.

Batch t depends on the seed and t alone, so that a run can go on anywhere. What training may see of a volume's label
(one slice) and what only monitoring may see (all of it) are different fields from here on.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from spss_fast.config import Config, DataSettings
from spss_fast.data.cache import PreparedCase
from spss_fast.data.splits import annotated_slices, read_annotations

ATTEMPTS = 16


@dataclass
class TrainingVolume:
    """One prepared volume as training sees it: its image and, where annotated, one slice of its label.

    ``image`` (H, W, D) float32; ``index`` the annotated slice z* and ``annotation`` its label (H, W) uint8, or both
    None; ``reference`` the full label (H, W, D) uint8 or None, which no loss and no crop may depend on.
    """

    name: str
    image: torch.Tensor
    index: int | None = None
    annotation: torch.Tensor | None = None
    reference: torch.Tensor | None = None


@dataclass
class Batch:
    """B volumes of patch (h, w, d), of which the first L are annotated; on the CPU.

    ``image`` is the supervised view, ``view1`` and ``view2`` (A1, A2) share a geometry of their own and differ by
    noise; all (B, 1, h, w, d) float32. ``annotation`` (L, h, w) uint8 and ``index`` (L,) int64, the annotated slice
    within the patch, and ``reference`` (L, h, w, d) uint8 have the geometry of ``image``. ``reference`` is there for
    monitoring only, and None unless every annotated volume has one.
    """

    names: list[str]
    image: torch.Tensor
    view1: torch.Tensor
    view2: torch.Tensor
    annotation: torch.Tensor
    index: torch.Tensor
    reference: torch.Tensor | None


def training_volumes(cases: list[PreparedCase], settings: DataSettings, seed: int) -> list[TrainingVolume]:
    """The annotated cases as training sees them: their image, and the label of one slice each."""
    slices, given = annotated_slices(cases, settings, seed), read_annotations(settings)
    volumes = []
    for case in cases:
        index, image, full = slices[case.name], torch.from_numpy(case.image), case.label()
        # a slice named by the user is taken from the file itself, which may have no other
        mask = case.annotation_from_source(given[case.name], settings) if case.name in given else full[:, :, index]
        annotation = torch.from_numpy(np.array(mask, order="C"))
        volumes.append(TrainingVolume(case.name, image, index, annotation, torch.from_numpy(full)))
    return volumes


def unlabeled_volumes(cases: list[PreparedCase]) -> list[TrainingVolume]:
    """The other training cases as training sees them: their image."""
    return [
        TrainingVolume(case.name, torch.from_numpy(case.image),
                       reference=torch.from_numpy(case.label()) if case.has_label else None)
        for case in cases
    ]


@dataclass(frozen=True)
class Geometry:
    """A crop of a volume, ``start`` and ``size`` in its own voxels, then turned by ``quarters`` x 90 degrees in plane
    and mirrored along in-plane axis ``flip`` (None: not)."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    quarters: int
    flip: int | None

    def apply(self, volume: torch.Tensor, fill: float) -> torch.Tensor:
        """The (h, w, d) patch of an (H, W, D) volume; ``fill`` stands where the crop reaches beyond it."""
        return self._turned(_cropped(volume, self.start, self.size, fill))

    def apply_slice(self, plane: torch.Tensor, fill: float) -> torch.Tensor:
        """The (h, w) patch of one (H, W) slice."""
        return self._turned(_cropped(plane, self.start[:2], self.size[:2], fill))

    def _turned(self, patch: torch.Tensor) -> torch.Tensor:
        patch = torch.rot90(patch, self.quarters, (0, 1))
        return patch if self.flip is None else patch.flip(self.flip)


def _cropped(array: torch.Tensor, start: tuple[int, ...], size: tuple[int, ...], fill: float) -> torch.Tensor:
    inside = tuple(slice(max(a, 0), min(a + n, full)) for a, n, full in zip(start, size, array.shape))
    before = [max(-a, 0) for a in start]
    part = array[inside]
    padding = [side for b, n, have in zip(before, size, part.shape) for side in (n - b - have, b)]
    return F.pad(part, padding[::-1], value=fill) if any(padding) else part


def _start(random: np.random.Generator, full: int, size: int, inside: int | None = None) -> int:
    """Where a crop of ``size`` out of ``full`` voxels starts: uniform, such that voxel ``inside`` is within; centred
    with a border all around where the volume is the smaller one."""
    if full <= size:
        return -((size - full) // 2)
    low, high = (0, full - size) if inside is None else (max(0, inside - size + 1), min(full - size, inside))
    return int(random.integers(low, high + 1))


def _turn_and_mirror(random: np.random.Generator) -> tuple[int, int | None]:
    """``quarters`` and ``flip`` of a :class:`Geometry`: each of the square's eight symmetries is equally likely.

    Mirroring always, along one axis or the other, would leave out the scan as it is, which testing is about.
    """
    return int(random.integers(4)), (None, 0)[random.integers(2)]


class Sampler:
    """Endless iterator of :class:`Batch`: annotated and unlabelled volumes in two orders, each drawn anew every pass.

    Supervised view: random quarter turn and mirroring in plane, random crop that holds the annotated
    slice and, where one fits, some of its foreground. A1 and A2: turn and mirroring of their own with probability
    0.5, one crop, and per view with probability 0.5 noise N(0, ``noise``) clipped to ``noise_clip``. Volumes smaller
    than the patch are centred in it, with their minimum (labels: 0) around them.

    ``prefetch`` batches are made ahead in a thread; it has no influence on them. Close the sampler (or use it as a
    context manager) to end the thread.
    """

    def __init__(self, labeled: list[TrainingVolume], unlabeled: list[TrainingVolume], config: Config, seed: int,
                 prefetch: int = 2):
        training = config.training
        if not labeled or any(volume.index is None or volume.annotation is None for volume in labeled):
            raise ValueError("labeled must hold volumes with an index and an annotation")
        if not unlabeled and training.batch_unlabeled:
            raise ValueError("unlabeled must hold at least one volume")
        self.labeled, self.unlabeled = labeled, unlabeled
        self.counts = training.batch_labeled, training.batch_unlabeled
        self.patch = config.data.patch
        self.noise, self.noise_clip = config.selection.noise, config.selection.noise_clip
        self.seed = seed
        self.step = 0
        self._fill = {id(volume): float(volume.image.min()) for volume in (*labeled, *unlabeled)}
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler") if prefetch else None
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> Batch:
        step, self.step = self.step, self.step + 1
        if self._thread is None:
            return self.batch(step)
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._thread.submit(self.batch, step + len(self._ahead)))
        return self._ahead.popleft().result()

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the sampler that gave ``state`` was, over the same volumes."""
        self.seed, self.step = state["seed"], state["step"]
        self._drop_ahead()

    def close(self) -> None:
        self._drop_ahead()
        if self._thread is not None:
            self._thread.shutdown()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def batch(self, step: int) -> Batch:
        """Batch number ``step``, whatever was drawn before."""
        random = np.random.default_rng([self.seed, 0, step])
        noise = torch.Generator().manual_seed(int(random.integers(2**63)))
        volumes = [self.labeled[i] for i in self._turn(1, len(self.labeled), self.counts[0], step)]
        volumes += [self.unlabeled[i] for i in self._turn(2, len(self.unlabeled), self.counts[1], step)]
        images, views1, views2, annotations, indices, references = [], [], [], [], [], []
        for position, volume in enumerate(volumes):
            annotated, fill = position < self.counts[0], self._fill[id(volume)]
            geometry = self._supervised(random, volume, annotated)
            images.append(geometry.apply(volume.image, fill))
            if annotated:
                annotations.append(geometry.apply_slice(volume.annotation, 0))
                indices.append(volume.index - geometry.start[2])
                references.append(volume.reference if volume.reference is None else geometry.apply(volume.reference, 0))
            quarters, flip = _turn_and_mirror(random) if random.random() < 0.5 else (0, None)
            view = self._random_crop(random, volume, quarters, flip).apply(volume.image, fill)
            views1.append(self._noisy(view, random, noise))
            views2.append(self._noisy(view, random, noise))
        complete = all(reference is not None for reference in references)
        return Batch(
            [volume.name for volume in volumes],
            torch.stack(images).unsqueeze(1), torch.stack(views1).unsqueeze(1), torch.stack(views2).unsqueeze(1),
            torch.stack(annotations), torch.tensor(indices), torch.stack(references) if complete else None,
        )

    def _turn(self, role: int, volumes: int, count: int, step: int) -> list[int]:
        """Which volumes batch ``step`` takes: the ``count`` next of an endless row of permutations."""
        chosen = []
        for position in range(step * count, (step + 1) * count):
            order = np.random.default_rng([self.seed, role, position // volumes]).permutation(volumes)
            chosen.append(int(order[position % volumes]))
        return chosen

    def _random_crop(self, random: np.random.Generator, volume: TrainingVolume, quarters: int, flip: int | None,
                     inside: tuple[int | None, ...] = (None, None, None)) -> Geometry:
        h, w, d = self.patch
        size = (w, h, d) if quarters % 2 else (h, w, d)  # a quarter turn swaps the sides back
        start = tuple(_start(random, full, n, at) for full, n, at in zip(volume.image.shape, size, inside))
        return Geometry(start, size, quarters, flip)

    def _supervised(self, random: np.random.Generator, volume: TrainingVolume, annotated: bool) -> Geometry:
        quarters, flip = _turn_and_mirror(random)
        if not annotated:
            return self._random_crop(random, volume, quarters, flip)
        for _ in range(ATTEMPTS):
            geometry = self._random_crop(random, volume, quarters, flip, (None, None, volume.index))
            if geometry.apply_slice(volume.annotation, 0).any():
                return geometry
        # small foreground in a large slice: around one of its pixels
        pixels = volume.annotation.nonzero()
        row, column = pixels[int(random.integers(len(pixels)))].tolist()
        return self._random_crop(random, volume, quarters, flip, (row, column, volume.index))

    def _noisy(self, view: torch.Tensor, random: np.random.Generator, noise: torch.Generator) -> torch.Tensor:
        if random.random() >= 0.5:
            return view
        return view + (torch.randn(view.shape, generator=noise) * self.noise).clamp_(-self.noise_clip, self.noise_clip)
