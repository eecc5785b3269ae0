"""warp against the vectors and against its laws; SpatialTransformer, integrate, autocast and wrong arguments."""

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from spss_fast.ops import SpatialTransformer, backend, integrate, warp
from spss_fast.ops.backends import available

BACKENDS = available("warp", DEVICE)
NONDETERMINISM = 1e-12 if DEVICE == "cuda" else 0.0  # of sums by atomics


@pytest.mark.parametrize("name", BACKENDS)
def test_vectors(vectors, name):
    v = {key: value.to(DEVICE) for key, value in vectors("warp").items()}
    with backend(name):
        warped = warp(v["image2d"][None, None], v["flow2d"][None])
        torch.testing.assert_close(warped[0, 0], v["warped2d"], rtol=1e-4, atol=1e-5)
        for mode, padding in (("bilinear", "zeros"), ("bilinear", "border"), ("nearest", "zeros")):
            tolerance = dict(rtol=0, atol=0) if mode == "nearest" else dict(rtol=1e-4, atol=1e-5)
            warped = warp(v["image3d"], v["flow3d"], mode, padding)
            torch.testing.assert_close(warped, v[f"warped3d_{mode}_{padding}"], **tolerance)


sizes = st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 6)] * 3))


@settings(max_examples=40)
@given(size=sizes, mode=st.sampled_from(["bilinear", "nearest"]), padding=st.sampled_from(["zeros", "border"]))
def test_zero_displacement_is_the_identity(size, mode, padding):
    image = torch.randn(2, 2, *size, device=DEVICE)
    assert torch.equal(warp(image, torch.zeros(2, len(size), *size, device=DEVICE), mode, padding), image)


@settings(max_examples=60)
@given(data=st.data(), size=sizes, mode=st.sampled_from(["bilinear", "nearest"]))
def test_integer_shift_is_a_roll_with_padding(data, size, mode):
    shift = [data.draw(st.integers(-side - 1, side + 1)) for side in size]
    image = torch.randn(1, 2, *size, device=DEVICE)
    displacement = torch.tensor(shift, dtype=torch.float32, device=DEVICE).view(1, -1, *[1] * len(size))
    displacement = displacement.expand(1, -1, *size)
    for padding in ("zeros", "border"):
        expected = image
        for axis, (by, side) in enumerate(zip(shift, size), 2):
            source = torch.arange(side, device=DEVICE) + by
            expected = expected.index_select(axis, source.clamp(0, side - 1))
            if padding == "zeros":
                inside = ((source >= 0) & (source < side)).view([-1 if i == axis else 1 for i in range(image.ndim)])
                expected = expected * inside
        assert torch.equal(warp(image, displacement, mode, padding), expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**63)])
def test_wild_displacements_stay_within_bounds(name, mode, padding, value):
    image = torch.rand(1, 1, 4, 5, 6, device=DEVICE) + 1
    displacement = torch.zeros(1, 3, 4, 5, 6, device=DEVICE)
    displacement[0, 1, 2, 3, 4] = value
    with backend("reference"):
        expected = warp(image, displacement, mode, padding)
    with backend(name):
        torch.testing.assert_close(warp(image, displacement, mode, padding), expected, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in available("warp", "cpu") if name != "triton"])
def test_one_thread_and_two_give_the_same_bits(name):
    image = torch.randn(3, 2, 20, 30, 40, requires_grad=True)
    displacement = (3 * torch.randn(3, 3, 20, 30, 40)).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with backend(name):
                warped = warp(image, displacement)
                results.append((warped, *torch.autograd.grad(warped.square().sum(), [image, displacement])))
    finally:
        torch.set_num_threads(before)
    if name == "reference":  # its index_add may split sums by thread; values still agree
        torch.testing.assert_close(results[0], results[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_triton_fixed_point_gradient_is_that_of_the_atomics():
    if "triton" not in BACKENDS:
        pytest.skip("no Triton here")
    image, displacement, grad = (torch.randn(2, channels, 4, 5, 6, device=DEVICE) for channels in (1, 3, 1))
    with backend("triton"):
        expected = torch.ops.spss_fast.warp_backward(grad, image, displacement, "bilinear", "zeros", True, True)
        torch.use_deterministic_algorithms(True)
        try:
            actual = torch.ops.spss_fast.warp_backward(grad, image, displacement, "bilinear", "zeros", True, True)
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """A half image from a network under autocast goes with a float32 displacement, gradients included."""
    image = torch.randn(1, 1, 6, 7, 8, device=DEVICE)
    convolution = torch.nn.Conv3d(1, 2, 1).to(DEVICE)
    displacement = torch.randn(1, 3, 6, 7, 8, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype):
        moving = convolution(image)
        warped = warp(moving, displacement)
    assert moving.dtype == warped.dtype == dtype
    torch.testing.assert_close(warped.float(), warp(moving.float(), displacement), rtol=1e-2, atol=1e-2)
    warped.float().square().sum().backward()
    assert displacement.grad.dtype == torch.float32 and convolution.weight.grad.abs().sum() > 0


def test_spatial_transformer_trains_a_displacement():
    y, x = torch.meshgrid(*[torch.arange(24.0, device=DEVICE)] * 2, indexing="ij")

    def blob(row, column):
        return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 30)[None, None]

    fixed, moving, transform = blob(12, 12), blob(14, 11), SpatialTransformer(padding="border")
    shift = torch.zeros(1, 2, 1, 1, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = (transform(moving, shift.expand(1, 2, 24, 24)) - fixed).square().mean()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(shift.detach().cpu().flatten(), torch.tensor([2.0, -1.0]), atol=0.05, rtol=0)


def test_integrate_of_a_constant_velocity_is_that_shift():
    velocity = torch.tensor([0.7, -1.3, 0.4], device=DEVICE)[:, None, None, None].expand(1, 3, 6, 7, 8)
    torch.testing.assert_close(integrate(velocity), velocity.contiguous())
    assert torch.equal(integrate(velocity, 0), velocity)


def test_integrate_of_opposite_velocities_are_inverses():
    coarse = 2 * torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    velocity = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    forward, inverse = integrate(velocity), integrate(-velocity)
    round_trip = inverse + warp(forward, inverse, padding="border")
    assert round_trip[..., 8:-8, 8:-8].abs().max() < 0.05 * forward.abs().max()


def test_integrate_gradient():
    velocity = torch.randn(1, 2, 4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: integrate(v, 3), velocity, nondet_tol=NONDETERMINISM)


def test_second_derivatives_are_refused_but_by_the_reference():
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64, device=DEVICE)
    displacement = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    if BACKENDS[0] != "reference":
        grad = torch.autograd.grad(warp(image, displacement).square().sum(), displacement, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="differentiable once"):
            grad.sum().backward()
    with backend("reference"):
        assert torch.autograd.gradgradcheck(lambda u: warp(image, u), displacement, nondet_tol=NONDETERMINISM)


IMAGE, SHIFT = torch.zeros(2, 1, 4, 5, device=DEVICE), torch.zeros(2, 2, 4, 5, device=DEVICE)


@pytest.mark.parametrize("arguments, error, name", [
    ((None, SHIFT), TypeError, "image"),
    ((IMAGE, [1.0]), TypeError, "displacement"),
    ((IMAGE.int(), SHIFT), TypeError, "image"),
    ((IMAGE, SHIFT.long()), TypeError, "displacement"),
    ((IMAGE[0], SHIFT), ValueError, "image"),
    ((IMAGE, SHIFT[:1]), ValueError, "displacement"),
    ((IMAGE, SHIFT[:, :1]), ValueError, "displacement"),
    ((IMAGE, SHIFT[..., :4]), ValueError, "displacement"),
    ((IMAGE, SHIFT.to("meta")), ValueError, "displacement"),
    ((IMAGE, SHIFT, "cubic"), ValueError, "mode"),
    ((IMAGE, SHIFT, "bilinear", "reflect"), ValueError, "padding"),
])
def test_wrong_arguments_are_named(arguments, error, name):
    with pytest.raises(error, match=rf"^{name} "):
        warp(*arguments)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"^mode "):
        SpatialTransformer("cubic")
    with pytest.raises(ValueError, match=r"^padding "):
        SpatialTransformer(padding="reflect")
    for velocity, steps, error, name in (
        (SHIFT, -1, ValueError, "steps"), (SHIFT, 2.0, TypeError, "steps"), (None, 3, TypeError, "velocity"),
        (SHIFT.long(), 3, TypeError, "velocity"), (IMAGE, 3, ValueError, "velocity"),
        (SHIFT[0], 3, ValueError, "velocity"),
    ):
        with pytest.raises(error, match=rf"^{name} "):
            integrate(velocity, steps)


@pytest.mark.skipif(DEVICE not in BACKENDS, reason="the compiled operators are not built")
@pytest.mark.parametrize("arguments, name", [
    ((IMAGE, SHIFT[:, :1], "bilinear", "zeros"), "displacement"),
    ((IMAGE, SHIFT.double(), "bilinear", "zeros"), "displacement"),
    ((IMAGE[0, 0], SHIFT, "bilinear", "zeros"), "image"),
    ((IMAGE, SHIFT, "cubic", "zeros"), "mode"),
])
def test_the_raw_operator_checks_too(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name} "):
        torch.ops.spss_fast.warp(*arguments)
