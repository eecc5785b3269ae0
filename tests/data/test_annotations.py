"""Annotated slices read back from a folder of label maps: along any axis, and what is wrong with each."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from spss_fast.data.annotations import (
    Annotation,
    annotated_plane,
    check_annotations,
    folder_states,
    read_annotations,
    read_slices,
)
from spss_fast.data.images import read_image
from spss_fast.data.layouts import find_cases
from spss_fast.data.sampling import training_volumes
from spss_fast.data.splits import annotated_slices, make_split
from spss_fast.errors import UserError
from tests.data.writing import IDENTITY, KITS, ball, prepared, settings_of, write_h5, write_image, write_series

SHAPE = (24, 20, 16)


def annotate(folder, name, axis, index, label, value=1, spacing=(1.0, 1.0, 1.0), direction=IDENTITY):
    """The annotation of one case: slice ``index`` along ``axis`` of ``label`` (axes as the file's) alone."""
    kept = np.zeros(label.shape, np.uint8)
    cut = [slice(None)] * 3
    cut[axis] = index
    kept[tuple(cut)] = value * (label[tuple(cut)] > 0)
    write_image(folder / name / "annotation.nii.gz", kept, spacing, direction)
    return kept


def suggest(folder, **slices):
    """slices.csv: case=(axis, slice)."""
    folder.mkdir(exist_ok=True)
    rows = [f"{name},{axis},{index}" for name, (axis, index) in slices.items()]
    (folder / "slices.csv").write_text("\n".join(["case,axis,slice", *rows]) + "\n")


@pytest.fixture
def scans_without_labels(tmp_path):
    """Five unlabelled scans a .. e of which b and d are to be annotated; their labels, which lie nowhere."""
    labels = {}
    for i, name in enumerate("abcde"):
        image, labels[name] = ball(SHAPE, i)
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
    return labels


def settings(tmp_path, **flags):
    return settings_of("folder", tmp_path, annotations=str(tmp_path / "todo"), n_labeled=2, n_test=0, **flags)


@pytest.mark.parametrize("axis, plane", [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_the_annotated_axis_becomes_the_slice_axis(scans_without_labels, tmp_path, axis, plane):
    labels = scans_without_labels
    at = {"b": SHAPE[axis] // 2, "d": SHAPE[axis] // 2 - 1}  # another slice than was suggested
    suggest(tmp_path / "todo", b=(2, 5), d=(2, 5))
    for name, index in at.items():
        annotate(tmp_path / "todo", name, axis, index, labels[name])
    config = settings(tmp_path)
    config.data.plane = annotated_plane(config.data)
    assert config.data.plane == plane
    cases = prepared("folder", tmp_path / "scans", config)
    check_annotations([case.case for case in cases], config.data)
    split = make_split(cases, tmp_path / "scans", config)
    assert sorted(split.train[:2]) == ["b", "d"] and not split.held_out
    annotated = [case for case in cases if case.name in at]
    for volume in training_volumes(annotated, config.data, 0):
        expected = np.moveaxis(labels[volume.name], axis, -1)
        assert volume.image.shape == expected.shape and volume.reference is None
        assert volume.index == at[volume.name]
        np.testing.assert_array_equal(volume.annotation, expected[:, :, volume.index])


def test_axes_of_the_file_are_those_of_the_body(tmp_path):
    """KiTS19's first axis runs from head to feet; another file of the data set has its slices last."""
    image, label = ball(SHAPE)
    write_image(tmp_path / "scans" / "kits.nrrd", image, (3.0, 0.8, 0.8), KITS)
    write_image(tmp_path / "scans" / "lps.nrrd", image, (0.8, 0.8, 3.0))
    # NIfTI beside NRRD: headers differ by rounding
    annotate(tmp_path / "todo", "kits", 0, 9, label, 3, (3.0, 0.8, 0.8), KITS)
    annotate(tmp_path / "todo", "lps", 2, 9, label, 2, (0.8, 0.8, 3.0))
    config = settings(tmp_path)
    given = read_annotations(config.data)
    assert {name: (a.axis, a.index, a.plane, a.values) for name, a in given.items()} == {
        "kits": (0, 9, "axial", (3,)), "lps": (2, 9, "axial", (2,))}
    cases = prepared("folder", tmp_path / "scans", config)
    assert annotated_slices(cases, config.data, 0) == {"kits": SHAPE[0] - 1 - 9, "lps": 9}
    kits, lps = training_volumes(cases, config.data, 0)
    np.testing.assert_array_equal(kits.annotation, label[9].T)
    np.testing.assert_array_equal(lps.annotation, label[:, :, 9])
    config.data.foreground = (2,)
    with pytest.raises(UserError, match=r"kits.annotation.nii.gz is annotated with label value 3, but foreground = 2"):
        read_annotations(config.data)


def test_dicom_and_hdf5_scans_are_annotated_too(tmp_path):
    image, label = ball(SHAPE)
    write_series(tmp_path / "dicom" / "p1", image)
    series = read_image(tmp_path / "dicom" / "p1")
    write_h5(tmp_path / "h5" / "x.h5", image=image)
    for data, name, axis in (("dicom", "p1", 2), ("h5", "x", 1)):
        grid = (series.GetSpacing(), series.GetDirection()) if data == "dicom" else ()
        folder = tmp_path / f"todo_{data}"
        annotate(folder, name, axis, 8, label, 1, *grid)
        config = settings_of("folder", tmp_path, annotations=str(folder))
        config.data.plane = annotated_plane(config.data)
        cases = prepared("folder", tmp_path / data, config)
        check_annotations([case.case for case in cases], config.data)
        volume, = training_volumes(cases, config.data, 0)
        np.testing.assert_array_equal(volume.annotation, np.moveaxis(label, axis, -1)[:, :, 8])
        assert volume.image.shape == np.moveaxis(image, axis, -1).shape


def test_a_real_ct_is_annotated_in_the_coronal_plane(scans, tmp_path):
    """A kidney in one coronal slice of a RAS file: the prepared slice holds it, where the scan has it."""
    path = scans("ct") / "example_seg.nii.gz"
    label = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(label).transpose(2, 1, 0)
    kidneys = np.isin(array, (2, 3))
    row = int(kidneys.sum((0, 2)).argmax())
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "p1.nii.gz").write_bytes((scans("ct") / "example_ct_sm.nii.gz").read_bytes())
    write_image(tmp_path / "todo" / "p1" / "annotation.nii.gz",
                (kidneys & (np.arange(array.shape[1]) == row)[None, :, None]).astype(np.uint8),
                label.GetSpacing(), label.GetDirection(), label.GetOrigin())
    config = settings(tmp_path, window="-160 240")
    config.data.plane = annotated_plane(config.data)
    case, = prepared("folder", tmp_path / "scans", config)
    check_annotations([case.case], config.data)
    volume, = training_volumes([case], config.data, 0)
    assert config.data.plane == "coronal" and volume.index == array.shape[1] - 1 - row  # RAS runs to the front
    np.testing.assert_array_equal(volume.annotation, kidneys[::-1, row])
    inside = volume.annotation.numpy() > 0
    assert volume.image[:, :, volume.index].numpy()[inside].mean() > volume.image.mean() + 0.5


# what is missing or wrong -------------------------------------------------------------------------------------------

def wrong(tmp_path, *words, cases=None):
    """The states of the folder's cases; the first that is wrong says ``words``, in one line."""
    states = folder_states(tmp_path / "todo", settings(tmp_path).data, cases)
    line = next(state for state in states.values() if isinstance(state, str))
    for word in words:
        assert word in line
    assert "\n" not in line and str(tmp_path) in line
    return states


def test_empty_annotations_are_not_there_yet(scans_without_labels, tmp_path):
    labels = scans_without_labels
    suggest(tmp_path / "todo", b=(2, 8), d=(2, 8))
    for name in "bd":
        write_image(tmp_path / "todo" / name / "annotation.nii.gz", np.zeros(SHAPE, np.uint8))
    config = settings(tmp_path)
    with pytest.raises(UserError, match=r"todo: all annotations are still empty: annotate one slice"):
        read_annotations(config.data)
    for name in ("image.nii.gz", "Segmentation.seg.nrrd"):
        write_image(tmp_path / "todo" / "b" / name, labels["b"])
    said = r"are still empty, but \S*todo/b/Segmentation.seg.nrrd is there: save it as annotation.nii.gz$"
    with pytest.raises(UserError, match=said):
        read_annotations(config.data)
    annotate(tmp_path / "todo", "b", 2, 8, labels["b"])
    assert list(read_annotations(config.data)) == ["b"]
    assert folder_states(tmp_path / "todo", config.data)["d"] is None
    said = r"n_labeled = 2 training.*no label with foreground \(1 such; still empty: d\): annotate.*training needs 2"
    with pytest.raises(UserError, match=said):
        make_split(prepared("folder", tmp_path / "scans", config), tmp_path / "scans", config)


def test_two_annotated_slices(scans_without_labels, tmp_path):
    label = scans_without_labels["b"]
    one = annotate(tmp_path / "todo", "b", 2, 8, label)
    other = annotate(tmp_path / "todo", "b", 2, 10, label)
    write_image(tmp_path / "todo" / "b" / "annotation.nii.gz", one | other)
    wrong(tmp_path, "2 annotated slices along axis 2 (8, 10): keep one")
    write_image(tmp_path / "todo" / "b" / "annotation.nii.gz", label)
    wrong(tmp_path, "annotated slices along axis", "...): keep one")


def test_a_row_of_voxels_needs_the_suggested_axis(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[3:9, 7, 8] = 1
    write_image(tmp_path / "todo" / "b" / "annotation.nii.gz", label)
    wrong(tmp_path, "6 annotated voxels in a row")
    suggest(tmp_path / "todo", b=(2, 8))
    state = folder_states(tmp_path / "todo", settings(tmp_path).data)["b"]
    assert (state.axis, state.index) == (2, 8)


def test_files_that_cannot_be_used(scans_without_labels, tmp_path):
    labels = scans_without_labels
    cases = find_cases("folder", tmp_path / "scans")
    (tmp_path / "todo" / "b").mkdir(parents=True)
    wrong(tmp_path, "todo/b holds no annotation file")
    suggest(tmp_path / "todo", b=(2, 8))
    wrong(tmp_path, "or strike the case from slices.csv")
    (tmp_path / "todo" / "slices.csv").unlink()
    annotate(tmp_path / "todo", "b", 2, 8, labels["b"], spacing=(1.0, 1.0, 2.0))
    wrong(tmp_path, "annotation.nii.gz does not match b.nii.gz: spacing (1.0, 1.0, 2.0)", cases=cases)
    annotate(tmp_path / "todo", "b", 2, 8, labels["b"][:-1])
    wrong(tmp_path, "does not match b.nii.gz: size (23, 20, 16)", cases=cases)
    write_image(tmp_path / "todo" / "b" / "annotation.nii.gz", np.where(labels["b"], 300, 0).astype(np.int16))
    wrong(tmp_path, "whole numbers from 0 to 255")
    (tmp_path / "todo" / "b" / "annotation.nii.gz").write_bytes(b"spoiled" * 50)
    wrong(tmp_path, "cannot be read as a medical image")
    annotate(tmp_path / "todo", "b", 2, 8, labels["b"])
    annotate(tmp_path / "todo", "nobody", 2, 8, labels["b"])
    states = wrong(tmp_path, "todo/nobody annotates no scan of the data folder", cases=cases)
    assert states["b"].index == 8
    with pytest.raises(UserError, match="nobody annotates no scan"):
        check_annotations(cases, settings(tmp_path).data)


def test_suggested_cases_whose_folder_is_gone_are_named_and_half_built_folders_are_not(scans_without_labels, tmp_path):
    suggest(tmp_path / "todo", b=(2, 8), d=(2, 8))
    annotate(tmp_path / "todo", "b", 2, 8, scans_without_labels["b"])
    (tmp_path / "todo" / ".building-x").mkdir()
    assert list(wrong(tmp_path, "todo/d holds no annotation file", "or strike the case from slices.csv")) == ["b", "d"]


def test_a_slice_may_show_some_of_the_classes_alone(scans_without_labels, tmp_path):
    annotate(tmp_path / "todo", "b", 2, 8, scans_without_labels["b"], value=3)
    assert read_annotations(settings(tmp_path, classes="1,3").data)["b"].values == (3,)
    with pytest.raises(UserError, match=r"label value 3, but classes = 1, 2: paint with that"):
        read_annotations(settings(tmp_path, classes="1,2").data)


def test_a_changed_file_is_read_again(scans_without_labels, tmp_path):
    config = settings(tmp_path)
    for index in (8, 9):
        annotate(tmp_path / "todo", "b", 2, index, scans_without_labels["b"])
        assert read_annotations(config.data)["b"].index == index


def test_all_cases_agree_on_the_plane(scans_without_labels, tmp_path):
    labels = scans_without_labels
    annotate(tmp_path / "todo", "b", 2, 8, labels["b"])
    annotate(tmp_path / "todo", "d", 0, 12, labels["d"])
    with pytest.raises(UserError, match=r"same plane, but that is axial in .*b.annotation.nii.gz, sagittal in .*d.ann"):
        read_annotations(settings(tmp_path).data)
    annotate(tmp_path / "todo", "d", 2, 8, labels["d"])
    with pytest.raises(UserError, match=r"plane = coronal, but .*todo is annotated in the axial plane"):
        annotated_plane(settings(tmp_path, plane="coronal").data)


def test_a_label_of_one_slice_is_no_full_one(tmp_path):
    """Named by a CSV: what training is monitored by has to show more than what was annotated."""
    image, label = ball(SHAPE)
    alone = np.zeros_like(label)
    alone[:, :, 8] = label[:, :, 8]
    for name, shown in (("b", alone), ("d", label)):
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
        write_image(tmp_path / "scans" / f"{name}_seg.nii.gz", shown)
    (tmp_path / "slices.csv").write_text("case,slice\nb,8\nd,8\n")
    config = settings_of("folder", tmp_path, annotations=str(tmp_path / "slices.csv"))
    one, whole = training_volumes(prepared("folder", tmp_path / "scans", config), config.data, 0)
    assert one.reference is None and torch.equal(whole.reference, torch.from_numpy(label))
    assert torch.equal(one.annotation, whole.annotation) and one.annotation.any()


def test_a_csv_as_a_spreadsheet_saves_it(tmp_path):
    (tmp_path / "slices.csv").write_bytes("\ufeffcase,slice\r\nb,8\r\n".encode())
    assert read_slices(tmp_path / "slices.csv") == {"b": Annotation(8)}


def test_a_csv_may_name_the_axis_too(tmp_path):
    image, label = ball(SHAPE)
    write_image(tmp_path / "scans" / "b.nii.gz", image)
    write_image(tmp_path / "scans" / "b_seg.nii.gz", label)
    config = settings_of("folder", tmp_path, annotations=str(tmp_path / "slices.csv"))
    cases = prepared("folder", tmp_path / "scans", config)
    (tmp_path / "slices.csv").write_text("case,axis,slice\nb,2,8\n")
    assert annotated_slices(cases, config.data, 0) == {"b": 8}
    (tmp_path / "slices.csv").write_text("case,axis,slice\nb,0,8\n")
    with pytest.raises(UserError, match=r"b is annotated along axis 0 of its file, but its slices lie along axis 2"):
        annotated_slices(cases, config.data, 0)
