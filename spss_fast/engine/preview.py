"""Preview PNGs: what the engine believes about one slice, next to what is true where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spss_fast.data.sampling import Batch
from spss_fast.engine.step import Outputs
from spss_fast.files import atomically

# of one foreground, by whose label it is; of several classes, by class, the reference dashed
COLORS = {"registration": "#ffb000", "fused": "#648fff", "prediction": "#dc267f", "reference": "#00e08a"}
CLASS_COLORS = ("#ffb000", "#56b4e9", "#ff6f91", "#00e08a", "#b48cff", "#f0e442", "#ff7f0e", "#c8c8c8")


def class_color(c: int) -> str:
    """The colour of foreground class ``c``, from 1."""
    return CLASS_COLORS[(c - 1) % len(CLASS_COLORS)]


def _panel(axis, image: np.ndarray, title: str, labels: dict[str, np.ndarray], classes: int) -> None:
    low, high = np.percentile(image, (1, 99))
    axis.imshow(image.T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    for name, label in labels.items():
        for c in range(1, classes):
            color, line = COLORS[name], "solid"
            if classes > 2:
                color, line = class_color(c), "dashed" if name == "reference" else "solid"
            if (label == c).any():
                axis.contour((label == c).T, [0.5], colors=color, linewidths=1.2, linestyles=line)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def save_preview(path: Path, batch: Batch, outputs: Outputs, iteration: int, values: Sequence[int]) -> None:
    """Three rows per annotated volume of the batch, which they name: at its annotated slice and half way to either end
    of the patch.

    Columns: registration label, fused label and the student's prediction, each with the reference where a full label
    exists; then the mixed image m, turned as its views are, with the voxels that the uncertainty mask M selects.
    All are patches as training sees them, turned and mirrored at random, so that no side of them is the patient's head.
    ``values`` (C,) are the classes' label values, for the legend of several.
    """
    image = batch.image[:, 0].cpu().numpy()
    rows = [(i, z) for i in range(len(batch.index)) for z in _slices(int(batch.index[i]), image.shape[-1])]
    figure = Figure(figsize=(12, 3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    labels = {name: getattr(outputs, name).cpu().numpy() for name in ("registration", "fused", "prediction")}
    mixed, mask = outputs.mixed[:, 0].cpu().numpy(), outputs.mask.cpu().numpy()
    for (i, z), row in zip(rows, axes):
        star = " (annotated)" if z == int(batch.index[i]) else ""
        for axis, (name, label) in zip(row, labels.items()):
            shown = {name: label[i, :, :, z]}
            if batch.reference is not None:
                shown = {"reference": batch.reference[i, :, :, z].numpy()} | shown
            _panel(axis, image[i, :, :, z], f"{name}, patch slice {z}{star}", shown, len(values))
        row[0].text(-0.02, 0.5, batch.names[i], rotation=90, ha="right", va="center", fontsize=9, parse_math=False,
                    transform=row[0].transAxes)
        title = f"m (CutMix, turned), {mask.mean():.2%} selected: blue"
        _panel(row[3], mixed[i, :, :, z], title, {}, len(values))
        overlay = np.zeros((*mask.shape[1:3], 4))
        overlay[mask[i, :, :, z]] = (0.4, 0.55, 1.0, 0.45)
        row[3].imshow(overlay.swapaxes(0, 1), interpolation="nearest")
    several = len(values) > 2
    reference = "no full labels to compare with"
    if batch.reference is not None:
        reference = "dashed: reference" if several else "green: reference"
    if several:
        lines = [Line2D([], [], color=class_color(c), label=f"label {v}") for c, v in enumerate(values) if c]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    figure.suptitle(f"iteration {iteration} ({reference})", fontsize=10)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))


def _slices(annotated: int, depth: int) -> list[int]:
    return sorted({annotated // 2, annotated, (annotated + depth - 1) // 2})
