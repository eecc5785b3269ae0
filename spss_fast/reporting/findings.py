"""What a researcher asks first, answered in plain sentences from the run's own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spss_fast import cli
from spss_fast.engine.evaluation import Rows, measured_grid
from spss_fast.reporting.gallery import Gallery
from spss_fast.reporting.record import Record

GOOD, NOTE, BAD = "good", "note", "bad"
FAR_BELOW = 0.05  # mean Dice of the student under that of the labels it learnt from, from which this is a warning


@dataclass
class Finding:
    """One sentence, and whether it is as it should be, worth knowing, or wrong."""

    text: str
    kind: str = NOTE


@dataclass
class Answer:
    """One question, the figure that answers it shortest, and sentences."""

    question: str
    figure: str
    findings: list[Finding]


def command(record: Record) -> str:
    """How to measure the run."""
    return cli.command_line("evaluate", "--run", record.path)


def answers(record: Record, gallery: Gallery) -> list[Answer]:
    """Is it good? Where does it fail? Did training behave?"""
    return [_quality(record), _failures(record, gallery), _training(record)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _quality(record: Record) -> Answer:
    question, findings = "Is it good?", []
    if record.evaluation:
        values = _column(record.evaluation, "dice")
        figure = f"Dice {values.mean():.3f} ± {values.std():.3f}"
        findings.append(Finding(
            f"The student's Dice is {values.mean():.3f} ± {values.std():.3f} (median {np.median(values):.3f}, from "
            f"{values.min():.3f} to {values.max():.3f}) over {len(values)} {record.evaluated}."))
        if record.stale:
            findings.append(Finding("The checkpoint is newer than evaluation.csv: these figures are of earlier "
                                    f"weights. Measure again: {command(record)}", BAD))
    else:
        figure = "not measured yet"
        findings.append(Finding(
            f"The student has not been measured on its {_plural(len(record.cases['test']), 'test case')}. The command "
            "is below; it needs full labels.", BAD))
    if record.labels:
        values = _column(record.labels, "dice")
        text = (f"The registration labels that it learnt from reach {values.mean():.3f} ± {values.std():.3f} on the "
                f"{_plural(len(values), 'annotated volume')}")
        kind = NOTE
        if record.evaluation:
            difference = _column(record.evaluation, "dice").mean() - values.mean()
            side = "above" if difference > 0 else "below"
            text += f"; the student is {abs(difference):.3f} {side} them, on other cases"
            kind = GOOD if difference > 0 else BAD if difference < -FAR_BELOW else NOTE
        findings.append(Finding(text + ".", kind))
    elif record.finished:
        findings.append(Finding("The registration labels could not be measured: no annotated volume has a full label."))
    if not record.finished:
        findings.append(Finding("This run is not finished: its weights are of a moment in training.", BAD))
    if grid := measured_grid(record.config.data):
        findings.append(Finding(f"Measured on {grid}: not to be compared with figures on others."))
    return Answer(question, figure, findings)


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows.values()])


def _failures(record: Record, gallery: Gallery) -> Answer:
    question, findings = "Where does it fail?", []
    rows, subject = (record.evaluation, "student") if record.evaluation else (record.labels, "registration labels")
    if not rows:
        return Answer(question, "unknown", [
            Finding("No metrics by case: neither the student nor the registration labels are measured.")])
    worst, metrics = next(iter(rows.items()))
    figure = f"worst: {metrics['dice']:.3f}" if record.evaluation else f"worst label: {metrics['dice']:.3f}"
    distance = metrics.get("hd95", math.nan)
    text = f"Worst case of the {subject}: {worst}, Dice {metrics['dice']:.3f}"
    findings.append(Finding(text + (f", HD95 {distance:.1f}." if math.isfinite(distance) else ".")))
    shown = gallery.tested if record.evaluation else gallery.annotated
    findings += _kind_of_error([example for example in shown if example.name == worst])
    values = _column(rows, "dice")
    low, high = np.percentile(values, (25, 75))
    fence = low - 1.5 * (high - low)
    outliers = [name for name, row in rows.items() if row["dice"] < fence]
    if outliers:
        findings.append(Finding(f"{_plural(len(outliers), 'outlier')} (more than 1.5 interquartile ranges below the "
                                f"first quartile, Dice < {fence:.3f}): {_listed(outliers)}.", BAD))
    elif len(rows) >= 4 and low < high:
        findings.append(Finding("No outlier: no case is more than 1.5 interquartile ranges below the first quartile."))
    empty = [name for name, row in rows.items() if math.isnan(row.get("hd95", 0))]
    if empty:
        named = f"all {len(rows)} cases" if len(empty) == len(rows) > 1 else _listed(empty)
        findings.append(Finding(f"Prediction or reference is empty in {named}.", BAD))
    return Answer(question, figure, findings)


def _listed(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _kind_of_error(examples: list) -> list[Finding]:
    """Whether the worst case misses or adds, and along which slices."""
    for example in examples:
        name = "registration" if "registration" in example.masks else "prediction"
        reference, mask = example.masks.get("reference"), example.masks[name]
        if reference is None or not reference.any():
            continue
        size = np.count_nonzero(reference)
        missed, added = reference & ~mask, mask & ~reference
        errors = (missed | added).sum((0, 1))
        order = np.argsort(-errors, kind="stable")
        half = int(np.searchsorted(np.cumsum(errors[order]), errors.sum() / 2)) + 1
        return [Finding(
            f"In it the {name if name == 'prediction' else 'registration label'} misses "
            f"{np.count_nonzero(missed) / size:.0%} of the reference's voxels and adds "
            f"{np.count_nonzero(added) / size:.0%} as many; half of these errors lie in {half} of "
            f"{len(errors)} slices, most of them in slice {order[0]}.")]
    return []


def _training(record: Record) -> Answer:
    training, joint = record.config.training, record.joint
    question = "Did training behave?"
    figure = "finished" if record.finished else f"{record.reached} of {training.iterations} iterations"
    findings = []
    if record.finished:
        findings.append(Finding(f"{record.iteration} of {_plural(training.iterations, 'joint iteration')} done.", GOOD))
    else:
        findings.append(Finding(
            f"{record.reached} of {_plural(training.iterations, 'joint iteration')} done, {record.iteration} in the "
            f"checkpoint. Where it stopped: {cli.command_line('train', '--out', record.path, '--resume')}", BAD))
    broken = sorted(name for curves in (record.registration, joint) for name, values in curves.items()
                    if not np.isfinite(values).all() and not name.startswith("dice"))
    if broken:
        findings.append(Finding(f"Not finite at some point: {', '.join(broken)}. Training diverged, or half precision "
                                "overflowed (--amp off shows which).", BAD))
    findings += [
        finding for finding in (
            _fell("The registration loss of stage 1", record.registration, "loss", "epochs"),
            _fell("The supervised loss L_s", joint, "loss_s", "iterations"),
            _fell("The teacher's uncertainty (mean entropy)", joint, "entropy", "iterations"),
            _fusion(record), _selection(record),
        ) if finding
    ]
    return Answer(question, figure, findings)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and the last tenth."""
    part = max(1, len(values) // 10)
    return float(values[:part].mean()), float(values[-part:].mean())


def _fell(subject: str, curves: dict[str, np.ndarray], name: str, unit: str) -> Finding | None:
    """How a curve went that should fall."""
    values = curves.get(name)
    if values is None or len(values) < 2:
        return None
    first, last = _ends(values)
    if last < 0.98 * first:
        return Finding(f"{subject} fell from {first:.3g} to {last:.3g}.", GOOD)
    went = "rose" if last > 1.02 * first else "stayed"
    return Finding(f"{subject} {went}: {first:.3g} at first, {last:.3g} in the end.", NOTE)


def _fusion(record: Record) -> Finding | None:
    """Whether the fused labels are better than the registration labels they are made from."""
    joint, training = record.joint, record.config.training
    if "dice_fused" not in joint:
        return None
    part = max(1, len(joint["step"]) // 4)
    registration, fused = (float(joint[name][-part:].mean()) for name in ("dice_registration", "dice_fused"))
    text = (f"Over the last quarter the fused labels have Dice {fused:.3f}, the registration labels "
            f"{registration:.3f}")
    if abs(fused - registration) < 0.005:
        share = joint["w_p"][-1] if "w_p" in joint else 1.0
        why = f": with {share:.2f}, the teacher's share never came to matter" if share <= 0.5 else ""
        return Finding(text + f", which is the same{why}.")
    if fused > registration:
        return Finding(text + ": the teacher mends them.", GOOD)
    late = f" It outvotes registration from iteration {_outvotes(training)} on." if _outvotes(training) else ""
    return Finding(text + f": the teacher spoils them.{late}", BAD)


def _outvotes(training) -> int | None:
    """The iteration from which the teacher's share of the fused labels is above one half."""
    if training.fusion <= 0.5 or not training.fusion_power:
        return None
    return math.ceil(training.fusion_iterations * (0.5 / training.fusion) ** (1 / training.fusion_power))


def _selection(record: Record) -> Finding | None:
    """Whether self-paced selection opened, and how many voxels it trusts in the end."""
    joint = record.joint
    if not {"K", "loss_pace", "lambda"} <= set(joint):
        return None
    voxels = math.prod(record.config.data.patch)
    last = f"in the end K = {joint['K'][-1]:,.0f} voxels, {100 * joint['K'][-1] / voxels:.2g}% of one patch"
    opened = np.flatnonzero(joint["loss_pace"] < joint["lambda"])
    if opened.size:
        return Finding(f"Selection opened (L_pace below λ) by iteration {joint['step'][opened[0]]:.0f}; {last}.", GOOD)
    return Finding(f"Selection never opened: L_pace stayed above λ ({joint['loss_pace'][-1]:.3g} beside "
                   f"{joint['lambda'][-1]:.3g} in the end), so K followed its ramp alone; {last}.")

