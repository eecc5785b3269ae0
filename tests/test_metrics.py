"""Metrics against the reference vectors, and against values worked out by hand."""

import math

import numpy as np
import pytest
from scipy import ndimage

from spss_fast import metrics


@pytest.mark.parametrize("case", range(3))
def test_metrics_agree_with_the_vectors(vectors, case):
    archive = vectors("metrics")
    prediction, reference = (archive[f"{case}_{name}"].numpy() for name in ("prediction", "reference"))
    result = metrics.evaluate(prediction, reference)
    np.testing.assert_allclose([result[name] for name in metrics.NAMES], archive[f"{case}_metrics"], rtol=1e-9)
    spaced = metrics.evaluate(prediction, reference, (0.9, 0.9, 3.0))
    expected = archive[f"{case}_metrics_spacing_0.9_0.9_3.0"]
    np.testing.assert_allclose([spaced["hd95"], spaced["asd"]], expected, rtol=1e-9)


def test_single_voxels_three_apart():
    prediction, reference = np.zeros((2, 8, 5, 4), bool)
    prediction[1, 2, 2], reference[4, 2, 2] = True, True
    assert metrics.evaluate(prediction, reference) == {"dice": 0.0, "jaccard": 0.0, "hd95": 3.0, "asd": 3.0}
    assert metrics.evaluate(prediction, reference, (2.0, 1.0, 1.0))["asd"] == 6.0


def test_the_two_directions_differ():
    prediction, reference = np.zeros((2, 8, 5, 4), bool)
    prediction[1, 2, 2], reference[[1, 4], 2, 2] = True, True  # nothing is added, a voxel 3 away is missed
    result = metrics.evaluate(prediction, reference)
    assert result["asd"] == 0 and result["hd95"] == pytest.approx(2.7)  # of the distances 0, 0 and 3
    result = metrics.evaluate(reference, prediction)
    assert result["asd"] == 1.5 and result["hd95"] == pytest.approx(2.7)


def test_a_voxel_with_all_six_neighbours_is_no_surface():
    cross = ndimage.generate_binary_structure(3, 1)
    middle = np.zeros((3, 3, 3), bool)
    middle[1, 1, 1] = True
    assert metrics.evaluate(cross, middle)["asd"] == metrics.evaluate(middle, cross)["asd"] == 1.0


@pytest.mark.parametrize("spacing", [None, (0.7, 1.25, 3.0)])
def test_surface_distances_are_those_of_whole_arrays_distance_transforms(spacing):
    random = np.random.default_rng(0)
    blobs = [ndimage.gaussian_filter(random.random((20, 24, 12)), 2) for _ in range(2)]
    masks = [blob > np.median(blob) for blob in blobs]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    actual = metrics.surface_distances(*masks, spacing)
    for distances, own, other in zip(actual, surfaces, surfaces[::-1]):
        np.testing.assert_allclose(distances, ndimage.distance_transform_edt(~other, sampling=spacing)[own], rtol=1e-12)


def test_empty_arrays():
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    both = metrics.evaluate(empty, empty)
    assert all(math.isnan(both[name]) for name in metrics.NAMES)
    missed = metrics.evaluate(empty, full)
    assert missed["dice"] == 0.0 and math.isnan(missed["asd"])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.evaluate(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))


def test_classes_are_measured_each_and_averaged():
    random = np.random.default_rng(0)
    prediction, reference = (random.integers(0, 4, (9, 8, 7)) for _ in range(2))
    prediction[prediction == 3] = 0  # a class that the prediction lacks
    result = metrics.evaluate_classes(prediction, reference, (0, 4, 2, 7), (1.0, 2.0, 3.0))
    own = [metrics.evaluate(prediction == c, reference == c, (1.0, 2.0, 3.0)) for c in (1, 2, 3)]
    for value, of_class in zip((4, 2, 7), own):
        np.testing.assert_equal({name: result[f"{name}_{value}"] for name in metrics.NAMES}, of_class)
    assert result["dice"] == pytest.approx((own[0]["dice"] + own[1]["dice"]) / 3)
    assert result["hd95"] == pytest.approx((own[0]["hd95"] + own[1]["hd95"]) / 2) and math.isnan(result["asd_7"])
    assert list(result)[:4] == list(metrics.NAMES) and len(result) == 16


def test_a_class_that_neither_has_is_left_out_of_the_mean():
    reference = np.zeros((8, 8, 8), int)
    reference[2:6, 2:6, 2:6] = 1
    prediction = np.where(np.arange(8)[:, None, None] == 2, 0, reference)
    result = metrics.evaluate_classes(prediction, reference, (0, 1, 2))
    assert result["dice"] == result["dice_1"] == pytest.approx(2 * 48 / (48 + 64)) and math.isnan(result["dice_2"])
    result = metrics.evaluate_classes(np.zeros_like(reference), np.zeros_like(reference), (0, 1, 2))
    assert math.isnan(result["dice"])


def test_one_foreground_has_no_columns_of_its_own():
    random = np.random.default_rng(0)
    prediction, reference = (random.integers(0, 2, (9, 8, 7)) for _ in range(2))
    assert metrics.evaluate_classes(prediction, reference, (0, 1)) == metrics.evaluate(prediction, reference)
