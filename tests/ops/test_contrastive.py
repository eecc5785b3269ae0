"""The contrastive loss: reference vectors, the N x N formulation, order of voxels, few candidates, wrong arguments."""

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from spss_fast.ops import backend, contrastive_loss, select_prototypes
from spss_fast.ops.backends import available
from spss_fast.ops.contrastive import reference_contrastive_loss


@pytest.fixture(params=available("contrastive", DEVICE), autouse=True, scope="module")
def each_backend(request):
    with backend(request.param):
        yield request.param


def case(seed, shape=(2, 16, 4, 3, 5), classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3)]
    logits = [torch.randn(shape[0], classes, *shape[2:], generator=generator).to(DEVICE) for _ in range(2)]
    return features, logits


def gradients(features, *rest):
    leaves = [f.detach().clone().requires_grad_() for f in features]
    loss = contrastive_loss(*leaves, *rest)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def n_by_n(a, b, n, logits_a, logits_n, k):
    """METHOD step 7 word for word: for every anchor, the k most confident of all N voxels of another class."""
    a, b, n = (F.normalize(x.movedim(1, -1).flatten(0, -2), dim=1) for x in (a, b, n))
    confidence, predicted = (t.flatten() for t in logits_n.softmax(1).max(1))
    terms = []
    for anchor, of_class in enumerate(logits_a.argmax(1).flatten()):
        candidates = (predicted != of_class).nonzero().flatten()
        negatives = candidates[confidence[candidates].argsort(descending=True, stable=True)[:k]]
        positive = (a[anchor] @ b[anchor] / 0.07).exp()
        for query in (a[anchor], b[anchor]):
            negative = (query @ n[negatives].T / 0.07).exp().sum()
            terms.append(-(positive / (positive + negative)).log())
    return torch.stack(terms).sum() / len(a)


def test_vectors(vectors):
    v = {key: value.to(DEVICE) for key, value in vectors("contrastive").items()}
    for i in range(3):
        inputs = [v[f"{i}_{name}"] for name in "abn"], v[f"{i}_logits_a"], v[f"{i}_logits_n"]
        for name, bidirectional in (("bi", True), ("uni", False)):
            loss, grads = gradients(*inputs, 50, 0.07, bidirectional)
            torch.testing.assert_close(loss, v[f"{i}_{name}_loss"].to(loss.dtype), rtol=1e-4, atol=1e-5)
            for grad, of in zip(grads, "abn"):
                torch.testing.assert_close(grad, v[f"{i}_{name}_grad_{of}"].to(grad.dtype), rtol=1e-4, atol=1e-5)


def test_the_largest_bank_of_the_triton_kernel(each_backend):
    """Of 208 KiB of an H100's 227 of shared memory; a larger one is refused there, also one of no more numbers."""
    if DEVICE == "cuda" and torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin < 208 * 2**10:
        pytest.skip("needs a GPU of more shared memory")
    inputs = case(5, (1, 64, 700))
    loss, grads = gradients(inputs[0], *inputs[1], 512)
    with backend("reference"):
        expected, of_expected = gradients(inputs[0], *inputs[1], 512)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for actual, e in zip(grads, of_expected):
        torch.testing.assert_close(actual, e, rtol=1e-3, atol=1e-6)
    if each_backend == "triton":
        with pytest.raises(ValueError, match=r"^k: 513 prototypes of 64 features do not fit"):
            contrastive_loss(*inputs[0], *inputs[1], 513)
        features, logits = case(5, (1, 16, 700))
        with pytest.raises(ValueError, match=r"^k: 2048 prototypes of 16 features do not fit"):
            contrastive_loss(*features, *logits, 2048)


def test_equals_the_n_by_n_formulation():
    features, logits = case(0)
    loss, grads = gradients(features, *logits, 7)
    leaves = [f.clone().requires_grad_() for f in features]
    expected = n_by_n(*leaves, *logits, 7)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for grad, leaf in zip(grads, leaves):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 30), st.booleans())
def test_does_not_depend_on_the_order_of_voxels(each_backend, seed, classes, k, bidirectional):
    features, logits = case(seed, classes=classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * 60, generator=generator).to(DEVICE)

    def shuffle(x):
        rows = x.movedim(1, -1).flatten(0, -2)[order]
        return rows.view(2, 4, 3, 5, -1).movedim(-1, 1)

    with backend(each_backend):
        loss, grads = gradients(features, *logits, k, 0.07, bidirectional)
        shuffled, moved = gradients([shuffle(f) for f in features], *[shuffle(x) for x in logits], k, 0.07,
                                    bidirectional)
    torch.testing.assert_close(loss, shuffled, rtol=1e-5, atol=1e-6)
    for grad, of_shuffled in zip(grads, moved):
        torch.testing.assert_close(shuffle(grad), of_shuffled, rtol=1e-4, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_does_not_depend_on_the_length_of_features(each_backend, seed, factor):
    features, logits = case(seed)
    with backend(each_backend):
        loss, grads = gradients(features, *logits, 9)
        scaled, of_scaled = gradients([factor * f for f in features], *logits, 9)
    torch.testing.assert_close(loss, scaled, rtol=1e-4, atol=1e-5)
    for grad, other, feature in zip(grads, of_scaled, features):
        torch.testing.assert_close(grad, factor * other, rtol=1e-3, atol=1e-5)
        assert (grad * feature).sum(1).abs().max() < 1e-5  # no pull along the feature itself


def test_only_prototypes_of_n_get_a_gradient():
    features, logits = case(1)
    _, (_, _, grad) = gradients(features, *logits, 5)
    indices, counts = select_prototypes(logits[1], 5)
    assert counts.tolist() == [5, 5, 5]
    touched = grad.movedim(1, -1).flatten(0, -2).abs().sum(1).nonzero().flatten()
    assert set(touched.tolist()) == set(indices.flatten().tolist())


def test_prototypes_of_other_classes_ties_and_nan():
    logits = torch.tensor([[3.0, 0], [0, 2], [1, 0], [0, 2], [9, torch.nan], [0, 1]]).T[None].to(DEVICE)
    indices, counts = select_prototypes(logits, 4)
    assert indices.tolist() == [[1, 3, 5, -1], [0, 2, -1, -1]]
    assert counts.tolist() == [3, 2]


def test_no_candidates_means_no_loss():
    features, logits = case(2, classes=2)
    one_class = torch.zeros_like(logits[1])
    one_class[:, 0] = 5  # anchors of class 0 have no negatives, those of class 1 have all
    loss, grads = gradients(features, one_class, one_class, 5)
    assert loss == 0 and not any(grad.any() for grad in grads)
    loss, grads = gradients(features, logits[0], one_class, 5)
    of_class_0 = logits[0].argmax(1) == 0
    assert loss > 0 and not grads[0].movedim(1, -1)[of_class_0].any()
    assert grads[0].movedim(1, -1)[~of_class_0].any(1).all()


def test_features_of_length_zero():
    features, logits = case(3)
    features[0][0, :, 0, 0, 0] = 0
    loss, grads = gradients(features, *logits, 5)
    leaves = [f.clone().requires_grad_() for f in features]
    expected = reference_contrastive_loss(*leaves, *logits, 5)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for grad, leaf in zip(grads, leaves):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_float16_gradients_do_not_underflow():
    features, logits = case(4, dtype=torch.float16)
    leaves = [f.requires_grad_() for f in features]
    (contrastive_loss(*leaves, *logits, 5) * 65536).backward()
    wide = [f.detach().float().requires_grad_() for f in features]
    (contrastive_loss(*wide, *logits, 5) * 65536).backward()
    for leaf, expected in zip(leaves, wide):
        torch.testing.assert_close(leaf.grad.float(), expected.grad, rtol=2e-3, atol=1e-3)


def test_mixed_dtypes_and_autocast():
    features, logits = case(5)
    expected = contrastive_loss(*features, *logits, 5)
    mixed = contrastive_loss(features[0].bfloat16().float(), features[1].bfloat16(), features[2], *logits, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = contrastive_loss(*features, *logits, 5)
    assert mixed.dtype == inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)


def test_gradients_are_only_computed_where_needed():
    features, logits = case(6)
    expected = gradients(features, *logits, 5)[1]
    assert not contrastive_loss(*features, *logits, 5).requires_grad
    for i in range(3):
        leaves = [f.clone().requires_grad_(i == j) for j, f in enumerate(features)]
        contrastive_loss(*leaves, *logits, 5).backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(3)]
        torch.testing.assert_close(leaves[i].grad, expected[i])


def test_second_derivatives(each_backend):
    features, logits = case(7)
    leaf = features[0].requires_grad_()
    loss = contrastive_loss(leaf, *features[1:], *logits, 5)
    if each_backend == "reference":
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), leaf)[0].isfinite().all()
    else:
        with pytest.raises(NotImplementedError, match="differentiable once"):
            torch.autograd.grad(loss, leaf, create_graph=True)


X, L = torch.zeros(1, 4, 3, 3), torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize("arguments, error, name", [
    ((None, X, X, L, L), TypeError, "a"),
    ((X, X.long(), X, L, L), TypeError, "b"),
    ((X, X[:, :3], X, L, L), ValueError, "b"),
    ((X, X, X[..., :2], L, L), ValueError, "n"),
    ((X, X, X, L[..., :2], L), ValueError, "logits_a"),
    ((X, X, X, L, L[:, :1]), ValueError, "logits_n"),
    ((X, X, X, L, L[:, :0]), ValueError, "logits_n"),
    ((X, X, X, L, L, -1), ValueError, "k"),
    ((X, X, X, L, L, 2.0), TypeError, "k"),
    ((X, X, X, L, L, 2, 0.0), ValueError, "temperature"),
    ((X, X, X, L, L, 2, float("nan")), ValueError, "temperature"),
    ((X, X, X, L, L, 2, "0.07"), TypeError, "temperature"),
    ((X, X.to("meta"), X, L, L), ValueError, "b"),
    ((X, X, X, L, L.to("meta")), ValueError, "logits_n"),
    ((X[0, 0], X, X, L, L), ValueError, "a"),
])
def test_errors(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        contrastive_loss(*arguments)


@pytest.mark.parametrize("classes", [1, 2, 5, 20])
def test_any_number_of_classes(classes):
    features, logits = case(8, classes=classes)
    loss, grads = gradients(features, *logits, 6)
    with backend("reference"):
        expected, of_expected = gradients(features, *logits, 6)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for grad, e in zip(grads, of_expected):
        torch.testing.assert_close(grad, e, rtol=1e-4, atol=1e-6)


def test_select_errors():
    with pytest.raises(TypeError, match=r"^logits "):
        select_prototypes(L.long(), 3)
    with pytest.raises(ValueError, match=r"^k "):
        select_prototypes(L, -3)
