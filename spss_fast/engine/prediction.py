"""One scan from file to segmentation: prepared as for training, through the network, back onto the file's own grid."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage
from scipy.special import entr
from torch import Tensor, nn

from spss_fast.data.geometry import Grid, resample
from spss_fast.data.layouts import Case, read_case
from spss_fast.data.preparation import prepare_scan
from spss_fast.engine.inference import sliding_window
from spss_fast.settings import DataSettings


@dataclass(frozen=True)
class Options:
    """How a scan is predicted; the settings it is prepared with are the training's."""

    overlap: float = 0.5  # of neighbouring windows, as a fraction of the patch
    mirror: bool = False  # average over in-plane flips
    largest_component: bool = False  # of each class
    tiles: int = 4  # windows through the network at once
    amp: torch.dtype | None = None  # autocast type
    statistics: str = "running"  # of batch norm, or those of each scan: "case"


@dataclass
class Segmentation:
    """What a network says of a scan, on the grid of the scan's file; arrays (H, W, D) along that file's axes."""

    grid: Grid
    label: np.ndarray  # uint8: 0 background, 1 ... C - 1, or the label values of classes that were kept apart
    probabilities: dict[int, np.ndarray] = field(default_factory=dict)  # float32 per foreground class, where asked for
    entropy: np.ndarray | None = None  # float32, nats, 0 to ln C, where asked for

    def volume_ml(self) -> float:
        """Volume of everything that is not background, in millilitres."""
        return float(np.count_nonzero(self.label) * np.prod(self.grid.spacing) / 1000)


def segment(
    network: nn.Module, case: Case, settings: DataSettings, options: Options, probabilities: bool = False,
    entropy: bool = False,
) -> Segmentation:
    """The segmentation of the scan ``case`` by ``network``, which is in evaluation mode.

    Raises ``UserError`` where the scan cannot be read or prepared.
    """
    image, grid, source = _prepared(case, settings)
    stride = tuple(max(1, round(side * (1 - options.overlap))) for side in settings.patch)
    probability = sliding_window(
        network, torch.from_numpy(image), settings.patch, stride, options.amp, options.tiles, gaussian=True,
        mirror=options.mirror, statistics=options.statistics,
    )
    del image
    result = decide(probability, grid, source, probabilities, entropy)
    if options.largest_component:
        keep_largest_components(result.label)
    if settings.classes:
        result.label = np.array(settings.class_values, np.uint8)[result.label]
    return result


def _prepared(case: Case, settings: DataSettings) -> tuple[np.ndarray, Grid, Grid]:
    """The prepared image, its grid and the file's; the scan as it was read is let go of."""
    scan = read_case(case, settings.plane)
    image, _, grid = prepare_scan(scan, case, settings)
    return image, grid, scan.source


def decide(
    probability: Tensor, grid: Grid, source: Grid, probabilities: bool = False, entropy: bool = False
) -> Segmentation:
    """Label map and maps on the grid ``source`` from softmax ``probability`` (C, H, W, D) on ``grid``.

    Each foreground class is interpolated linearly on its own, and background is what they leave of 1: labels decided
    after that have smooth borders, where decided before they would show the coarser grid's voxels. What ``source``
    has beyond ``grid`` is background. One class at a time keeps this to a few volumes of ``source``'s size.
    """
    result = Segmentation(source, np.zeros(source.size, np.uint8, order="F"))
    best = rest = total = None
    for c in range(1, len(probability)):
        p = resample(probability[c].cpu().numpy(), grid, source, linear=True)
        if best is None:
            best, rest = p, 1 - p
            result.label[:] = 1
        else:
            result.label[p > best] = c
            best, rest = np.maximum(best, p), rest - p
        if entropy:
            total = entr(p) if total is None else total + entr(p)
        if probabilities:
            result.probabilities[c] = p
    result.label[best <= rest] = 0
    if entropy:
        # rounding may leave less than nothing, or make a certain class a little more than certain
        result.entropy = np.maximum(total + entr(np.maximum(rest, 0)), 0)
    return result


def keep_largest_components(label: np.ndarray) -> None:
    """Clears, in place, all but the largest face-connected component of each class of a label map."""
    for c, box in enumerate(ndimage.find_objects(label), 1):
        if box is None:
            continue
        part = label[box]
        components, count = ndimage.label(part == c)
        if count > 1:
            largest = np.bincount(components.ravel(order="K"))[1:].argmax() + 1
            part[(components != largest) & (components > 0)] = 0
