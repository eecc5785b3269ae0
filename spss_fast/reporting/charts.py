"""Curves as inline SVG whose colours are the page's, so that they follow its light or dark scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spss_fast.engine.evaluation import Rows
from spss_fast.reporting.gallery import Example
from spss_fast.reporting.record import Curves, Record, defined

# colours that stand for a property of the page's style sheet until the SVG is written
INK, GRID = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
PROPERTIES = {INK: "currentColor", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8.5, "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.5, "legend.frameon": False,
}
POINTS = 300  # a curve of more is averaged down to as many, for the page's size
TREND_FROM = 20  # rows from which a running mean is drawn over the curve


@dataclass
class Chart:
    """One chart: its title, what to see in it, and the SVG."""

    title: str
    note: str
    svg: str


def charts(record: Record) -> list[Chart]:
    """The curves of a run in the order of its stages; those of which nothing is logged are left out."""
    config, joint = record.config, record.joint
    made = []
    if record.registration:
        lines = {"image loss": record.registration["loss"]}
        made.append(_chart("Stage 1: registration", "Last batch of each epoch.", record.registration["step"], lines,
                           "epoch"))
    if len(joint.get("step", ())) < 2:
        return made
    step, drops = joint["step"], _learning_rate_steps(record)
    dashed = " Dashed: the learning rate falls." if drops else ""

    def add(title: str, note: str, names: dict[str, str], **options) -> None:
        lines = {label: joint[name] for name, label in names.items() if name in joint}
        lines = {label: values for label, values in lines.items() if not np.isnan(values).all()}
        if options.get("log"):
            note += "".join(f" {label} is 0 throughout." for label, values in lines.items() if not values.any())
        if lines:
            known = min(np.count_nonzero(~np.isnan(values)) for values in lines.values())
            if known < len(step):
                note += f" Of the {len(step):,} logged iterations {known:,}: the others have no value."
            made.append(_chart(title, note, step, lines, "iteration", drops=drops, **options))

    add("Stage 2: losses of the student", "Logarithmic. L_u and L_c grow with their weight w(t)." + dashed,
        {"loss_s": "supervised L_s", "loss_u": "unsupervised L_u", "loss_c": "contrastive L_c"}, log=True)
    add("Quality of the pseudo labels",
        "Dice against the full labels, which training never sees; each point is one batch of patches.",
        {"dice_registration": "registration", "dice_fused": "fused"})
    add("Pace: L_pace and λ", "Selection opens where L_pace falls below λ. Logarithmic.",
        {"loss_pace": "L_pace", "lambda": "λ"}, log=True)
    voxels = math.prod(config.data.patch)
    if "K" in joint:
        made.append(_chart("K, the voxels that are trusted", f"As a share of the {voxels:,} voxels of one patch.", step,
                           {"K": joint["K"] / voxels}, "iteration", drops=drops, percent=True, floor=0))
    classes = config.data.class_count
    add("Uncertainty of the teacher",
        f"Mean entropy over all voxels; complete doubt is ln {classes} = {math.log(classes):.2f}.",
        {"entropy": "entropy"}, floor=0)
    add("Stage 2: registration", "Image loss without labels, and with the Dice of the fused labels.",
        {"loss_registration": "images", "loss_registration_labels": "images and labels"})
    add("Teacher's share of the fused labels", "w_p: above one half the teacher outvotes the registration labels.",
        {"w_p": "w_p"}, floor=0)
    add("Ramp", f"w(t), the weight of L_u and L_c; it ends at {config.selection.ramp_max:g}.", {"w": "w(t)"}, floor=0)
    return made


def dice_of_cases(groups: dict[str, Rows]) -> str:
    """Dice of every case that has one as a dot, a row for each group, with the mean as a line; an SVG."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "cases"}):
        figure, axis = _figure((4.4, 0.62 + 0.62 * len(groups)))
        for place, (rows, color) in enumerate(zip(groups.values(), SERIES)):
            values = defined(rows, "dice")
            # dots of similar Dice beside each other, not on top
            offset = 0.16 * (np.arange(len(values)) % 3 - 1) if len(values) > 8 else np.zeros(len(values))
            axis.plot(values, place + offset, "o", color=color, markersize=4, alpha=0.75, markeredgewidth=0)
            axis.plot([values.mean()] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.5)
        names = [f"{name} ({len(defined(rows, 'dice'))})" for name, rows in groups.items()]
        axis.set_yticks(range(len(groups)), names)
        axis.set_ylim(len(groups) - 0.45, -0.55)
        axis.set_xlim(-0.02, 1.02)
        axis.tick_params("y", length=0)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("Dice of each case (line: mean)")
        return _svg(figure, "Dice of each case")


def by_distance(examples: Sequence[Example]) -> Chart | None:
    """How the labels of the gallery's annotated volumes fade; None where none of them has a full label."""
    examples = [example for example in examples if "reference" in example.labels]
    if not examples:
        return None
    curves = dice_by_distance(examples)
    several = f"the {len(examples)} annotated volumes below" if len(examples) > 1 else "the annotated volume below"
    return _chart(
        "Labels by distance from the annotated slice",
        f"Dice of slices so far away (the mean over classes, of several), of {several} together.",
        np.arange(len(next(iter(curves.values())))), curves, "slices from the annotated one", smoothed=False,
    )


def dice_by_distance(examples: Sequence[Example]) -> Curves:
    """Dice of all voxels that lie 0, 1, 2, ... slices from the annotated one, of all ``examples`` together, for each
    kind of label that all of them have: the mean over the classes that label or reference has there, NaN where that is
    none."""
    names = [name for name in ("registration", "fused", "prediction") if all(name in e.labels for e in examples)]
    classes = max(int(example.labels[name].max()) for example in examples for name in ("reference", *names))
    overlap, total = np.zeros((2, len(names), classes, max(example.image.shape[2] for example in examples)))
    for example in examples:
        distance = np.abs(np.arange(example.image.shape[2]) - example.annotated)
        for row, c in np.ndindex(len(names), classes):
            label, reference = (example.labels[name] == c + 1 for name in (names[row], "reference"))
            np.add.at(overlap[row, c], distance, 2 * (label & reference).sum((0, 1)))
            np.add.at(total[row, c], distance, label.sum((0, 1)) + reference.sum((0, 1)))
    last = int(np.flatnonzero(total.any((0, 1)))[-1]) + 1
    of_class = np.divide(overlap, total, out=np.zeros_like(total), where=total > 0)
    present = (total > 0).sum(1)
    dice = np.divide(of_class.sum(1), present, out=np.full(present.shape, np.nan), where=present > 0)
    return dict(zip(names, dice[:, :last]))


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _learning_rate_steps(record: Record) -> list[int]:
    training = record.config.training
    return list(range(training.lr_every, record.reached + 1, training.lr_every)) if training.lr_every else []


def averaged(values: np.ndarray) -> np.ndarray:
    """``values`` (N,) averaged over neighbours down to at most :data:`POINTS`."""
    if len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])


def trend(values: np.ndarray) -> np.ndarray:
    """The centred running mean over a tenth of ``values`` (N,), narrower at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _chart(
    title: str, note: str, step: np.ndarray, lines: Curves, along: str, log: bool = False, drops: Sequence[int] = (),
    percent: bool = False, floor: float | None = None, smoothed: bool = True,
) -> Chart:
    """``lines`` over ``step``, each over those of its values that are not NaN."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure, axis = _figure((4.4, 2.5))
        widths = (2.6, 1.6, 1.2, 1.2) if len(lines) > 1 else (1.8,)  # the first one shows where others cover it
        for (label, values), color, width in zip(lines.items(), SERIES, widths):
            known = ~np.isnan(values)
            few = np.count_nonzero(known) < TREND_FROM
            x, values = averaged(step[known]), averaged(values[known])
            schedule = len(np.unique(values)) <= len(values) // 2  # it goes in steps: shown as they are
            smooth = smoothed and not few and not schedule
            marker = "o" if few else None
            axis.plot(x, values, color=color, marker=marker, markersize=width + 1.4, linewidth=0.8 if smooth else width,
                      alpha=0.35 if smooth else 1, label=None if smooth else label)
            if smooth:
                axis.plot(x, trend(values), color=color, linewidth=width, label=label)
        if log:
            axis.set_yscale("log", nonpositive="mask")  # a loss of 0 has no logarithm
        else:
            axis.yaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        for drop in drops:
            axis.axvline(drop, color=INK, linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.6)
        if floor is not None:
            axis.set_ylim(bottom=floor)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel(along)
        if len(lines) > 1:
            axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=len(lines), handlelength=1.2,
                        columnspacing=1.2, borderaxespad=0.2)
        return Chart(title, note, _svg(figure, title))


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for the inside of a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for color, value in PROPERTIES.items():
        text = text.replace(color, value)
    # matplotlib names every group, in every figure alike; what is referred to has a name of its figure's own (hashsalt)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    # the page's own font; the size comes from the page's width
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
