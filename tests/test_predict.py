"""The command from scans to label maps: what comes out, what is skipped, and what every bad input says."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from rich.console import Console

from spss_fast import metrics, predict, prepare
from spss_fast.config import resolve
from spss_fast.data.geometry import Grid, to_image
from spss_fast.data.images import read_grid
from spss_fast.engine.prediction import segment
from spss_fast.engine.weights import load_network
from spss_fast.errors import UserError
from tests.data.test_preparation import read_file_order, synthetic_ct
from tests.data.writing import ball, write_image, write_la, write_series
from tests.engine.thresholding import thresholding_weights, write_run

SMALL = {"patch": (32, 32, 16), "amp": "off", "device": "cpu"}


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", resolve("folder", SMALL), thresholding_weights(2.5))


def _predict(inputs, out, *arguments, **options):
    return predict.predict(inputs, out, *arguments, console=Console(quiet=True), **options)


def _grid(path) -> Grid:
    return Grid.of(sitk.ReadImage(str(path)))


def test_real_ct_in_its_own_geometry(scans, tmp_path):
    """Window, body crop and resampling on the way in; size, spacing, origin and direction to the last digit after."""
    config = resolve("kits", SMALL | {"resample": (48, 48, 16)})
    run = write_run(tmp_path / "run", config, thresholding_weights(1.0))
    out = tmp_path / "out"
    assert predict.main([str(scans("ct") / "example_ct_sm.nii.gz"), str(scans("ct") / "example_ct.nii.gz"), str(out),
                         "--run", str(run), "--probabilities", "--entropy", "--mirror"]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([
        "example_ct_sm.nii.gz", "example_ct_sm_probability.nii.gz", "example_ct_sm_entropy.nii.gz",
        "example_ct.nii.gz", "example_ct_probability.nii.gz", "example_ct_entropy.nii.gz", "predict.json",
    ])
    for name in ("example_ct_sm", "example_ct"):
        source = scans("ct") / f"{name}.nii.gz"
        for part, kind in (("", sitk.sitkUInt8), ("_probability", sitk.sitkFloat32), ("_entropy", sitk.sitkFloat32)):
            image = sitk.ReadImage(str(out / f"{name}{part}.nii.gz"))
            assert Grid.of(image) == _grid(source) and image.GetPixelID() == kind
        header, original = (gzip.open(path).read(348) for path in (out / f"{name}.nii.gz", source))
        assert header[76:108] == original[76:108] and header[252:328] == original[252:328]
        label, probability, entropy = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}{part}.nii.gz")))
            for part in ("", "_probability", "_entropy")
        )
        np.testing.assert_array_equal(label, probability > 0.5)
        assert 0.01 < label.mean() < 0.5 and 0 <= entropy.min() and entropy.max() <= np.log(2) + 1e-6
        # what is bright in the file is what was found: contrast-filled organs and bone
        hu = sitk.GetArrayFromImage(sitk.ReadImage(str(source)))
        assert np.median(hu[label == 1]) > np.median(hu[(label == 0) & (hu > -200)]) + 30


def test_the_real_kits_label_maps(scans, tmp_path):
    """All of them, each with a synthesised CT, thinned in plane for speed: measured, prepared, and segmented where they
    lie, whatever their number of slices and spacing."""
    labels = {path.parent.name: path for path in sorted(scans("kits19").glob("*/segmentation.nii.gz"))}
    assert len(labels) == 6
    for name, path in labels.items():
        (tmp_path / "kits" / name).mkdir(parents=True)
        thinned = sitk.ReadImage(str(path))[:, ::4, ::4]
        sitk.WriteImage(thinned, str(tmp_path / "kits" / name / "segmentation.nii.gz"))
        image = to_image(synthetic_ct(read_file_order(tmp_path / "kits" / name / "segmentation.nii.gz")),
                         Grid.of(thinned))
        sitk.WriteImage(image, str(tmp_path / "kits" / name / "imaging.nii.gz"))

    found = prepare.prepare_folder(tmp_path / "kits", tmp_path / "kits.toml", console=Console(quiet=True),
                                   flags={"cache_dir": str(tmp_path / "cache"), "workers": 1})
    assert not found.unusable and {case.name for case in found.cases} == set(labels)
    assert all(case.has_label and case.label().any() for case in found.cases)

    run = write_run(tmp_path / "run", resolve("kits", SMALL | {"resample": (64, 64, 32)}), thresholding_weights(1.3))
    summary = _predict(tmp_path / "kits", tmp_path / "out", run)
    assert len(summary.written) == 6 and not summary.bad and not summary.empty
    for source, path in summary.written.items():
        assert _grid(path) == _grid(source)
        kidneys = read_file_order(tmp_path / "kits" / source.parent.name / "segmentation.nii.gz") == 1
        assert metrics.dice(read_file_order(path) > 0, kidneys) > 0.8


def test_a_real_la_case_and_format(scans, run, tmp_path):
    case = scans("la_raw") / "06SR5RBREL16DQ6M8LWS"
    summary = _predict(case, tmp_path / "out", run, overlap=0)
    path, = summary.written.values()
    assert path == tmp_path / "out" / "06SR5RBREL16DQ6M8LWS.nrrd" and summary.written.keys() == {case / "lgemri.nrrd"}
    assert _grid(path) == _grid(case / "lgemri.nrrd")
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) == {0, 1}


def test_dicom_series_become_nifti_on_their_own_grid(run, tmp_path):
    image, label = ball()
    write_series(tmp_path / "patients" / "p1" / "axial", image)
    write_series(tmp_path / "patients" / "p2", image, axes=((1, 0, 0), (0, 0, -1)), along=(0, 1, 0))
    write_series(tmp_path / "patients" / "p3", image, skip=(3,))
    summary = _predict(tmp_path / "patients", tmp_path / "out", run)
    assert sorted(path.name for path in summary.written.values()) == ["p1_axial.nii.gz", "p2.nii.gz"]
    (reason,) = summary.bad.values()
    assert "lacks slices" in reason
    for series, path in summary.written.items():
        grid, expected = _grid(path), read_grid(series)
        assert grid.size == expected.size
        for name in ("spacing", "origin", "direction"):
            np.testing.assert_allclose(getattr(grid, name), getattr(expected, name), atol=1e-5)
        predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)
        assert metrics.dice(predicted > 0, label > 0) > 0.9
    # one series is a folder of its own, and what is done stays
    assert list(_predict(tmp_path / "patients" / "p2", tmp_path / "out", run).skipped) == [tmp_path / "patients" / "p2"]


def test_what_is_done_is_skipped_until_it_is_older_than_its_scan(run, tmp_path):
    write_la(tmp_path / "la", 2)
    out = tmp_path / "out"
    assert len(_predict(tmp_path / "la", out, run).written) == 2
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "predict.json"}
    summary = _predict(tmp_path / "la", out, run)
    assert not summary.written and list(summary.skipped.values()) == sorted(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # one more output is asked for, one is lost, one scan is replaced
    assert len(_predict(tmp_path / "la", out, run, entropy=True).written) == 2
    (out / "a.nrrd").unlink()
    assert list(_predict(tmp_path / "la", out, run).written.values()) == [out / "a.nrrd"]
    os.utime(tmp_path / "la" / "b" / "lgemri.nrrd", (2e9, 2e9))
    assert list(_predict(tmp_path / "la", out, run).written.values()) == [out / "b.nrrd"]


def test_predictions_of_two_networks_do_not_mix(run, tmp_path):
    write_la(tmp_path / "la", 1)
    out, other = tmp_path / "out", write_run(tmp_path / "other", resolve("folder", SMALL), thresholding_weights(0.5))
    _predict(tmp_path / "la", out, run)
    for arguments, changed in (((run,), {"mirror": True}), ((other,), {})):
        with pytest.raises(UserError, match=r"made with other (mirror|weights): choose another folder"):
            _predict(tmp_path / "la", out, *arguments, **changed)
    first = (out / "a.nrrd").read_bytes()
    assert len(_predict(tmp_path / "la", out, other, overwrite=True).written) == 1
    assert (out / "a.nrrd").read_bytes() != first
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_predictions_of_other_settings_do_not_mix(run, tmp_path):
    write_la(tmp_path / "la", 1)
    _predict(tmp_path / "la", tmp_path / "out", run)
    for name, value in {"overlap": 0.25, "largest_component": True}.items():
        with pytest.raises(UserError, match=f"made with other {name}: choose another folder"):
            _predict(tmp_path / "la", tmp_path / "out", run, **{name: value})
    for name, value in {"statistics": "case", "window": (0, 50), "plane": "coronal", "max_in_plane": 32}.items():
        other = write_run(tmp_path / name, resolve("folder", SMALL | {name: value}), thresholding_weights(2.5))
        with pytest.raises(UserError, match=f"made with other {name}: choose another folder"):
            _predict(tmp_path / "la", tmp_path / "out", other)


@pytest.mark.parametrize("amp, expected", [(None, None), ("bf16", torch.bfloat16)])
def test_the_runs_statistics_and_the_precision_asked_for_reach_the_scans(amp, expected, tmp_path, monkeypatch):
    write_la(tmp_path / "la", 1)
    run = write_run(tmp_path / "run", resolve("folder", SMALL | {"statistics": "case"}), thresholding_weights(2.5))
    given = []
    monkeypatch.setattr(predict, "segment", lambda *arguments: given.append(arguments[3]) or segment(*arguments))
    _predict(tmp_path / "la", tmp_path / "out", run, amp=amp)
    assert [(options.statistics, options.amp) for options in given] == [("case", expected)]


def test_files_that_no_prediction_wrote_are_never_replaced(run, tmp_path):
    write_image(tmp_path / "imagesTr" / "a.nii.gz", ball()[0])
    write_image(tmp_path / "labelsTr" / "a.nii.gz", ball()[1])
    before = (tmp_path / "labelsTr" / "a.nii.gz").read_bytes()
    with pytest.raises(UserError, match="is there already and no prediction"):
        _predict(tmp_path / "imagesTr", tmp_path / "labelsTr", run, overwrite=True)
    with pytest.raises(UserError, match="is a scan, and would be overwritten"):
        _predict(tmp_path / "imagesTr", tmp_path / "imagesTr", run)
    write_image(tmp_path / "more" / "b.nii.gz", ball()[0])  # into a folder of other scans, where no name clashes
    with pytest.raises(UserError, match=r"a\.nii\.gz is there already and no prediction"):
        _predict(tmp_path / "more", tmp_path / "imagesTr", run)
    write_image(tmp_path / "cases" / "a" / "image.nii.gz", ball()[0])  # with folders of its own
    with pytest.raises(UserError, match=r"image\.nii\.gz is there already and no prediction"):
        _predict(tmp_path / "more", tmp_path / "cases", run)
    assert (tmp_path / "labelsTr" / "a.nii.gz").read_bytes() == before
    assert not (tmp_path / "labelsTr" / "predict.json").exists()


def test_predictions_do_not_go_among_the_cases(run, tmp_path):
    write_image(tmp_path / "scans" / "a" / "imaging.nii.gz", ball()[0])
    with pytest.raises(UserError, match="holds the scans, and predictions there would be taken for scans"):
        _predict(tmp_path / "scans", tmp_path / "scans", run)
    with pytest.raises(UserError, match=r"segs is or lies below .*scans, which holds the scans"):
        _predict(tmp_path / "scans", tmp_path / "scans" / "segs", run)
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["a"]


def test_a_label_map_beside_a_scan_is_neither_needed_nor_read(run, tmp_path):
    write_image(tmp_path / "scans" / "a.nii.gz", ball()[0])
    (tmp_path / "scans" / "a_seg.nii.gz").write_bytes(b"spoiled")
    summary = _predict(tmp_path / "scans", tmp_path / "out", run)
    assert list(summary.written.values()) == [tmp_path / "out" / "a.nii.gz"] and not summary.bad


def test_empty_label_maps_are_named(tmp_path, capsys):
    write_la(tmp_path / "la", 2)
    run = write_run(tmp_path / "never", resolve("folder", SMALL), thresholding_weights(50.0))
    assert predict.main([str(tmp_path / "la"), str(tmp_path / "out"), "--run", str(run)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing but background was found in 2 of them" in said and "lgemri.nrrd" in said
    assert "see that their modality and intensities are those of the training scans" in said


def test_weights_of_others(run, tmp_path):
    """The same weights as a run's, and as a plain file with the run's settings or a preset's: the same label map."""
    write_la(tmp_path / "la", 1)
    torch.save({"net": thresholding_weights(2.5)}, tmp_path / "w.pth")
    flags = ["--settings", str(tmp_path / "s.toml"), "--patch", "32,32,16", "--dataset", "folder", "--amp", "off"]
    (tmp_path / "s.toml").write_text("max_in_plane = 0\n")
    commands = {
        "run": ["--run", str(run)],
        "checkpoint": ["--weights", str(run / "checkpoints" / "last.pt")],
        "both": ["--weights", str(tmp_path / "w.pth"), "--run", str(run)],
        "preset": ["--weights", str(tmp_path / "w.pth"), *flags],
    }
    for name, arguments in commands.items():
        assert predict.main([str(tmp_path / "la"), str(tmp_path / name), *arguments]) == 0
    written = {(tmp_path / name / "a.nrrd").read_bytes() for name in commands}
    assert len(written) == 1
    with pytest.raises(UserError, match=r"w\.pth does not say how scans are prepared"):
        predict.main([str(tmp_path / "la"), str(tmp_path / "none"), "--weights", str(tmp_path / "w.pth")])


def test_weights_and_settings_that_are_given_come_before_the_runs_own(run, tmp_path):
    write_la(tmp_path / "la", 1)
    torch.save(thresholding_weights(0.5), tmp_path / "other.pth")
    _predict(tmp_path / "la", tmp_path / "own", run)
    _predict(tmp_path / "la", tmp_path / "other", run, tmp_path / "other.pth")
    own, other = (read_file_order(tmp_path / name / "a.nrrd") for name in ("own", "other"))
    assert (other >= own).all() and other.sum() > own.sum()  # of the lower threshold
    config = resolve("folder", SMALL | {"window": (0, 100)})
    assert load_network(None, run / "checkpoints" / "last.pt", config)[1] is config


def test_a_run_whose_training_stopped_is_said_to_be_one(run, tmp_path, capsys):
    write_la(tmp_path / "la", 1)
    write_run(tmp_path / "stopped", resolve("folder", SMALL), thresholding_weights(2.5), iteration=7)
    for folder in (run, tmp_path / "stopped"):
        predict.main([str(tmp_path / "la"), str(tmp_path / folder.name), "--run", str(folder)])
        shown = capsys.readouterr().out
        assert ("note: training stopped at iteration 7 of 6000\n" in shown) == (folder != run)


def test_classes_that_the_weights_do_not_have_are_refused(tmp_path):
    write_la(tmp_path / "la", 1)
    run = write_run(tmp_path / "run", resolve("folder", SMALL | {"classes": "1,2"}), thresholding_weights(2.5))
    with pytest.raises(UserError, match="the weights have 2 classes, but the settings name the 2 label values"):
        _predict(tmp_path / "la", tmp_path / "out", run)


def test_several_classes_come_from_the_weights(tmp_path):
    run = write_run(tmp_path / "run", resolve("folder", SMALL), thresholding_weights(0.5, 2.0))
    image = np.zeros((36, 36, 20), np.uint8)
    image[8:28, 8:28, 4:16], image[14:22, 14:22, 7:13] = 60, 200
    write_image(tmp_path / "a.mha", image)
    _predict(tmp_path / "a.mha", tmp_path / "out", run, probabilities=True)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.mha"))).T
    np.testing.assert_array_equal(label, np.digitize(image, (30, 100)))
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"a_probability{c}.mha"))).T
                     for c in (1, 2))
    assert (first[label == 1] > 0.5).all() and (second[label == 2] > 0.5).all()


def test_bad_files_are_listed_and_the_others_predicted(run, tmp_path, capsys):
    folder = tmp_path / "scans"
    write_image(folder / "good.nii.gz", ball()[0])
    content = (folder / "good.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    (folder / "magic.nii.gz").write_bytes(gzip.compress(b"this is no scan" * 100))
    (folder / "text.nrrd").write_text("neither is this")
    (folder / "empty.mha").touch()
    sitk.WriteImage(sitk.Image([32, 32], sitk.sitkInt16), str(folder / "flat.nii.gz"))
    sitk.WriteImage(sitk.Image([32, 32, 16, 2], sitk.sitkInt16), str(folder / "series.nii.gz"))
    sitk.WriteImage(sitk.Image([32, 32, 16], sitk.sitkVectorUInt8, 3), str(folder / "colour.nrrd"))
    write_image(folder / "zeros.nii.gz", np.zeros((20, 20, 20), np.uint8))
    write_image(folder / "nan.nii.gz", np.full((20, 20, 20), np.nan, np.float32))
    assert predict.main([str(folder), str(tmp_path / "out"), "--run", str(run)]) == 1
    shown = capsys.readouterr()
    lines = {line.split(".")[0].rsplit("/", 1)[1]: line for line in shown.err.strip().splitlines()}
    expected = {
        "cut": "truncated", "magic": "cannot be read as a medical image", "text": "cannot be read as a medical image",
        "empty": "cannot be read as a medical image", "flat": "2 dimensions instead of 3",
        "series": "4 dimensions instead of 3", "colour": "3 values per voxel", "zeros": "no contrast", "nan": "NaN",
    }
    assert lines.keys() == expected.keys() and all(said in lines[name] for name, said in expected.items())
    assert "1 predicted, 0 there already, 9 failed" in shown.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.nii.gz", "predict.json"]
    # and the good one is not predicted again
    assert predict.main([str(folder), str(tmp_path / "out"), "--run", str(run)]) == 1
    assert "0 predicted, 1 there already, 9 failed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    (["scans", "out"], "no network: give --run RUN"),
    (["scans", "out", "--run", "nowhere"], "/nowhere: give the folder of a training, its --out"),
    (["scans", "out", "--weights", "none.pth"], "no weights at none.pth"),
    (["scans", "out", "--run", "run", "--dataset", "la"], "--run brings its own settings"),
    (["scans", "out", "--run", "run", "--window", "0,1"], "--window changes a preset"),
    (["scans", "out", "--run", "run", "--overlap", "1"], "overlap must be from 0 to below 1"),
    (["scans", "out.nii.gz", "--run", "run"], "is to be the folder for the predictions"),
    (["nowhere", "out", "--run", "run"], "nowhere does not exist"),
    (["empty", "out", "--run", "run"], "the folder empty is empty"),
    (["scans", "out", "--run", "run", "--mirrors"], "did you mean --mirror?"),
    (["scans"], "required: OUT"),
])
def test_bad_command_lines_end_in_one_line_and_write_nothing(arguments, said, run, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "scans" / "a.nii.gz", ball()[0])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        predict.main(arguments)
    message = str(error.value) if error.type is UserError else capsys.readouterr().err.strip()
    assert said in message and "\n" not in message
    assert not list(tmp_path.glob("out*"))


def test_from_the_shell(run, tmp_path):
    write_image(tmp_path / "a.nii.gz", ball()[0])
    (tmp_path / "b.nii.gz").write_bytes(b"")
    command = [sys.executable, "-m", "spss_fast.predict", "a.nii.gz", "b.nii.gz", "out", "--run", str(run)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: b.nii.gz ") and len(result.stderr.strip().splitlines()) == 1
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["overlap"] == 0.5
    found, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))).T, ball()[1])
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
