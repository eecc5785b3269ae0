"""Label fusion against the vectors, weights and propagation against brute force."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from spss_fast.config import RegistrationSettings
from spss_fast.engine import pseudo_labels, selfpaced
from spss_fast.nets.regnet import RegistrationNet


@pytest.mark.parametrize("iteration", [0, 1500, 6000])
def test_fused_labels_agree_with_the_vectors(vectors, iteration):
    archive = vectors("fused_labels")
    registration, index = archive["registration"].to(torch.uint8), archive["annotated"]
    annotation = torch.stack([registration[i, :, :, z] for i, z in enumerate(index)])
    weight = selfpaced.fusion_weight(iteration / 6000, 0.9, 0.2)
    segmentation, fused = pseudo_labels.fused_labels(
        registration, archive["teacher_probability"][:, 1], annotation, index, weight
    )
    assert torch.equal(segmentation.bool(), archive[f"seg_{iteration}"])
    assert torch.equal(fused.bool(), archive[f"fused_{iteration}"])


def test_holes_are_background_that_no_path_joins_to_the_border():
    torch.manual_seed(1)
    label = (torch.rand(2, 12, 11, 10) > 0.45).to(torch.uint8)
    label[0, 3:9, 3:9, 3:9] = 1
    label[0, 5:7, 5:7, 5:7] = 0
    filled = pseudo_labels.fill_holes(label)
    for before, after in zip(label.numpy(), filled.numpy()):
        outside, count = ndimage.label(np.pad(before, 1) == 0)
        expected = (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
        assert count > 1 and np.array_equal(after > 0, expected)


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
    annotation = torch.zeros(1, 32, 32, dtype=torch.uint8)
    annotation[0, 8:20, 9:25] = 1
    labels = pseudo_labels.registration_labels(
        network, torch.randn(1, 32, 32, 6), annotation, torch.tensor([2]), RegistrationSettings(opening=1, closing=1),
        None,
    )
    assert torch.equal(labels, annotation[..., None].expand(-1, -1, -1, 6))


def test_paired_organs_are_carried_each_on_their_own():
    network = RegistrationNet()
    torch.nn.init.zeros_(network.flow.weight)
    annotation = torch.zeros(2, 32, 32, dtype=torch.uint8)
    annotation[0, 4:12, 4:12], annotation[0, 4:10, 20:28], annotation[0, 25:27, 25:27] = 1, 1, 1
    annotation[1, 20:30, 5:9] = 1
    parts = pseudo_labels.split_structures(annotation, 2)
    assert parts.sum((1, 2)).tolist() == [64, 48, 40, 0]
    for structures, kept in ((1, [64, 40]), (2, [112, 40])):
        labels = pseudo_labels.registration_labels(
            network, torch.randn(2, 32, 32, 4), annotation, torch.tensor([0, 3]),
            RegistrationSettings(opening=1, closing=1, structures=structures), None,
        )
        assert labels[0, :, :, 3].sum() == kept[0] and labels[1, :, :, 0].sum() == kept[1]
        assert torch.equal(labels[0, :, :, 0], annotation[0]) and torch.equal(labels[1, :, :, 3], annotation[1])
