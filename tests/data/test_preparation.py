"""What preparation makes of a scan: CT as in KiTS19, MR as in LA, and its way back to the file."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from spss_fast.config import resolve
from spss_fast.data.annotations import Annotation
from spss_fast.data.cache import prepare
from spss_fast.data.geometry import Grid
from spss_fast.data.layouts import Case, Scan, find_cases
from spss_fast.data.preparation import (
    body_box,
    classes_shown,
    foreground,
    prepare_scan,
    resampled_label,
    target_grid,
)
from spss_fast.errors import UserError
from tests.data.writing import ball, prepared, settings_of, to_source, write_h5, write_image, write_kits, write_la


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def synthetic_ct(label: np.ndarray) -> np.ndarray:
    """A CT for a KiTS19 label map (slices first): a body of 40 HU in air, kidneys of 150 HU, tumours of 90 HU."""
    depth, rows, columns = label.shape
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    plane = np.where((x / 0.92) ** 2 + (y / 0.8) ** 2 < 1, 40, -1000).astype(np.int16)
    image = np.repeat(plane[None], depth, 0)
    image[label == 1], image[label == 2] = 150, 90
    return image


def read_file_order(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0)


@pytest.fixture
def real_kits(scans, tmp_path):
    """A real KiTS19 label map with a synthesised CT, in the raw layout: its folder."""
    name = "case_00017"
    source = scans("kits19") / name / "segmentation.nii.gz"
    label = sitk.ReadImage(str(source))
    image = sitk.GetImageFromArray(synthetic_ct(read_file_order(source)).transpose(2, 1, 0))
    image.CopyInformation(label)
    (tmp_path / "kits" / name).mkdir(parents=True)
    sitk.WriteImage(image, str(tmp_path / "kits" / name / "imaging.nii.gz"), useCompression=True, compressionLevel=1)
    (tmp_path / "kits" / name / "segmentation.nii.gz").write_bytes(source.read_bytes())
    return tmp_path / "kits"


def test_kits_preset_on_a_real_label_map(real_kits, tmp_path):
    config = settings_of("kits", tmp_path)
    case, = prepared("kits", real_kits, config)
    label = case.label()
    assert case.image.shape == label.shape == (192, 192, 64) and case.image.dtype == np.float32
    assert case.image.mean() == pytest.approx(0, abs=1e-4) and case.image.std() == pytest.approx(1, abs=1e-4)
    assert set(np.unique(label)) == {0, 1}
    # image and label stay in register through orientation, crop and resampling: kidney + tumour are what is bright
    body = np.median(case.image[case.image > case.image.min() + 0.1])
    threshold = body + 0.25 * (case.image.max() - body)
    assert dice(case.image > threshold, label) > 0.93
    # a millimetre is still a millimetre: the volume of the kidneys is kept
    original = read_file_order(real_kits / "case_00017" / "segmentation.nii.gz") > 0
    spacing = sitk.ReadImage(str(real_kits / "case_00017" / "segmentation.nii.gz")).GetSpacing()
    assert label.sum() * np.prod(case.spacing) == pytest.approx(original.sum() * np.prod(spacing), rel=0.02)
    # and back into the file's own geometry, to the last digit
    back = to_source(case, label)
    reference = sitk.ReadImage(str(real_kits / "case_00017" / "imaging.nii.gz"))
    assert (back.GetSize(), back.GetSpacing(), back.GetOrigin(), back.GetDirection()) == (
        reference.GetSize(), reference.GetSpacing(), reference.GetOrigin(), reference.GetDirection())
    assert dice(sitk.GetArrayFromImage(back).transpose(2, 1, 0) > 0, original) > 0.93
    # half the resolution covers the same space
    full = case
    half, = prepared("kits", real_kits, settings_of("kits", tmp_path, downsample=2))
    assert half.image.shape == (96, 96, 32)
    np.testing.assert_allclose(half.spacing, np.array(full.spacing) * 2)
    np.testing.assert_allclose(half.grid.point((-0.5,) * 3), full.grid.point((-0.5,) * 3))
    blocks = full.image.reshape(96, 2, 96, 2, 32, 2).mean((1, 3, 5))
    assert np.corrcoef(blocks.ravel(), half.image.ravel())[0, 1] > 0.99
    assert half.label().sum() * 8 == pytest.approx(full.label().sum(), rel=0.03)


def test_window_maps_before_averaging(tmp_path):
    """Metal of 3000 HU must not spread: voxels are clipped to the window before they are averaged."""
    image = np.full((8, 16, 16), 0, np.int16)
    image[:, :8] = 100
    image[4, 4, 4] = 3000
    write_kits(tmp_path / "d", "case_00000", image, None)
    config = settings_of("kits", tmp_path, body_crop=False, resample="8 8 4")
    case, = prepared("kits", tmp_path / "d", config)
    levels = np.unique(case.image.round(4))
    spread = (levels - levels.min()) / (levels[1] - levels.min())  # 0 for 0 HU, 1 for 100 HU
    assert spread.max() == pytest.approx(1 + (240 - 100) / 100 / 8, abs=0.01)


def test_body_box_holds_the_body_and_leaves_the_table_out():
    image = np.full((160, 150, 40), -1000, np.float32)
    x, y = np.mgrid[:160, :150]
    image[((x - 80) / 50) ** 2 + ((y - 60) / 40) ** 2 < 1] = 30
    image[20:140, 120:124] = 200  # a table, apart from the body
    image += np.random.default_rng(0).normal(0, 20, image.shape)
    start, stop = body_box(image, Case("x", None, None, "kits_raw"))
    np.testing.assert_allclose(start, [30, 20, 0], atol=2)
    np.testing.assert_allclose(stop, [131, 101, 40], atol=2)


def test_no_voxel_of_the_body_is_lost_to_the_coarse_look():
    for first, last in ((100, 250), (101, 251), (102, 252), (101, 252)):  # every third voxel is looked at
        image = np.full((384, 20, 8), -1000, np.float32)
        image[first : last + 1, 5:15] = 30
        start, stop = body_box(image, Case("x", None, None, "kits_raw"))
        assert first - 6 <= start[0] <= first and last < stop[0] <= last + 7


def real_organs(scans, tmp_path):
    """The real CT with several organs in the raw KiTS19 layout: its folder."""
    (tmp_path / "d" / "case_00000").mkdir(parents=True)
    for part, name in (("ct_sm", "imaging"), ("seg", "segmentation")):
        target = tmp_path / "d" / "case_00000" / f"{name}.nii.gz"
        target.write_bytes((scans("ct") / f"example_{part}.nii.gz").read_bytes())
    return tmp_path / "d"


def test_body_crop_of_a_real_ct(scans, tmp_path):
    config = settings_of("kits", tmp_path, resample="64 64 32", foreground="2 3")
    case, = prepared("kits", real_organs(scans, tmp_path), config)
    label = sitk.ReadImage(str(scans("ct") / "example_seg.nii.gz"))
    kidneys = np.isin(sitk.GetArrayFromImage(label), (2, 3)).transpose(2, 1, 0)
    extent = np.array(case.spacing) * case.grid.size
    full = np.array(label.GetSpacing()) * label.GetSize()
    assert (extent[:2] < 0.97 * full[:2]).all() and (extent[:2] > 0.8 * full[:2]).all()
    assert case.label().sum() * np.prod(case.spacing) == pytest.approx(kidneys.sum() * 27, rel=0.03)
    # two kidneys, and brighter than the fat around them
    count = ndimage.label(case.label())[1]
    shell = ndimage.binary_dilation(case.label(), iterations=2) & (case.label() == 0)
    assert count >= 2 and case.image[case.label() > 0].mean() > case.image[shell].mean() + 0.2
    back = to_source(case, case.label())
    assert back.GetDirection() == label.GetDirection() and back.GetOrigin() == label.GetOrigin()
    assert dice(sitk.GetArrayFromImage(back).transpose(2, 1, 0) > 0, kidneys) > 0.85


def test_la_preset_keeps_the_grid_and_scores(tmp_path):
    write_la(tmp_path / "la", 1)
    case, = prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    image, label = ball()
    np.testing.assert_allclose(case.image, (image - image.mean()) / image.std(), atol=1e-5)
    np.testing.assert_array_equal(case.label(), label)
    back = to_source(case, case.image)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back).transpose(2, 1, 0), case.image)


def test_real_la_raw_and_h5_prepare_alike(scans, tmp_path):
    config = settings_of("la", tmp_path, downsample=2)
    names = ["06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU"]
    both = []
    for folder in ("la_raw", "la_h5"):
        cases = {case.name: case for case in prepared_some(scans(folder), names, config)}
        both.append([cases[name] for name in names])
    for raw, h5 in zip(*both):
        np.testing.assert_allclose(raw.image, h5.image, atol=1e-4)
        np.testing.assert_array_equal(raw.label(), h5.label())
        assert raw.image.shape == tuple(-(-n // 2) for n in raw.source.size)


def prepared_some(folder, names, config):
    return prepare([case for case in find_cases("la", folder) if case.name in names], config.data, progress=False)


def test_wide_slices_are_cropped_around_their_centre(tmp_path):
    image, label = ball((40, 36, 24))
    write_image(tmp_path / "la" / "a" / "lgemri.nrrd", image)
    write_image(tmp_path / "la" / "a" / "laendo.nrrd", label)
    case, = prepared("la", tmp_path / "la", settings_of("la", tmp_path, max_in_plane=30))
    np.testing.assert_array_equal(case.label(), label[5:35, 3:33])
    back = sitk.GetArrayFromImage(to_source(case, np.ones(case.grid.size, np.uint8))).transpose(2, 1, 0)
    assert back.sum() == 30 * 30 * 24 and back[5:35, 3:33].all()


def test_where_the_crop_lies_does_not_depend_on_the_label():
    image = np.random.default_rng(0).normal(0, 100, (40, 40, 20)).astype(np.float32)
    scans = [Scan(image, np.roll(np.eye(40, dtype=np.uint8)[:, :, None].repeat(20, 2), shift, 0), (1.0,) * 3,
                  Grid(image.shape), Grid(image.shape)) for shift in (0, 11)]
    for dataset in ("la", "kits"):
        config = settings_of(dataset, Path("."), max_in_plane=30)
        one, other = (prepare_scan(scan, Case("x", None, None, "la_raw"), config.data) for scan in scans)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[2] == other[2]


def test_h5_is_resampled_but_not_windowed_or_cropped(tmp_path):
    """KiTS19 as the literature shares it is z-scored already: a window in HU would wipe it out."""
    random = np.random.default_rng(0)
    image = random.normal(size=(24, 20, 16)).astype(np.float32)
    write_h5(tmp_path / "d" / "case_00000.h5", image=image, label=(image > 1).astype(np.uint8))
    case, = prepared("kits", tmp_path / "d", settings_of("kits", tmp_path, resample="24 20 16"))
    np.testing.assert_allclose(case.image, (image - image.mean()) / image.std(), atol=1e-5)
    half, = prepared("kits", tmp_path / "d", settings_of("kits", tmp_path, resample="12 10 8"))
    assert half.image.shape == (12, 10, 8)


def test_foreground_merges_the_values_asked_for():
    label = np.array([0, 1, 2, 5], np.uint8)
    config = settings_of("kits", Path("."))
    np.testing.assert_array_equal(foreground(label, config.data), [0, 1, 1, 1])
    config.data.foreground = (2, 5)
    np.testing.assert_array_equal(foreground(label, config.data), [0, 0, 1, 1])


def test_classes_keep_the_values_asked_for_apart():
    label = np.array([0, 1, 2, 5, 255], np.uint8)
    config = settings_of("kits", Path("."), classes="5,2")
    np.testing.assert_array_equal(foreground(label, config.data), [0, 0, 2, 1, 0])


def test_organs_of_a_real_ct_stay_apart(scans, tmp_path):
    config = settings_of("kits", tmp_path, resample="64 64 32", classes="5,1,2,3")
    case, = prepared("kits", real_organs(scans, tmp_path), config)
    original = sitk.GetArrayFromImage(sitk.ReadImage(str(scans("ct") / "example_seg.nii.gz")))
    for c, value in enumerate((5, 1, 2, 3), 1):
        volume = (case.label() == c).sum() * np.prod(case.spacing)
        assert volume == pytest.approx((original == value).sum() * 27, rel=0.06)


def test_labels_at_half_resolution_lie_where_the_image_does(tmp_path):
    """Image and label are the same ball: means over blocks and votes have their middle in the same place."""
    inside = ball((41, 40, 30))[1]
    write_image(tmp_path / "d" / "a" / "lgemri.nrrd", 10 + 100 * inside)
    write_image(tmp_path / "d" / "a" / "laendo.nrrd", inside)
    case, = prepared("la", tmp_path / "d", settings_of("la", tmp_path, downsample=2))
    image = (case.image - case.image.min()) / np.ptp(case.image)
    label = case.label()
    np.testing.assert_array_equal(label, image >= 0.5)  # of as many on either side, the foreground
    assert label.any() and (image[label == 0] > 0.3).any()
    annotation = case.annotation_from_source(Annotation(15), resolve("la", {"downsample": 2}).data)
    votes = np.pad(inside[:, :, 15], ((0, 1), (0, 0))).reshape(21, 2, 20, 2).sum((1, 3))
    np.testing.assert_array_equal(annotation, votes >= 2)


@pytest.mark.parametrize("classes, expected", [((1, 2), [0, 1, 2, 2]), ((2, 1), [0, 2, 2, 1]), ((), [0, 1, 1, 1])])
def test_of_as_many_voxels_the_last_class_wins(classes, expected):
    blocks = [[0, 0, 0, 1], [1, 1, 0, 0], [2, 2, 1, 1], [2, 2, 2, 1]]
    label = np.zeros((8, 2, 1), np.uint8)
    for i, (a, b, c, d) in enumerate(blocks):
        label[2 * i : 2 * i + 2, :, 0] = [[a, b], [c, d]]
    grid = Grid((8, 2, 1))
    settings = settings_of("la", Path("."), classes=classes).data
    shrunk = resampled_label(label, grid, grid.shrunk((2, 2, 1)), settings)
    np.testing.assert_array_equal(shrunk[:, 0, 0], expected)


def test_classes_are_counted_slice_by_slice():
    label = np.zeros((4, 5, 6), np.uint8)
    label[1, 2, 1], label[1, 2, 3], label[2, 2, 3], label[0, 0, 5] = 1, 1, 2, 9
    settings = settings_of("la", Path("."), classes=(1, 2)).data
    for array in (label, np.asfortranarray(label)):
        np.testing.assert_array_equal(classes_shown(array, settings), [0, 1, 0, 2, 0, 0])


def test_preset_grid_of_la_at_half_resolution():
    grid = Grid((183, 140, 88), (0.625,) * 3)
    scan = Scan(np.zeros(grid.size, np.float32), None, grid.spacing, grid, grid)
    config = settings_of("la", Path("."), downsample=2)
    half = target_grid(scan, Case("x", None, None, "la_raw"), config.data)
    assert half.size == (92, 70, 44)
    np.testing.assert_allclose(half.spacing, 1.25)


# bad scans ----------------------------------------------------------------------------------------------------------

def refused(dataset, tmp_path, **flags):
    with pytest.raises(UserError) as error:
        prepared(dataset, tmp_path / "d", settings_of(dataset, tmp_path, **flags))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_image_without_contrast(tmp_path):
    write_image(tmp_path / "d" / "a" / "lgemri.nrrd", np.full((20, 20, 20), 7, np.uint8))
    assert "lgemri.nrrd has no contrast" in refused("la", tmp_path)


def test_ct_without_a_body(tmp_path):
    write_kits(tmp_path / "d", "case_00000", np.full((8, 16, 16), -1000, np.int16), None)
    message = refused("kits", tmp_path)
    assert "imaging.nii.gz holds no body" in message and "body_crop" in message


def test_the_first_bad_case_is_named_and_the_others_counted(tmp_path):
    names = write_la(tmp_path / "d", 5)
    for name in names[1:4]:
        (tmp_path / "d" / name / "lgemri.nrrd").write_bytes(b"spoiled" * 50)
    message = refused("la", tmp_path)
    assert str(tmp_path / "d" / "b" / "lgemri.nrrd") in message and "2 more of the 5 cases" in message
