"""The command on folders as scanners and annotators leave them, up to a training run without any full label."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from spss_fast import prepare, train
from spss_fast.config import resolve
from spss_fast.data.fingerprint import known_modality
from spss_fast.data.images import read_grid
from spss_fast.data.splits import make_split
from spss_fast.errors import UserError
from spss_fast.suggest import suggest
from tests.data.test_annotations import annotate
from tests.data.writing import ball, settings_of, write_image, write_object, write_series

SMALL = {
    "filters": 2, "iterations": 1, "registration_epochs": 1, "registration_steps": 1, "registration_pairs": 2,
    "passes": 2, "negatives": 5, "log_every": 1, "refresh_batches": 1, "amp": "off", "device": "cpu",
}


def run(tmp_path, data, **flags):
    flags = {"cache_dir": str(tmp_path / "cache"), "workers": 1, **flags}
    return prepare.prepare_folder(data, tmp_path / "mine.toml", flags=flags, console=Console(quiet=True))


def write_annotated(tmp_path, names, annotated):
    """Scans of those names, of which some have slice 16 annotated; the last one's label."""
    for i, name in enumerate(names):
        image, label = ball((32, 32, 32), i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
        if name in annotated:
            annotate(tmp_path / "todo", name, 2, 16, label)
    return label


def test_from_unlabelled_scans_and_an_annotation_folder_to_a_run(tmp_path, capsys, monkeypatch):
    """Coronal slices are annotated, in another folder; no scan has a full label anywhere."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcde"):
        image, label = ball((40, 36, 36), i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
        if name in "bd":
            annotate(tmp_path / "todo", name, 1, 18, label)
    write_image(tmp_path / "todo" / "e" / "annotation.nii.gz", np.zeros_like(label))
    write_image(tmp_path / "todo" / "e" / "Segmentation.nrrd", label)
    arguments = ["--data-dir", "scans", "--annotations", "todo", "--cache-dir", "cache", "--workers", "1"]
    assert prepare.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 annotations in" in shown and "still empty: e\n" in shown and "b: coronal slice 18 (axis 1" in shown
    assert "todo/e/Segmentation.nrrd is there: save it as annotation.nii.gz" in shown
    config = resolve("folder", SMALL, tmp_path / "scans.toml")
    assert config.data.plane == "coronal" and (config.data.n_labeled, config.data.n_test) == (2, 0)
    assert config.data.patch == (32, 32, 32)
    assert (config.data.data_dir, config.data.annotations) == (str(tmp_path / "scans"), str(tmp_path / "todo"))
    with pytest.raises(UserError, match=r"plane = axial, but .*todo is annotated in the coronal plane"):
        run(tmp_path, tmp_path / "scans", annotations="todo", plane="axial")
    train.train(config, tmp_path / "run", console=Console(quiet=True))
    recorded = json.loads((tmp_path / "run" / "cases.json").read_text())
    assert recorded["annotated"] == {"b": 18, "d": 18}
    with pytest.raises(UserError, match=r"scans.toml exists already: prepare by it with --settings"):
        prepare.main(arguments)
    with pytest.raises(UserError, match=r"MISSPELT do not exist"):
        prepare.main([*arguments, "--annotations", "MISSPELT"])
    assert prepare.main(["--data-dir", "scans", "--settings", "scans.toml"]) == 0  # as it was edited


def test_slices_of_padded_annotations_are_named_as_the_scan_counts_them(tmp_path):
    """As `suggest` pads them: here with 4 slices below the scan."""
    for i, name in enumerate("abcd"):
        image, label = ball((32, 32, 24), i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
        if name in "ab":
            label[:, :, :10] = label[:, :, 11:] = 0
            padded = np.pad(label, ((0, 0), (0, 0), (4, 0)))
            write_image(tmp_path / "todo" / name / "annotation.nii.gz", padded, origin=(0.0, 0.0, -4.0))
    said = Console(file=io.StringIO())
    flags = {"cache_dir": str(tmp_path / "cache"), "workers": 1, "annotations": str(tmp_path / "todo")}
    prepare.prepare_folder(tmp_path / "scans", tmp_path / "mine.toml", flags=flags, console=said)
    assert "a: axial slice 10 (axis 2 of the file), label value 1" in said.file.getvalue()


@pytest.mark.parametrize("values", [(1,), (1, 3), (255,)])
def test_a_label_map_whose_name_does_not_say_so_is_refused(tmp_path, values):
    for i, name in enumerate("abcd"):
        image, label = ball((32, 32, 24), i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
    mask = tmp_path / "scans" / "liver_a.nii.gz"
    write_image(mask, sum(value * (np.roll(label, 8 * i, 0) > 0) for i, value in enumerate(values)).astype(np.float32))
    result = run(tmp_path, tmp_path / "scans")
    line, = result.unusable
    assert line.startswith(f"{mask} looks like a label map") and "like CASE_seg.nii.gz beside CASE.nii.gz" in line
    assert [case.name for case in result.cases] == list("abcd")
    settings = settings_of("folder", tmp_path / "other", data_dir=str(tmp_path / "scans")).data
    with pytest.raises(UserError, match=r"liver_a.nii.gz looks like a label map"):
        suggest(settings, tmp_path / "todo", 2, Console(quiet=True))


def test_dicom_that_is_no_scan_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcd"):
        write_series(tmp_path / "scans" / name / "CT", ball((32, 32, 24), i)[0])
    write_object(tmp_path / "scans" / "a" / "RTSTRUCT" / "1.dcm", "RTSTRUCT")
    assert prepare.main(["--data-dir", "scans", "--cache-dir", "cache", "--workers", "1"]) == 0
    assert "left out, as no scan: 1 DICOM RTSTRUCT (a/RTSTRUCT/1.dcm); a label must be" in capsys.readouterr().out


def test_a_label_without_foreground_is_said_and_counts_as_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcd"):
        image, label = ball((32, 32, 24), i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
        write_image(tmp_path / "scans" / f"{name}_seg.nii.gz", label * (name != "b"))
    assert prepare.main(["--data-dir", "scans", "--cache-dir", "cache", "--workers", "1"]) == 0
    assert "1 labels hold no foreground: b; their scans count as unlabelled" in capsys.readouterr().out


def test_annotations_of_nearly_all_scans_need_training_without_unlabelled_ones(tmp_path):
    write_annotated(tmp_path, "abc", "ab")
    result = run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "todo"))
    text = " ".join(result.settings.read_text().split("\n# "))
    assert "annotations names 2 of the 3 scans" in text and "--batch-unlabeled 0" in text


def test_annotations_that_cannot_be_used_are_named_where_too_few_are_left(tmp_path):
    label = write_annotated(tmp_path, "abcd", "abc")
    both = np.zeros_like(label)
    both[:, :, 14:16] = label[:, :, 14:16]
    write_image(tmp_path / "todo" / "b" / "annotation.nii.gz", both)
    write_image(tmp_path / "todo" / "c" / "annotation.nii.gz", label[1:])
    said = r"annotates 1 scan.*annotate 1 more; 2 cannot be used: .*b/annotation.* 2 annotated slices.*c/annotation"
    with pytest.raises(UserError, match=said):
        run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "todo"))


def test_without_labels_annotating_is_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcd"):
        write_image(tmp_path / "scans" / f"{name}.nii.gz", ball((32, 32, 24), i)[0])
    assert prepare.main(["--data-dir", "scans", "--cache-dir", "cache", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "0 scans have a label" in shown and "train with" not in shown
    assert "suggest --data-dir scans --out TO_ANNOTATE --budget 2, remove scans.toml and prepare anew" in shown


def test_annotations_that_are_all_empty_are_refused(tmp_path):
    image, label = ball((32, 32, 32))
    write_image(tmp_path / "scans" / "a.nii.gz", image)
    write_image(tmp_path / "todo" / "a" / "annotation.nii.gz", np.zeros_like(label))
    with pytest.raises(UserError, match="todo: all annotations are still empty: annotate one slice"):
        run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "todo"))
    assert not (tmp_path / "mine.toml").exists()


def test_a_real_ct(scans, tmp_path):
    data = tmp_path / "ct"
    for source, name in (("ct_sm", "p1"), ("seg", "p1_seg"), ("ct", "p2")):
        data.mkdir(exist_ok=True)
        (data / f"{name}.nii.gz").write_bytes((scans("ct") / f"example_{source}.nii.gz").read_bytes())
    result = run(tmp_path, data, foreground="2,3")
    settings = result.config.data
    assert settings.window == (-160.0, 240.0) and settings.resample is None and settings.foreground == (2, 3)
    assert all(side % 16 == 0 for side in settings.patch)
    assert all(side <= n for case in result.cases for side, n in zip(settings.patch, case.image.shape))
    text = result.settings.read_text()
    assert "modality: CT 2" in text and "RAS 2" in text
    assert not result.unusable and [case.has_label for case in result.cases] == [True, False]


def test_a_label_of_one_slice_is_counted_as_an_annotation(tmp_path):
    for i in range(10):
        image, label = ball((32, 32, 32), i)
        if i:
            label[:, :, :15] = label[:, :, 16:] = 0
        write_image(tmp_path / "scans" / f"{i}.nii.gz", image)
        write_image(tmp_path / "scans" / f"{i}_seg.nii.gz", label)
    result = run(tmp_path, tmp_path / "scans")
    assert (result.config.data.n_test, result.config.data.n_labeled) == (0, 8)
    assert "9 labels show one slice or none: 1, 2, 3, 4, ...;" in " ".join(result.settings.read_text().split("\n# "))


@pytest.mark.parametrize("labelled, n_test", [(8, 0), (30, 6)])
def test_a_csv_sets_how_many_are_annotated(tmp_path, capsys, labelled, n_test):
    """What is proposed can be trained: no more annotated volumes than named, no test without a label."""
    for i in range(30):
        image, label = ball((24, 24, 16), i)
        write_image(tmp_path / "scans" / f"s{i:02d}.nii.gz", image)
        if i < labelled:
            write_image(tmp_path / "scans" / f"s{i:02d}_seg.nii.gz", label)
    rows = [f"s{i:02d},8\n" for i in range(8)]
    (tmp_path / "slices.csv").write_text("case,slice\n" + "".join(rows))
    result = run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "slices.csv"))
    assert (result.config.data.n_labeled, result.config.data.n_test) == (8, n_test) and not result.unusable
    split = make_split(result.cases, tmp_path / "scans", result.config)
    assert set(split.train[:8]) == {f"s{i:02d}" for i in range(8)} and split.held_out == (n_test > 0)


def test_what_is_proposed_beside_lists_trains_by_them(tmp_path):
    """Of 12 labelled scans one is damaged, and the list has names as files have them."""
    for i in range(12):
        image, label = ball((24, 24, 16), i)
        write_image(tmp_path / "scans" / f"s{i:02d}.nii.gz", image)
        write_image(tmp_path / "scans" / f"s{i:02d}_seg.nii.gz", label)
    (tmp_path / "scans" / "s03.nii.gz").write_bytes(b"spoiled" * 50)
    names = "".join(f"s{i:02d}.nii.gz\n" for i in range(12))
    (tmp_path / "scans" / "train.list").write_text(names, encoding="utf-8-sig")
    result = run(tmp_path, tmp_path / "scans")
    assert result.config.data.n_labeled == 9 and len(result.unusable) == 1 and len(result.cases) == 11
    (tmp_path / "scans" / "train.list").write_text(names.replace("s03.nii.gz\n", ""))
    assert len(make_split(result.cases, tmp_path / "scans", result.config).train) == 11


def test_lists_that_training_would_refuse_are_refused(tmp_path):
    for i, name in enumerate("abcd"):
        write_image(tmp_path / "scans" / f"{name}.nii.gz", ball((24, 24, 16), i)[0])
    (tmp_path / "scans" / "train.list").write_text("a\nb\nzz\n")
    with pytest.raises(UserError, match=r"train.list names zz, but .*scans has no such scan"):
        run(tmp_path, tmp_path / "scans")
    (tmp_path / "scans" / "train.list").write_text("a\nb\nc\n")
    (tmp_path / "scans" / "test.list").write_text("c\n")
    with pytest.raises(UserError, match=r"test.list names c, as train.list does"):
        run(tmp_path, tmp_path / "scans")
    assert not (tmp_path / "mine.toml").exists()


def test_a_csv_that_does_not_fit_is_named(tmp_path):
    for name in "abcd":
        write_image(tmp_path / "scans" / f"{name}.nii.gz", ball((24, 24, 16))[0])
    for name in "ab":
        write_image(tmp_path / "scans" / f"{name}_seg.nii.gz", ball((24, 24, 16))[1])
    (tmp_path / "slices.csv").write_text("case,slice\na,8\nb,8\nc,8\nz,8\n")
    result = run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "slices.csv"))
    assert result.config.data.n_labeled == 2 and len(result.unusable) == 2
    assert "names slice 8 of c, but" in result.unusable[0] and "has no label" in result.unusable[0]
    assert "slices.csv names z, which is no scan of the data folder" in result.unusable[1]
    (tmp_path / "mine.toml").unlink()
    (tmp_path / "slices.csv").write_text("case,slice\na,8\n")
    with pytest.raises(UserError, match=r"annotates 1 scan, and training needs 2: annotate 1 more"):
        run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "slices.csv"))
    with pytest.raises(UserError, match=r"TODOO do not exist"):
        run(tmp_path, tmp_path / "scans", annotations=str(tmp_path / "TODOO"))
    assert not (tmp_path / "mine.toml").exists()


def test_real_la_gets_the_published_patch(scans, tmp_path):
    """The three narrowest of the 80 set it."""
    folders = [path for path in scans("la_raw").iterdir() if path.is_dir()]
    folders.sort(key=lambda path: (min(read_grid(path / "lgemri.nrrd").size[:2]), path.name))
    (tmp_path / "la").mkdir()
    for name in (path.name for path in folders[:3]):
        (tmp_path / "la" / name).symlink_to(scans("la_raw") / name)
    result = run(tmp_path, tmp_path / "la")
    assert result.config.data.patch == (112, 112, 80)
    assert result.config.data.window is None and not result.config.data.body_crop


def test_bad_files_are_listed_and_the_others_prepared(tmp_path):
    image = ball((40, 36, 34))[0]
    for name in "abc":
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
    (tmp_path / "scans" / "b.nii.gz").write_bytes(b"spoiled" * 50)
    write_series(tmp_path / "scans" / "d", image, skip=(4,), modality="MR")
    result = run(tmp_path, tmp_path / "scans")
    assert [case.name for case in result.cases] == ["a", "c"]
    assert len(result.unusable) == 2
    assert "b.nii.gz cannot be read" in result.unusable[0] and "d lacks slices" in result.unusable[1]
    assert f"# left out: {tmp_path}" in result.settings.read_text()


def test_a_cache_that_cannot_be_written_is_named_once(tmp_path):
    for name in "ab":
        write_image(tmp_path / "scans" / f"{name}.nii.gz", ball((40, 36, 34))[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache folder .* cannot be made"):
        run(tmp_path, tmp_path / "scans", cache_dir=str(tmp_path / "file" / "cache"))


def test_decathlon_says_its_modality_and_labels(tmp_path):
    image, label = ball((40, 36, 34))
    write_image(tmp_path / "d" / "imagesTr" / "x_1.nii.gz", image)
    write_image(tmp_path / "d" / "labelsTr" / "x_1.nii.gz", label * 2)
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(
        {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "ignore", "2": "atrium"}}))
    text = run(tmp_path, tmp_path / "d").settings.read_text()
    assert "modality: MR 1" in text and "2 (atrium) in 1 of 1" in text and "concluded" not in text


def test_uneven_spacings_are_resampled_to_one_grid(tmp_path):
    random = np.random.default_rng(0)
    for i, thickness in enumerate((1.0, 2.5, 5.0)):
        image = random.integers(0, 255, (48, 48, 40 // (i + 1))).astype(np.uint8)
        write_image(tmp_path / "s" / f"{i}.mha", image, (1.0, 1.0, thickness))
    result = run(tmp_path, tmp_path / "s")
    assert result.config.data.resample and all(side % 16 == 0 for side in result.config.data.resample)
    assert {case.image.shape for case in result.cases} == {result.config.data.resample}


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_ct_that_is_stored_as_float(tmp_path, smoothed):
    """Whole values show it whatever their type; where resampling made fractions of them a remark says what to do."""
    image = np.full((40, 40, 24), -1000.0, np.float32)
    image[6:34, 6:34] = np.random.default_rng(0).integers(-100, 300, (28, 28, 24))
    image[0, 0, 0] = -1024 + 0.5 * smoothed
    if smoothed:
        image[6:34, 6:34] += 0.25
    write_image(tmp_path / "scans" / "a.nii.gz", image)
    result = run(tmp_path, tmp_path / "scans")
    text = " ".join(result.settings.read_text().split("\n# "))
    assert (result.config.data.window, result.config.data.body_crop) == (
        (None, False) if smoothed else ((-160.0, 240.0), True))
    assert ("look like CT in HU" in text and "--window -160,240" in text) == smoothed


@pytest.mark.parametrize("text, expected", [("CT", "CT"), ("MRI", "MR"), ("FLAIR", "MR"), ("PT", "other"), ("", "")])
def test_names_of_modalities(text, expected):
    assert known_modality(text) == expected
