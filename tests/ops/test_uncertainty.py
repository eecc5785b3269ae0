"""The uncertainty selection: reference vectors, exact counts, ties, NaN, nesting, layouts, wrong arguments."""

from itertools import pairwise

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from spss_fast.ops import accumulate_softmax, backend, uncertainty_mask
from spss_fast.ops.backends import available
from spss_fast.ops.uncertainty import reference_accumulate_softmax, reference_uncertainty_mask

BACKENDS = available("uncertainty", DEVICE)


@pytest.fixture(params=BACKENDS, autouse=True, scope="module")
def each_backend(request):
    with backend(request.param):
        yield request.param


def total_of(entropies: list[float]) -> torch.Tensor:
    """One volume of two classes whose voxels' entropies are in the order of the numbers given, all in (0, 1)."""
    p = torch.tensor(entropies, dtype=torch.float32) / 2
    return torch.stack([p, 1 - p])[None].to(DEVICE)


def test_vectors(vectors):
    v = vectors("entropy_mask")
    total = torch.zeros_like(v["logits"][0], device=DEVICE)
    for logits in v["logits"]:
        accumulate_softmax(total, logits.to(DEVICE))
    entropy, mask = uncertainty_mask(total, len(v["logits"]), int(v["keep"]))
    torch.testing.assert_close(entropy.cpu(), v["entropy"], rtol=1e-4, atol=1e-5)
    assert torch.equal(mask.cpu(), v["mask"].bool())


def test_ties_go_to_the_lower_index():
    entropy, mask = uncertainty_mask(total_of([0.5, 0.2, 0.5, 0.9, 0.5, 0.1, 0.5]), 1, 4)
    assert mask.shape == entropy.shape == (1, 7)
    assert mask[0].tolist() == [True, True, True, False, False, True, False]


@pytest.mark.parametrize("voxels", [1, 255, 3000, 20000])
def test_all_voxels_equal(voxels):
    keep = voxels // 2
    _, mask = uncertainty_mask(torch.full((1, 2, voxels), 0.5, device=DEVICE), 1, keep)
    assert mask[0].tolist() == [True] * keep + [False] * (voxels - keep)


def test_nan_is_never_chosen():
    total = total_of([0.5, 0.2, 0.7, 0.9])
    total[0, 0, 1] = torch.nan
    for keep, chosen in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 2, 3]), (100, [0, 2, 3])):
        entropy, mask = uncertainty_mask(total, 1, keep)
        assert mask[0].nonzero().flatten().tolist() == chosen
        assert entropy[0].isnan().tolist() == [False, True, False, False]
    assert not uncertainty_mask(total * torch.nan, 1, 2)[1].any()


def test_nan_and_infinite_logits_become_nan():
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 1], logits[0, 1, 2], logits[0, :, 3], logits[0, 0, 4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        total = torch.zeros(1, 2, 6, device=DEVICE)
        accumulate_softmax(total, logits.to(DEVICE, dtype))
        assert total[0, 0].isnan().tolist() == [False, True, True, True, False, False]
        assert total[0, :, 4].tolist() == [0, 1]


def test_keep_as_a_tensor():
    total = torch.rand(2, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for keep in (-5, 0, 1, 100, 420, 1000):
        by_tensor = uncertainty_mask(total, 1, torch.tensor(keep, device=DEVICE))[1]
        assert by_tensor.sum() == min(max(keep, 0), 420)
        assert torch.equal(by_tensor, uncertainty_mask(total, 1, max(keep, 0))[1])


@pytest.mark.parametrize("shape", [(2, 2, 5, 6, 7), (2, 3, 17, 16, 9)])
def test_memory_formats_agree_and_mix(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = torch.zeros_like(logits)
    reference_accumulate_softmax(expected, logits)
    for of_total in (torch.contiguous_format, torch.channels_last_3d):
        for of_logits in (torch.contiguous_format, torch.channels_last_3d):
            total = torch.zeros_like(logits).contiguous(memory_format=of_total)
            accumulate_softmax(total, logits.contiguous(memory_format=of_logits))
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
            assert total.is_contiguous(memory_format=of_total)


def test_a_total_of_any_strides_is_written_in_place():
    storage = torch.zeros(2, 2, 5, 6, 14, device=DEVICE)
    total = storage[..., ::2].transpose(2, 3)
    logits = torch.randn(2, 2, 6, 5, 7, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    accumulate_softmax(total, logits)
    torch.testing.assert_close(storage[..., ::2].transpose(2, 3), logits.softmax(1))
    assert not storage[..., 1::2].any()


@settings(max_examples=25)
@given(data=st.data())
def test_masks_are_nested_and_exact(each_backend, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 9), st.integers(1, 40)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    logits = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)) / levels
    total = logits.softmax(1).to(DEVICE)
    count = total[:, 0].numel()
    keeps = sorted(data.draw(st.lists(st.integers(0, count + 2), min_size=2, max_size=3)))
    with backend(each_backend):
        results = [uncertainty_mask(total, 1, keep) for keep in keeps]
    for keep, (entropy, mask) in zip(keeps, results):
        assert mask.sum() == min(keep, count)
        # The mask is the selection of its own entropies, ties by index.
        order = entropy.flatten().argsort(stable=True)[:keep]
        assert mask.flatten()[order].all()
    for (_, smaller), (_, larger) in pairwise(results):
        assert not (smaller & ~larger).any()


@settings(max_examples=15)
@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=300), st.integers(0, 300))
def test_selection_orders_all_floats(each_backend, values, keep):
    """Through one channel, -p log(p + 1e-6) takes either sign and NaN; the choice follows the entropies returned."""
    with backend(each_backend):
        entropy, mask = uncertainty_mask(torch.tensor(values, device=DEVICE)[None, None], 1, keep)
    order = entropy.flatten().argsort(stable=True)
    order = order[~entropy.flatten()[order].isnan()][:keep]
    expected = torch.zeros_like(mask.flatten())
    expected[order] = True
    assert torch.equal(mask.flatten(), expected)


def test_agrees_with_reference_in_large():
    if "triton" in BACKENDS and DEVICE == "cpu":
        sizes = (4, 2, 20, 20, 20)  # Triton's interpreter is slow
    else:
        sizes = (4, 2, 64, 64, 64)
    total = torch.randn(sizes, generator=torch.Generator().manual_seed(3)).softmax(1).to(DEVICE)
    count = total[:, 0].numel()
    entropy, mask = uncertainty_mask(total, 1, count // 10)
    expected, _ = reference_uncertainty_mask(total, 1, count // 10)
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)
    assert mask.sum() == count // 10
    assert entropy[mask].max() <= entropy[~mask].min()


def test_no_gradient_flows():
    logits = torch.randn(1, 2, 4, device=DEVICE, requires_grad=True)
    total = torch.zeros(1, 2, 4, device=DEVICE)
    accumulate_softmax(total, logits)
    assert not total.requires_grad and not uncertainty_mask(total, 1, 1)[0].requires_grad


def test_a_gradient_that_needs_the_total_as_it_was_is_refused():
    weight = torch.ones(1, 2, 4, device=DEVICE, requires_grad=True)
    total, logits = torch.zeros(1, 2, 4, device=DEVICE), torch.randn(1, 2, 4, device=DEVICE)
    product = weight * total
    accumulate_softmax(total, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():  # where tensors have no versions
        inference = torch.zeros_like(logits)
        accumulate_softmax(inference, logits)
    torch.testing.assert_close(inference, total)


def test_autocast_leaves_float32():
    logits = torch.randn(1, 2, 8, 8, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        total = torch.zeros_like(logits)
        accumulate_softmax(total, logits)
        entropy, _ = uncertainty_mask(total, 1, 3)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(total, logits.softmax(1))


@pytest.mark.parametrize("arguments, error, name", [
    ((None, torch.zeros(1, 2, 3)), TypeError, "total"),
    ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.long)), TypeError, "logits"),
    ((torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.zeros(1, 2, 3)), TypeError, "total"),
    ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).double()), TypeError, "total"),
    ((torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)), ValueError, "total"),
    ((torch.zeros(1, 2), torch.zeros(1, 2)), ValueError, "logits"),
    ((torch.zeros(1, 2, 3, device="meta"), torch.zeros(1, 2, 3)), ValueError, "total"),
    ((torch.zeros(1, 0, 2), torch.zeros(1, 0, 2)), ValueError, "logits"),
])
def test_accumulate_errors(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        accumulate_softmax(*arguments)


@pytest.mark.parametrize("arguments, error, name", [
    ((torch.zeros(1, 2, 3), 1, -1), ValueError, "keep"),
    ((torch.zeros(1, 2, 3), 1, 1.5), TypeError, "keep"),
    ((torch.zeros(1, 2, 3), 1, True), TypeError, "keep"),
    ((torch.zeros(1, 2, 3), 1, torch.tensor(1.0)), TypeError, "keep"),
    ((torch.zeros(1, 2, 3), 1, torch.tensor([1])), ValueError, "keep"),
    ((torch.zeros(1, 2, 3), 0, 1), ValueError, "passes"),
    ((torch.zeros(1, 2, 3), 1.0, 1), TypeError, "passes"),
    ((torch.zeros(1, 2, 3).half(), 1, 1), TypeError, "total"),
    ((torch.zeros(3), 1, 1), ValueError, "total"),
])
def test_mask_errors(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        uncertainty_mask(*arguments)
