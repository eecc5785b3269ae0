"""Measuring cases with a student whose answer is known, and what is made of the figures."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from spss_fast import metrics
from spss_fast.config import resolve
from spss_fast.engine import evaluation


def _student() -> nn.Sequential:
    """Foreground is what lies above the mean of batch norm's statistics, at first 0."""
    student = nn.Sequential(nn.BatchNorm3d(1, affine=False), nn.Conv3d(1, 2, 1))
    with torch.no_grad():
        student[1].weight.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1))
        student[1].bias.zero_()
    return student


@pytest.mark.parametrize("statistics", ["running", "case"])
@pytest.mark.parametrize("spacing", [False, True])
def test_cases_are_measured_with_the_runs_statistics_and_in_the_unit_asked_for(statistics, spacing):
    config = resolve("la", {"patch": "16,16,16", "statistics": statistics})
    half = np.broadcast_to(np.arange(32) < 16, (16, 16, 32))
    image, label = np.where(half, 6, 4).astype(np.float32), (np.arange(32) < 13) * np.ones((16, 16, 1), np.uint8)
    cases = [SimpleNamespace(name=name, image=image, spacing=(1.0, 2.0, 5.0), full_label=lambda full=full: full)
             for name, full in (("bare", None), ("whole", label))]
    student = _student().train()  # as training leaves it
    rows = evaluation.evaluate_cases(student, cases, config, (16, 16, 16), None, spacing)
    found = half if statistics == "case" else np.ones_like(half)
    expected = metrics.evaluate(found, label, (1.0, 2.0, 5.0) if spacing else None)
    assert rows == {"whole": pytest.approx(expected)}


def test_registration_labels_are_measured_from_the_annotated_slice_on(monkeypatch):
    reference = torch.zeros(6, 5, 4, dtype=torch.uint8)
    reference[1:4, 1:4, 2] = 1

    def slice_alone(flows, annotation, index, *settings):
        labels = torch.zeros(1, *reference.shape, dtype=torch.uint8)
        labels[0, :, :, index[0]] = annotation[0]
        return labels

    monkeypatch.setattr(evaluation, "outward_flows", lambda *arguments: None)
    monkeypatch.setattr(evaluation, "registration_labels", slice_alone)
    volumes = [
        SimpleNamespace(name=name, image=reference.float(), annotation=reference[:, :, 2], index=2, reference=full)
        for name, full in (("bare", None), ("whole", reference))
    ]
    rows = evaluation.evaluate_labels(nn.Identity(), volumes, resolve("la"), torch.device("cpu"), None)
    assert rows == {"whole": {"dice": 1.0, "jaccard": 1.0, "hd95": 0.0, "asd": 0.0}}


def test_a_table_shows_each_metric_under_its_heading():
    console = Console(file=io.StringIO(), width=100)
    evaluation.print_metrics(console, "title", {"a": {"dice": 0.5, "jaccard": 0.25, "hd95": 4.0, "asd": 1.5}}, "mm")
    lines = [re.findall(r"[^│┃]+", line) for line in console.file.getvalue().splitlines()]
    headings, row = ([cell.strip() for cell in next(line for line in lines if line[0].strip() == name)]
                     for name in ("case", "a"))
    assert dict(zip(headings, row)) == {
        "case": "a", "Dice": "0.5000", "Jaccard": "0.2500", "HD95 (mm)": "4.00", "ASD (mm)": "1.50"}


def test_a_narrow_table_cuts_no_name_and_no_number():
    console = Console(file=io.StringIO(), width=72)
    rows = {name: {"dice": 0.5, "jaccard": 0.25, "hd95": 14.0, "asd": 11.5} for name in ("3C2QTUNI0852Q2H", "b")}
    evaluation.print_metrics(console, "title", rows, "voxel")
    lines = [re.findall(r"[^│┃]+", line) for line in console.file.getvalue().splitlines()]
    assert "".join(line[0].strip() for line in lines if len(line) == 5).count("3C2QTUNI0852Q2H") == 1
    assert all(f"{value} ± 0.00" in console.file.getvalue() for value in ("0.5000", "14.00", "11.50"))


def test_names_with_brackets_are_shown_as_they_are():
    """rich takes [v2] for markup, and :dog: for an emoji."""
    console = Console(file=io.StringIO(), width=100)
    row = {"dice": 0.5, "jaccard": 0.25, "hd95": np.nan, "asd": np.nan}
    evaluation.print_metrics(console, "1 case of runs[v2][/v2]", {"scan[v2]:dog:": row}, "mm")
    title, *table, said = console.file.getvalue().splitlines()
    assert title.strip() == "1 case of runs[v2][/v2]" and any(" scan[v2]:dog: " in line for line in table)
    assert said == "no distance for scan[v2]:dog:: prediction or reference is empty there"


def test_the_table_says_of_how_many_cases_a_class_has_its_mean():
    console = Console(file=io.StringIO(), width=100)
    whole = {"dice": 0.5, "jaccard": 0.25, "hd95": 4.0, "asd": 1.5}
    rows = {
        "a": whole | {f"{name}_{c}": value for c in (1, 2) for name, value in whole.items()},
        "b": whole | {f"{name}_1": value for name, value in whole.items()} | dict.fromkeys(
            ["dice_2", "jaccard_2", "hd95_2", "asd_2"], np.nan),
    }
    evaluation.print_metrics(console, "title", rows, "voxel")
    said = console.file.getvalue()
    assert "class 1, mean of 2" in said and "class 2, mean of 1" in said and " mean of 2 " in said
    assert "no Dice of a class for b: both are empty there" in said
    nothing = {"a": dict.fromkeys(metrics.NAMES, np.nan)}
    assert evaluation.dice_line(nothing) == "Dice undefined"


def test_strides_are_las_in_proportion():
    assert evaluation.window_stride((112, 112, 80)) == (18, 18, 4)
    assert evaluation.window_stride((176, 176, 64)) == (28, 28, 3)
    assert evaluation.window_stride((16, 16, 8)) == (3, 3, 1)


def test_means_leave_undefined_distances_out():
    rows = {"a": {"dice": 0.5, "hd95": 4.0, "asd": np.nan}, "b": {"dice": 0.7, "hd95": np.nan, "asd": np.nan}}
    summary = evaluation.mean_and_sd(rows)
    assert summary == {"dice": pytest.approx((0.6, 0.1)), "hd95": (4.0, 0.0)}
    assert evaluation.dice_line(rows) == "Dice 0.6000 ± 0.1000"
