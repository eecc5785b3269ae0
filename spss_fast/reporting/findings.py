"""What a researcher asks first, answered in plain sentences from the run's own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spss_fast import cli
from spss_fast.engine.evaluation import measured_grid
from spss_fast.reporting.gallery import Example, Gallery, missed_and_added
from spss_fast.reporting.record import Record, defined, measured

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
        values = defined(record.evaluation, "dice")
        figure, finding = _dice(values, len(record.evaluation), record.evaluated)
        findings.append(finding)
        if record.stale:
            findings.append(Finding("The checkpoint is newer than evaluation.csv: these figures are of earlier "
                                    f"weights. Measure again: {command(record)}", BAD))
    else:
        figure = "not measured yet"
        findings.append(Finding(
            f"The student has not been measured on its {_plural(len(record.cases['test']), 'test case')}. The command "
            "is below; it needs full labels.", BAD))
    labels = defined(record.labels or {}, "dice")
    if labels.size:
        text = (f"The registration labels that it learnt from reach {labels.mean():.3f} ± {labels.std():.3f} on the "
                f"{_plural(len(labels), 'annotated volume')}")
        kind = NOTE
        if record.evaluation and values.size:
            difference = values.mean() - labels.mean()
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


def _dice(values: np.ndarray, count: int, cases: str) -> tuple[str, Finding]:
    """What ``values`` (N,) say, the Dice of those of ``count`` evaluated ``cases`` that have one."""
    if not values.size:
        return "nothing to measure", Finding(
            f"In none of the {count} {cases} do prediction or reference show anything: there is no Dice.")
    over = f"{len(values)} {cases}" if len(values) == count else f"those {len(values)} of {count} {cases} that have one"
    return f"Dice {values.mean():.3f} ± {values.std():.3f}", Finding(
        f"The student's Dice is {values.mean():.3f} ± {values.std():.3f} (median {np.median(values):.3f}, from "
        f"{values.min():.3f} to {values.max():.3f}) over {over}.")


def _failures(record: Record, gallery: Gallery) -> Answer:
    question, findings = "Where does it fail?", []
    every, subject = (record.evaluation, "student") if record.evaluation else (record.labels, "registration labels")
    rows = measured(every or {})
    if not rows:
        none = "no case has a Dice" if every else "neither the student nor the registration labels are measured"
        return Answer(question, "unknown", [Finding(f"No metrics by case: {none}.")])
    worst, metrics = next(iter(rows.items()))
    figure = f"worst: {metrics['dice']:.3f}" if record.evaluation else f"worst label: {metrics['dice']:.3f}"
    distance = metrics.get("hd95", math.nan)
    text = f"Worst case of the {subject}: {worst}, Dice {metrics['dice']:.3f}"
    findings.append(Finding(text + (f", HD95 {distance:.1f}." if math.isfinite(distance) else ".")))
    shown = gallery.tested if record.evaluation else gallery.annotated
    findings += _kind_of_error([example for example in shown if example.name == worst])
    values = defined(rows, "dice")
    low, high = np.percentile(values, (25, 75))
    fence = low - 1.5 * (high - low)
    outliers = [name for name, row in rows.items() if row["dice"] < fence]
    if outliers:
        findings.append(Finding(f"{_plural(len(outliers), 'outlier')} (more than 1.5 interquartile ranges below the "
                                f"first quartile, Dice < {fence:.3f}): {_listed(outliers)}.", BAD))
    elif len(rows) >= 4 and low < high:
        findings.append(Finding("No outlier: no case is more than 1.5 interquartile ranges below the first quartile."))
    empty = [name for name, row in rows.items() if _one_is_empty(row)]
    if empty:
        named = f"all {len(rows)} cases" if len(empty) == len(rows) > 1 else _listed(empty)
        of_class = " of a class" * any(name.startswith("dice_") for name in metrics)
        findings.append(Finding(f"Prediction or reference{of_class} is empty in {named}.", BAD))
    neither = [name for name in every if name not in rows]
    if neither:
        findings.append(Finding(f"Neither prediction nor reference shows anything in {_listed(neither)}: no Dice, and "
                                "left out of all means."))
    return Answer(question, figure, findings)


def _one_is_empty(row: dict[str, float]) -> bool:
    """Whether prediction or reference, of any class, is empty, but not both: there is a Dice but no distance."""
    return any(name.startswith("hd95") and math.isnan(value) and not math.isnan(row[name.replace("hd95", "dice")])
               for name, value in row.items())


def _listed(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _kind_of_error(examples: list[Example]) -> list[Finding]:
    """Whether the worst case misses or adds, and along which slices, where it does."""
    for example in examples:
        name = "registration" if "registration" in example.labels else "prediction"
        reference, label = example.labels.get("reference"), example.labels[name]
        if reference is None or not reference.any():
            continue
        size = np.count_nonzero(reference)
        missed, added = missed_and_added(label, reference)
        text = (f"In it the {name if name == 'prediction' else 'registration label'} misses "
                f"{np.count_nonzero(missed) / size:.0%} of the reference's voxels and adds "
                f"{np.count_nonzero(added) / size:.0%} as many")
        if (missed & added).any():
            text += " (a voxel of the wrong class is both)"
        errors = (missed | added).sum((0, 1))
        if errors.any():
            order = np.argsort(-errors, kind="stable")
            half = int(np.searchsorted(np.cumsum(errors[order]), errors.sum() / 2)) + 1
            text += f"; half of these errors lie in {half} of {len(errors)} prepared slices, most of them in the "
            text += f"file's slice {example.in_file[order[0]]}"
        return [Finding(text + ".")]
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
    """Means of the first and the last tenth; NaN where a value is."""
    part = max(1, len(values) // 10)
    return float(values[:part].mean()), float(values[-part:].mean())


def _fell(subject: str, curves: dict[str, np.ndarray], name: str, unit: str) -> Finding | None:
    """How a curve went that should fall; None where it is not known, at its ends at least."""
    values = curves.get(name)
    if values is None or len(values) < 2:
        return None
    first, last = _ends(values)
    if math.isnan(first) or math.isnan(last):
        return None
    if last < 0.98 * first:
        return Finding(f"{subject} fell from {first:.3g} to {last:.3g}.", GOOD)
    went = "rose" if last > 1.02 * first else "stayed"
    return Finding(f"{subject} {went}: {first:.3g} at first, {last:.3g} in the end.", NOTE)


def _fusion(record: Record) -> Finding | None:
    """Whether the fused labels are better than the registration labels they are made from; None where the last quarter
    has no iteration that could tell, of annotated volumes with full labels alone."""
    joint, training = record.joint, record.config.training
    if "dice_fused" not in joint:
        return None
    part = max(1, len(joint["step"]) // 4)
    both = np.array([joint[name][-part:] for name in ("dice_registration", "dice_fused")])
    both = both[:, np.isfinite(both).all(0)]
    if not both.size:
        return None
    registration, fused = map(float, both.mean(1))
    of = f" ({both.shape[1]} of {part} logged iterations)" if both.shape[1] < part else ""
    text = (f"Over the last quarter{of} the fused labels have Dice {fused:.3f}, the registration labels "
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
    """Whether self-paced selection opened, and how many voxels it trusts in the end; None where L_pace cannot tell."""
    joint = record.joint
    if not {"K", "loss_pace", "lambda"} <= set(joint):
        return None
    voxels = math.prod(record.config.data.patch)
    last = f"in the end K = {joint['K'][-1]:,.0f} voxels, {100 * joint['K'][-1] / voxels:.2g}% of one patch"
    opened = np.flatnonzero(joint["loss_pace"] < joint["lambda"])
    if opened.size:
        return Finding(f"Selection opened (L_pace below λ) by iteration {joint['step'][opened[0]]:.0f}; {last}.", GOOD)
    if not np.isfinite(joint["loss_pace"]).all():
        return None
    return Finding(f"Selection never opened: L_pace stayed above λ ({joint['loss_pace'][-1]:.3g} beside "
                   f"{joint['lambda'][-1]:.3g} in the end), so K followed its ramp alone; {last}.")

