"""Finding and reading scans: the real LA and KiTS19 files, and every file that cannot be used."""

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from spss_fast.data.layouts import Case, find_cases, read_case
from spss_fast.errors import UserError
from tests.data.writing import KITS, ball, write_h5, write_image, write_kits, write_la


def zscored(array):
    array = array.astype(np.float64)
    return (array - array.mean()) / array.std()


def test_real_la_raw_and_h5_agree(scans):
    raw = {case.name: case for case in find_cases("la", scans("la_raw"))}
    preprocessed = find_cases("la", scans("la_h5"))
    assert len(raw) == 80 and len(preprocessed) == 3
    for case in preprocessed:
        assert (case.layout, raw[case.name].layout) == ("la_h5", "la_raw")
        ours, theirs = read_case(raw[case.name]), read_case(case)
        np.testing.assert_allclose(zscored(ours.image), zscored(theirs.image), atol=1e-5)
        np.testing.assert_array_equal(ours.label > 0, theirs.label > 0)
        assert set(np.unique(ours.label)) == {0, 255}
        np.testing.assert_allclose(ours.spacing, 0.625)


@pytest.mark.parametrize("name", ["case_00017", "case_00112"])
def test_real_kits_label_maps_come_out_axial_with_slices_last(scans, name):
    path = scans("kits19") / name / "segmentation.nii.gz"
    # a label map is an image too, which spares synthesising a CT here
    scan = read_case(Case(name, path, path, "kits_raw"))
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # reversed: (x, y, slice)
    np.testing.assert_array_equal(scan.label, stored[:, :, ::-1])
    assert scan.label.dtype == scan.image.dtype == np.uint8  # as stored
    assert scan.label.shape[:2] == (512, 512) and scan.spacing[0] == scan.spacing[1] < scan.spacing[2]
    assert scan.source.size[0] == scan.label.shape[2]
    # kidneys: one on either side of the spine, behind the middle
    fractions = np.argwhere(scan.label[::4, ::4] > 0) / (128, 128, scan.label.shape[2])
    left = fractions[:, 0] > 0.5
    assert 0.3 < left.mean() < 0.7
    assert fractions[left, 0].mean() > 0.6 and fractions[~left, 0].mean() < 0.4 and fractions[:, 1].mean() > 0.5


def test_real_ct_reads_the_same_from_any_orientation(scans, tmp_path):
    """RAS as delivered, and turned into KiTS19's order: the same scan."""
    folder = scans("ct")
    image, label = (sitk.ReadImage(str(folder / f"example_{part}.nii.gz")) for part in ("ct_sm", "seg"))
    for name, code in (("ras", "RAS"), ("kits", "IPL")):
        (tmp_path / name).mkdir()
        for part, file in ((image, "imaging.nii.gz"), (label, "segmentation.nii.gz")):
            sitk.WriteImage(sitk.DICOMOrient(part, code), str(tmp_path / name / file))
    kits, ras = (read_case(case) for case in find_cases("kits", tmp_path))
    np.testing.assert_array_equal(kits.image, ras.image)
    np.testing.assert_array_equal(kits.label, ras.label)
    assert kits.source.size[0] == 30 and ras.source.size[2] == 30 and kits.image.shape[2] == 30
    # liver (5) on the right, spleen (1) on the left: x grows to the left
    assert np.argwhere(ras.label == 5)[:, 0].mean() < np.argwhere(ras.label == 1)[:, 0].mean()


def test_folder_recognises_every_layout(tmp_path):
    image, label = ball()
    write_la(tmp_path / "la", 2)
    write_kits(tmp_path / "kits", "case_00000", image.astype(np.int16), None)
    write_h5(tmp_path / "la_h5" / "x" / "mri_norm2.h5", image=image, label=label)
    write_h5(tmp_path / "h5" / "y.h5", image=image)
    found = {name: find_cases("folder", tmp_path / name) for name in ("la", "kits", "la_h5", "h5")}
    assert {name: cases[0].layout for name, cases in found.items()} == {
        "la": "la_raw", "kits": "kits_raw", "la_h5": "la_h5", "h5": "h5"}
    assert [case.name for case in found["la"]] == ["a", "b"]
    assert found["h5"][0].name == "y" and found["la_h5"][0].name == "x"
    assert found["kits"][0].label is None and read_case(found["kits"][0]).label is None
    assert read_case(found["h5"][0]).label is None


def test_missing_and_empty_folders_say_where_data_come_from(tmp_path):
    sources = {"kits": "neheller/kits19", "la": "atriaseg2018", "folder": "own-data.md", "phantom": "leave out --data-"}
    for folder in (tmp_path, tmp_path / "absent"):
        for dataset in sources:
            with pytest.raises(UserError) as error:
                find_cases(dataset, folder)
            assert str(folder) in str(error.value) and "\n" not in str(error.value)
            assert [name for name, said in sources.items() if said in str(error.value)] == [dataset]


def test_scans_one_level_below_are_pointed_at(tmp_path):
    write_la(tmp_path / "Training Set", 1)
    with pytest.raises(UserError, match="Training Set as the data folder"):
        find_cases("la", tmp_path)


def test_labels_without_scans_are_named(tmp_path, scans):
    with pytest.raises(UserError, match=r"case_00003 \(and 5 more\).*no imaging.nii.gz.*kits19"):
        find_cases("kits", scans("kits19"))
    write_image(tmp_path / "a" / "laendo.nrrd", ball()[1])
    with pytest.raises(UserError, match=r"no lgemri.nrrd"):
        find_cases("la", tmp_path)


# bad files ----------------------------------------------------------------------------------------------------------

SHAPE = (10, 16, 14)


def good(tmp_path):
    """A good KiTS19 case whose files a test then spoils: (case, image array, label array)."""
    random = np.random.default_rng(0)
    image = random.integers(-1000, 1000, SHAPE).astype(np.int16)
    label = (image > 0).astype(np.uint8)
    write_kits(tmp_path, "case_00000", image, label)
    return find_cases("kits", tmp_path)[0], image, label


def refused(case, *words):
    with pytest.raises(UserError) as error:
        read_case(case)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_the_good_case_is_read(tmp_path):
    case, image, label = good(tmp_path)
    scan = read_case(case)
    np.testing.assert_array_equal(scan.image, image.transpose(2, 1, 0)[:, :, ::-1])
    np.testing.assert_array_equal(scan.label, label.transpose(2, 1, 0)[:, :, ::-1])
    assert scan.spacing == pytest.approx((0.8, 0.8, 3.0))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("which", ["image", "label"])
def test_truncated_nifti_gz(tmp_path, fraction, which):
    """The NIfTI reader itself pads such a file with zeros."""
    case = good(tmp_path)[0]
    path = getattr(case, which)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refused(case, str(path), "fetch the file again")


def test_truncated_nifti_in_a_complete_gzip(tmp_path):
    case = good(tmp_path)[0]
    content = gzip.decompress(case.image.read_bytes())
    case.image.write_bytes(gzip.compress(content[: len(content) // 2]))
    refused(case, str(case.image), "truncated")


def test_gzip_of_several_members_is_complete(tmp_path):
    case, image, _ = good(tmp_path)
    content = gzip.decompress(case.image.read_bytes())
    case.image.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    np.testing.assert_array_equal(read_case(case).image, image.transpose(2, 1, 0)[:, :, ::-1])


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    case = good(tmp_path)[0]
    case.image.write_bytes(b"")  # root may read whatever there is, so what ITK would say is had in another way
    monkeypatch.setattr("os.access", lambda path, mode: path != case.image)
    refused(case, "cannot be opened (permission denied): make it readable")


def test_axes_that_are_not_at_right_angles(tmp_path):
    case = good(tmp_path)[0]
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    struct.pack_into("<2h", content, 252, 0, 1)  # the sform alone counts
    struct.pack_into("<12f", content, 280, 1, 0.3, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    case.image.write_bytes(gzip.compress(bytes(content)))
    refused(case, "not at right angles", "resample the scan")


def test_an_sform_of_another_spacing(tmp_path):
    """ITK would go by pixdim, with a warning."""
    case = good(tmp_path)[0]
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    column = struct.unpack_from("<9f", content, 280)[::4]
    for factor in (1.005, 2):
        for row, value in enumerate(column):
            struct.pack_into("<f", content, 280 + 16 * row, factor * value)
        case.image.write_bytes(gzip.compress(bytes(content)))
        if factor < 2:
            read_case(case)
    refused(case, str(case.image), "(3.0, 0.8, 0.8) by its pixdim and (6.0, 0.8, 0.8) by its sform", "correct")


def test_truncated_nrrd(tmp_path):
    write_la(tmp_path, 1)
    case = find_cases("la", tmp_path)[0]
    case.image.write_bytes(case.image.read_bytes()[:-40])
    refused(case, str(case.image), "fetch the file again")


@pytest.mark.parametrize("content", [b"", b"not an image at all" * 30])
@pytest.mark.parametrize("folder", ["scans", "iso_spacing", "orthonormal"])
def test_unreadable(tmp_path, content, folder):
    """Whatever words its path holds."""
    case = good(tmp_path / folder)[0]
    case.image.write_bytes(content)
    refused(case, str(case.image), "cannot be read")


@pytest.mark.parametrize("shape", [(16, 14), (4, 5, 6, 2)])
def test_not_three_dimensional(tmp_path, shape):
    case = good(tmp_path)[0]
    image = sitk.Image(list(shape), sitk.sitkInt16)
    sitk.WriteImage(image, str(case.image))
    refused(case, str(case.image), f"{len(shape)} dimensions", "one volume per file")


def test_colour(tmp_path):
    case = good(tmp_path)[0]
    sitk.WriteImage(sitk.Image([14, 16, 10], sitk.sitkVectorUInt8, 3), str(case.image))
    refused(case, str(case.image), "3 values per voxel")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    case, image, _ = good(tmp_path)
    image = image.astype(np.float32)
    image[3, 4, 5] = value
    write_image(case.image, image, (3.0, 0.8, 0.8), KITS)
    refused(case, str(case.image), "1 voxels that are NaN or infinite")
    image[3, 4, 5] = 0
    write_image(case.image, image, (3.0, 0.8, 0.8), KITS)
    np.testing.assert_array_equal(read_case(case).image, image.transpose(2, 1, 0)[:, :, ::-1])


@pytest.mark.parametrize("end", [".nii.gz", ".nii"])
def test_truncated_float_nifti(tmp_path, end):
    path = tmp_path / f"x{end}"
    write_image(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    case = Case("x", path, None, "kits_raw")
    assert read_case(case).image.shape == SHAPE
    path.write_bytes(path.read_bytes()[:-100])
    refused(case, str(path), "fetch the file again")


@pytest.mark.parametrize("change, word", [
    ({"spacing": (3.0, 0.8, 0.9)}, "spacing"),
    ({"origin": (0.0, 5.0, 0.0)}, "origin"),
    ({"direction": (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)}, "direction"),
])
def test_label_of_another_geometry(tmp_path, change, word):
    case, _, label = good(tmp_path)
    write_image(case.label, label, **{"spacing": (3.0, 0.8, 0.8), "direction": KITS, **change})
    refused(case, str(case.label), word, "instead of", "export the label")


def test_label_of_another_size(tmp_path):
    case, _, label = good(tmp_path)
    write_image(case.label, label[1:], (3.0, 0.8, 0.8), KITS)
    refused(case, str(case.label), "size (9, 16, 14)", "(10, 16, 14)")


def test_label_geometry_may_differ_by_rounding(tmp_path):
    case, _, label = good(tmp_path)
    write_image(case.label, label, (3.0001, 0.8, 0.8), KITS, (0.001, 0.0, 0.0))
    np.testing.assert_array_equal(read_case(case).label, label.transpose(2, 1, 0)[:, :, ::-1])


@pytest.mark.parametrize("spoiled", [0.5, -1, 300])
def test_label_that_is_no_label_map(tmp_path, spoiled):
    case, _, label = good(tmp_path)
    label = label.astype(np.float32)
    label[0, 0, 0] = spoiled
    write_image(case.label, label, (3.0, 0.8, 0.8), KITS)
    refused(case, str(case.label), "whole numbers from 0 to 255", f"one is {spoiled:g}")


def test_label_values_that_a_scale_moved_a_little(tmp_path):
    """As nibabel writes float64 into uint8: 2 / 255 a step, in which 1 is no whole number."""
    case, _, label = good(tmp_path)
    label[0, 0, 0] = 2
    write_image(case.label, np.where(label == 1, 127, 255 * (label == 2)).astype(np.uint8), (3.0, 0.8, 0.8), KITS)
    content = bytearray(gzip.decompress(case.label.read_bytes()))
    struct.pack_into("<2f", content, 112, 2 / 255, 0)
    case.label.write_bytes(gzip.compress(bytes(content)))
    np.testing.assert_array_equal(read_case(case).label, label.transpose(2, 1, 0)[:, :, ::-1])


def test_zero_spacing(tmp_path):
    """The NIfTI reader itself refuses it, or takes the voxels to be 1 mm wide."""
    case = good(tmp_path)[0]
    content = bytearray(gzip.decompress(case.image.read_bytes()))
    content[80:84] = np.float32(0).tobytes()  # pixdim[1]
    case.image.write_bytes(gzip.compress(bytes(content)))
    refused(case, str(case.image), "spacing", "correct its header")


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_endings_in_capitals(tmp_path, kind):
    write_image(tmp_path / "a.nii.gz", ball()[0].astype(kind))
    path = (tmp_path / "a.nii.gz").rename(tmp_path / "A.NII.GZ")
    np.testing.assert_array_equal(read_case(Case("A", path, None, "plain")).image, ball()[0])


@pytest.mark.parametrize("packed", [False, True])
def test_nifti_2_is_named(tmp_path, packed):
    header = bytearray(544)
    struct.pack_into("<i8s2h8q", header, 0, 540, b"n+2\0\r\n\x1a\n", 2, 8, 3, 4, 5, 6, 1, 1, 1, 1)
    struct.pack_into("<8d", header, 104, *[1.0] * 8)
    struct.pack_into("<q2d", header, 168, 544, 1.0, 0.0)
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(header + bytes(120)) if packed else header + bytes(120))
    refused(Case("a", path, None, "plain"), str(path), "is NIfTI-2, which is not read: save it as NIfTI-1")


def test_bad_h5(tmp_path):
    image, label = ball()
    path = tmp_path / "x.h5"
    case = Case("x", path, path, "h5")
    write_h5(path, image=image, label=label[1:])
    refused(case, str(path), "does not fit")
    write_h5(path, images=image)
    refused(case, str(path), "no data set named image: found images")
    write_h5(path, image=image[0])
    refused(case, str(path), "2 dimensions")
    write_h5(path, image=np.where(label, np.nan, 0.0))
    refused(case, str(path), "NaN")
    write_h5(path, image=np.random.default_rng(0).normal(size=(20, 20, 20)), label=np.ones((20, 20, 20), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])
    refused(case, str(path), "cannot be read as HDF5", "fetch the file again")
