"""Preview PNGs: what the engine believes about one slice, next to what is true where that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spss_fast.data.sampling import Batch
from spss_fast.engine.checkpoint import atomically
from spss_fast.engine.step import Outputs

COLORS = {"registration": "#ffb000", "fused": "#648fff", "prediction": "#dc267f", "reference": "#00e08a"}


def _panel(axis, image: np.ndarray, title: str, contours: dict[str, np.ndarray]) -> None:
    low, high = np.percentile(image, (1, 99))
    axis.imshow(image.T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    for name, mask in contours.items():
        if mask.any():
            axis.contour(mask.T, [0.5], colors=COLORS[name], linewidths=1.2)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def save_preview(path: Path, batch: Batch, outputs: Outputs, iteration: int) -> None:
    """One row per annotated volume of the batch, at its annotated slice and half way to either end of the patch.

    Columns: registration label, fused label and the student's prediction, each with the reference where a full label
    exists; then the mixed image m with the voxels that the uncertainty mask M selects.
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
            contours = {name: label[i, :, :, z]}
            if batch.reference is not None:
                contours = {"reference": batch.reference[i, :, :, z].numpy()} | contours
            _panel(axis, image[i, :, :, z], f"{name}, slice {z}{star}", contours)
        _panel(row[3], mixed[i, :, :, z], f"m, selected voxels: {mask.mean():.1%} of the batch", {})
        overlay = np.zeros((*mask.shape[1:3], 4))
        overlay[mask[i, :, :, z]] = (0.4, 0.55, 1.0, 0.45)
        row[3].imshow(overlay.swapaxes(0, 1), interpolation="nearest")
    reference = "green: reference" if batch.reference is not None else "no full labels to compare with"
    figure.suptitle(f"iteration {iteration}: {', '.join(batch.names[: len(batch.index)])} ({reference})", fontsize=10)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))


def _slices(annotated: int, depth: int) -> list[int]:
    return sorted({annotated // 2, annotated, (annotated + depth - 1) // 2})
