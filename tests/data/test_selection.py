"""The rules that suggest: which volumes, which slice."""

import numpy as np
import pytest

from spss_fast.data.selection import THUMBNAIL, distances, halving_slice, k_medoids, thumbnail


def test_medoids_are_the_middles_of_groups():
    places = np.array([0.0, 1, 2, 50, 51, 52, 100, 101, 102])
    between = np.abs(places[:, None] - places)
    assert k_medoids(between, 3) == [1, 4, 7]
    assert k_medoids(between, 1) == [4]
    assert k_medoids(between, 9) == list(range(9))
    # the outermost of a group stays where it is fixed, and the other groups get theirs
    assert k_medoids(between, 3, fixed=[0]) == [0, 4, 7]
    assert k_medoids(between, 2, fixed=[8, 0]) == [8, 0]


@pytest.mark.parametrize("seed", range(5))
def test_no_single_exchange_lowers_the_sum(seed):
    points = np.random.default_rng(seed).normal(size=(20, 6))
    between = distances(list(points))
    fixed = [3, 11]
    chosen = k_medoids(between, 5, fixed)
    assert len(set(chosen)) == 5 and chosen[:2] == fixed
    total = between[chosen].min(0).sum()
    for place in range(2, 5):
        for other in set(range(20)) - set(chosen):
            exchanged = [*chosen[:place], other, *chosen[place + 1 :]]
            assert between[exchanged].min(0).sum() >= total * (1 - 1e-9)


def test_items_that_are_all_the_same_end_the_search():
    assert k_medoids(np.zeros((6, 6)), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("count, fixed", [(4, []), (1, [0, 1])])
def test_impossible_counts_are_refused(count, fixed):
    with pytest.raises(ValueError, match=f"cannot choose {count} of 3 items"):
        k_medoids(np.ones((3, 3)), count, fixed)


def test_distances_are_root_mean_squares():
    rows = [np.array([0.0, 0]), np.array([3.0, 1]), np.array([0.0, 2])]
    np.testing.assert_allclose(distances(rows)[0], [0, np.sqrt(5), np.sqrt(2)])
    np.testing.assert_array_equal(distances(rows), distances(rows).T)


@pytest.mark.parametrize("shape", [(40, 36, 24), (8, 8, 8), (5, 9, 70)])
def test_thumbnails_compare_scans_of_any_size(shape):
    ramp = np.broadcast_to(np.arange(shape[2], dtype=np.float32) / shape[2], shape)
    small = thumbnail(ramp).reshape((THUMBNAIL,) * 3)
    np.testing.assert_allclose(small, np.broadcast_to((np.arange(8) + 0.5) / 8, small.shape), atol=0.1)


def test_thumbnails_average_what_lies_between_their_voxels():
    checkers = np.indices((32, 32, 32)).sum(0) % 2
    np.testing.assert_allclose(thumbnail(checkers.astype(np.float32)), 0.5)


def test_the_slice_halves_the_signal_of_the_middle():
    even = np.ones((16, 16, 20))
    even[0, 0] = 0  # the darkest value, outside the middle
    assert halving_slice(even) == 9
    air = np.concatenate([np.zeros((16, 16, 20)), even], 2)  # 20 slices of air below the same scan
    assert halving_slice(air) == 29
    assert halving_slice(5 * air - 1000) == 29
    for beside in np.s_[:4, :, 15:], np.s_[:, 12:, 15:]:
        rim = even.copy()
        rim[beside] = 100  # brightness beside the middle half does not count
        assert halving_slice(rim) == 9
