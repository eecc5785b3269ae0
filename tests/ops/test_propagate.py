"""propagate against the vectors, SciPy and its laws; wrong arguments."""

import numpy as np
import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from spss_fast.ops import backend, propagate
from spss_fast.ops.backends import available

BACKENDS = available("propagate", DEVICE)


@pytest.mark.parametrize("name", BACKENDS)
def test_vectors(vectors, name):
    v = {key: value.to(DEVICE) for key, value in vectors("propagate").items()}
    with backend(name):
        out = propagate(v["slice"][None], v["index"].reshape(1), v["flow_up"][None], v["flow_down"][None])
    assert out.dtype == torch.uint8 and torch.equal(out[0], v["labels"])


def still(labels, **how):
    """The slices after and before the annotated one, without motion: post() of the label."""
    labels, index = labels.to(DEVICE), torch.ones(labels.shape[0], dtype=torch.long, device=DEVICE)
    flow = torch.zeros(labels.shape[0], 2, 2, *labels.shape[1:], device=DEVICE)
    return propagate(labels, index, flow, flow, **how).cpu()


def largest(mask):
    names, count = ndimage.label(mask, np.ones((3, 3)))
    return names == 1 + np.argmax(np.bincount(names.ravel())[1:]) if count else mask


@settings(max_examples=80)
@given(
    st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 4)
)
def test_post_agrees_with_scipy(height, width, density, seed, opening, closing):
    """Random slices of any width across word boundaries: component, opening, closing."""
    mask = np.random.default_rng(seed).random((height, width)) < density
    how = dict(opening=2 * opening + 1, closing=2 * closing + 1)
    cross = np.zeros((2 * opening + 1,) * 2, bool)
    cross[opening], cross[:, opening] = True, True
    kept = largest(mask)
    opened = ndimage.binary_dilation(ndimage.binary_erosion(kept, cross, border_value=1), cross)
    near = still(torch.from_numpy(mask)[None], **how, far_distance=10)
    assert np.array_equal(near[0, :, :, 0].bool().numpy(), opened) and torch.equal(near[..., 0], near[..., 2])

    far = ndimage.binary_erosion(ndimage.binary_erosion(kept, cross, border_value=1), cross, border_value=1)
    far = ndimage.binary_dilation(ndimage.binary_dilation(far, cross), cross)
    square = np.ones((2 * closing + 1,) * 2, bool)
    far = ndimage.binary_erosion(ndimage.binary_dilation(far, square), square, border_value=1)
    out = still(torch.from_numpy(mask)[None], **how, far_distance=0, far_iterations=2)
    assert np.array_equal(out[0, :, :, 0].bool().numpy(), far)


@pytest.mark.parametrize("name", BACKENDS)
def test_of_equal_components_the_first_in_raster_order_stays(name):
    mask = torch.zeros(1, 9, 70, dtype=torch.uint8)
    mask[0, 6:8, 2:5] = 1  # lower, though further left
    mask[0, 1:3, 31:34] = 1  # across a word boundary
    mask[0, 1:3, 60:63] = 1
    with backend(name):
        out = still(mask, opening=1, closing=1)
    expected = torch.zeros(9, 70, dtype=torch.uint8)
    expected[1:3, 31:34] = 1
    assert torch.equal(out[0, :, :, 0], expected) and torch.equal(out[0, :, :, 1], mask[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_spiral_is_one_component(name):
    """Long chains of unions: a spiral one voxel wide, and a comb that joins only in its last row."""
    spiral = torch.zeros(41, 41, dtype=torch.uint8)
    y = x = 20
    dy, dx, reach = 0, 1, 2
    while 0 <= y < 41 and 0 <= x < 41:
        for _ in range(2):
            for _ in range(reach):
                if 0 <= y < 41 and 0 <= x < 41:
                    spiral[y, x] = 1
                y, x = y + dy, x + dx
            dy, dx = dx, -dy
        reach += 2
    comb = torch.zeros(41, 41, dtype=torch.uint8)
    comb[:, ::2] = 1
    comb[40] = 1
    with backend(name):
        out = still(torch.stack([spiral, comb]), opening=1, closing=1)
    assert torch.equal(out[..., 0], torch.stack([spiral, comb]))


@settings(max_examples=30)
@given(st.integers(2, 12), st.data())
def test_mirrored_volumes_give_mirrored_labels(depth, data):
    index = data.draw(st.integers(0, depth - 1))
    torch.manual_seed(depth)
    labels = torch.zeros(1, 20, 35, dtype=torch.uint8, device=DEVICE)
    labels[0, 5:15, 8:30] = 1
    shifts = 1.5 * torch.randn(2, 1, depth - 1, 2, 1, 1, device=DEVICE)
    up, down = shifts.expand(2, 1, depth - 1, 2, 20, 35)
    out = propagate(labels, torch.tensor([index], device=DEVICE), up, down, opening=3)
    mirrored = propagate(labels, torch.tensor([depth - 1 - index], device=DEVICE), down.flip(1), up.flip(1), opening=3)
    assert torch.equal(out.flip(-1), mirrored)
    assert torch.equal(out[..., index], labels)


def test_not_a_number_moves_nothing_in():
    labels = torch.ones(1, 5, 5, dtype=torch.uint8, device=DEVICE)
    flow = torch.full((1, 1, 2, 5, 5), float("nan"), device=DEVICE)
    out = propagate(labels, torch.zeros(1, dtype=torch.long, device=DEVICE), flow, flow)
    assert out[..., 0].all() and not out[..., 1].any()


LABELS = torch.zeros(2, 4, 5, dtype=torch.uint8, device=DEVICE)
INDEX = torch.zeros(2, dtype=torch.long, device=DEVICE)
FLOW = torch.zeros(2, 3, 2, 4, 5, device=DEVICE)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("change, error", [
    ({"labels": LABELS.float()}, TypeError),
    ({"labels": LABELS[0]}, ValueError),
    ({"index": INDEX.int()}, TypeError),
    ({"index": INDEX.to("meta")}, ValueError),
    ({"flow_up": FLOW.to("meta")}, ValueError),
    ({"index": INDEX[:1]}, ValueError),
    ({"flow_up": FLOW.long()}, TypeError),
    ({"flow_up": FLOW[:, :, :1]}, ValueError),
    ({"flow_up": None}, TypeError),
    ({"flow_down": FLOW.double()}, TypeError),
    ({"flow_down": FLOW[:, :2]}, ValueError),
    ({"opening": 4}, ValueError),
    ({"opening": 2.5}, TypeError),
    ({"closing": -1}, ValueError),
    ({"far_distance": -1}, ValueError),
    ({"far_iterations": -1}, ValueError),
])
def test_wrong_arguments_are_named(name, change, error):
    arguments = dict(labels=LABELS, index=INDEX, flow_up=FLOW, flow_down=FLOW) | change
    with backend(name), pytest.raises(error, match=rf"^{next(iter(change))} "):
        propagate(**arguments)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("beyond", [4, -1])
def test_an_index_beyond_the_volume_is_an_error_or_on_a_gpu_an_empty_volume(name, beyond):
    index = torch.tensor([1, beyond], device=DEVICE)
    with backend(name):
        if name == "cuda":
            out = propagate(torch.ones_like(LABELS), index, FLOW, FLOW)
            assert out[0].any() and not out[1].any()
        else:
            with pytest.raises(ValueError, match=r"^index "):
                propagate(torch.ones_like(LABELS), index, FLOW, FLOW)
