"""Label fusion against the vectors, weights and propagation against brute force."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from spss_fast.engine import pseudo_labels, selfpaced
from spss_fast.engine.registration import outward_flows
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.ops import fill_holes
from spss_fast.settings import RegistrationSettings


@pytest.mark.parametrize("iteration", [0, 1500, 6000])
def test_fused_labels_agree_with_the_vectors(vectors, iteration):
    archive = vectors("fused_labels")
    registration, index = archive["registration"].to(torch.uint8), archive["annotated"]
    annotation = torch.stack([registration[i, :, :, z] for i, z in enumerate(index)])
    weight = selfpaced.fusion_weight(iteration / 6000, 0.9, 0.2)
    segmentation, fused = pseudo_labels.fuse(registration, archive["teacher_probability"], weight, annotation, index)
    assert torch.equal(segmentation.bool(), archive[f"seg_{iteration}"])
    assert torch.equal(fused.bool(), archive[f"fused_{iteration}"])


def test_holes_are_background_that_no_path_joins_to_the_border():
    torch.manual_seed(1)
    label = (torch.rand(2, 12, 11, 10) > 0.45).to(torch.uint8)
    label[0, 3:9, 3:9, 3:9] = 1
    label[0, 5:7, 5:7, 5:7] = 0
    filled = fill_holes(label, 2)
    for before, after in zip(label.numpy(), filled.numpy()):
        outside, count = ndimage.label(np.pad(before, 1) == 0)
        expected = (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
        assert count > 1 and np.array_equal(after > 0, expected)
        assert np.array_equal(after > 0, ndimage.binary_fill_holes(before))


@pytest.mark.parametrize("inner, outer", [(1, 2), (2, 1)])
def test_a_hole_goes_to_the_class_around_it_and_other_classes_stay(inner, outer):
    label = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    label[0, 1:19, 1:19, 1:19] = outer
    label[0, 3:5, 3:5, 3:5] = 0  # a hole of the outer class
    label[0, 8:16, 8:16, 8:16] = inner
    label[0, 10:14, 10:14, 10:14] = 0  # one of the inner class, which lies within the outer one
    label[0, 7, 7:17, 7:17] = 0  # between the two: of the outer one
    label[0, 0, 0, 0] = inner
    expected = label.clone()
    expected[0, 3:5, 3:5, 3:5] = expected[0, 7, 7:17, 7:17] = outer
    expected[0, 10:14, 10:14, 10:14] = inner
    assert torch.equal(fill_holes(label, 3), expected)


def test_a_gap_that_only_classes_together_enclose_stays():
    label = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    label[0, 1:4, 1:7, 1:7], label[0, 4:7, 1:7, 1:7] = 1, 2
    label[0, 3:5, 3:5, 3:5] = 0
    assert torch.equal(fill_holes(label, 3), label)


def test_the_most_probable_class_of_one_foreground_is_that_above_a_half():
    half = torch.tensor(0.5)
    near = [half, torch.nextafter(half, torch.tensor(1.0)), torch.nextafter(half, torch.tensor(0.0))]
    torch.manual_seed(0)
    foreground = torch.cat([torch.rand(100_000), torch.stack(near), torch.tensor([0.0, 1.0, torch.nan])])
    decided = pseudo_labels.most_probable(foreground[None, None])
    assert torch.equal(decided[0] == 1, foreground > 0.5)


def test_fused_labels_of_several_classes_are_the_argmax_of_the_mixture():
    torch.manual_seed(0)
    probability = torch.randn(2, 4, 6, 7, 8).softmax(1)
    registration = torch.randint(4, (2, 6, 7, 8), dtype=torch.uint8)
    index = torch.tensor([3, 5])
    annotation = torch.randint(4, (2, 6, 7), dtype=torch.uint8)
    onehot = torch.nn.functional.one_hot(registration.long(), 4).movedim(-1, 1)
    for weight in (0.0, 0.3, 0.6, 0.9):
        segmentation, fused = pseudo_labels.fuse(registration, probability, weight, annotation, index)
        mixture = (1 - weight) * onehot + weight * probability
        for label, scores in ((segmentation, probability), (fused, mixture)):
            expected = fill_holes(scores.argmax(1).to(torch.uint8), 4)
            expected = pseudo_labels.restore_annotation(expected, annotation, index)
            assert torch.equal(label, expected)
        assert (segmentation != fused).any()


def test_annotated_slices_are_restored():
    labels, annotation = torch.zeros(2, 3, 3, 5), torch.ones(2, 3, 3)
    restored = pseudo_labels.restore_annotation(labels, annotation, torch.tensor([1, 4]))
    assert restored.sum((1, 2)).tolist() == [[0, 9, 0, 0, 0], [0, 0, 0, 0, 9]]


def test_voxel_weights():
    torch.manual_seed(0)
    registration, segmentation = (torch.randint(2, (1, 3, 2, 6), dtype=torch.uint8) for _ in range(2))
    disagree = registration != segmentation
    arguments = registration, segmentation, torch.tensor([2])
    early = pseudo_labels.voxel_weights(*arguments, 999, 0.8, 1000, False)
    torch.testing.assert_close(early[0, 0, 0], torch.tensor([0.64, 0.8, 1.0, 0.8, 0.64, 0.512]))
    late = pseudo_labels.voxel_weights(*arguments, 6000, 0.8, 1000, False)
    torch.testing.assert_close(late, early * (1 + 2 * (5000 / 1e5) ** 0.5 * disagree))
    truncated = pseudo_labels.voxel_weights(*arguments, 6000, 0.8, 1000, True)
    assert set(truncated[..., [0, 1, 3, 4, 5]].unique().tolist()) <= {0.0, 1.0} and (truncated[..., 2] == 1).all()


def test_without_displacement_the_annotated_slice_is_copied_through_the_volume():
    torch.manual_seed(0)
    network = RegistrationNet()
    torch.nn.init.zeros_(network.flow.weight)
    annotation, index = torch.zeros(1, 32, 32, dtype=torch.uint8), torch.tensor([2])
    annotation[0, 8:20, 9:25] = 1
    labels = pseudo_labels.registration_labels(
        outward_flows(network, torch.randn(1, 32, 32, 6), index, None), annotation, index, 2,
        RegistrationSettings(opening=1, closing=1),
    )
    assert torch.equal(labels, annotation[..., None].expand(-1, -1, -1, 6))


def test_paired_organs_are_carried_each_on_their_own():
    network = RegistrationNet()
    torch.nn.init.zeros_(network.flow.weight)
    annotation = torch.zeros(2, 32, 32, dtype=torch.uint8)
    annotation[0, 4:12, 4:12], annotation[0, 4:10, 20:28], annotation[0, 25:27, 25:27] = 1, 1, 1
    annotation[1, 20:30, 5:9] = 1
    parts, index = pseudo_labels.split_structures(annotation, 2), torch.tensor([0, 3])
    assert parts.sum((1, 2)).tolist() == [64, 48, 40, 0]
    for structures, kept in ((1, [64, 40]), (2, [112, 40])):
        labels = pseudo_labels.registration_labels(
            outward_flows(network, torch.randn(2, 32, 32, 4), index, None), annotation, index, 2,
            RegistrationSettings(opening=1, closing=1, structures=structures),
        )
        assert labels[0, :, :, 3].sum() == kept[0] and labels[1, :, :, 0].sum() == kept[1]
        assert torch.equal(labels[0, :, :, 0], annotation[0]) and torch.equal(labels[1, :, :, 3], annotation[1])


def test_structures_are_joined_over_corners():
    annotation = torch.zeros(1, 9, 9, dtype=torch.uint8)
    annotation[0, 1:3, 1:3], annotation[0, 3:5, 3:5], annotation[0, 6:9, 6:8] = 1, 1, 1
    assert pseudo_labels.split_structures(annotation, 3).sum((1, 2)).tolist() == [8, 6, 0]


@pytest.mark.parametrize("structures", [1, 2])
def test_classes_are_carried_as_they_would_be_alone(structures):
    torch.manual_seed(0)
    network, volumes, index = RegistrationNet(), torch.randn(2, 32, 32, 6), torch.tensor([1, 4])
    torch.nn.init.normal_(network.flow.weight, 0, 1.5)
    annotation = torch.zeros(2, 32, 32, dtype=torch.uint8)
    annotation[:, 3:13, 3:13], annotation[:, 18:28, 2:13], annotation[0, 18:30, 18:30] = 1, 2, 1
    annotation[1, 18:30, 18:30] = 3
    settings = RegistrationSettings(opening=3, closing=1, structures=structures)
    flows = outward_flows(network, volumes, index, None)
    labels = pseudo_labels.registration_labels(flows, annotation, index, 4, settings)
    assert labels.dtype == torch.uint8 and labels.shape == volumes.shape
    for c in (1, 2, 3):
        alone = pseudo_labels.registration_labels(flows, (annotation == c).to(torch.uint8), index, 2, settings)
        assert torch.equal((labels == c).to(torch.uint8), alone)  # far enough apart not to overlap
    assert (labels[0] != 3).all() and not torch.equal(labels[0, :, :, 0], labels[0, :, :, 5])
    for label, slice_, z in zip(labels, annotation, index):
        assert torch.equal(label[:, :, z], slice_)


@pytest.mark.parametrize("lesion, organ", [(1, 2), (2, 1)])
def test_a_lesion_is_not_closed_over_by_its_organ(lesion, organ):
    network = RegistrationNet()
    torch.nn.init.zeros_(network.flow.weight)
    annotation = torch.zeros(1, 32, 32, dtype=torch.uint8)
    annotation[0, 6:26, 6:26], annotation[0, 14:17, 14:17] = organ, lesion
    settings = RegistrationSettings(opening=1, closing=5, far_distance=1, far_iterations=1)
    index = torch.tensor([0])
    flows = outward_flows(network, torch.zeros(1, 32, 32, 6), index, None)
    labels = pseudo_labels.registration_labels(flows, annotation, index, 3, settings)
    assert torch.equal(labels, annotation[..., None].expand(-1, -1, -1, 6))


def test_of_equally_large_masks_the_first_class_is_right():
    masks = torch.ones(2, 3, 2, 2, 1, dtype=torch.uint8)
    masks[0, :, 0] = 0
    labels = pseudo_labels.joined(masks, torch.tensor([[5, 5, 9], [7, 6, 6]]))
    assert labels[0, 0].unique().tolist() == [0] and labels[0, 1].unique().tolist() == [1]
    assert labels[1].unique().tolist() == [2]


@pytest.mark.parametrize("truncated", [False, True])
def test_weights_lie_in_memory_alike_at_every_iteration(truncated):
    """A CUDA graph is recorded for one layout of its inputs."""
    registration, index = torch.zeros(2, 6, 5, 4, dtype=torch.uint8), torch.tensor([1, 3])
    arguments = (registration, registration, index)
    weights = [pseudo_labels.voxel_weights(*arguments, t, 0.9, 1000, truncated) for t in (0, 1000, 2000)]
    assert all(weight.is_contiguous() for weight in weights)
