"""Recognising nnU-Net's, the Decathlon's and plain folders by their files."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from spss_fast.data.images import ENDINGS, files_of
from spss_fast.data.layouts import find_cases, read_case
from spss_fast.errors import UserError
from tests.data.writing import KITS, ball, write_image, write_series

IMAGE, LABEL = ball((12, 11, 10))


def write(folder, *names):
    """Images, or labels where the name says so by ``label``, ``seg`` or ``mask``."""
    for name in names:
        is_label = any(word in name.lower() for word in ("label", "seg", "mask"))
        write_image(folder / name, LABEL if is_label else IMAGE)


def found(folder):
    """Case name: (image, label) relative to the folder."""
    return {case.name: tuple(path and str(path.relative_to(folder)) for path in (case.image, case.label))
            for case in find_cases("folder", folder)}


@pytest.mark.parametrize("names, expected", [
    (["a.nii.gz", "b.nii", "c.nrrd"], {"a": ("a.nii.gz", None), "b": ("b.nii", None), "c": ("c.nrrd", None)}),
    (["a/image.nii.gz", "a/label.nii.gz", "b/image.nii.gz"],
     {"a": ("a/image.nii.gz", "a/label.nii.gz"), "b": ("b/image.nii.gz", None)}),
    (["a/scan.nii.gz", "a/segmentation.nii.gz"], {"a": ("a/scan.nii.gz", "a/segmentation.nii.gz")}),
    (["a/scan7.nrrd", "a/scan7_seg.nrrd"], {"a": ("a/scan7.nrrd", "a/scan7_seg.nrrd")}),
    (["a.nii.gz", "a_label.nii.gz", "b.mha", "b-seg.mha", "c.nrrd", "c.seg.nrrd"],
     {"a": ("a.nii.gz", "a_label.nii.gz"), "b": ("b.mha", "b-seg.mha"), "c": ("c.nrrd", "c.seg.nrrd")}),
    (["p_0001_image.mha", "p_0001_label.mha"], {"p_0001": ("p_0001_image.mha", "p_0001_label.mha")}),
    (["images/a.nii.gz", "labels/a.nii.gz", "images/b.nii.gz"],
     {"a": ("images/a.nii.gz", "labels/a.nii.gz"), "b": ("images/b.nii.gz", None)}),
    (["img/img0001.nii.gz", "label/label0001.nii.gz"], {"img0001": ("img/img0001.nii.gz", "label/label0001.nii.gz")}),
    (["volume-0.nii", "segmentation-0.nii"], {"volume-0": ("volume-0.nii", "segmentation-0.nii")}),
    (["ct_0001.nii.gz", "ct_0001_mask.nii.gz"], {"ct_0001": ("ct_0001.nii.gz", "ct_0001_mask.nii.gz")}),
    (["a/image.nii.gz", "a/annotation.nii.gz"], {"a": ("a/image.nii.gz", None)}),
    *((["a.nii.gz", f"{label}.nii.gz"], {"a": ("a.nii.gz", f"{label}.nii.gz")}) for label in (
        "mask_a", "Label-a", "ground_truth_a", "a_annotation", "a_ground_truth", "a_groundtruth", "a_roi", "a_contour",
        "a_seg_JD", "a-label-2", "a_seg_v2", "a_mask1")),
    (["a_image.nii.gz", "a_seg_JD.nii.gz"], {"a": ("a_image.nii.gz", "a_seg_JD.nii.gz")}),
    (["scan_a.nii.gz", "mask_a.nii.gz"], {"scan_a": ("scan_a.nii.gz", "mask_a.nii.gz")}),
    (["ct_a.nii.gz", "mr_a.nii.gz", "a.nii.gz", "mask_a.nii.gz"],
     {"ct_a": ("ct_a.nii.gz", None), "mr_a": ("mr_a.nii.gz", None), "a": ("a.nii.gz", "mask_a.nii.gz")}),
    (["a/ct_1.nii.gz", "a/mask_of_liver.nii.gz", "b/ct_1.nii.gz", "b/liver_seg_JD.nii.gz"],
     {"a": ("a/ct_1.nii.gz", "a/mask_of_liver.nii.gz"), "b": ("b/ct_1.nii.gz", "b/liver_seg_JD.nii.gz")}),
    (["images/a.nii.gz", "annotations/a_seg_JD.nii.gz"], {"a": ("images/a.nii.gz", "annotations/a_seg_JD.nii.gz")}),
    (["ct_scan_mask_fit_3.nii.gz", "ct_scan_mask_fit_3_seg_v2.nii.gz", "ct_scan_mask_fit_4.nii.gz"],
     {"ct_scan_mask_fit_3": ("ct_scan_mask_fit_3.nii.gz", "ct_scan_mask_fit_3_seg_v2.nii.gz"),
      "ct_scan_mask_fit_4": ("ct_scan_mask_fit_4.nii.gz", None)}),
    (["a.NII.GZ", ".hidden.nii.gz"], {"a": ("a.NII.GZ", None)}),
])
def test_plain_folders(tmp_path, names, expected):
    for name in names:
        write(tmp_path, name.replace(".NII.GZ", ".nii.gz"))
    for name in names:
        if name.endswith("GZ"):
            (tmp_path / name.replace(".NII.GZ", ".nii.gz")).rename(tmp_path / name)
    assert found(tmp_path) == expected


def test_a_folder_that_cannot_be_opened_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path, "a.nii.gz", "b/image.nii.gz")
    scandir = os.scandir

    def closed(path):
        if Path(path) == tmp_path / "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"b cannot be opened \(Permission denied\): make it readable"):
        find_cases("folder", tmp_path)


def test_folders_whose_names_are_too_long_for_a_case(tmp_path):
    write_series(tmp_path.joinpath(*(letter * 70 for letter in "abc")), IMAGE)
    with pytest.raises(UserError, match="more than 200 bytes: rename them"):
        found(tmp_path)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "archive", "x/image.nii.gz")
    write_series(tmp_path / "archive" / "y", IMAGE)
    write(tmp_path / "scans", "b.nii.gz")
    for name, target in {"a": "../archive/x", "c": "../archive/y", "up": "..", "here": "."}.items():
        (tmp_path / "scans" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "link").symlink_to("scans", target_is_directory=True)
    for folder in ("scans", "link"):
        assert found(tmp_path / folder) == {"a": ("a/image.nii.gz", None), "b": ("b.nii.gz", None), "c": ("c", None)}


def test_files_and_series_of_several_kinds_side_by_side(tmp_path):
    write(tmp_path, "a.nii.gz", "labels/b.nii.gz")
    write_series(tmp_path / "images" / "b", IMAGE, (1.0, 1.0, 1.0))
    write_series(tmp_path / "c" / "1.2.840", IMAGE)
    assert found(tmp_path) == {"a": ("a.nii.gz", None), "b": ("images/b", "labels/b.nii.gz"),
                               "c_1.2.840": ("c/1.2.840", None)}


def nnunet(folder, *cases, channels=("CT",), ending=".nii.gz", labels=True, **content):
    names = {str(i): name for i, name in enumerate(channels)}
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": names, "labels": {"background": 0, "organ": 1}, "file_ending": ending, **content}))
    for case in cases:
        for i in range(len(channels)):
            write(folder, f"imagesTr/{case}_{i:04d}{ending}")
        if labels:
            write_image(folder / "labelsTr" / f"{case}{ending}", LABEL)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nnunet(tmp_path, ending):
    nnunet(tmp_path, "liver_001", "liver_002", ending=ending)
    write(tmp_path, f"imagesTs/liver_003_0000{ending}")
    assert found(tmp_path) == {
        name: (f"imagesTr/{name}_0000{ending}", f"labelsTr/{name}{ending}") for name in ("liver_001", "liver_002")}
    np.testing.assert_array_equal(read_case(find_cases("folder", tmp_path)[0]).label, LABEL)


def test_several_channels_end_in_one_line(tmp_path):
    nnunet(tmp_path, "a", "b", channels=("T1", "T2"))
    said = r"imagesTr has 2 channels per case \(T1, T2\), and one is taken: copy the images of one channel"
    with pytest.raises(UserError, match=said) as error:
        find_cases("folder", tmp_path)
    assert "\n" not in str(error.value)


def test_decathlon(tmp_path):
    for name in ("liver_0", "liver_1"):
        write(tmp_path, f"imagesTr/{name}.nii.gz")
        write_image(tmp_path / "labelsTr" / f"{name}.nii.gz", LABEL)
    (tmp_path / "imagesTr" / "._liver_0.nii.gz").write_bytes(b"left by macOS")
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert found(tmp_path) == {
        name: (f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz") for name in ("liver_0", "liver_1")}
    (tmp_path / "dataset.json").write_text(json.dumps(description | {"modality": {"0": "T2", "1": "ADC"}}))
    with pytest.raises(UserError, match=r"\(T2, ADC\).*: split the 4-D files, .* a folder without this dataset\.json"):
        find_cases("folder", tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset.json cannot be read as JSON"):
        find_cases("folder", tmp_path)


def test_a_data_set_one_level_below_is_pointed_at(tmp_path):
    nnunet(tmp_path / "Dataset001", "a")
    with pytest.raises(UserError, match=r"Dataset001 as the data folder"):
        find_cases("folder", tmp_path)


@pytest.mark.parametrize("names, words", [
    (["a_seg.nii.gz"], r"a_seg.nii.gz is a label without a scan"),
    (["a.nii.gz", "labels/b.nii.gz", "labels/c.nii.gz"], r"b.nii.gz \(and 1 more\) is a label without a scan"),
    (["a/t1.nii.gz", "a/t2.nii.gz"], r"t1.nii.gz and t2.nii.gz in .*/a both look like the image of the case a"),
    (["a.nii.gz", "a_seg.nii.gz", "a_mask.nii.gz"], r"a_mask.nii.gz and a_seg.nii.gz in .* both look like the label"),
    (["a.nii.gz", "mask_a.nii.gz", "a_seg_JD.nii.gz"], r"a.nii.gz and a_seg_JD.nii.gz in .* both look like the label"),
    (["ct_a.nii.gz", "mr_a.nii.gz", "mask_a.nii.gz"], r"mask_a.nii.gz is a label without a scan"),
    (["a/image.nii.gz", "label.nii.gz"], r"/label.nii.gz is a label without a scan"),
    (["a.nii.gz", "a.nrrd"], r"both look like the image of the case a"),
])
def test_what_cannot_be_told_apart_is_named(tmp_path, names, words):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=words) as error:
        find_cases("folder", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_folder_of_a_single_case_is_told_from_a_data_folder(tmp_path):
    write(tmp_path, "a/image.nii.gz", "a/label.nii.gz")
    write_series(tmp_path / "b", IMAGE)
    write(tmp_path, "b/label.nii.gz")
    for name in "ab":
        with pytest.raises(UserError) as error:
            find_cases("folder", tmp_path / name)
        said = f"{tmp_path / name} is the folder of a single case, whose label is label.nii.gz: give .*, {tmp_path}, as"
        assert re.match(said, str(error.value))


def test_the_label_of_a_series(tmp_path):
    """It lies in the series' own folder or is named after the case; beside the folder it belongs to another case."""
    for series in ("p1/DICOM", "p2/DICOM", "p3/DICOM"):
        write_series(tmp_path / series, LABEL)
    write(tmp_path, "p1/DICOM/label.nii.gz", "p2_DICOM_seg.nii.gz")
    assert found(tmp_path) == {
        "p1_DICOM": ("p1/DICOM", "p1/DICOM/label.nii.gz"), "p2_DICOM": ("p2/DICOM", "p2_DICOM_seg.nii.gz"),
        "p3_DICOM": ("p3/DICOM", None),
    }
    write(tmp_path, "p3/seg.nii.gz")
    said = r"seg.nii.gz is a label without a scan .*none is the case p3.*after its case \(like p3_DICOM\)"
    with pytest.raises(UserError, match=said):
        find_cases("folder", tmp_path)


def test_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match=r"no scans in .*give the folder that holds your scans"):
        find_cases("folder", tmp_path)


def test_the_data_of_a_header_belong_to_it(tmp_path):
    write(tmp_path, "a.mhd")
    assert {path.suffix for path in files_of(tmp_path / "a.mhd")} == {".mhd", ".zraw"}


def test_a_rotated_label_of_a_plain_folder(tmp_path):
    write(tmp_path, "ä ö.nii.gz")
    write_image(tmp_path / "ä ö_seg.nii.gz", LABEL, direction=KITS)
    case, = find_cases("folder", tmp_path)
    with pytest.raises(UserError, match=r"ä ö_seg.nii.gz does not match ä ö.nii.gz: direction"):
        read_case(case)
