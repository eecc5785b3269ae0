"""The command that measures a run, on a network whose answer is known: in which unit, by which windows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spss_fast import evaluate, metrics
from spss_fast.config import resolve, to_toml
from spss_fast.engine.evaluation import evaluate_cases
from spss_fast.errors import UserError
from spss_fast.settings import Config
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
    run = write_run(tmp_path / "run", settings(tmp_path), thresholding_weights(1.5), iteration=1)
    cases = {"data_dir": str(tmp_path / "scans"), "train": [], "test": ["a"], "annotated": {}, "held_out": True}
    (run / "cases.json").write_text(json.dumps(cases))
    return run


def settings(folder: Path) -> Config:
    flags = {"patch": (32, 32, 16), "amp": "off", "device": "cpu", "workers": 1, "cache_dir": str(folder / "cache")}
    return resolve("folder", flags)


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
    said = r"--stride 32,32,17 exceeds the patch of 32 x 32 x 16 voxels.*lower it"
    with pytest.raises(UserError, match=said):
        evaluate.main(["--run", str(run), "--stride", "32,32,17"])
    assert not (tmp_path / "cache").exists()


def test_weights_without_a_run_are_measured_on_all_that_has_a_full_label(run, tmp_path, capsys):
    """As the run's own student is, by the settings that are given or, of a checkpoint of ours, by its own."""
    weights, file, scans = tmp_path / "w.pth", tmp_path / "settings.toml", tmp_path / "scans"
    torch.save({"net": thresholding_weights(1.5)}, weights)
    file.write_text(to_toml(settings(tmp_path)))
    write_image(scans / "b.nii.gz", FOUND, SPACING)
    expected = evaluate.evaluate(run)[0]
    assert expected["a"]["dice"] > 0.5
    rows, meaning = evaluate.evaluate(weights=weights, config=settings(tmp_path), data_dir=scans)
    assert rows == expected and meaning == f"cases of {scans}"
    rows, meaning = evaluate.evaluate(weights=run / "checkpoints" / "last.pt", data_dir=scans)
    assert rows == expected and meaning == f"cases of {scans}; training stopped at iteration 1 of 6000"
    evaluate.main(["--weights", str(weights), "--dataset", "folder", "--settings", str(file), "--data-dir", str(scans)])
    assert f"1 cases of {scans}" in "".join(capsys.readouterr().out.splitlines())
    about = json.loads((tmp_path / "w.evaluation.json").read_text())
    assert about["foreign"] and about["weights"] == str(weights)
    assert "a" in (tmp_path / "w.evaluation.csv").read_text()


def test_other_weights_are_measured_as_a_run_is_and_leave_its_own_metrics_alone(run, tmp_path):
    weights, out = tmp_path / "other.pth", run / "evaluation.csv"
    torch.save(thresholding_weights(50.0), weights)
    evaluate.main(["--run", str(run)])
    before = out.read_text()
    evaluate.main(["--run", str(run), "--weights", str(weights)])
    assert out.read_text() == before != (tmp_path / "other.evaluation.csv").read_text()
    measured = json.loads((tmp_path / "other.evaluation.json").read_text())["measured"]
    assert measured == f"held-out cases; with other weights than the run's, {weights}"


@pytest.mark.parametrize("flags, said", [
    ([], "no network: give --run RUN, or --weights FILE"),
    (["--weights", "w.pth"], r"w\.pth does not say how scans are prepared: add --run, or --dataset"),
    (["--weights", "w.pth", "--dataset", "folder"], "--data-dir is missing: the folder of the labelled scans"),
    (["--weights", "w.pth", "--dataset", "folder", "--classes", "3,5,7", "--data-dir", "scans"],
     "have 3 classes, background included, but labels are read as 4: name the 2 others' values with --classes"),
    (["--weights", "two.pth", "--dataset", "folder", "--classes", "3,5", "--data-dir", "scans"],
     "have 2 classes, background included, but labels are read as 3: leave --classes out"),
    (["--weights", "w.pth", "--data-dir", "scans", "--patch", "32,32,32"], "--patch changes a preset: add --dataset"),
    (["--run", "run", "--dataset", "la"], "--run brings its own settings: leave out --dataset"),
    (["--run", "run", "--weights", "w.pth", "--classes", "3,5"], "--classes changes a preset: leave it out, a run"),
    (["--weights", "two.pth", "--dataset", "kits", "--data-dir", "scans"], "kits"),
    (["--weights", "two.pth", "--dataset", "folder", "--data-dir", "bare"], "no case of bare has a full label"),
    (["--weights", "text.pth", "--dataset", "folder", "--data-dir", "scans"], r"cannot read the checkpoint text\.pth"),
    (["--run", "run", "--out", "w.pth"], r"--out w\.pth is to be the table of metrics.*name it w\.csv"),
    (["--run", "run", "--out", "none/w.csv"], r"cannot be written to none/w\.csv: name another --out"),
])
def test_what_weights_need_is_said(flags, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(thresholding_weights(0.5, 2.0), "w.pth")
    torch.save(thresholding_weights(0.5), "two.pth")
    Path("text.pth").write_text("this is no network")
    write_image(Path("bare") / "a.nii.gz", FOUND, SPACING)
    before = sorted(tmp_path.rglob("*.*"))
    with pytest.raises(UserError, match=said):
        evaluate.main(flags)
    assert sorted(tmp_path.rglob("*.*")) == before
