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

from spss_fast.engine.preview import COLORS, class_color
from spss_fast.reporting.gallery import Example, missed_and_added

# in drawing order; dashes on top of whole lines tell them apart where they coincide, in print, without colours, and
# where colours stand for classes
LINES = {
    "annotated": ("annotated slice", "#ffffff", ""),
    "registration": ("registration label", COLORS["registration"], ""),
    "fused": ("fused label", COLORS["fused"], "7 5"),
    "prediction": ("prediction", COLORS["prediction"], ""),
    "reference": ("reference", COLORS["reference"], "3 4"),
}
NOUNS = {"registration": "registration label", "fused": "fused label"}
MISSED, ADDED, WRONG_CLASS = "#56b4ff", "#ff8c42", "#e65cff"
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


def rows(example: Example, values: Sequence[int], key: str) -> list[Row]:
    """The pictures of an example's slices; ``values`` (C,) are the classes' label values, and ``key`` makes the ids in
    the SVGs its own."""
    if example.head_last:  # axis 1 is drawn downwards, and a patient stands upright
        example = replace(
            example, image=example.image[:, ::-1], labels={name: m[:, ::-1] for name, m in example.labels.items()},
            entropy=None if example.entropy is None else example.entropy[:, ::-1],
        )
    low, high = np.percentile(example.image, (1, 99))
    gray = np.clip((example.image - low) / max(high - low, 1e-6), 0, 1)
    return [_row(example, gray[:, :, z], z, why, values, f"{key}-{z}") for z, why in example.slices]


def _row(example: Example, gray: np.ndarray, z: int, why: str, values: Sequence[int], key: str) -> Row:
    labels = {name: label[:, :, z] for name, label in example.labels.items()}
    frame = _Frame(gray, labels, example.spacing, key)

    def contours(*names: str) -> str:
        return _contours({name: labels[name] for name in names if name in labels}, values)

    panels = []
    if "registration" in labels:
        pseudo = contours("annotated", "registration", "fused", "reference")
        panels.append(Panel("pseudo labels", frame.svg(pseudo, "pseudo labels")))
    if "prediction" in labels:
        panels.append(Panel("prediction", frame.svg(contours("prediction", "reference"), "prediction")))
        if "registration" not in labels and "reference" in labels:
            overlay = _image(_error_colors(labels["prediction"], labels["reference"]), gray.shape, "errors")
            panels.append(Panel("errors", frame.svg(overlay, "errors")))
    if example.entropy is not None:
        overlay = _image(_entropy_colors(example.entropy[:, :, z], len(values)), gray.shape, "uncertainty")
        panels.append(Panel("uncertainty", frame.svg(overlay + contours("prediction"), "uncertainty")))
    # the first picture brings the image, the others refer to it
    panels[0].svg = panels[0].svg.replace(frame.reference(), frame.definition(), 1)
    return Row(f"Slice {example.in_file[z]}: {why}", _differences(labels), panels)


def _differences(labels: dict[str, np.ndarray]) -> str:
    """What the labels of one slice miss and add beside the reference, in words."""
    if "reference" not in labels:
        return ""
    reference, parts = labels["reference"], []
    for name in ("registration", "fused", "prediction"):
        if name in labels:
            missed, added = map(np.count_nonzero, missed_and_added(labels[name], reference))
            parts.append(f"{NOUNS.get(name, name)} misses {missed}, adds {added}")
    size = np.count_nonzero(reference)
    return f"{f'Of its {size} reference voxels' if size else 'It has no reference voxels'}: {'; '.join(parts)}."


class _Frame:
    """The part of a slice (H, W) that is shown, at the shape it has in the body: axis 0 to the right, axis 1 down."""

    def __init__(self, gray: np.ndarray, labels: dict[str, np.ndarray], spacing: tuple[float, ...], key: str):
        self.gray, self.key = gray, key
        union = np.any(list(labels.values()), 0)
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


def _contours(labels: dict[str, np.ndarray], values: Sequence[int]) -> str:
    """Outlines of the classes of labels (H, W) in voxel coordinates, where voxel i reaches from i to i + 1: in the
    label's own colour, or, of several classes, in theirs."""
    parts = []
    for name, label in labels.items():
        for c, value in enumerate(values[1:], 1):
            color, title = "", LINES[name][0]
            if len(values) > 2:
                title += f", label value {value}"
                if name != "annotated":  # a border around the lines on it
                    color = f' style="stroke:{class_color(c)}"'
            if path := _outline(label == c):
                parts.append(f'<path class="{name}"{color} d="{path}"><title>{title}</title></path>')
    return "".join(parts)


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
    """(H, W, 4): what is missed, what is added, and what is both, of the wrong class."""
    colors = np.zeros((*prediction.shape, 4))
    missed, added = missed_and_added(prediction, reference)
    for mask, color in ((missed, MISSED), (added, ADDED), (missed & added, WRONG_CLASS)):
        colors[mask] = matplotlib.colors.to_rgba(color, 0.75)
    return colors


def _entropy_colors(entropy: np.ndarray, classes: int) -> np.ndarray:
    """(H, W, 4): entropy from 0 (the image itself) to ln C, complete doubt (opaque)."""
    share = np.clip(entropy / np.log(classes), 0, 1)
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
