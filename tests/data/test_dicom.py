"""DICOM series: one that is read as it was written, and all that ITK would bend without a word."""

import numpy as np
import pytest
import SimpleITK as sitk

from spss_fast.data.folders import left_out
from spss_fast.data.images import files_of, read_grid, read_image
from spss_fast.data.layouts import Case, find_cases, read_case, source_grid
from spss_fast.errors import UserError
from tests.data.writing import write_image, write_object, write_series

ARRAY = np.random.default_rng(0).integers(-1000, 1000, (20, 16, 8))


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        read_image(folder)
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_series_is_read_in_hounsfield_units_on_its_own_grid(tmp_path):
    write_series(tmp_path / "p1" / "study" / "series", ARRAY)
    case, = find_cases("folder", tmp_path)
    assert (case.name, case.label) == ("p1_study_series", None)
    scan = read_case(case)
    np.testing.assert_array_equal(scan.image, ARRAY)
    from_headers = source_grid(case)
    assert (scan.source.size, scan.source.direction) == (from_headers.size, from_headers.direction)
    np.testing.assert_allclose(scan.source.spacing, from_headers.spacing)
    np.testing.assert_allclose(scan.source.origin, from_headers.origin)
    assert scan.source.spacing == pytest.approx((0.8, 0.9, 3.0))
    assert len(files_of(case.image)) == 8


def test_a_coronal_series_has_its_slices_last(tmp_path):
    write_series(tmp_path / "p1", ARRAY, axes=((1, 0, 0), (0, 0, -1)), along=(0, 1, 0))
    scan = read_case(find_cases("folder", tmp_path)[0])
    assert scan.image.shape == (20, 16, 8) and np.abs(scan.grid.axes[:, 2]).round(6).tolist() == [0, 1, 0]
    np.testing.assert_array_equal(scan.image, ARRAY[:, ::-1])


def test_a_label_beside_a_series_belongs_to_it(tmp_path):
    write_series(tmp_path / "p1", ARRAY)
    image = read_image(tmp_path / "p1")
    label = (ARRAY > 0).astype(np.uint8)
    write_image(tmp_path / "p1_seg.nii.gz", label, image.GetSpacing(), image.GetDirection(), image.GetOrigin())
    case, = find_cases("folder", tmp_path)
    np.testing.assert_array_equal(read_case(case).label, label)


def test_missing_slices(tmp_path):
    write_series(tmp_path / "one", ARRAY, skip=(3,))
    refused(tmp_path / "one", "lacks slices", "6.00 mm between 0006.dcm and 0004.dcm where 3.00 mm are usual")
    write_series(tmp_path / "first", ARRAY, skip=(0,))  # nothing tells: it is a shorter scan
    assert read_image(tmp_path / "first").GetSize() == (20, 16, 7)


def test_mixed_series(tmp_path):
    write_series(tmp_path / "p1", ARRAY)
    write_series(tmp_path / "p1", ARRAY, uid="1.2.4", first=100)
    refused(tmp_path / "p1", "mixes 2 DICOM series (8, 8 files)", "folder of its own")


def test_a_localizer_of_the_same_series(tmp_path):
    write_series(tmp_path / "p1", ARRAY)
    write_series(tmp_path / "p1", ARRAY[:, :, :1], axes=((1, 0, 0), (0, 0, -1)), along=(0, 1, 0), first=100)
    with pytest.raises(UserError, match=r"dcm differs in size, pixel spacing or direction from .*keep one series"):
        read_image(tmp_path / "p1")


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("modality", ["SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "SR", "KO", "REG"])
def test_what_is_no_scan_is_left_out(tmp_path, modality, explicit):
    """Among the slices, in a folder beside them and in one that would be taken for the same case."""
    write_series(tmp_path / "p1" / "CT", ARRAY)
    for name in ("p1/CT/x.dcm", "p1/300/x.dcm", "p1/SEG/x"):
        write_object(tmp_path / name, modality, explicit)
    case, = find_cases("folder", tmp_path)
    np.testing.assert_array_equal(read_case(case).image, ARRAY)
    line, = left_out(tmp_path)
    assert f"3 DICOM {modality} (p1/300/x.dcm, p1/CT/x.dcm, p1/SEG/x)" in line
    assert ("NIfTI or NRRD" in line) == (modality in ("SEG", "RTSTRUCT"))


def test_segmentations_and_localizers_that_are_read_as_images_are_left_out(tmp_path):
    localizer = {"kind": "ORIGINAL\\PRIMARY\\LOCALIZER", "first": 100}
    write_series(tmp_path / "p1" / "2-CT", ARRAY)
    write_series(tmp_path / "p1" / "2-CT", ARRAY[:, :, :1], uid="1.2.4", **localizer)
    write_series(tmp_path / "p1" / "1-scout", ARRAY[:, :, :2], **localizer)
    write_series(tmp_path / "p1" / "300-Segmentation", ARRAY > 0, modality="SEG")
    case, = find_cases("folder", tmp_path)
    assert case.name == "p1_2-CT"
    np.testing.assert_array_equal(read_case(case).image, ARRAY)
    localizers, segmentations = left_out(tmp_path)
    assert "3 DICOM localizer (p1/1-scout/0101.dcm, " in localizers and "8 DICOM SEG (" in segmentations
    with pytest.raises(UserError, match=r"no scans in .*300-Segmentation: .*; left out, as no scan: 8 DICOM SEG"):
        find_cases("folder", tmp_path / "p1" / "300-Segmentation")


def test_doubled_slices(tmp_path):
    write_series(tmp_path / "p1", ARRAY)
    write_series(tmp_path / "p1", ARRAY, first=100)
    refused(tmp_path / "p1", "two slices at the same place", "several echoes, phases")


def test_a_tilted_gantry(tmp_path):
    write_series(tmp_path / "p1", ARRAY, along=(0, np.sin(0.2), np.cos(0.2)))
    refused(tmp_path / "p1", "tilted by 11.5 degrees")


def test_a_single_slice(tmp_path):
    write_series(tmp_path / "p1", ARRAY[:, :, :1])
    refused(tmp_path / "p1", "a single DICOM slice")


def test_colour(tmp_path):
    (tmp_path / "p1").mkdir()
    sitk.WriteImage(sitk.Image([14, 16], sitk.sitkVectorUInt8, 3), str(tmp_path / "p1" / "1.dcm"))
    with pytest.raises(UserError, match=r"1.dcm holds 3 values per voxel"):
        read_grid(tmp_path / "p1")


@pytest.mark.parametrize("content", [b"", b"\0" * 128 + b"DICM" + b"nothing more"])
def test_damaged(tmp_path, content):
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / "1.dcm").write_bytes(content)
    refused(tmp_path / "p1", "DICOM", "export it again")


@pytest.mark.parametrize("name", ["0001.dcm", "0005.dcm"])
def test_a_truncated_slice(tmp_path, name):
    """GDCM passes over it: the first or last one would be missing unnoticed."""
    write_series(tmp_path / "p1", ARRAY)
    path = tmp_path / "p1" / name
    path.write_bytes(path.read_bytes()[:-300])
    refused(tmp_path / "p1", f"{name} is no slice that can be read", "export it again")


def test_paths_of_any_letters(tmp_path):
    write_series(tmp_path / "Größe 患者" / "ß", ARRAY)
    case, = find_cases("folder", tmp_path)
    assert isinstance(case, Case) and case.name == "Größe 患者_ß"
    np.testing.assert_array_equal(read_case(case).image, ARRAY)
