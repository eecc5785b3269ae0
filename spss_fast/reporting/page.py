"""From a run's record and gallery to one HTML page."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np

from spss_fast import __version__, metrics
from spss_fast.config import resolve
from spss_fast.engine.evaluation import Rows
from spss_fast.engine.preview import class_color
from spss_fast.reporting import charts, findings, panels
from spss_fast.reporting.gallery import Example, Gallery
from spss_fast.reporting.record import Record, defined, measured
from spss_fast.settings import SECTIONS

FIRST = 12  # rows of a table that are always shown
NAMES = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD"}
SHARES = ("dice", "jaccard")  # metrics between 0 and 1


def render(record: Record, gallery: Gallery) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spss_fast.reporting", "."), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    groups = {"student": record.evaluation, "registration\nlabels": record.labels}
    groups = {name: rows for name, rows in groups.items() if rows and measured(rows)}
    values = record.config.data.class_values
    return environment.get_template("page.html").render(
        name=record.name, lead=_lead(record), answers=findings.answers(record, gallery),
        strip=charts.dice_of_cases(groups) if groups else "",
        evaluation=_table(record.evaluation), evaluated=record.evaluated, command=findings.command(record),
        distances=_distances(record.about.get("units")),
        notes=gallery.notes, iteration=record.iteration, passes=record.config.selection.passes,
        lines=[{"name": name, "label": label, "color": color if len(values) == 2 else "#ffffff", "dash": dash}
               for name, (label, color, dash) in panels.LINES.items()],
        channels=len(values),
        classes=[(class_color(c), value) for c, value in enumerate(values) if c] if len(values) > 2 else [],
        ramp=[matplotlib.colors.to_hex(matplotlib.colormaps["inferno"](share)) for share in np.linspace(0.25, 1, 6)],
        missed=panels.MISSED, added=panels.ADDED, wrong_class=panels.WRONG_CLASS,
        tested=_examples(gallery.tested, values, "tested"),
        annotated=_examples(gallery.annotated, values, "annotated"),
        distance=charts.by_distance(gallery.annotated),
        tested_title=_tested_title(record),
        charts=charts.charts(record), trend_from=charts.TREND_FROM,
        labels=_table(record.labels), no_labels=_no_labels(record),
        configuration=_configuration(record), environment=_environment(record), cases=_cases(record),
        version=__version__, made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _lead(record: Record) -> str:
    annotated, cases = len(record.cases["annotated"]), record.cases
    state = "finished" if record.finished else "not finished"
    started = record.environment["started"][:16].replace("T", " ")
    tested = f", {len(cases['test'])} held-out test cases" if cases["held_out"] else ""
    if not cases["held_out"] and record.evaluation and not record.foreign:
        tested = f", {len(record.evaluation)} of them measured as test cases"
    return (
        f"SPSS on {record.config.data.dataset}: {annotated} volumes with one annotated slice each, "
        f"{len(cases['train']) - annotated} unlabelled{tested}. {record.reached} of "
        f"{record.config.training.iterations} joint iterations, {state}. Started {started}."
    )


def _distances(units: str | None) -> str:
    if units is None:  # a CSV that has lost the JSON beside it
        return "HD95 and ASD are in the unit that evaluate was asked for: voxels, or mm with --units mm."
    if units == "mm":
        return "HD95 and ASD are in mm."
    return "HD95 and ASD are in voxels (evaluate --units mm: in mm, but of HDF5 files, which keep no voxel size)."


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if name.startswith(SHARES) else f"{value:.2f}"


def _table(rows: Rows | None) -> dict[str, Any] | None:
    """Rows as the template shows them; columns are the CSV's."""
    if not rows:
        return None
    columns = list(next(iter(rows.values())))

    def mean(name: str) -> list[str]:
        known = defined(rows, name)
        if not known.size:
            return ["–"]
        few = [f"of {known.size}"] if known.size < len(rows) else []
        return [_number(name, known.mean()), f"± {_number(name, known.std())}", *few]

    def share(name: str, value: float) -> float | None:
        return round(100 * value, 1) if name == "dice" and not math.isnan(value) else None

    def cells(row: dict[str, float]) -> list[dict[str, Any]]:
        return [{"text": _number(name, row[name]), "share": share(name, row[name])} for name in columns]

    shown = [{"case": case, "cells": cells(row)} for case, row in rows.items()]
    return {
        "headings": [NAMES.get(name, name) for name in columns], "count": len(rows), "mean": [*map(mean, columns)],
        "first": shown[:FIRST], "rest": shown[FIRST:],
    }


def _examples(examples: list[Example], values: Sequence[int], key: str) -> list[dict[str, Any]]:
    shown = []
    for number, example in enumerate(examples):
        scores = ", ".join(f"{NAMES.get(name, name)} {_number(name, value)}" for name, value in example.scores.items())
        shown.append({
            "title": example.rank.capitalize(), "name": example.name, "scores": scores or _unmeasured(example, values),
            "rows": panels.rows(example, values, f"{key}-{number}"),
        })
    return shown


def _tested_title(record: Record) -> str:
    if record.foreign:
        return "Evaluated cases"
    return "Test cases" if record.cases["held_out"] else "Unlabelled training cases"


def _unmeasured(example: Example, values: Sequence[int]) -> str:
    """What stands in place of metrics."""
    if "reference" not in example.labels:
        return "Not measured: it has no full label."
    name, noun = ("registration", "registration label") if "registration" in example.labels else ("prediction",) * 2
    dice = metrics.evaluate_classes(example.labels[name], example.labels["reference"], values)["dice"]
    return f"Not measured; the {noun} drawn here has Dice {_number('dice', dice)}."


def _no_labels(record: Record) -> str:
    if record.finished:
        return "Not measured: no annotated volume has a full label."
    return "They are measured at the end of training, where annotated volumes have full labels."


def _configuration(record: Record) -> dict[str, list[dict[str, Any]]]:
    """Settings by section, beside those that the preset would give at the same ``downsample``."""
    data = record.config.data
    preset = resolve(data.dataset, {"downsample": data.downsample})
    chosen = {}
    for section, cls in SECTIONS.items():
        chosen[section] = []
        for item in dataclasses.fields(cls):
            value, default = (getattr(getattr(config, section), item.name) for config in (record.config, preset))
            if value == default and _plain(value) == "none":
                continue
            chosen[section].append({
                "name": item.name, "value": _plain(value), "changed": value != default, "preset": _plain(default),
            })
    return chosen


def _plain(value: Any) -> str:
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return str(value)


def _environment(record: Record) -> dict[str, str]:
    shown = {}
    for key, value in record.environment.items():
        if key == "command":
            shown[key] = shlex.join(value)
        elif isinstance(value, dict):
            shown |= {name: str(version) for name, version in value.items()}
        else:
            shown[key] = str(value)
    return shown


def _cases(record: Record) -> dict[str, str]:
    cases = record.cases
    in_file = "annotated_in_file" in cases  # older runs do not say
    slices = cases["annotated_in_file" if in_file else "annotated"]
    whose = "slice axis of the scan's file" if in_file else "slices of the prepared volume, not of the scan's file"
    return {
        "data folder": cases["data_dir"],
        "annotated": ", ".join(f"{name} (slice {index})" for name, index in slices.items()),
        "slices count": f"from 0 along the {whose}", "trained on": ", ".join(cases["train"]),
        "test": ", ".join(cases["test"]), "held out": "yes" if cases["held_out"] else "no",
    }
