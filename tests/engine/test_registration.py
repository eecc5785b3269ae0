"""Registration: similarity against the vectors, pairs and flows against brute force, and that it learns a shift."""

import copy

import pytest
import torch

from spss_fast.engine import registration
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.ops.warp import warp
from spss_fast.settings import RegistrationSettings


def test_ncc_agrees_with_the_vectors(vectors):
    archive = vectors("losses")
    result = registration.negative_ncc(archive["image_a"], archive["image_b"])
    torch.testing.assert_close(result.double(), archive["ncc"], rtol=1e-4, atol=1e-5)


def test_soft_dice_of_equal_and_of_disjoint_maps():
    torch.manual_seed(0)
    mask = (torch.rand(4, 3, 8, 8) > 0.5).float()
    assert registration.soft_dice_loss(mask, mask) < 1e-6
    assert registration.soft_dice_loss(mask, 1 - mask) > 0.999
    one_of_three = torch.cat([mask[:, :1], 1 - mask[:, 1:]], 1)
    torch.testing.assert_close(registration.soft_dice_loss(mask, one_of_three), torch.tensor(2 / 3), rtol=1e-3, atol=0)


def test_pairs_are_neighbours_in_both_directions_and_reach_every_slice():
    torch.manual_seed(0)
    settings = RegistrationSettings(registration_steps=40, registration_pairs=100)
    volume, moving, fixed = (x.flatten() for x in registration.sample_pairs(torch.zeros(3, 4, 4, 7), settings))
    assert len(volume) == 4000
    assert set((fixed - moving).tolist()) == {-1, 1}
    assert set(volume.tolist()) == {0, 1, 2}
    assert set(moving.tolist()) == set(fixed.tolist()) == set(range(7))


def test_flows_of_slices_that_are_smaller_than_the_network_takes():
    """As of the same slices in the middle of their minimum, which is what training's patches show."""
    torch.manual_seed(0)
    network, volumes = RegistrationNet(), torch.randn(2, 12, 15, 4)
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    padded = torch.nn.functional.pad(volumes, (0, 0, 0, 1, 2, 2), value=float(volumes.min()))
    small, large = (registration.outward_flows(network, v, torch.tensor([0, 2]), None) for v in (volumes, padded))
    assert small.shape == (2, 3, 2, 12, 15)
    torch.testing.assert_close(small, large[..., 2:14, :15])


def test_flows_of_one_batched_forward_are_those_of_each_pair_away_from_the_annotated_slice():
    torch.manual_seed(0)
    network, volumes, index = RegistrationNet(), torch.randn(4, 32, 32, 4), [0, 1, 2, 3]
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    flows = registration.outward_flows(network, volumes, torch.tensor(index), None)
    assert flows.shape == (4, 3, 2, 32, 32)
    for b, annotated in enumerate(index):
        for z in range(3):
            pair = [volumes[b, :, :, s][None, None] for s in (z, z + 1)]
            moving, fixed = pair if z >= annotated else pair[::-1]
            torch.testing.assert_close(flows[b, z], network(moving, fixed)[0], rtol=1e-4, atol=1e-5)


def test_flows_of_large_volumes_take_several_forwards(monkeypatch):
    torch.manual_seed(0)
    network, volumes, index, pairs = RegistrationNet(), torch.randn(4, 16, 32, 5), torch.tensor([2, 0, 4, 1]), []
    torch.nn.init.normal_(network.flow.weight, 0, 0.1)
    whole = registration.outward_flows(network, volumes, index, None)
    monkeypatch.setattr(registration, "FLOW_PIXELS", 3 * 16 * 32)
    network.register_forward_pre_hook(lambda _, inputs: pairs.append(len(inputs[0])))
    torch.testing.assert_close(registration.outward_flows(network, volumes, index, None), whole, rtol=1e-4, atol=1e-5)
    assert pairs == [3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_loss_is_the_similarity_and_with_labels_their_dice(similarity, labelled):
    torch.manual_seed(0)
    network, volumes = RegistrationNet(), torch.randn(2, 32, 32, 5)
    torch.nn.init.normal_(network.flow.weight, 0, 1.0)
    labels = torch.randint(2, (2, 2, 32, 32, 5), dtype=torch.uint8)
    settings = RegistrationSettings(registration_steps=1, registration_pairs=6, similarity=similarity)
    pairs = registration.sample_pairs(volumes, settings)
    volume, moving, fixed = (index[0] for index in pairs)
    with torch.no_grad():
        images = volumes[volume, :, :, moving][:, None], volumes[volume, :, :, fixed][:, None]
        flow = network(*images)
        warped = warp(images[0], flow)
        loss = (warped - images[1]).square().mean() if similarity == "mse" else registration.negative_ncc(
            warped, images[1])
        if labelled:
            of_moving, of_fixed = (labels[volume, :, :, :, z].float() for z in (moving, fixed))
            loss += registration.soft_dice_loss(warp(of_moving, flow), of_fixed)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    result = registration.registration_steps(
        network, adam, volumes, labels if labelled else None, pairs, settings, None)
    torch.testing.assert_close(result, loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_every_step_is_taken_from_the_weights_of_the_last(amp):
    torch.manual_seed(0)
    once, volumes, weights = RegistrationNet(), torch.randn(2, 32, 32, 5), []
    settings = RegistrationSettings(registration_steps=3, registration_pairs=4)
    pairs = registration.sample_pairs(volumes, settings)
    for network, calls in ((once, [pairs]), (copy.deepcopy(once), zip(*(index.split(1) for index in pairs)))):
        adam = torch.optim.Adam(network.parameters(), 1e-2)
        for call in calls:
            registration.registration_steps(network, adam, volumes, None, call, settings, amp)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(*weights)


def _drifting_disk(slices: int = 8) -> torch.Tensor:
    """A smooth disk that moves by one voxel a slice: (1, 32, 32, slices)."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disks = [torch.sigmoid(7 - ((rows - 12 - z) ** 2 + (columns - 16) ** 2) ** 0.5) for z in range(slices)]
    return torch.stack(disks, -1)[None]


def test_registration_learns_a_drift_and_labels_help():
    torch.manual_seed(0)
    network, volume = RegistrationNet(), _drifting_disk()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    settings = RegistrationSettings(registration_steps=60, registration_pairs=8)
    pairs = registration.sample_pairs(volume, settings)
    registration.registration_steps(network, optimizer, volume, None, pairs, settings, None)
    labels = torch.stack([volume > 0.5, volume > 0.9], 1).to(torch.uint8)
    registration.registration_steps(network, optimizer, volume, labels, pairs, settings, None)
    up = registration.outward_flows(network, volume, torch.tensor([0]), None)
    moving, fixed = volume[0].movedim(-1, 0)[:-1, None], volume[0].movedim(-1, 0)[1:, None]
    before = (moving - fixed).square().mean()
    after = (warp(moving, up[0]) - fixed).square().mean()
    assert after < 0.25 * before
