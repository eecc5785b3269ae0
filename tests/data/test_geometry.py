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


def image_of(size, spacing, direction):
    image = to_image(np.arange(np.prod(size), dtype=np.float32).reshape(size), Grid(size, spacing, direction=direction))
    return image


def test_kits_orientation_is_turned_to_slices_last_without_interpolation():
    image = image_of((3, 4, 5), (1.0, 0.8, 0.8), KITS)  # thin slices: only the direction tells which axis they are
    turned = oriented(image)
    np.testing.assert_array_equal(to_array(turned), to_array(image).transpose(2, 1, 0)[:, :, ::-1])
    np.testing.assert_allclose(turned.GetDirection(), np.eye(3).ravel(), atol=1e-12)


def test_a_file_without_orientation_has_its_slices_along_the_coarse_axis():
    image = image_of((3, 4, 5), (5.0, 0.7, 0.7), tuple(np.eye(3).ravel()))
    np.testing.assert_array_equal(to_array(oriented(image)), to_array(image).transpose(1, 2, 0))


@pytest.mark.parametrize("spacing", [(0.625, 0.625, 0.625), (0.7, 0.7, 5.0), (0.9, 0.7, 0.6)])
def test_axial_scans_in_lps_stay_as_they_are(spacing):
    image = image_of((3, 4, 5), spacing, tuple(np.eye(3).ravel()))
    np.testing.assert_array_equal(to_array(oriented(image)), to_array(image))


def test_oriented_voxels_stay_where_they_were():
    image = image_of((3, 4, 5), (2.0, 0.8, 0.9), OBLIQUE)
    image = sitk.PermuteAxes(image, [2, 0, 1])
    turned = oriented(image)
    assert sorted(turned.GetSize()) == sorted(image.GetSize())
    for index in np.ndindex(turned.GetSize()):
        point = turned.TransformIndexToPhysicalPoint(index)
        assert image[image.TransformPhysicalPointToIndex(point)] == turned[index]
