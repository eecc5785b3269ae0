"""The whole job on small phantoms: two commands, resuming, what training may see, and bad command lines."""

import csv
import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from rich.console import Console

from spss_fast import cli, evaluate, train
from spss_fast.config import resolve
from spss_fast.data.phantom import write_phantoms
from spss_fast.engine import checkpoint, progress
from spss_fast.engine.interrupts import uninterrupted
from spss_fast.engine.profiling import PHASES
from spss_fast.engine.run_folder import RunFolder
from spss_fast.errors import UserError
from tests.data.writing import write_h5

SMALL = {
    "n_labeled": 2, "n_test": 2, "phantoms": 6, "patch": (32, 32, 16), "resample": (32, 32, 16), "filters": 2,
    "iterations": 3, "registration_epochs": 1, "registration_steps": 2, "registration_pairs": 4, "passes": 2,
    "negatives": 5, "log_every": 1, "preview_every": 2, "checkpoint_every": 2, "refresh_batches": 1, "workers": 1,
    "amp": "off", "device": "cpu",
}
SAME_BITS = {"deterministic": True}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 6, 0, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(phantoms, cache) -> dict:
    return SMALL | {"data_dir": str(phantoms), "cache_dir": str(cache)}


def _train(settings: dict, out: Path, **options) -> dict:
    train.train(resolve("phantom", settings), out, console=Console(quiet=True), **options)
    return checkpoint.read(out / "checkpoints" / "last.pt")


def _flags(settings: dict) -> list[str]:
    def text(value) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), text(value))]


def test_two_commands_from_scans_to_metrics(settings, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["--dataset", "phantom", "--out", str(run), *_flags(settings)])
    shown = capsys.readouterr().out
    assert "registration labels of the 2 annotated volumes: Dice" in shown
    assert "stage 2: joint training 0/3: waiting for the first batch" in shown
    assert 0.1 < float(re.search(r"peak memory: (\S+) GiB", shown)[1]) < 50
    assert resolve("phantom", {}, run / "config.toml") == resolve("phantom", settings)
    recorded = json.loads((run / "cases.json").read_text())
    assert len(recorded["annotated"]) == len(recorded["test"]) == 2 and recorded["held_out"]
    assert not set(recorded["train"]) & set(recorded["test"])
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    with (run / "joint.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert 0 <= float(rows[-1]["dice_fused"]) <= 1 and float(rows[-1]["loss_s"]) > 0
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["000002.png", "000003.png"]
    assert list(run.glob("events.out.tfevents.*"))
    assert not [path for path in run.rglob(".*") if path.is_file()]  # no half-written file stays

    evaluate.main(["--run", str(run)])
    shown = capsys.readouterr().out
    assert "2 held-out cases" in shown and "registration labels of 2 annotated training volumes" in shown
    with (run / "evaluation.csv").open() as file:
        measured = {row["case"]: float(row["dice"]) for row in csv.DictReader(file)}
    assert sorted(measured) == recorded["test"]
    about = json.loads((run / "evaluation.json").read_text())
    assert about["measured"] == "held-out cases; on the 32 x 32 x 16 voxels that scans are resampled to"
    assert about["data_dir"] == recorded["data_dir"]
    assert (about["units"], about["cases"]) == ("voxel", 2)
    assert about["metrics"]["dice"]["mean"] == pytest.approx(np.mean(list(measured.values())), abs=1e-5)


def test_the_first_iteration_is_shown_at_once(settings, tmp_path, capsys, monkeypatch):
    """The next that is shown may be minutes off."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    train.main(["--out", str(tmp_path / "run"), *_flags(settings | {"log_every": 50, "iterations": 4})])
    shown = re.findall(r"joint training (\d)/4, ", capsys.readouterr().out)
    logged = (tmp_path / "run" / "joint.csv").read_text().splitlines()[1:]
    assert shown == ["1", "4"] and [row.split(",")[0] for row in logged] == ["4"]


@pytest.fixture(scope="module")
def organs(tmp_path_factory) -> Path:
    """Phantoms that label liver (3) and spleen (4) beside the kidneys (1)."""
    folder = tmp_path_factory.mktemp("organs")
    write_phantoms(folder, 6, 0, (24, 64, 64), (8.0, 5.6, 5.6), workers=1, progress=False, organs=True)
    return folder


def test_several_classes_train_and_are_measured(settings, organs, tmp_path, capsys):
    rows = ["case,slice"]
    for name in ("case_00000", "case_00001"):
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(organs / name / "segmentation.nii.gz")))
        both = [(label == value).sum((0, 1)) for value in (1, 3)]  # the slice axis is the last one here
        rows.append(f"{name},{np.argmax(np.minimum(*both))}")
    (tmp_path / "slices.csv").write_text("\n".join(rows))
    changes = {"data_dir": str(organs), "annotations": str(tmp_path / "slices.csv"), "classes": "3,1"}
    run, changes = tmp_path / "run", changes | {"iterations": 12, "preview_every": 12}
    train.main(["--dataset", "phantom", "--out", str(run), *_flags(settings | changes)])
    assert ", class 3 0." in " ".join(capsys.readouterr().out.split())
    content = checkpoint.read(run / "checkpoints" / "last.pt")
    assert all(len(content[part]["out_conv.weight"]) == 3 for part in ("student", "teacher"))
    with (run / "joint.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert np.isfinite([list(row.values()) for row in rows]).all()
    for kind in ("registration", "fused"):
        dice = [[row[f"dice_{kind}{suffix}"] for row in rows] for suffix in ("", "_3", "_1")]
        np.testing.assert_allclose(dice[0], np.mean(dice[1:], 0), atol=1e-5)
        assert min(max(of_class) for of_class in dice[1:]) > 0.3
    assert np.mean([row["loss_s"] for row in rows[-4:]]) < np.mean([row["loss_s"] for row in rows[:4]])

    evaluate.main(["--run", str(run)])
    shown = capsys.readouterr().out
    assert all(f"class {value}" in shown for value in (3, 1)) and "class 2" not in shown
    with (run / "evaluation.csv").open() as file:
        names = next(csv.reader(file))
    assert names[:5] == ["case", "dice", "jaccard", "hd95", "asd"]
    assert names[5:] == [f"{name}_{value}" for value in (3, 1) for name in names[1:5]]


def test_a_class_that_no_annotated_slice_shows_is_named(settings, organs, tmp_path):
    with pytest.raises(UserError, match="no annotated slice of the 2 holds label value 9"):
        _train(settings | {"data_dir": str(organs), "classes": "1,9"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_cases_in_another_folder_are_called_so(settings, phantoms, tmp_path):
    _train(settings | {"iterations": 1}, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "cases.json").read_text())
    known = [recorded["train"][0], recorded["train"][-1], recorded["test"][0]]
    for name in known:
        shutil.copytree(phantoms / name, tmp_path / "other" / name)
    rows, meaning = evaluate.evaluate(tmp_path / "run", tmp_path / "other")
    assert sorted(rows) == sorted(known) and "(2 named as training cases of the run, 1 annotated)" in meaning


def test_hdf5_is_not_measured_in_mm(settings, tmp_path):
    _train(settings | {"iterations": 1}, tmp_path / "run")
    label = np.zeros((32, 32, 16), np.uint8)
    label[8:20, 8:20, 4:12] = 1
    write_h5(tmp_path / "other" / "a.h5", image=label.astype(np.float32), label=label)
    rows, _ = evaluate.evaluate(tmp_path / "run", tmp_path / "other")
    assert list(rows) == ["a"]
    with pytest.raises(UserError, match=r"--units mm: .*a\.h5 is preprocessed HDF5, which keeps no voxel size"):
        evaluate.evaluate(tmp_path / "run", tmp_path / "other", units="mm")


def test_data_that_moved_are_measured_as_before(settings, phantoms, tmp_path, capsys):
    first, moved = tmp_path / "data", tmp_path / "moved"
    shutil.copytree(phantoms, first)
    _train(settings | {"data_dir": str(first), "iterations": 1}, tmp_path / "run")
    evaluate.main(["--run", str(tmp_path / "run")])
    before = (tmp_path / "run" / "evaluation.csv").read_text()
    first.rename(moved)
    with pytest.raises(UserError, match=r"data does not exist: if it has moved, say where to with --data-dir"):
        evaluate.main(["--run", str(tmp_path / "run")])
    capsys.readouterr()
    evaluate.main(["--run", str(tmp_path / "run"), "--data-dir", str(moved)])
    assert "2 held-out cases of the run, now in " in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "evaluation.csv").read_text() == before
    about = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (about["data_dir"], about["foreign"]) == (str(moved), False)
    shutil.copytree(moved / "case_00001", moved / "new")
    evaluate.main(["--run", str(tmp_path / "run"), "--data-dir", str(moved)])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"not measured: 1 labelled cases in {moved} that are not the run's (new); to measure them" in shown
    assert (tmp_path / "run" / "evaluation.csv").read_text() == before


def test_another_data_folder_can_be_measured(settings, phantoms, tmp_path):
    _train(settings, tmp_path / "run")
    shutil.copytree(phantoms / "case_00001", tmp_path / "other" / "case_00001")
    rows, meaning = evaluate.evaluate(tmp_path / "run", tmp_path / "other")
    assert list(rows) == ["case_00001"] and meaning.startswith("cases of another folder than the run's own, ")
    # in another layout too
    (tmp_path / "plain").mkdir()
    for name, plain in (("imaging", "a"), ("segmentation", "a_seg")):
        shutil.copy(tmp_path / "other" / "case_00001" / f"{name}.nii.gz", tmp_path / "plain" / f"{plain}.nii.gz")
    assert evaluate.evaluate(tmp_path / "run", tmp_path / "plain")[0] == {"a": rows["case_00001"]}
    (tmp_path / "other" / "case_00001" / "segmentation.nii.gz").unlink()
    with pytest.raises(UserError, match="full label"):
        evaluate.evaluate(tmp_path / "run", tmp_path / "other")


def test_nothing_is_measured_on_a_label_of_one_slice_and_previews_can_be_left_out(settings, phantoms, tmp_path):
    _train(settings | {"registration_epochs": 0, "iterations": 1, "preview_every": 0}, tmp_path / "run")
    assert not list((tmp_path / "run" / "previews").iterdir())
    for name in ("case_00001", "case_00002"):
        shutil.copytree(phantoms / name, tmp_path / "other" / name)
    path = tmp_path / "other" / "case_00001" / "segmentation.nii.gz"
    image = sitk.ReadImage(str(path))
    label = sitk.GetArrayFromImage(image)  # slices last
    alone = sitk.GetImageFromArray(label * (np.arange(label.shape[2]) == (label > 0).sum((0, 1)).argmax()))
    alone.CopyInformation(image)
    sitk.WriteImage(alone, str(path))
    rows, _ = evaluate.evaluate(tmp_path / "run", tmp_path / "other")
    assert list(rows) == ["case_00002"]


def test_a_training_that_diverges_stops_and_says_so(settings, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|-?inf) at iteration \d+.* --lr .it is 1e\+30.*--amp off"):
        _train(settings | {"lr": 1e30, "iterations": 6, "log_every": 1}, tmp_path / "run")


def test_a_registration_that_diverges_stops_too(settings, tmp_path):
    with pytest.raises(UserError, match=r"the loss_registration is nan at epoch 1 .*--registration-lr .it is 1e\+30"):
        _train(settings | {"registration_lr": 1e30}, tmp_path / "one")
    with pytest.raises(UserError, match=r"loss_registration\w* is nan at iteration \d+.*--registration-lr"):
        _train(settings | {"registration_lr": 1e30, "registration_epochs": 0, "log_every": 50}, tmp_path / "two")
    assert checkpoint.read(tmp_path / "two" / "checkpoints" / "last.pt")["iteration"] == 0


def _weights(content: dict) -> list[torch.Tensor]:
    return [value for part in ("student", "teacher", "registration") for value in content[part].values()]


@pytest.fixture
def interruptible():
    """Interrupts as a terminal's: what starts the tests in the background may have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(settings, tmp_path, monkeypatch, interruptible):
    settings = settings | SAME_BITS
    whole = _train(settings, tmp_path / "whole")
    iterate = train.joint_iteration

    def interrupted(state, batch):
        if state.iteration == 1:
            signal.raise_signal(signal.SIGINT)  # amid the second iteration, which is finished
        return iterate(state, batch)

    monkeypatch.setattr(train, "joint_iteration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(settings, tmp_path / "parts")
    assert checkpoint.read(tmp_path / "parts" / "checkpoints" / "last.pt")["iteration"] == 2
    monkeypatch.setattr(train, "joint_iteration", iterate)
    parts = _train(settings, tmp_path / "parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(parts)))
    joint = [(tmp_path / name / "joint.csv").read_text() for name in ("whole", "parts")]
    assert joint[0] == joint[1]


def test_a_run_resumed_amid_stage_1_goes_on_with_its_batches(settings, tmp_path, monkeypatch, interruptible):
    changes = {"n_labeled": 4, "n_test": 0, "registration_epochs": 3, "iterations": 1} | SAME_BITS
    whole = _train(settings | changes, tmp_path / "whole")
    pretrain = train.registration_epoch

    def interrupted(state, batches):
        if state.epoch == 1:
            signal.raise_signal(signal.SIGINT)
        return pretrain(state, batches)

    monkeypatch.setattr(train, "registration_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(settings | changes, tmp_path / "parts")
    assert checkpoint.read(tmp_path / "parts" / "checkpoints" / "last.pt")["epoch"] == 2
    monkeypatch.setattr(train, "registration_epoch", pretrain)
    parts = _train(settings | changes, tmp_path / "parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(parts)))
    texts = [(tmp_path / name / "registration.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 4


def test_resume_refuses_other_data(settings, phantoms, tmp_path):
    """Else a case that is recorded as a test case might train."""
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    _train(settings | {"data_dir": str(data), "iterations": 1}, tmp_path / "run")
    shutil.copytree(data / "case_00001", data / "case_00009")
    with pytest.raises(UserError, match=r"cases are not those that the run in .* began with: case_0000.*another --out"):
        train.main(["--out", str(tmp_path / "run"), "--resume"])


def test_two_processes_do_not_train_in_one_folder(settings, tmp_path):
    _train(settings | {"iterations": 1}, tmp_path / "run")
    code = """
import pathlib, sys
from spss_fast.engine.run_folder import RunFolder
folder = RunFolder(pathlib.Path(sys.argv[1]))
folder.hold()
print("held", flush=True)
input()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"another process trains in .*run: wait for it, stop it"):
            train.main(["--out", str(tmp_path / "run"), "--resume"])
        other.kill()
    train.main(["--out", str(tmp_path / "run"), "--resume"])


def test_full_labels_of_some_annotated_volumes_leave_the_metrics_in_columns(settings, tmp_path, monkeypatch):
    load = train.load

    def partly(config, console):
        dataset = load(config, console)
        dataset.labeled[0].reference = None
        return dataset

    monkeypatch.setattr(train, "load", partly)
    changes = {"batch_labeled": 1, "batch_unlabeled": 1, "iterations": 4, "log_every": 1}
    _train(settings | changes, tmp_path / "run")
    with (tmp_path / "run" / "joint.csv").open() as file:
        dice = [float(row["dice_fused"]) for row in csv.DictReader(file)]
    assert sum(np.isnan(dice)) == 2 and len(dice) == 4


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(
    settings, tmp_path, monkeypatch, capsys, interruptible
):
    def interrupted(state, batch):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "joint_iteration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(resolve("phantom", settings), tmp_path / "run")
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (content["epoch"], content["iteration"]) == (settings["registration_epochs"], 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    shown = capsys.readouterr().out
    assert "stopping after this iteration" in shown
    assert f"go on from the last checkpoint with: python -m spss_fast.train --out {tmp_path / 'run'} --resume" in shown


def test_where_interrupts_are_ignored_they_stay_so(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted(Console(quiet=True)):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_training_sees_one_slice_per_annotated_case_and_nothing_more(settings, phantoms, tmp_path):
    """Full labels are altered everywhere but in the annotated slices: no weight may notice."""
    altered = tmp_path / "altered"
    shutil.copytree(phantoms, altered)
    slices = {}
    for path in sorted(altered.glob("case_*/segmentation.nii.gz")):
        image = sitk.ReadImage(str(path))
        label = sitk.GetArrayFromImage(image)  # KiTS19's slice axis is the last one here, where SimpleITK reverses axes
        annotated = int(np.argmax((label > 0).sum((0, 1))))
        slices[path.parent.name] = annotated
        changed = np.where(np.arange(label.shape[2]) == annotated, label, (label == 0).astype(label.dtype))
        out = sitk.GetImageFromArray(changed)
        out.CopyInformation(image)
        sitk.WriteImage(out, str(path))
    table = tmp_path / "slices.csv"
    split = json.loads(_cases(settings, tmp_path / "probe").read_text())
    rows = [f"{name},{slices[name]}" for name in split["train"][:2]]
    table.write_text("\n".join(["case,slice", *rows]) + "\n")
    lists = {part: "\n".join(split[part]) + "\n" for part in ("train", "test")}
    contents = []
    for name, source in (("original", phantoms), ("altered", altered)):
        folder = tmp_path / f"data_{name}"
        shutil.copytree(source, folder)
        for part, text in lists.items():
            (folder / f"{part}.list").write_text(text)
        changes = {"data_dir": str(folder), "annotations": str(table)} | SAME_BITS
        contents.append(_train(settings | changes, tmp_path / name))
    assert all(torch.equal(a, b) for a, b in zip(_weights(contents[0]), _weights(contents[1])))


def _cases(settings: dict, out: Path) -> Path:
    _train(settings | {"iterations": 1}, out)
    return out / "cases.json"


def test_half_precision_trains(settings, tmp_path):
    content = _train(settings | {"amp": "bf16"}, tmp_path / "run")
    assert content["iteration"] == 3 and all(torch.isfinite(value).all() for value in _weights(content))


def test_both_loaders_train_the_same_weights(settings, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install spss_fast[dali])")
    contents = [_train(settings | SAME_BITS | {"loader": name}, tmp_path / name) for name in ("torch", "dali")]
    assert all(torch.equal(a, b) for a, b in zip(*map(_weights, contents)))


def test_a_missing_dali_is_named_before_anything_is_written(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="--loader dali: DALI cannot be imported"):
        _train(settings | {"loader": "dali"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_old_run_is_not_overwritten(settings, tmp_path):
    run = tmp_path / "run"
    _train(settings, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        _train(settings, run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments, said", [
    (["--datset", "la"], "unknown flag --datset: did you mean --dataset?"),
    (["--iters", "6"], "unknown flag --iters: did you mean --iterations?"),
    (["--registraton-epochs", "6"], "did you mean --registration-epochs?"),
    (["--window", "-160", "240"], "240 belongs to no flag: lists are written with commas"),
    (["--dataset", "brats"], "invalid choice: 'brats'"),
    (["--dataset", "la"], "--data-dir"),
    (["--dataset", "la", "--data-dir", "nowhere"], "nowhere does not exist: LA comes from"),
    (["--dataset", "phantom", "--iterations", "many"], "setting iterations = 'many'"),
    (["--dataset", "phantom", "--classes", "1,a"], "): 'a' is no whole number"),
    (["--dataset", "phantom", "--noise", "lots"], "): 'lots' is no number"),
    (["--dataset", "phantom", "--patch", "40,40,16"], "multiples of 16"),
    (["--dataset", "phantom", "--similarity", "ssd"], "choose one of mse, ncc"),
    (["--dataset", "phantom", "--device", "cuda:99"], "device cuda:99 cannot be used"),
    (["--dataset", "phantom", "--settings", "none.toml"],
     "cannot read the settings file none.toml: No such file or directory (prepare writes one for a folder of scans)"),
    (["--out", "empty", "--resume"], "/empty: give the folder of a training, its --out"),
])
def test_bad_command_lines_end_in_one_line_and_write_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: train.main(arguments))
    shown = capsys.readouterr()
    assert exit.value.code == 2 and shown.out == ""
    assert said in shown.err and len(shown.err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_resume_keeps_the_runs_own_settings(settings, phantoms, tmp_path, monkeypatch, capsys):
    """From another working directory, too."""
    monkeypatch.chdir(phantoms.parent)
    run, flags = tmp_path / "run", settings | {"iterations": 1, "data_dir": phantoms.name}
    (tmp_path / "mine.toml").write_text("lr = 0.02\npatch = [32, 32, 16]\n")
    train.main(["--out", str(run), "--settings", str(tmp_path / "mine.toml"), *_flags(flags)])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    train.main(["--out", str(run), "--resume"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing was left to train: this run had finished its 1 iterations" in shown
    assert f"measure it with: python -m spss_fast.evaluate --run {run}" in shown
    same = ["--out", str(run), "--resume", "--settings", "mine.toml", *_flags(flags | {"data_dir": str(phantoms)})]
    train.main(same)
    with pytest.raises(UserError, match="filters, iterations would be another: leave out --filters, --iterations"):
        train.main([*same, "--iterations", "5", "--filters", "4"])
    (tmp_path / "mine.toml").write_text("lr = 0.03\n")
    with pytest.raises(UserError, match="lr would be another: leave out --settings"):
        train.main(same)
    with pytest.raises(UserError, match="is of --dataset phantom: leave out --dataset kits"):
        train.main(["--dataset", "kits", "--out", str(run), "--resume"])


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*last\.pt"):
        train.main(["--out", str(tmp_path), "--resume"])


def test_evaluate_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="give the folder of a training"):
        evaluate.main(["--run", str(tmp_path)])
    with pytest.raises(UserError, match="three voxel counts"):
        evaluate.main(["--run", str(tmp_path), "--stride", "4,4"])
    with pytest.raises(UserError, match=r"x\.json is to be the table of metrics, .* name it .*x\.csv"):
        evaluate.main(["--run", str(tmp_path), "--out", str(tmp_path / "x.json")])
    with pytest.raises(UserError, match=r"cannot read .*cases\.json .*: copy a run folder whole"):
        RunFolder(tmp_path).cases()


def test_the_same_seed_gives_the_same_bits(settings, tmp_path):
    changes = SAME_BITS | {"iterations": 50, "log_every": 50, "checkpoint_every": 50, "preview_every": 50}
    runs = [_weights(_train(settings | changes, tmp_path / name)) for name in ("first", "second")]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert not torch.are_deterministic_algorithms_enabled()
    other = _weights(_train(settings | changes | {"seed": 1, "iterations": 2}, tmp_path / "other"))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_half_precision_scales_its_gradients_and_goes_on_with_its_scale(settings, tmp_path):
    changes = {"amp": "fp16", "iterations": 2, "checkpoint_every": 1}
    content = _train(settings | changes, tmp_path / "run")
    assert content["scaler"]["scale"] == content["registration_scaler"]["scale"] == 2**16
    assert all(value.isfinite().all() for value in _weights(content) if value.is_floating_point())
    # no step was skipped for an overflow
    assert any(group["momentum_buffer"].any() for group in content["sgd"]["state"].values())

    content["scaler"]["scale"], content["config"]["training"]["iterations"] = 2.0**10, 3
    torch.save(content, tmp_path / "run" / "checkpoints" / "last.pt")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (content["iteration"], content["scaler"]["scale"]) == (3, 2**10)


def test_a_profiled_run_says_where_its_time_goes(settings, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["--dataset", "phantom", "--out", str(run), "--profile", "2", *_flags(settings | {"iterations": 5})])
    shown = capsys.readouterr().out
    table = (run / "profile.txt").read_text(encoding="utf-8")
    for phase in PHASES:
        line = next(line for line in table.splitlines() if line.startswith(f"│ {phase}"))
        assert float(line.split("│")[2]) > 0 and line.strip()[:20] in shown
    with gzip.open(run / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"spss_fast/{phase}" for phase in PHASES} <= names


def test_a_profiled_run_that_ends_early_counts_what_it_profiled(settings, tmp_path, capsys):
    flags = ["--dataset", "phantom", "--profile", "10", *_flags(settings)]
    train.main([*flags, "--out", str(tmp_path / "three"), "--iterations", "3"])
    assert "mean of 1" in capsys.readouterr().out
    train.main([*flags, "--out", str(tmp_path / "two"), "--iterations", "2"])
    assert "nothing was profiled: --profile leaves out the first 2 iterations" in capsys.readouterr().out
    assert not (tmp_path / "two" / "profile.txt").exists()
