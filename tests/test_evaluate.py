"""The command that measures a run, on a network whose answer is known: in which unit, by which windows."""

import json
from pathlib import Path

import numpy as np
import pytest

from spss_fast import evaluate, metrics
from spss_fast.config import resolve
from spss_fast.engine.evaluation import evaluate_cases
from spss_fast.errors import UserError
from tests.data.writing import ball, write_image
from tests.engine.thresholding import thresholding_weights, write_run

SPACING = (1.0, 1.0, 3.0)
_, FOUND = ball((32, 32, 28))
LABEL = np.roll(FOUND, 2, 2)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that finds the ball, whose label lies two slices higher."""
    write_image(tmp_path / "scans" / "a.nii.gz", FOUND - 0.5, SPACING)
    write_image(tmp_path / "scans" / "a_seg.nii.gz", LABEL, SPACING)
    flags = {"patch": (32, 32, 16), "amp": "off", "device": "cpu", "workers": 1, "cache_dir": str(tmp_path / "cache")}
    run = write_run(tmp_path / "run", resolve("folder", flags), thresholding_weights(1.5), iteration=1)
    cases = {"data_dir": str(tmp_path / "scans"), "train": [], "test": ["a"], "annotated": {}, "held_out": True}
    (run / "cases.json").write_text(json.dumps(cases))
    return run


@pytest.mark.parametrize("units, spacing", [("voxel", None), ("mm", SPACING)])
def test_distances_are_in_the_unit_that_is_asked_for(run, units, spacing):
    rows, _ = evaluate.evaluate(run, units=units)
    assert rows["a"] == pytest.approx(metrics.evaluate(FOUND, LABEL, spacing))


def test_the_stride_that_is_given_reaches_the_windows_and_the_unit_the_summary(run, monkeypatch, capsys):
    strides = []
    monkeypatch.setattr(evaluate, "evaluate_cases",
                        lambda *given, **options: strides.append(given[3]) or evaluate_cases(*given, **options))
    evaluate.main(["--run", str(run)])
    evaluate.main(["--run", str(run), "--stride", "16,32,8", "--units", "mm"])
    assert strides == [(5, 5, 1), (16, 32, 8)] and "HD95 (mm)" in capsys.readouterr().out
    about = json.loads((run / "evaluation.json").read_text())
    assert about["units"] == "mm"
    assert about["measured"] == "held-out cases; training stopped at iteration 1 of 6000"


def test_a_stride_beyond_the_patch_is_refused_before_anything_is_prepared(run, tmp_path):
    said = r"--stride 32,32,17 exceeds the run's patch of 32 x 32 x 16 voxels.*lower it"
    with pytest.raises(UserError, match=said):
        evaluate.main(["--run", str(run), "--stride", "32,32,17"])
    assert not (tmp_path / "cache").exists()
