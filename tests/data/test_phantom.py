"""Phantoms: KiTS19's layout, what is in them, and that nothing that exists is written to."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from spss_fast.data.layouts import find_cases, read_case
from spss_fast.data.phantom import LIVER, SPLEEN, phantom, write_phantoms
from spss_fast.data.splits import make_split
from spss_fast.errors import UserError
from tests.data.writing import KITS, prepared, settings_of

SMALL = {"shape": (16, 40, 40), "spacing": (12.0, 9.0, 9.0), "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six phantoms of full size."""
    folder = tmp_path_factory.mktemp("phantoms")
    assert write_phantoms(folder, 6, 0, workers=2, progress=False) == 6
    return folder


def test_layout_is_that_of_kits19(folder, scans):
    real = sitk.ReadImage(str(scans("kits19") / "case_00017" / "segmentation.nii.gz"))
    for case in find_cases("phantom", folder):
        image, label = sitk.ReadImage(str(case.image)), sitk.ReadImage(str(case.label))
        assert image.GetDirection() == label.GetDirection() == real.GetDirection() == KITS
        assert image.GetSize() == label.GetSize() == (48, 128, 128) and image.GetSpacing() == label.GetSpacing()
        assert image.GetPixelID() == sitk.sitkInt16 and label.GetPixelID() == real.GetPixelID()
    assert [case.name for case in find_cases("phantom", folder)] == [f"case_{i:05d}" for i in range(6)]


def test_anatomy_and_intensities_are_those_of_a_ct(folder):
    tumours = 0
    for case in find_cases("phantom", folder):
        scan = read_case(case)
        millilitre = np.prod(scan.spacing) / 1000
        kidneys = scan.label > 0
        tumours += bool((scan.label == 2).any())
        assert set(np.unique(scan.label)) <= {0, 1, 2}
        parts, _ = ndimage.label(kidneys)
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1] * millilitre
        assert len(sizes) >= 2 and sizes[:2].min() > 80 and 200 < sizes.sum() < 700
        # one on either side, behind the middle; the spine, brightest of all, between them and further behind
        x, y, _ = np.nonzero(kidneys)
        spine = np.array(np.nonzero(scan.image > 250)).mean(axis=1)
        left = x > scan.image.shape[0] / 2
        assert x[~left].mean() < spine[0] - 10 and x[left].mean() > spine[0] + 10 and y.mean() < spine[1]
        # air outside, fat around, enhanced like KiTS19's, and of neighbours as bright as them half as much again
        mean = scan.image[kidneys].mean()
        assert 110 < mean < 180 and scan.image[0].mean() < -900
        shell = ndimage.binary_dilation(kidneys, iterations=4) & ~kidneys
        assert scan.image[shell].mean() < mean - 40
        alike = np.abs(ndimage.uniform_filter(scan.image, 3) - mean) < 25
        assert (alike & ~kidneys).sum() > 0.5 * kidneys.sum()
    assert tumours < 6


def test_volumes_differ_in_shape_and_place(folder):
    scans = [read_case(case) for case in find_cases("phantom", folder)]
    centres = np.array([ndimage.center_of_mass(scan.label > 0) for scan in scans])
    assert len({scan.label.astype(bool).sum() for scan in scans}) == 6 and centres.std(axis=0).min() > 0.5
    masks = [scan.label > 0 for scan in scans]
    overlap = [2 * (a & b).sum() / (a.sum() + b.sum()) for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlap) < 0.8  # one volume's label is no answer for another


def test_preset_prepares_kidneys_of_several_hundred_voxels(folder, tmp_path):
    config = settings_of("phantom", tmp_path, n_labeled=2, n_test=2)
    cases = prepared("phantom", folder, config)
    for case in cases:
        assert case.image.shape == (64, 64, 32)
        assert case.label().sum() > 1500 and case.label().any((0, 1)).sum() >= 15
    split = make_split(cases, folder, config)
    assert len(split.train) == 4 and len(split.test) == 2 and split.held_out


def test_a_case_depends_on_seed_and_number_only(folder, tmp_path):
    image, label = phantom(np.random.default_rng([0, 4]), (48, 128, 128), (4.0, 2.8, 2.8))
    for array, name in ((image, "imaging"), (label, "segmentation")):
        stored = sitk.ReadImage(str(folder / "case_00004" / f"{name}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(stored).T, array)
    other = phantom(np.random.default_rng([1, 4]), (48, 128, 128), (4.0, 2.8, 2.8))[0]
    assert (other != image).mean() > 0.5


def test_organs_are_labelled_on_request_and_change_nothing_else():
    sizes = (24, 64, 64), (8.0, 5.6, 5.6)
    for seed in range(3):
        image, label = phantom(np.random.default_rng(seed), *sizes)
        same, organs = phantom(np.random.default_rng(seed), *sizes, organs=True)
        np.testing.assert_array_equal(image, same)
        np.testing.assert_array_equal(label, np.where(organs > 2, 0, organs))
        liver, spleen = organs == LIVER, organs == SPLEEN
        assert liver.sum() > 5 * spleen.sum() > 0
        # soft tissue, on either side (columns run from right to left), the lungs cut out
        assert 70 < np.median(image[liver]) < 125 and np.mean(image[liver] < -300) < 0.02
        assert liver.nonzero()[2].mean() < 32 < spleen.nonzero()[2].mean()


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_second_call_writes_nothing_and_a_larger_one_adds(tmp_path):
    assert write_phantoms(tmp_path, 3, 0, **SMALL) == 3
    before = contents(tmp_path)
    assert write_phantoms(tmp_path, 3, 0, **SMALL) == 0
    assert contents(tmp_path) == before
    assert write_phantoms(tmp_path, 5, 0, **SMALL) == 2
    assert {path: content for path, content in contents(tmp_path).items() if path in before} == before


def test_an_interrupted_call_is_completed(tmp_path, monkeypatch):
    calls, original = [], sitk.WriteImage

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:  # the second case's label, its image being written
            raise KeyboardInterrupt
        original(*arguments, **options)

    monkeypatch.setattr(sitk, "WriteImage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path, 3, 0, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case_00000", "phantoms.txt"]
    monkeypatch.setattr(sitk, "WriteImage", original)
    assert write_phantoms(tmp_path, 3, 0, **SMALL) == 2
    assert len(find_cases("phantom", tmp_path)) == 3


def test_phantoms_are_not_written_between_other_files(tmp_path):
    (tmp_path / "scan.nii.gz").touch()
    with pytest.raises(UserError, match=r"holds scan\.nii\.gz and no phantoms.*--dataset folder"):
        write_phantoms(tmp_path, 3, 0, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"shape": (12, 40, 40)}, {"organs": True}])
def test_phantoms_of_another_recipe_are_left_alone(tmp_path, other):
    write_phantoms(tmp_path, 1, 0, **SMALL)
    before = contents(tmp_path)
    assert write_phantoms(tmp_path, 3, **{"seed": 0, **SMALL, **other}) == 0
    assert contents(tmp_path) == before


def test_scans_of_another_origin_are_left_alone(tmp_path):
    (tmp_path / "case_00210").mkdir()
    assert write_phantoms(tmp_path, 3, 0, **SMALL) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["case_00210"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be written to .*file/phantoms"):
        write_phantoms(tmp_path / "file" / "phantoms", 1, 0, **SMALL)
