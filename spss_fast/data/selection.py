"""Which volumes and which slice of each to annotate: rules that look at prepared images alone, never at a label.

Volumes, k-medoids: the ``budget`` scans that are the most like all others, so that every scan has one like it among
them. Scans are compared by thumbnails of THUMBNAIL voxels a side, whatever their size. Slice, the halving of the
signal: the slice below and above which lies equally much brightness, counted from the volume's darkest value over the
middle half of the plane. docs/annotating.md holds what either is worth beside a random choice
(benchmarks/suggest_rule.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

THUMBNAIL = 8  # voxels a side


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An (H, W, D) image averaged over blocks and sampled at THUMBNAIL voxels a side, flattened, float64."""
    blocks = [side / THUMBNAIL for side in image.shape]
    smooth = ndimage.uniform_filter(image, [max(1, round(block)) for block in blocks], mode="nearest")
    centres = [((np.arange(THUMBNAIL) + 0.5) * block - 0.5).round().astype(int) for block in blocks]
    return smooth[np.ix_(*centres)].ravel().astype(np.float64)


def distances(features: Sequence[np.ndarray]) -> np.ndarray:
    """(N, N) float64: root mean square difference between any two of N feature vectors."""
    rows = np.stack(features)
    return np.stack([np.sqrt(((rows - row) ** 2).mean(1)) for row in rows])


def k_medoids(distance: np.ndarray, count: int, fixed: Sequence[int] = ()) -> list[int]:
    """``count`` of N items, the ``fixed`` ones among them, such that the sum of distances from every item to its
    nearest chosen one is small.

    Kaufman and Rousseeuw's PAM: items are added one at a time, each the one that lowers the sum most, then single
    ones (not the fixed) are exchanged for as long as that lowers it. There is no chance in it: the same ``distance``
    (N, N) gives the same items, first the fixed, then in the order of their places. Raises ``ValueError`` for a count
    that is smaller than the fixed or larger than N.
    """
    if not len(fixed) <= count <= len(distance):
        raise ValueError(f"cannot choose {count} of {len(distance)} items with {len(fixed)} of them fixed")
    far = np.full(len(distance), distance.max() + 1)

    def total(chosen: list[int]) -> np.ndarray:
        """(N,): the sum of distances with each item as one more, infinite for the chosen."""
        nearest = distance[chosen].min(0) if chosen else far
        sums = np.minimum(distance, nearest).sum(1)
        sums[chosen] = np.inf
        return sums

    kept, added = list(fixed), []
    while len(kept) + len(added) < count:
        added.append(int(total(kept + added).argmin()))
    while added:
        now = distance[kept + added].min(0).sum()
        swaps = [total(kept + added[:i] + added[i + 1 :]) for i in range(len(added))]
        best = min(range(len(added)), key=lambda i: swaps[i].min())
        if swaps[best].min() >= now * (1 - 1e-9):  # rounding alone must not exchange two items for ever
            break
        added[best] = int(swaps[best].argmin())
    return kept + sorted(added)


def halving_slice(image: np.ndarray) -> int:
    """The slice z of an (H, W, D) image at which half of its signal is reached, from slice 0 on.

    A slice's signal is the sum of its brightness above the volume's minimum over the middle half of H and of W. (The
    slice with the shortest paths to all others along the chain of neighbours, which seems to ask more of the image,
    is the middle one whatever the image: distances along a line are least from its median.)
    """
    height, width = image.shape[:2]
    middle = image[height // 4 : height - height // 4, width // 4 : width - width // 4]
    signal = (middle - image.min()).sum((0, 1), dtype=np.float64)
    reached = np.cumsum(signal)
    return int(np.searchsorted(reached, reached[-1] / 2))
