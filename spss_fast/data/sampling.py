"""What a training batch holds, drawn from prepared volumes, and its patches in plain PyTorch.

Batch t depends on the seed and t alone, so that a run can go on anywhere, with whichever loader (``loader``). What
training may see of a volume's label (one slice) and what only monitoring may see (all of it) are different fields from
here on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from spss_fast.data.annotations import Annotation, read_annotations
from spss_fast.data.cache import PreparedCase
from spss_fast.data.splits import annotated_slices
from spss_fast.settings import Config, DataSettings

ATTEMPTS = 16


@dataclass
class TrainingVolume:
    """One prepared volume as training sees it: its image and, where annotated, one slice of its label.

    ``image`` (H, W, D) float32; ``index`` the annotated slice z* and ``annotation`` its label (H, W) uint8, or both
    None; ``reference`` the full label (H, W, D) uint8 or None, which no loss and no crop may depend on.
    ``index_in_file`` is the annotated slice as the scan's file counts it (:func:`index_in_file`), for people.
    """

    name: str
    image: torch.Tensor
    index: int | None = None
    annotation: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    index_in_file: int | None = None


@dataclass
class Batch:
    """B volumes of patch (h, w, d), of which the first L are annotated.

    ``image`` is the supervised view, ``view1`` and ``view2`` (A1, A2) share a geometry of their own and differ by
    noise; all (B, 1, h, w, d) float32, on the device that trains. On the CPU always, and in the geometry of ``image``:
    ``annotation`` (L, h, w) uint8; ``index`` (L,) int64, the annotated slice within the patch; ``reference``
    (L, h, w, d) uint8, which is there for monitoring only, and None unless every annotated volume has one.
    """

    names: list[str]
    image: torch.Tensor
    view1: torch.Tensor
    view2: torch.Tensor
    annotation: torch.Tensor
    index: torch.Tensor
    reference: torch.Tensor | None

    def with_images(self, image: torch.Tensor, view: torch.Tensor) -> Batch:
        """The same batch with other images: a supervised view, and one view for A1 and A2."""
        return replace(self, image=image, view1=view, view2=view)


def training_volumes(cases: list[PreparedCase], settings: DataSettings, seed: int) -> list[TrainingVolume]:
    """The annotated cases as training sees them: their image, and the label of one slice each."""
    slices, given = annotated_slices(cases, settings, seed), read_annotations(settings)
    volumes = []
    for case in cases:
        index, image, named = slices[case.name], torch.from_numpy(case.image), given.get(case.name)
        annotation, full = annotated_slice(case, index, named, settings), case.full_label()
        reference = None if full is None else torch.from_numpy(full)
        where = index_in_file(case, index, named)
        volumes.append(TrainingVolume(case.name, image, index, annotation, reference, where))
    return volumes


def _annotation(case: PreparedCase, named: Annotation | None) -> Annotation | None:
    """What the user ``named``, else the only slice that the case's label shows; None for a slice of a full label."""
    return named if named is not None or case.only_slice is None else Annotation(case.only_slice)


def annotated_slice(
    case: PreparedCase, index: int, named: Annotation | None, settings: DataSettings
) -> torch.Tensor:
    """The label (H, W) uint8 in [0, C) of prepared slice ``index``; of the one that the user ``named``, and of the only
    one that a label shows, from the file itself."""
    annotation = _annotation(case, named)
    mask = case.label()[:, :, index] if annotation is None else case.annotation_from_source(annotation, settings)
    return torch.from_numpy(np.array(mask, order="C"))


def index_in_file(case: PreparedCase, index: int, named: Annotation | None) -> int:
    """Prepared slice ``index``, the annotated one, as the scan's file counts it: from 0 along its slice axis. Where the
    prepared slices are others than the file's, it is the nearest, the only one that a label shows, or the one that the
    user ``named``."""
    annotation = _annotation(case, named)
    return case.slice_to_source(index) if annotation is None else annotation.index_in(case.source)


def unlabeled_volumes(cases: list[PreparedCase]) -> list[TrainingVolume]:
    """The other training cases as training sees them: their image."""
    return [TrainingVolume(case.name, torch.from_numpy(case.image)) for case in cases]


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

    @property
    def steps(self) -> tuple[bool, bool, bool]:
        """The turn and the mirroring as three steps to take in this order: whether the in-plane axes are exchanged,
        whether axis 0 is mirrored, whether axis 1 is."""
        rows, columns = self.quarters in (1, 2), self.quarters in (2, 3)
        return self.quarters % 2 == 1, rows ^ (self.flip == 0), columns ^ (self.flip == 1)

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


@dataclass(frozen=True)
class Sample:
    """One place of a batch: a volume, the ``supervised`` view of it, and the geometry that its two ``views`` share."""

    volume: TrainingVolume
    supervised: Geometry
    views: Geometry
    noisy: tuple[bool, bool]  # whether A1 has noise, whether A2 has


@dataclass(frozen=True)
class Draw:
    """All that chance decides about a batch: its samples, annotated and not, and the seed of their noise."""

    labeled: list[Sample]
    unlabeled: list[Sample]
    noise_seed: int

    @property
    def samples(self) -> list[Sample]:
        return self.labeled + self.unlabeled

    @property
    def names(self) -> list[str]:
        return [sample.volume.name for sample in self.samples]

    @property
    def index(self) -> torch.Tensor:
        """(L,) int64: the annotated slices within their patches."""
        return torch.tensor([sample.volume.index - sample.supervised.start[2] for sample in self.labeled])

    @property
    def has_reference(self) -> bool:
        return all(sample.volume.reference is not None for sample in self.labeled)


class Sampler:
    """Draws the batches of a run: annotated and unlabelled volumes in two orders, each drawn anew every pass.

    Supervised view: random quarter turn and mirroring in plane, random crop that holds the annotated
    slice and, where one fits, some of its foreground. A1 and A2: turn and mirroring of their own with probability
    0.5, one crop, and per view with probability 0.5 noise N(0, ``noise``) clipped to ``noise_clip``. Volumes smaller
    than the patch are centred in it, with their minimum (labels: 0) around them.

    Of ``world`` processes that train together, each takes its share by its ``rank``: batch t of this rank is batch
    t * world + rank of the row that a single process would see, so that together they pass over the volumes once.
    Raises ``ValueError`` for volumes that cannot make a batch, and for a rank that is not one of the world's.
    """

    def __init__(self, labeled: list[TrainingVolume], unlabeled: list[TrainingVolume], config: Config, seed: int,
                 rank: int = 0, world: int = 1):
        training = config.training
        if not labeled or any(volume.index is None or volume.annotation is None for volume in labeled):
            raise ValueError("labeled must hold volumes with an index and an annotation")
        if not unlabeled and training.batch_unlabeled:
            raise ValueError("unlabeled must hold at least one volume")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of the {world} of the world")
        self.labeled, self.unlabeled = labeled, unlabeled
        self.counts = training.batch_labeled, training.batch_unlabeled
        self.patch = config.data.patch
        self.noise, self.noise_clip = config.selection.noise, config.selection.noise_clip
        self.seed, self.rank, self.world = seed, rank, world
        self._minimum: dict[int, float] = {}

    def minimum(self, volume: TrainingVolume) -> float:
        """The least value of a volume's image, which stands around it where it is smaller than the patch."""
        if id(volume) not in self._minimum:  # all of the volume is read for it, so not before it is needed
            self._minimum[id(volume)] = float(volume.image.min())
        return self._minimum[id(volume)]

    def batch(self, step: int) -> Batch:
        """Batch number ``step``, whatever was drawn before."""
        draw = self.draw(step)
        return self.add_noise(self.patches(draw), draw)

    def draw(self, step: int) -> Draw:
        """What batch number ``step`` holds; no voxel is touched for it but those of annotations."""
        step = step * self.world + self.rank
        random = np.random.default_rng([self.seed, 0, step])
        noise_seed = int(random.integers(2**63))
        volumes = [self.labeled[i] for i in self._chosen(1, len(self.labeled), self.counts[0], step)]
        volumes += [self.unlabeled[i] for i in self._chosen(2, len(self.unlabeled), self.counts[1], step)]
        samples = []
        for position, volume in enumerate(volumes):
            supervised = self._supervised(random, volume, position < self.counts[0])
            quarters, flip = _turn_and_mirror(random) if random.random() < 0.5 else (0, None)
            views = self._random_crop(random, volume, quarters, flip)
            noisy = random.random() < 0.5, random.random() < 0.5
            samples.append(Sample(volume, supervised, views, noisy))
        return Draw(samples[: self.counts[0]], samples[self.counts[0] :], noise_seed)

    def patches(self, draw: Draw) -> Batch:
        """The batch of ``draw`` before the noise, on the CPU: A1 and A2 are one and the same tensor."""
        image, view = (
            torch.stack([
                getattr(sample, name).apply(sample.volume.image, self.minimum(sample.volume)) for sample in draw.samples
            ]).unsqueeze(1)
            for name in ("supervised", "views")
        )
        annotation = torch.stack([s.supervised.apply_slice(s.volume.annotation, 0) for s in draw.labeled])
        reference = None
        if draw.has_reference:
            reference = torch.stack([s.supervised.apply(s.volume.reference, 0) for s in draw.labeled])
        return Batch(draw.names, image, view, view, annotation, draw.index, reference)

    def add_noise(self, batch: Batch, draw: Draw) -> Batch:
        """``batch``, as :meth:`patches` makes it, with the noise of A1 and A2; A1's own memory is written to.

        The noise is torch's on the device of the batch, seeded by ``draw`` alone: the same for every loader there.
        """
        view1, view2 = batch.view1, batch.view1.clone()
        generator = torch.Generator(view1.device).manual_seed(draw.noise_seed)
        for *views, sample in zip(view1, view2, draw.samples):
            for view, noisy in zip(views, sample.noisy):
                if noisy:
                    noise = torch.randn(view.shape, generator=generator, device=view.device)
                    view += noise.mul_(self.noise).clamp_(-self.noise_clip, self.noise_clip)
        return replace(batch, view1=view1, view2=view2)

    def _chosen(self, role: int, volumes: int, count: int, step: int) -> list[int]:
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
