"""Grids and resampling against what can be worked out by hand."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from spss_fast.data.geometry import Grid, oriented, resample, to_array, to_image
from tests.data.writing import KITS

OBLIQUE = tuple(np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.1, 1.0, 0.3], [0.2, 0.1, 1.0]]))[0].ravel())
GRID = Grid((6, 8, 10), (0.5, 2.0, 3.0), (-7.0, 5.0, 11.0), OBLIQUE)


@given(st.tuples(*[st.floats(-20, 20)] * 3))
def test_index_inverts_point(index):
    np.testing.assert_allclose(GRID.index(GRID.point(index)), index, atol=1e-9)


def test_point_is_where_simpleitk_has_it():
    image = to_image(np.zeros(GRID.size, np.float32), GRID)
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((3, 7, 2)), GRID.point((3, 7, 2)), atol=1e-9)


def test_array_and_image_agree_on_the_index():
    array = np.random.default_rng(0).normal(size=GRID.size).astype(np.float32)
    image = to_image(array, GRID)
    assert image[3, 7, 2] == array[3, 7, 2]
    np.testing.assert_array_equal(to_array(image), array)
    assert Grid.of(image).size == GRID.size


def test_an_array_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        to_image(np.zeros((2, 3, 4), np.float32), GRID)


def test_resized_keeps_the_box_of_space():
    smaller = GRID.resized((3, 16, 7))
    for corner in (np.zeros(3), np.ones(3)):
        edge, other = corner * GRID.size - 0.5, corner * smaller.size - 0.5
        np.testing.assert_allclose(smaller.point(other), GRID.point(edge), atol=1e-9)


def test_shrinking_averages_whole_blocks():
    array = np.random.default_rng(1).normal(size=GRID.size).astype(np.float32)
    result = resample(array, GRID, GRID.shrunk(2), linear=True)
    np.testing.assert_allclose(result, array.reshape(3, 2, 4, 2, 5, 2).mean((1, 3, 5)), atol=1e-6)


def test_an_incomplete_last_block_repeats_the_border():
    array = np.arange(5, dtype=np.float32).reshape(5, 1, 1) * np.ones((5, 4, 4), np.float32)
    grid = Grid(array.shape)
    assert grid.shrunk(2).size == (3, 2, 2)
    np.testing.assert_allclose(resample(array, grid, grid.shrunk(2), linear=True)[:, 0, 0], [0.5, 2.5, 4.0])


def test_linear_resampling_reproduces_a_ramp():
    """A ramp is its own linear interpolation and its own block average; only the border clamps."""
    axes = np.meshgrid(*map(np.arange, (30, 20, 40)), indexing="ij")
    ramp = (axes[0] + 2 * axes[1] - 3 * axes[2]).astype(np.float32)
    grid = Grid(ramp.shape, direction=OBLIQUE)
    target = grid.resized((11, 27, 16))
    result = resample(ramp, grid, target, linear=True)
    for index in ((5, 13, 8), (2, 4, 12), (9, 22, 3)):
        at = grid.index(target.point(index))
        assert result[index] == pytest.approx(at @ [1, 2, -3], abs=1e-3)


def test_nearest_resampling_makes_no_new_values():
    label = np.random.default_rng(2).choice([0, 1, 7], size=(12, 12, 12)).astype(np.uint8)
    result = resample(label, Grid(label.shape), Grid(label.shape).resized((7, 20, 5)), linear=False)
    assert result.dtype == np.uint8 and set(np.unique(result)) == {0, 1, 7}


def test_outside_value_fills_beyond_the_border():
    array = np.ones((4, 4, 4), np.float32)
    wider = Grid((4, 4, 4)).cropped((-2, 0, 0), (6, 4, 4))
    np.testing.assert_array_equal(resample(array, Grid((4, 4, 4)), wider, linear=True, outside=-3.0)[:2], -3.0)


def scan_of(size, spacing, direction):
    """An array whose values are all different, and its grid."""
    return np.arange(np.prod(size), dtype=np.float32).reshape(size), Grid(size, spacing, direction=direction)


def test_kits_orientation_is_turned_to_slices_last_without_interpolation():
    array, grid = scan_of((3, 4, 5), (1.0, 0.8, 0.8), KITS)  # thin slices: only the direction tells which axis they are
    turned, now = oriented(array, grid)
    np.testing.assert_array_equal(turned, array.transpose(2, 1, 0)[:, :, ::-1])
    np.testing.assert_allclose(now.direction, np.eye(3).ravel(), atol=1e-12)
    assert np.shares_memory(turned, array)


def test_a_file_without_orientation_has_its_slices_along_the_coarse_axis():
    array, grid = scan_of((3, 4, 5), (5.0, 0.7, 0.7), tuple(np.eye(3).ravel()))
    np.testing.assert_array_equal(oriented(array, grid)[0], array.transpose(1, 2, 0))


@pytest.mark.parametrize("times, axis", [(1.4, 2), (1.6, 0)])
def test_an_axis_is_coarse_from_one_and_a_half_times_the_others_on(times, axis):
    array, grid = scan_of((3, 4, 5), (0.7 * times, 0.7, 0.5), tuple(np.eye(3).ravel()))
    assert oriented(array, grid)[1].axes[axis, 2] == 1


@pytest.mark.parametrize("plane, axis", [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_the_plane_that_is_asked_for_has_its_slices_last(plane, axis):
    """Whatever the voxels' shape, and in whichever order the file has the axes."""
    array, grid = scan_of((3, 4, 5), (5.0, 0.7, 0.7), KITS)
    turned, now = oriented(array, grid, plane)
    np.testing.assert_allclose(now.axes[:, 2], np.eye(3)[axis], atol=1e-12)
    at = tuple(np.rint(grid.index(now.point((1, 2, 1)))).astype(int))
    assert turned[1, 2, 1] == array[at]


@pytest.mark.parametrize("spacing", [(0.625, 0.625, 0.625), (0.7, 0.7, 5.0), (0.9, 0.7, 0.6)])
def test_axial_scans_in_lps_stay_as_they_are(spacing):
    array, grid = scan_of((3, 4, 5), spacing, tuple(np.eye(3).ravel()))
    turned, now = oriented(array, grid)
    np.testing.assert_array_equal(turned, array)
    assert now == grid


@given(st.integers(0, 2**31))
def test_orientation_is_that_of_itk(seed):
    """Oblique scans in any order of axes, as SimpleITK's own filter turns them."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
    rotation[:, 0] *= np.sign(np.linalg.det(rotation))
    array, grid = scan_of((3, 4, 5), (0.8, 0.9, 0.85), tuple(rotation.ravel()))
    turned, now = oriented(array, grid)
    theirs = sitk.DICOMOrient(to_image(array, grid), "LPS")
    np.testing.assert_array_equal(turned, to_array(theirs))
    np.testing.assert_allclose(now.direction, theirs.GetDirection(), atol=1e-12)
    np.testing.assert_allclose(now.origin, theirs.GetOrigin(), atol=1e-9)
    assert now.spacing == theirs.GetSpacing()


def test_nearest_voxels_are_those_of_itk():
    label = np.random.default_rng(3).integers(0, 200, (12, 13, 14)).astype(np.uint8)
    grid = Grid(label.shape, (0.8, 0.9, 3.0), (5.0, -3.0, 2.0), OBLIQUE)
    for target in (grid.resized((5, 29, 9)), grid.cropped((-2, 3, 4), (9, 12, 5)).resized((7, 8, 4))):
        reference = to_image(np.zeros(target.size, np.uint8), target)
        theirs = sitk.Resample(to_image(label, grid), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 7.0)
        np.testing.assert_array_equal(resample(label, grid, target, linear=False, outside=7.0), to_array(theirs))
