"""One slice as an SVG: the image, contours over it in voxel coordinates, and overlays of uncertainty and error."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib import image as mpl_image
from matplotlib.figure import Figure
from matplotlib.path import Path as Contour
from scipy import ndimage

from spss_fast.engine.preview import COLORS
from spss_fast.reporting.gallery import Example

# in drawing order; dashes on top of whole lines tell them apart where they coincide, in print, and without colours
LINES = {
    "annotated": ("annotated slice", "#ffffff", ""),
    "registration": ("registration label", COLORS["registration"], ""),
    "fused": ("fused label", COLORS["fused"], "7 5"),
    "prediction": ("prediction", COLORS["prediction"], ""),
    "reference": ("reference", COLORS["reference"], "3 4"),
}
NOUNS = {"registration": "registration label", "fused": "fused label"}
MISSED, ADDED = "#56b4ff", "#ff8c42"
LARGEST = 320  # pixels a side; slices of more are thinned for the page's size
SURROUNDINGS = 0.4  # of the contours' box, shown on each side of it
LEAST_SHOWN = 0.5  # of the slice's side
FLATTEST = 0.7  # of the picture's longer side is its shorter one at least, where the slice reaches so far


@dataclass
class Panel:
    """One picture: its title and SVG."""

    title: str
    svg: str


@dataclass
class Row:
    """One slice: what it is, what is wrong in it, and its pictures."""

    title: str
    text: str
    panels: list[Panel]


def rows(example: Example, key: str) -> list[Row]:
    """The pictures of an example's slices; ``key`` makes the ids in the SVGs its own."""
    if example.head_last:  # axis 1 is drawn downwards, and a patient stands upright
        example = replace(
            example, image=example.image[:, ::-1], masks={name: m[:, ::-1] for name, m in example.masks.items()},
            entropy=None if example.entropy is None else example.entropy[:, ::-1],
        )
    low, high = np.percentile(example.image, (1, 99))
    gray = np.clip((example.image - low) / max(high - low, 1e-6), 0, 1)
    return [_row(example, gray[:, :, z], z, why, f"{key}-{z}") for z, why in example.slices]


def _row(example: Example, gray: np.ndarray, z: int, why: str, key: str) -> Row:
    masks = {name: mask[:, :, z] for name, mask in example.masks.items()}
    frame = _Frame(gray, masks, example.spacing, key)
    panels = []
    if "registration" in masks:
        pseudo = {name: masks[name] for name in ("annotated", "registration", "fused", "reference") if name in masks}
        panels.append(Panel("pseudo labels", frame.svg(_contours(pseudo), "pseudo labels")))
    if "prediction" in masks:
        shown = {name: masks[name] for name in ("prediction", "reference") if name in masks}
        panels.append(Panel("prediction", frame.svg(_contours(shown), "prediction")))
        if "registration" not in masks and "reference" in masks:
            overlay = _image(_error_colors(masks["prediction"], masks["reference"]), gray.shape, "errors")
            panels.append(Panel("errors", frame.svg(overlay, "errors")))
    if example.entropy is not None:
        overlay = _image(_entropy_colors(example.entropy[:, :, z]), gray.shape, "uncertainty")
        contours = _contours({"prediction": masks["prediction"]})
        panels.append(Panel("uncertainty", frame.svg(overlay + contours, "uncertainty")))
    # the first picture brings the image, the others refer to it
    panels[0].svg = panels[0].svg.replace(frame.reference(), frame.definition(), 1)
    return Row(f"Slice {z} of {example.image.shape[2]}: {why}", _differences(masks), panels)


def _differences(masks: dict[str, np.ndarray]) -> str:
    """What the labels of one slice miss and add beside the reference, in words."""
    if "reference" not in masks:
        return ""
    reference, parts = masks["reference"], []
    for name in ("registration", "fused", "prediction"):
        if name in masks:
            missed, added = (np.count_nonzero(part) for part in (reference & ~masks[name], masks[name] & ~reference))
            parts.append(f"{NOUNS.get(name, name)} misses {missed}, adds {added}")
    size = np.count_nonzero(reference)
    return f"{f'Of its {size} reference voxels' if size else 'It has no reference voxels'}: {'; '.join(parts)}."


class _Frame:
    """The part of a slice (H, W) that is shown, at the shape it has in the body: axis 0 to the right, axis 1 down."""

    def __init__(self, gray: np.ndarray, masks: dict[str, np.ndarray], spacing: tuple[float, ...], key: str):
        self.gray, self.key = gray, key
        union = np.any(list(masks.values()), 0)
        size = [(end - start) * step for (start, end), step in zip(self._extents(union, (0, 0)), spacing)]
        self.box = self._extents(union, [math.ceil(FLATTEST * max(size) / step) for step in spacing[:2]])
        (left, right), (top, bottom) = self.box
        self.aspect = (right - left) * spacing[0] / ((bottom - top) * spacing[1])

    @staticmethod
    def _extents(mask: np.ndarray, least: Sequence[int]) -> list[tuple[int, int]]:
        return [_extent(mask, axis, least[axis]) for axis in (0, 1)]

    def definition(self) -> str:
        return _image(self.gray, self.gray.shape, "scan", self.key)

    def reference(self) -> str:
        return f'<use href="#{self.key}"/>'

    def svg(self, content: str, label: str) -> str:
        (left, right), (top, bottom) = self.box
        return (
            f'<svg role="img" aria-label="{label}" viewBox="{left} {top} {right - left} {bottom - top}" '
            f'preserveAspectRatio="none" style="aspect-ratio:{self.aspect:.4f}">{self.reference()}{content}</svg>'
        )


def _extent(mask: np.ndarray, axis: int, least: int) -> tuple[int, int]:
    """First voxel and end along ``axis`` of what is shown: the mask and its surroundings, ``least`` voxels or more."""
    side = mask.shape[axis]
    inside = np.flatnonzero(mask.any(1 - axis))
    if not inside.size:
        return 0, side
    first, end = inside[0], inside[-1] + 1
    length = min(side, max(round((end - first) * (1 + 2 * SURROUNDINGS)), round(LEAST_SHOWN * side), least))
    start = int(np.clip((first + end - length) // 2, 0, side - length))
    return start, start + length


def _contours(masks: dict[str, np.ndarray]) -> str:
    """Outlines of masks (H, W) in voxel coordinates, where voxel i reaches from i to i + 1."""
    return "".join(
        f'<path class="{name}" d="{path}"><title>{LINES[name][0]}</title></path>'
        for name, mask in masks.items() if (path := _outline(mask))
    )


def _outline(mask: np.ndarray) -> str:
    if not mask.any():
        return ""
    padded = np.pad(mask, 1).T.astype(float)  # closed at the border as well
    contours = Figure().subplots().contour(padded, [0.5]).get_paths()[0]
    parts = []
    for (x, y), code in zip(contours.vertices - 0.5, contours.codes):
        if code == Contour.CLOSEPOLY:
            parts.append("Z")
        else:
            parts.append(f"{'M' if code == Contour.MOVETO else 'L'}{x:g} {y:g}")
    return "".join(parts)


def _error_colors(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(H, W, 4): what is missed and what is added."""
    colors = np.zeros((*prediction.shape, 4))
    for mask, color in ((reference & ~prediction, MISSED), (prediction & ~reference, ADDED)):
        colors[mask] = matplotlib.colors.to_rgba(color, 0.75)
    return colors


def _entropy_colors(entropy: np.ndarray) -> np.ndarray:
    """(H, W, 4): entropy from 0 (the image itself) to ln 2 and beyond (opaque)."""
    share = np.clip(entropy / np.log(2), 0, 1)
    colors = matplotlib.colormaps["inferno"](0.25 + 0.75 * share)
    colors[..., 3] = 0.85 * share
    return colors


def _image(values: np.ndarray, shape: tuple[int, int], kind: str, key: str = "") -> str:
    """Gray (H, W) or colours (H, W, 4) in 0 .. 1 as an image of ``shape`` voxels, as a data URI."""
    thin = max(1.0, max(values.shape[:2]) / LARGEST)
    if thin > 1:
        factors = (1 / thin, 1 / thin) + (1,) * (values.ndim - 2)
        values = np.clip(ndimage.zoom(values, factors, order=1), 0, 1)
    values = np.swapaxes(values, 0, 1)
    file = io.BytesIO()
    options = {"cmap": "gray", "vmin": 0, "vmax": 1} if values.ndim == 2 else {}
    mpl_image.imsave(file, (np.round(values * 255) / 255), format="png", **options)
    data = base64.b64encode(file.getvalue()).decode()
    name = f'id="{key}" ' if key else ""
    return (
        f'<image {name}class="{kind}" width="{shape[0]}" height="{shape[1]}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )
