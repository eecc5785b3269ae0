"""Batches: what is in them, images and labels of one geometry, and batch t a function of seed and t alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from spss_fast.config import resolve
from spss_fast.data.sampling import Geometry, Sampler, TrainingVolume, training_volumes, unlabeled_volumes
from tests.data.writing import prepared, settings_of, write_la

SHAPE = (37, 45, 30)


def coded(name: str, shape=SHAPE, index: int | None = 12) -> TrainingVolume:
    """A volume whose every voxel holds its own number: wherever it comes to lie, its label and place are known."""
    image = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    reference = labelled(image).to(torch.uint8)
    if index is None:
        return TrainingVolume(name, image)
    return TrainingVolume(name, image, index, reference[:, :, index].clone(), reference)


def labelled(image):
    """The label that belongs to a coded voxel: irregular, about a third of all voxels, never the voxel 0."""
    return (image.long() * 7919) % 101 > 70


def sampler_of(labeled=4, unlabeled=5, shape=SHAPE, patch="32 16 16", seed=3, index=12, rank=0, world=1, **flags):
    config = resolve("la", {"patch": patch, **flags})
    return Sampler([coded(f"l{i}", shape, index) for i in range(labeled)],
                   [coded(f"u{i}", shape, None) for i in range(unlabeled)], config, seed, rank, world)


def same(one, other):
    assert one.names == other.names
    for name in ("image", "view1", "view2", "annotation", "index", "reference"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_shapes_and_types():
    batch = sampler_of().batch(0)
    assert [name[0] for name in batch.names] == ["l", "l", "u", "u"]
    for view in (batch.image, batch.view1, batch.view2):
        assert view.shape == (4, 1, 32, 16, 16) and view.dtype == torch.float32 and view.is_contiguous()
    assert batch.annotation.shape == (2, 32, 16) and batch.annotation.dtype == torch.uint8
    assert batch.index.shape == (2,) and batch.index.dtype == torch.int64
    assert batch.reference.shape == (2, 32, 16, 16) and batch.reference.dtype == torch.uint8


@pytest.mark.parametrize("shape, patch", [
    (SHAPE, "32 16 16"), (SHAPE, "16 32 16"), ((20, 40, 10), "32 16 16"), ((10, 12, 8), "32 48 16"),
    ((45, 37, 13), "16 16 16"),
])
def test_images_labels_and_annotations_share_their_geometry(shape, patch):
    index = min(12, shape[2] - 2)
    sampler = sampler_of(shape=shape, patch=patch, index=index)
    seen = set()
    for step in range(40):
        batch = sampler.batch(step)
        for i in range(2):
            image, z = batch.image[i, 0], int(batch.index[i])
            inside = image > 0  # what pads is the volume's minimum, 0, which no label marks
            assert torch.equal(batch.reference[i] > 0, labelled(image) & inside)
            assert torch.equal(batch.annotation[i], batch.reference[i, :, :, z])
            assert (image[:, :, z][inside[:, :, z]] % shape[2] == index).all()
            assert batch.annotation[i].any()
            seen.add((round(float(image[1, 0, z] - image[0, 0, z])), round(float(image[0, 1, z] - image[0, 0, z]))))
    if shape == SHAPE:
        # turned and mirrored in all eight ways: rows and columns run along either axis, in either direction
        row, column = shape[1] * shape[2], shape[2]
        assert seen == {(a * p, b * q) for p, q in ((row, column), (column, row)) for a in (1, -1) for b in (1, -1)}


def test_volumes_smaller_than_the_patch_are_centred_in_their_minimum():
    sampler = sampler_of(shape=(10, 12, 8), patch="32 32 16", index=3)
    for step in range(10):
        batch = sampler.batch(step)
        z = int(batch.index[0])
        assert z == 4 + 3
        filled = batch.image[0, 0] > 0
        assert filled.any((0, 1)).nonzero().flatten().tolist() == list(range(4, 12))
        assert sorted([int(filled.any((1, 2)).sum()), int(filled.any((0, 2)).sum())]) == [10, 12]
        assert batch.reference[0, ~filled].sum() == 0


def test_minimum_pads_where_intensities_are_negative():
    sampler = sampler_of(shape=(10, 12, 8), patch="16 16 16", index=3)
    for volume in (*sampler.labeled, *sampler.unlabeled):
        volume.image -= 500
    sampler = Sampler(sampler.labeled, sampler.unlabeled, resolve("la", {"patch": "16 16 16"}), 0)
    assert sampler.batch(0).image.amin((1, 2, 3, 4)).tolist() == [-500] * 4


def test_views_share_geometry_and_differ_by_bounded_noise():
    sampler = sampler_of(labeled=2, unlabeled=2, noise=0.1, noise_clip=0.2)
    clean = both = 0
    noises = []
    for step in range(80):
        batch = sampler.batch(step)
        codes = batch.view1.round(), batch.view2.round()
        # codes are whole numbers and the noise is below a half: rounding takes it away
        assert torch.equal(*codes)
        noise1, noise2 = batch.view1 - codes[0], batch.view2 - codes[1]
        for one, other in zip(noise1, noise2):
            clean += (not one.any()) + (not other.any())
            if one.any() and other.any():
                both += 1
                assert not torch.equal(one, other)
            noises += [noise for noise in (one, other) if noise.any()]
    assert max(float(noise.abs().max()) for noise in noises) <= 0.205
    # independently, each with probability 0.5
    assert 0.43 < clean / 640 < 0.57 and 0.18 < both / 320 < 0.32
    values = torch.cat([noise.flatten() for noise in noises[:40]])
    # N(0, 0.1) clipped at two standard deviations; codes near 40 000 carry an error of 0.004
    assert values.std() == pytest.approx(0.0959, abs=0.003) and abs(float(values.mean())) < 0.002


def test_every_batch_has_noise_of_its_own():
    sampler = sampler_of(labeled=2, unlabeled=2)
    noises = []
    for step in range(12):
        batch = sampler.batch(step)
        noises += [view - view.round() for view in batch.view1 if (view != view.round()).any()]
    signs = torch.stack([noise.flatten()[:500].sign() for noise in noises])
    agreement = (signs @ signs.T / 500).fill_diagonal_(0)
    assert len(noises) > 10 and agreement.max() < 0.3


def test_views_turn_with_probability_one_half():
    sampler = sampler_of(labeled=2, unlabeled=2, noise=0.0)
    straight = 0
    for step in range(150):
        for view in sampler.batch(step).view1[:, 0]:
            row, column = float(view[1, 0, 0] - view[0, 0, 0]), float(view[0, 1, 0] - view[0, 0, 0])
            straight += (row, column) == (SHAPE[1] * SHAPE[2], SHAPE[2])
    # a half, and an eighth of the other half, in which all symmetries are equally likely
    assert straight / 600 == pytest.approx(0.5 + 0.5 / 8, abs=0.07)


def test_views_have_a_geometry_of_their_own():
    batch = sampler_of(noise=0.0).batch(0)
    assert not any(torch.equal(image, view) for image, view in zip(batch.image, batch.view1))


def test_every_pass_takes_every_volume_once():
    sampler = sampler_of(labeled=6, unlabeled=10)
    names = [sampler.batch(step).names for step in range(30)]
    for role, size in ((slice(0, 2), 6), (slice(2, 4), 10)):
        row = [name for batch in names for name in batch[role]]
        passes = [row[i : i + size] for i in range(0, len(row), size)]
        assert all(len(set(one)) == size for one in passes)
        assert len({tuple(one) for one in passes}) > 1  # in another order each time


def test_odd_numbers_of_volumes_are_all_used():
    sampler = sampler_of(labeled=3, unlabeled=7)
    counts = Counter(name for step in range(42) for name in sampler.batch(step).names)
    assert {counts[f"l{i}"] for i in range(3)} == {28} and {counts[f"u{i}"] for i in range(7)} == {12}


def test_a_small_foreground_in_a_large_slice_is_always_in_the_crop():
    volume = coded("l", (200, 180, 20))
    volume.annotation.zero_()
    volume.annotation[3, 170] = 1
    volumes = [volume, replace(volume)]
    unlabeled = [coded("u", (200, 180, 20), None)] * 2
    sampler = Sampler(volumes, unlabeled, resolve("la", {"patch": "16 32 16"}), 0)
    starts = set()
    for step in range(30):
        batch = sampler.batch(step)
        assert (batch.annotation.sum((1, 2)) == 1).all()
        starts |= {tuple(place) for place in batch.annotation.nonzero()[:, 1:].tolist()}
    assert len(starts) > 20  # and not always at the same place of it


def test_the_annotated_slice_comes_to_lie_anywhere_in_the_crop():
    sampler = sampler_of(shape=(20, 20, 60), patch="16 16 16", index=30)
    places = Counter(int(z) for step in range(200) for z in sampler.batch(step).index)
    assert set(places) == set(range(16)) and max(places.values()) < 60


def test_a_batch_depends_on_the_seed_and_its_number_only():
    one, other = sampler_of(), sampler_of()
    for step in range(5):
        other.batch(step)
    same(one.batch(7), other.batch(7))
    assert not torch.equal(one.batch(7).image, one.batch(8).image)
    assert not torch.equal(one.batch(7).image, sampler_of(seed=4).batch(7).image)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (global state must not matter)
    again = one.batch(7)
    torch.manual_seed(2)
    same(again, other.batch(7))


def test_ranks_share_the_row_of_a_single_process():
    alone, ranks = sampler_of(), [sampler_of(rank=rank, world=3) for rank in range(3)]
    for step in range(4):
        for rank, sampler in enumerate(ranks):
            same(sampler.batch(step), alone.batch(3 * step + rank))


def test_references_change_nothing_but_themselves():
    plain, altered = sampler_of(), sampler_of()
    for volume in altered.labeled:
        volume.reference = 1 - volume.reference
    for step in range(10):
        one, other = plain.batch(step), altered.batch(step)
        assert not torch.equal(one.reference, other.reference)
        same(replace(one, reference=None), replace(other, reference=None))


def test_no_reference_unless_every_annotated_volume_has_one():
    sampler = sampler_of(labeled=2, unlabeled=2)
    sampler.labeled[1].reference = None
    assert sampler.batch(0).reference is None


def test_volumes_are_not_written_to():
    sampler = sampler_of()
    before = [volume.image.clone() for volume in sampler.labeled]
    for step in range(5):
        batch = sampler.batch(step)
        for tensor in (batch.image, batch.view1, batch.view2, batch.annotation, batch.reference):
            tensor.zero_()
    assert all(torch.equal(volume.image, image) for volume, image in zip(sampler.labeled, before))


def test_wrong_volumes_are_refused():
    config = resolve("la")
    with pytest.raises(ValueError, match="labeled"):
        Sampler([coded("a", index=None)], [coded("b", index=None)], config, 0)
    with pytest.raises(ValueError, match="labeled"):
        Sampler([], [coded("b", index=None)], config, 0)
    with pytest.raises(ValueError, match="unlabeled"):
        Sampler([coded("a")], [], config, 0)
    with pytest.raises(ValueError, match="rank 2"):
        sampler_of(rank=2, world=2)


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("flip", [None, 0, 1])
def test_geometry_against_turning_the_whole_volume(quarters, flip):
    volume = coded("a").image
    geometry = Geometry((3, 5, 2), (16, 32, 8), quarters, flip)
    expected = np.rot90(volume.numpy()[3:19, 5:37, 2:10], quarters)
    expected = expected if flip is None else np.flip(expected, flip)
    np.testing.assert_array_equal(geometry.apply(volume, 0.0).numpy(), expected)
    np.testing.assert_array_equal(geometry.apply_slice(volume[:, :, 4], 0.0).numpy(), expected[:, :, 2])
    patch = volume.numpy()[3:19, 5:37, 2:10]
    exchanged, rows, columns = geometry.steps
    patch = patch.swapaxes(0, 1) if exchanged else patch
    patch = patch[:: -1 if rows else 1, :: -1 if columns else 1]
    np.testing.assert_array_equal(patch, expected)


def test_training_sees_one_slice_of_a_label(tmp_path):
    """From files to training volumes: altering a label anywhere but in the annotated slice alters no training input."""
    names = write_la(tmp_path / "la", 4)
    config = settings_of("la", tmp_path)
    cases = prepared("la", tmp_path / "la", config)
    labeled, unlabeled = training_volumes(cases[:2], config.data, 0), unlabeled_volumes(cases[2:])
    assert [volume.name for volume in labeled + unlabeled] == names
    for volume, case in zip(labeled, cases):
        assert volume.annotation.dtype == torch.uint8 and volume.image.dtype == torch.float32
        np.testing.assert_array_equal(volume.annotation, case.label()[:, :, volume.index])
        # a copy: what happens to the reference cannot reach it
        volume.reference.zero_()
        assert volume.annotation.any()
    for volume in unlabeled:
        assert volume.index is None and volume.annotation is None and volume.reference is None
