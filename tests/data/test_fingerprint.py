"""What is measured of a scan, and the settings that follow from what scans are like."""

import json
from pathlib import Path

import numpy as np
import pytest

from spss_fast.data.fingerprint import VOLUME_VOXELS, Measured, Proposal, describe, measure, propose
from spss_fast.data.layouts import find_cases
from tests.data.writing import settings_of, write_image


def scan(size=(64, 64, 32), spacing=(1.0, 1.0, 1.0), **changes) -> Measured:
    """An MR scan with a full label."""
    usual = {"name": "a", "modality": "MR", "said": True, "orientation": "LPS", "plane": "axial", "body": size,
             "lowest": 0.0, "percentiles": (1.0, 50.0, 90.0), "highest": 100.0, "values": (1,), "full": True}
    return Measured(size=size, spacing=spacing, **usual | changes)


def proposed(*scans: Measured, data_dir=Path("nowhere"), lists=(None, None), **given) -> Proposal:
    return propose(list(scans), data_dir, given, (), lists)


def measured(tmp_path, image, **options) -> Measured:
    write_image(tmp_path / "scans" / "a.nii.gz", image, **options)
    case, = find_cases("folder", tmp_path / "scans")
    return measure(case, "", settings_of("folder", tmp_path).data)


def test_intensities_are_measured_at_their_percentiles(tmp_path):
    found = measured(tmp_path, np.random.default_rng(0).permutation(10001).reshape(73, 137, 1).astype(np.int16))
    assert (found.lowest, *found.percentiles, found.highest) == pytest.approx((0, 50, 5000, 9950, 10000))


def test_the_box_of_the_body_is_that_of_its_own_voxels(tmp_path):
    image = np.full((40, 36, 24), -1000, np.int16)
    image[10:34, 8:30, 6:20] = np.random.default_rng(0).integers(-100, 300, (24, 22, 14))
    assert measured(tmp_path, image).body == (26, 24, 16)  # and a voxel around it


@pytest.mark.parametrize("coarse, plane", [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_the_plane_of_the_slices_is_named(tmp_path, coarse, plane):
    spacing = np.where(np.arange(3) == coarse, 3.0, 1.0)
    found = measured(tmp_path, np.random.default_rng(0).integers(0, 99, (20, 20, 20), np.uint8), spacing=spacing)
    assert found.plane == plane and found.spacing == (1.0, 1.0, 3.0)


def test_sizes_and_spacings_are_described_by_axis_as_median_and_range():
    scans = [scan((10, 50, 7), (1.0, 2.0, 3.0)), scan((20, 60, 7), (1.0, 2.0, 4.0)), scan((90, 70, 7), (1.0, 2.0, 8.0))]
    assert describe(scans)[2:5] == [
        "height: 20 (10 to 90) voxels of 1.000 mm", "width: 60 (50 to 70) voxels of 2.000 mm",
        "slices: 7 voxels of 4.000 (3.000 to 8.000) mm",
    ]


def test_what_is_cropped_away_is_no_place_for_a_patch():
    whole = scan((128, 128, 64), modality="CT", body=(64, 72, 48))
    assert proposed(whole).values["body_crop"] and proposed(whole).values["patch"] == (48, 48, 48)
    assert proposed(whole, body_crop=False).values["patch"] == (112, 112, 64)
    assert not proposed(scan((64, 64, 64), modality="CT", body=(63, 63, 64))).values["body_crop"]
    assert proposed(scan((64, 64, 64)), max_in_plane=48).values["patch"] == (32, 32, 64)


def test_patches_are_cut_down_where_they_are_longest_in_mm():
    found = proposed(scan((176, 176, 240), (0.5, 0.5, 2.0)))
    assert found.values["resample"] is None and found.values["patch"] == (160, 160, 64)
    assert "80 x 80 x 128 mm" in found.reasons["patch"]


def test_half_resolution_has_patches_and_grids_of_half_the_sides():
    found = proposed(scan((192, 192, 160)), downsample=2)
    assert found.values["resample"] is None and found.values["patch"] == (48, 48, 64)
    assert "96 x 96 x 128 mm" in found.reasons["patch"]
    assert proposed(scan((70, 70, 35)), downsample=2).values["patch"] == (32, 32, 16)
    uneven = scan((256, 256, 64), (1.0, 1.0, 2.0)), scan((256, 256, 32), (1.0, 1.0, 4.0))
    whole, half = (proposed(*uneven, downsample=factor).values["resample"] for factor in (1, 2))
    assert whole == tuple(2 * side for side in half)


def test_voxels_that_are_long_alike_in_all_scans_stay():
    assert proposed(scan(spacing=(0.5, 0.5, 5.0)), scan(spacing=(0.5, 0.5, 5.0))).values["resample"] is None
    assert proposed(scan(spacing=(0.5, 0.5, 5.0)), scan(spacing=(0.5, 0.5, 2.0))).values["resample"]


@pytest.mark.parametrize("size", [(40, 24, 40), (72, 96, 50), (400, 150, 400)])
@pytest.mark.parametrize("spacing", [(1.0, 3.0, 1.0), (3.0, 1.0, 0.6)])
def test_slices_that_are_turned_get_square_voxels(size, spacing):
    found = proposed(scan(size, spacing))
    made = np.multiply(size, spacing) / found.values["resample"]
    assert made[0] == pytest.approx(made[1], rel=0.25) and not found.remarks
    assert np.prod(found.values["resample"]) < 1.25 * VOLUME_VOXELS  # rounded to multiples of 16
    assert "turns by 90 degrees, differ by a factor of 3.00" in found.reasons["resample"]


def test_slices_that_stay_uneven_by_the_users_choice_are_remarked():
    kept, made = (proposed(scan((64, 32, 64), (1.0, 3.0, 1.0)), resample=grid) for grid in (None, (64, 96, 64)))
    assert "voxels of 1.00 x 3.00 mm, and training turns them" in kept.remarks[-1] and not made.remarks


def test_large_volumes_are_shrunk_along_axes_that_are_finer_than_need_be():
    grid = proposed(scan((512, 512, 100), (0.7, 0.7, 5.0))).values["resample"]
    assert grid == (160, 160, 96) and np.prod(grid) == pytest.approx(VOLUME_VOXELS, rel=0.1)


@pytest.mark.parametrize("labels", [{"background": 0, "atrium": 1, "Ignore": 2},
                                    {"0": "background", "1": "atrium", "2": "ignore"}])
def test_what_is_to_be_ignored_is_no_foreground(labels, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    found = proposed(scan(values=(1, 2)), scan(values=(1,)), data_dir=tmp_path)
    assert found.values["foreground"] == (1,) and "1 (atrium) in 2 of 2" in found.reasons["foreground"]
    assert proposed(scan(values=(1,)), data_dir=tmp_path).values["foreground"] == ()


NAMES = [f"s{i:02d}" for i in range(22)]


@pytest.mark.parametrize("labelled, train, test, expected", [
    (NAMES, NAMES, None, 16),
    (NAMES, NAMES[:12], None, 10),  # two train without
    (NAMES, None, NAMES[12:], 10),
    (NAMES[:5], NAMES, None, 5),
    (NAMES[5:9], NAMES[4:], None, 16),  # the first has no label: as without any, some are to be annotated
    (NAMES[5:9], None, NAMES[:7], 2),
    (NAMES[5:9], NAMES[:4], None, 2),
    (NAMES, None, None, 16),
])
def test_annotated_cases_are_those_that_the_lists_leave_to_training(labelled, train, test, expected):
    scans = [scan(name=name, values=(1,) * (name in labelled), full=name in labelled) for name in NAMES]
    found = proposed(*scans, lists=(train, test), n_test=4)
    assert found.values["n_labeled"] == expected


def test_labels_that_training_does_not_come_to_are_no_annotations():
    scans = [scan(name=name, values=(1,) * (name == "b"), full=name == "b") for name in "abcdefgh"]
    for lists in ((list("abcdefgh"), None), (None, ["b"])):
        found = proposed(*scans, lists=lists)
        assert "no scan of those that come first in training has a label" in found.remarks[-1]
        assert "annotate one slice in this many" in found.reasons["n_labeled"]
    assert proposed(*scans, lists=(list("bacdefgh"), None)).remarks == []


def test_a_lone_scan_without_annotations_is_not_told_of_them():
    assert not proposed(scan()).remarks


def test_scans_unlike_the_others_are_named():
    remarks = proposed(scan(name="p"), scan(name="q", plane="coronal"), scan((12, 64, 64), name="r", modality="CT"),
                       scan((64, 64, 12), name="s")).remarks
    assert remarks[:3] == [
        "the modality of 1 scans is not MR: r (CT); keep one modality per data set",
        "the plane of the slices of 1 scans is not axial: q (coronal); set plane if they should be the same",
        "1 scans have fewer than 16 slices: s; patches are padded there",
    ]
