"""Splits and annotated slices."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from spss_fast.data.annotations import read_annotations
from spss_fast.data.cache import PreparedCase
from spss_fast.data.dataset import load
from spss_fast.data.geometry import Grid
from spss_fast.data.layouts import find_cases
from spss_fast.data.sampling import training_volumes
from spss_fast.data.splits import annotated_slices, make_split
from spss_fast.errors import UserError
from tests.data.writing import ball, prepared, settings_of, write_image, write_kits, write_la


@pytest.fixture
def ten(tmp_path):
    """Ten prepared LA cases a .. j, their folder and a function that splits them."""
    names = write_la(tmp_path / "la", 10)
    config = settings_of("la", tmp_path, n_labeled=3, n_test=4)
    cases = prepared("la", tmp_path / "la", config)

    def split(**flags):
        return make_split(cases, tmp_path / "la", settings_of("la", tmp_path, **{"n_labeled": 3, "n_test": 4, **flags}))

    return names, tmp_path / "la", cases, split


def test_without_lists_the_split_is_drawn_by_seed_and_name(ten, tmp_path):
    names, folder, cases, split = ten
    one = split()
    assert sorted(one.train + one.test) == names and len(one.test) == 4 and one.held_out
    assert split() == one and split(seed=1) != one
    # the order in which the file system lists the cases is no matter, nor what else lies there
    config = settings_of("la", tmp_path, n_labeled=3, n_test=4)
    assert make_split(cases[::-1], folder, config) == one
    fewer = make_split([case for case in cases if case.name != one.train[-1]], folder, config)
    assert (fewer.test, fewer.train) == (one.test, one.train[:-1])


def test_every_case_is_tested_under_some_seed(ten):
    names, _, _, split = ten
    counts = Counter(name for seed in range(200) for name in split(seed=seed).test)
    assert set(counts) == set(names) and min(counts.values()) > 50 and max(counts.values()) < 110


def test_lists_are_honoured_in_their_order(ten):
    _, folder, _, split = ten
    (folder / "train.list").write_text("g\nb\na\n\nd.h5 \nc\n")
    (folder / "test.list").write_text("j\ne\n")
    result = split()
    assert (result.train, result.test, result.held_out) == (["g", "b", "a", "d", "c"], ["j", "e"], True)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".MHA", ".h5"])
def test_lists_may_have_file_endings_and_a_byte_order_mark(ten, ending):
    _, folder, _, split = ten
    (folder / "train.list").write_text("".join(f"{name}{ending}\r\n" for name in "gbadc"), encoding="utf-8-sig")
    assert split().train == list("gbadc")


def test_cases_outside_a_training_list_are_the_test(ten):
    names, folder, _, split = ten
    (folder / "train.list").write_text("\n".join("jihgfed"))
    assert (split().test, split().held_out) == (["a", "b", "c"], True)
    (folder / "train.list").write_text("\n".join(names[::-1]))
    assert (split().test, split().held_out) == (list("gfedcba"), False)


def test_a_test_list_alone_is_kept_out_of_training(ten):
    names, folder, _, split = ten
    (folder / "test.list").write_text("b\nh\n")
    result = split()
    assert result.test == ["b", "h"] and sorted(result.train) == sorted(set(names) - {"b", "h"}) and result.held_out


def test_real_la_list_is_the_standard_order(scans, tmp_path):
    """80 cases, all in train.list: the first 16 annotated, the other 64 the test, never their labels seen."""
    cases = find_cases("la", scans("la_raw"))
    grid = Grid((1, 1, 1))
    bare = [PreparedCase(case.name, np.zeros(1), grid.spacing, case, grid, grid, (1, 1), tmp_path) for case in cases]
    split = make_split(bare, scans("la_raw"), settings_of("la", tmp_path))
    listed = (scans("la_raw") / "train.list").read_text().split()
    assert split.train == listed and split.test == listed[16:] and not split.held_out


def test_cases_without_a_label_are_never_annotated_or_tested(tmp_path):
    names = write_la(tmp_path / "la", 10)
    for name in names[:4]:
        (tmp_path / "la" / name / "laendo.nrrd").unlink()
    config = settings_of("la", tmp_path, n_labeled=3, n_test=2)
    split = make_split(prepared("la", tmp_path / "la", config), tmp_path / "la", config)
    assert sorted(split.train[-4:]) == names[:4] and not set(split.test) & set(names[:4])


@pytest.mark.parametrize("resample", ["none", "32 32 12", "32 32 48"])
def test_a_label_of_one_slice_is_no_test(tmp_path, resample):
    """On a grid of more slices the one is several; the full label of d stays one on a grid of fewer."""
    for i, name in enumerate("abcde"):
        image, label = ball(seed=i)
        if name != "d":
            label[:, :, :12] = label[:, :, 13:] = 0
        write_image(tmp_path / "plain" / f"{name}.nii.gz", image)
        write_image(tmp_path / "plain" / f"{name}_seg.nii.gz", label)
    (tmp_path / "slices.csv").write_text("case,slice\na,12\nb,12\n")
    flags = {"n_labeled": 2, "n_test": 5, "batch_unlabeled": 1, "resample": resample}
    config = settings_of("folder", tmp_path, annotations=str(tmp_path / "slices.csv"), **flags)
    cases = prepared("folder", tmp_path / "plain", config)
    assert [case.name for case in cases if case.has_full_label] == ["d"] and all(case.has_label for case in cases)
    split = make_split(cases, tmp_path / "plain", config)
    assert split.test == ["d"] and sorted(split.train[:2]) == ["a", "b"] and sorted(split.train[2:]) == ["c", "e"]


@pytest.mark.parametrize("train, test, words", [
    ("a\nb\nzz\nyy\n", None, r"train.list names zz \(and 1 more\)"),
    ("a\nb\nc\nd\ne\n", "e\nf\n", "test.list names e, as train.list does"),
    ("a\nb\na\n", None, "train.list names a twice"),
    ("\n", None, "train.list names no case"),
    ("a\nb\nc\nd\n", None, r"leaves 4 volumes to train on.*n_labeled = 3 and batch_unlabeled = 2 need 5"),
])
def test_bad_lists(ten, train, test, words):
    _, folder, _, split = ten
    (folder / "train.list").write_text(train)
    if test:
        (folder / "test.list").write_text(test)
    with pytest.raises(UserError, match=words):
        split()


def test_a_case_that_both_lists_leave_out_is_never_read(tmp_path):
    names = write_la(tmp_path / "la", 6)
    (tmp_path / "la" / "f" / "lgemri.nrrd").write_bytes(b"spoiled")
    config = settings_of("la", tmp_path, data_dir=str(tmp_path / "la"), n_labeled=2)
    (tmp_path / "la" / "train.list").write_text("\n".join(names[:4]))
    with pytest.raises(UserError, match=r"f/lgemri\.nrrd cannot be read"):
        load(config, Console(quiet=True))
    (tmp_path / "la" / "test.list").write_text("e\n")
    dataset = load(config, Console(quiet=True))
    assert dataset.split.train == names[:4] and [case.name for case in dataset.test] == ["e"]


def test_too_few_volumes(ten):
    said = r"leaves 6 volumes to train on \(10 in all, 4 for testing\).*lower n_labeled.*set batch_unlabeled = 0"
    with pytest.raises(UserError, match=said):
        ten[3](n_labeled=6)
    assert len(ten[3](n_labeled=6, batch_unlabeled=0).train) == 6


def test_an_annotated_case_needs_a_label(ten, tmp_path):
    _, folder, _, _ = ten
    (folder / "train.list").write_text("\n".join("abcdefghij"))
    (folder / "b" / "laendo.nrrd").unlink()
    config = settings_of("la", tmp_path, n_labeled=3)
    said = r"b/lgemri.nrrd is of the first n_labeled = 3.*annotate a slice of it, or lower n_labeled to 2$"
    with pytest.raises(UserError, match=said):
        make_split(prepared("la", folder, config), folder, config)
    config.data.n_labeled = 2  # of which one is left, too few for a batch
    with pytest.raises(UserError, match=r"annotate a slice of it; training needs 2 annotated slices at least"):
        make_split(prepared("la", folder, config), folder, config)


def test_an_empty_label_is_none(ten, tmp_path):
    _, folder, _, _ = ten
    (folder / "train.list").write_text("\n".join("abcdefghij"))
    write_image(folder / "b" / "laendo.nrrd", np.zeros_like(ball()[1]))
    config = settings_of("la", tmp_path, n_labeled=3)
    cases = prepared("la", folder, config)
    assert [case.name for case in cases if not case.has_label] == ["b"] and cases[1].label() is None
    with pytest.raises(UserError, match=r"b/lgemri.nrrd is of the first.*no label with foreground \(1 such\)"):
        make_split(cases, folder, config)
    other = settings_of("la", tmp_path, n_labeled=3, foreground="7")
    with pytest.raises(UserError, match=r"a/lgemri.nrrd is.*no label with foreground \(value 7\) \(3 such\)"):
        make_split(prepared("la", folder, other), folder, other)
    (folder / "train.list").unlink()
    config.data.n_test = 2
    assert make_split(cases, folder, config).train[-1] == "b"


# annotated slices ---------------------------------------------------------------------------------------------------

def bar(tmp_path, first, last, depth=30):
    """A prepared case whose foreground fills slices ``first`` to ``last``."""
    image, label = np.random.default_rng(0).integers(0, 255, (16, 16, depth)).astype(np.uint8), None
    label = np.zeros_like(image)
    label[4:9, 4:9, first : last + 1] = 1
    write_image(tmp_path / "bar" / "a" / "lgemri.nrrd", image)
    write_image(tmp_path / "bar" / "a" / "laendo.nrrd", label)
    config = settings_of("la", tmp_path)
    return prepared("la", tmp_path / "bar", config), config


def test_slices_are_drawn_uniformly_from_the_middle_three_fifths(tmp_path):
    cases, config = bar(tmp_path, 5, 24)  # 20 slices: the middle 12 are 9 .. 20
    counts = Counter(annotated_slices(cases, config.data, seed)["a"] for seed in range(2400))
    assert set(counts) == set(range(9, 21))
    # 200 expected each, standard deviation 13.5
    assert max(abs(count - 200) for count in counts.values()) < 60
    assert annotated_slices(cases, config.data, 3) == annotated_slices(cases, config.data, 3)


@pytest.mark.parametrize("first, last", [(7, 7), (7, 8), (7, 10)])
def test_few_slices_are_all_eligible(tmp_path, first, last):
    cases, config = bar(tmp_path, first, last)
    drawn = {annotated_slices(cases, config.data, seed)["a"] for seed in range(100)}
    assert drawn == set(range(first, last + 1))


@pytest.mark.parametrize("index", [10, 11])
def test_the_only_slice_that_a_label_shows_is_taken_whole_at_half_resolution(tmp_path, index):
    cases, _ = bar(tmp_path, index, index)
    config = settings_of("la", tmp_path, downsample=2)
    cases = prepared("la", tmp_path / "bar", config)
    assert annotated_slices(cases, config.data, 0) == {"a": 5}
    volume, = training_volumes(cases, config.data, 0)
    square = np.zeros((8, 8), np.uint8)
    square[2:5, 2:5] = 1  # of a pixel beyond it, 1 of 4 or 2 of 4, which is as many
    square[4, 4] = 0
    np.testing.assert_array_equal(volume.annotation, square)
    assert volume.index_in_file == index


def test_several_classes_are_drawn_where_most_of_them_show(tmp_path):
    names = write_la(tmp_path / "two", 1)
    label = np.zeros((40, 36, 30), np.uint8)
    label[4:9, 4:9, 5:25] = 2
    label[20:29, 20:29, 3:12] = 1  # of 3 .. 24 the middle three fifths are 7 .. 20
    label[:, :, 10][label[:, :, 10] == 0] = 7  # no class of its own: no reason to prefer this slice
    write_image(tmp_path / "two" / names[0] / "lgemri.nrrd", np.random.default_rng(0).normal(size=label.shape))
    write_image(tmp_path / "two" / names[0] / "laendo.nrrd", label)

    def drawn(**flags):
        config = settings_of("la", tmp_path, **flags)
        cases = prepared("la", tmp_path / "two", config)
        return Counter(annotated_slices(cases, config.data, seed)[names[0]] for seed in range(300))

    two = drawn(classes=(1, 2))
    assert set(two) == {7, 8, 9, 10, 11} and min(two.values()) > 35
    # merged they are one class, which slice 15 shows as well as any
    assert set(drawn(foreground=(1, 2))) == set(range(7, 21))


def test_a_case_keeps_its_slice_whoever_else_is_annotated(ten, tmp_path):
    cases = ten[2]
    settings = settings_of("la", tmp_path).data
    everyone = annotated_slices(cases, settings, 0)
    assert len(set(everyone.values())) > 1
    assert annotated_slices(cases[3:5], settings, 0) == {name: everyone[name] for name in "de"}
    alike = [replace(cases[0], name=name) for name in "pqrstu"]  # the name alone tells them apart
    assert len(set(annotated_slices(alike, settings, 0).values())) > 1


def csv_settings(tmp_path, text, **flags):
    (tmp_path / "slices.csv").write_text(text)
    return settings_of("la", tmp_path, annotations=str(tmp_path / "slices.csv"), **flags).data


def test_the_csv_names_slices_and_the_others_are_drawn(ten, tmp_path):
    cases = ten[2][:3]
    given = annotated_slices(cases, csv_settings(tmp_path, "case, slice\na, 10\n\nc,13\n"), 0)
    drawn = annotated_slices(cases, settings_of("la", tmp_path).data, 0)
    assert given == {"a": 10, "b": drawn["b"], "c": 13}


def test_csv_cases_train_first_and_never_test(ten, tmp_path):
    (tmp_path / "slices.csv").write_text("case,slice\nh,10\nc,12\n")
    for seed in range(5):
        split = ten[3](annotations=str(tmp_path / "slices.csv"), seed=seed)
        assert set(split.train[:2]) == {"h", "c"}


def test_cases_that_are_named_are_annotated_wherever_they_are_listed(ten, tmp_path):
    _, folder, cases, split = ten
    (folder / "train.list").write_text("\n".join("jihgfedcba"))
    (tmp_path / "slices.csv").write_text("case,slice\nb,12\ni,12\n")
    result = split(annotations=str(tmp_path / "slices.csv"))
    assert "".join(result.train) == "jibhgfedca" and "".join(result.test) == "hgfedca"
    config = settings_of("la", tmp_path, annotations=str(tmp_path / "slices.csv"), n_labeled=3)
    annotated = [next(case for case in cases if case.name == name) for name in result.train[:3]]
    assert annotated_slices(annotated, config.data, 0).keys() == set("jib")
    (tmp_path / "slices.csv").write_text("case,slice\nh,12\n")  # one of the first three: all as listed
    assert "".join(split(annotations=str(tmp_path / "slices.csv")).train) == "jihgfedcba"


def test_a_file_with_one_annotated_slice_is_enough(tmp_path):
    """Slice 7 of the file, 24 slices resampled to 8: the annotation is the file's, not what lies near it."""
    image = np.random.default_rng(0).integers(-100, 200, (24, 16, 16)).astype(np.int16)
    label = np.zeros((24, 16, 16), np.uint8)
    label[7, 2:9, 3:7] = 1
    write_kits(tmp_path / "d", "case_00000", image, label)
    (tmp_path / "slices.csv").write_text("case,slice\ncase_00000,7\n")
    flags = {"body_crop": False, "resample": "16 16 8", "annotations": str(tmp_path / "slices.csv")}
    config = settings_of("kits", tmp_path, **flags)
    volume, = training_volumes(prepared("kits", tmp_path / "d", config), config.data, 0)
    assert volume.index == (23 - 7) // 3
    expected = np.zeros((16, 16), np.uint8)
    expected[3:7, 2:9] = 1
    np.testing.assert_array_equal(volume.annotation.numpy(), expected)


@pytest.mark.parametrize("text, words", [
    ("case,slice\na,10\nzz,3\n", r"slices.csv names zz, which is not one of the 3 annotated cases"),
    ("case,slice\na,24\n", r"slice 24 of a does not exist; its last is 23"),
    ("case,slice\na,-1\n", r"slice -1 of a does not exist"),
    ("case,slice\na,0\n", r"slice 0 of a holds no foreground in .*laendo.nrrd"),
    ("case,slice\na,ten\n", r"line 2: slice 'ten' is not a whole number"),
    ("case,slice\na\n", r"line 2: slice None is not a whole number"),
    ("case,slice\na,10\na,11\n", r"line 3: a is there twice"),
    ("name,z\na,10\n", r"must begin with the line case,slice"),
    ("", r"must begin with the line case,slice"),
    ("case,slice\n", r"names no slice"),
])
def test_bad_csv(ten, tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        annotated_slices(ten[2][:3], csv_settings(tmp_path, text), 0)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_binary_csv(tmp_path):
    settings = settings_of("la", tmp_path, annotations=str(tmp_path / "absent.csv")).data
    with pytest.raises(UserError, match=r"annotations \S*absent.csv do not exist: give a CSV of case,slice"):
        read_annotations(settings)
    (tmp_path / "absent.csv").write_bytes(b"\xff\xfe\x00\x81case")
    with pytest.raises(UserError, match=r"absent.csv is not a CSV file"):
        read_annotations(settings)


def test_foreground_lost_in_resampling_is_named(tmp_path):
    image, label = ball((40, 40, 40))[0], np.zeros((40, 40, 40), np.uint8)
    label[21, 21, 21] = 1
    write_image(tmp_path / "la" / "a" / "lgemri.nrrd", image)
    write_image(tmp_path / "la" / "a" / "laendo.nrrd", label)
    config = settings_of("la", tmp_path, resample="8 8 8")
    with pytest.raises(UserError, match=r"laendo.nrrd: its foreground does not survive"):
        annotated_slices(prepared("la", tmp_path / "la", config), config.data, 0)
