"""The segmentation losses: reference vectors, accuracy, order of voxels, memory formats, wrong arguments."""

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from spss_fast.ops import backend, masked_ce_dice, weighted_ce_dice
from spss_fast.ops.backends import available
from spss_fast.ops.losses import reference_masked_ce_dice, reference_weighted_ce_dice


@pytest.fixture(params=available("losses", DEVICE), autouse=True, scope="module")
def each_backend(request):
    with backend(request.param):
        yield request.param


def case(seed, shape=(2, 3, 6, 5, 7)):
    generator = torch.Generator().manual_seed(seed)
    voxels = (shape[0], *shape[2:])
    tensors = (
        2 * torch.randn(shape, generator=generator), torch.randint(0, shape[1], voxels, generator=generator),
        torch.rand(voxels, generator=generator) < 0.4, torch.rand(voxels, generator=generator),
    )
    return [t.to(DEVICE) for t in tensors]


def with_gradient(function, logits, *rest):
    leaf = logits.detach().requires_grad_()
    losses = function(leaf, *rest)
    sum((i + 1) * loss for i, loss in enumerate(losses)).backward()
    return [loss.detach() for loss in losses], leaf.grad


def test_vectors(vectors):
    v = {key: value.to(DEVICE) for key, value in vectors("losses").items()}
    logits = v["probability"].log()  # their softmax is the probability
    target, mask = v["target"].long(), v["mask"].bool()
    ce, masked, dice = masked_ce_dice(logits, target, mask)
    for actual, name in ((ce, "masked_ce_probabilities"), (masked, "masked_dice"), (dice, "dice")):
        torch.testing.assert_close(actual, v[name].to(actual.dtype), rtol=1e-4, atol=1e-5)
    ce, dice = weighted_ce_dice(v["logits"], target, v["weight"])
    for actual, name in ((ce, "weighted_ce"), (dice, "foreground_dice")):
        torch.testing.assert_close(actual, v[name].to(actual.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_dice_is_the_mean_over_classes(classes):
    """Worked out class by class; only the supervised one leaves the background out."""
    logits, target, mask, weight = case(8, (2, classes, 6, 5, 7))
    probability = logits.double().softmax(1)

    def dice(c, weight):
        p, here = probability[:, c], (target == c).double()
        return 1 - (2 * (p * here * weight).sum() + 1e-5) / ((p * p * weight + here * weight).sum() + 1e-5)

    def mean(first, weight):
        return torch.stack([dice(c, weight) for c in range(first, classes)]).mean().float()

    _, masked, whole = masked_ce_dice(logits, target, mask)
    _, foreground = weighted_ce_dice(logits, target, weight)
    expected = mean(0, mask.double()), mean(0, 1.0), mean(1, 1.0)
    torch.testing.assert_close((masked, whole, foreground), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from(["probabilities", "logits"]))
def test_do_not_depend_on_the_order_of_voxels(each_backend, seed, classes, ce_input):
    logits, target, mask, weight = case(seed, (2, classes, 300))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with backend(each_backend):
        for function, rest in ((masked_ce_dice, (target, mask)), (weighted_ce_dice, (target, weight))):
            extra = (ce_input,) if function is masked_ce_dice else ()
            losses, grad = with_gradient(function, logits, *rest, *extra)
            moved, of_moved = with_gradient(function, logits[..., order], *[r[..., order] for r in rest], *extra)
            torch.testing.assert_close(losses, moved, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad[..., order], of_moved, rtol=1e-4, atol=1e-7)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20))
def test_do_not_depend_on_a_shift_of_all_logits(each_backend, seed, shift):
    logits, target, mask, weight = case(seed)
    with backend(each_backend):
        for function, rest in ((masked_ce_dice, (target, mask, "logits")), (weighted_ce_dice, (target, weight))):
            losses, grad = with_gradient(function, logits, *rest)
            shifted, of_shifted = with_gradient(function, logits + shift, *rest)
            torch.testing.assert_close(losses, shifted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad, of_shifted, rtol=1e-3, atol=1e-6)
            assert grad.sum(1).abs().max() < 1e-6  # the gradient along that shift is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_agree(dtype):
    logits, target, mask, weight = case(1)
    logits = logits.to(dtype)
    for function, reference, rest in (
        (masked_ce_dice, reference_masked_ce_dice, (target, mask)),
        (weighted_ce_dice, reference_weighted_ce_dice, (target, weight)),
    ):
        expected, expected_grad = with_gradient(reference, logits, *rest)
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            losses, grad = with_gradient(function, logits.contiguous(memory_format=memory_format), *rest)
            assert grad.dtype == dtype and grad.is_contiguous(memory_format=memory_format)
            assert all(loss.dtype == torch.float32 for loss in losses)
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, expected_grad, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_sums_stay_accurate_in_large(each_backend):
    """A float32 running sum over these voxels would be off in the fourth digit."""
    if each_backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter is too slow for a million voxels")
    logits, target, mask, weight = case(2, (1, 2, 128, 128, 64))
    for function, rest in ((masked_ce_dice, (target, mask)), (weighted_ce_dice, (target, weight))):
        with backend("reference"):
            expected = function(logits.double(), *rest)
        for actual, e in zip(function(logits, *rest), expected):
            assert abs(actual.double() - e) < 2e-6 * abs(e)


def test_an_empty_mask_has_no_ce():
    logits, target, mask, _ = case(3)
    losses, grad = with_gradient(masked_ce_dice, logits, target, mask & False)
    assert losses[0] == 0 and losses[1] == 0 and losses[2] > 0
    assert grad.isfinite().all()


def test_wrong_labels_are_never_silent(each_backend):
    logits, target, mask, weight = case(4)
    for wrong in (-1, 3, 2**40):
        target[0, 0, 0, 0] = wrong
        if each_backend == "cpu":
            with pytest.raises(ValueError, match=r"^target: "):
                masked_ce_dice(logits, target, mask)
            with pytest.raises(ValueError, match=r"^target: "):
                weighted_ce_dice(logits, target, weight)
        elif each_backend == "triton":
            assert masked_ce_dice(logits, target, mask)[0].isnan()
            assert weighted_ce_dice(logits, target, weight)[0].isnan()
        elif DEVICE == "cpu":  # on a GPU torch's own cross entropy would abort the process
            with pytest.raises((IndexError, RuntimeError)):
                masked_ce_dice(logits, target, mask)


def test_only_some_outputs_are_used():
    logits, target, mask, weight = case(5)
    for function, rest, outputs in ((masked_ce_dice, (target, mask), 3), (weighted_ce_dice, (target, weight), 2)):
        for i in range(outputs):
            leaf, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            function(leaf, *rest)[i].backward()
            with backend("reference"):
                function(expected, *rest)[i].backward()
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_second_derivatives(each_backend):
    logits, target, mask, weight = case(6)
    leaf = logits.requires_grad_()
    for loss in (masked_ce_dice(leaf, target, mask)[0], weighted_ce_dice(leaf, target, weight)[0]):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if each_backend == "reference":
            assert torch.autograd.grad(grad.square().sum(), leaf)[0].isfinite().all()
        else:
            with pytest.raises(NotImplementedError, match="differentiable once"):
                torch.autograd.grad(grad.square().sum(), leaf)


def test_autocast_computes_in_float32():
    logits, target, mask, weight = case(7)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = [*masked_ce_dice(logits, target, mask), *weighted_ce_dice(logits, target, weight)]
    outside = [*masked_ce_dice(logits, target, mask), *weighted_ce_dice(logits, target, weight)]
    assert all(torch.equal(i, o) and i.dtype == torch.float32 for i, o in zip(inside, outside))


X, T, M = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(1, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize("arguments, error, name", [
    ((None, T, M), TypeError, "logits"),
    ((X.long(), T, M), TypeError, "logits"),
    ((X[0, 0], T, M), ValueError, "logits"),
    ((X, T.float(), M), TypeError, "target"),
    ((X, T[:, :2], M), ValueError, "target"),
    ((X, T, M.float()), TypeError, "mask"),
    ((X, T, M[:, :2]), ValueError, "mask"),
    ((X, T, M, "softmax"), ValueError, "ce_input"),
    ((X, T.to("meta"), M), ValueError, "target"),
    ((X, T, M.to("meta")), ValueError, "mask"),
])
def test_masked_errors(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        masked_ce_dice(*arguments)


@pytest.mark.parametrize("arguments, error, name", [
    ((X, T, M), TypeError, "weight"),
    ((X, T, M[:, :2].float()), ValueError, "weight"),
    ((X[:, :1], T, M.float()), ValueError, "logits"),
    ((X, None, M.float()), TypeError, "target"),
    ((X, T, M.float().to("meta")), ValueError, "weight"),
])
def test_weighted_errors(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        weighted_ce_dice(*arguments)
