"""Paces against the released schedule, and the CutMix box and noise against their definitions."""

import math

import pytest
import torch

from spss_fast.engine import selfpaced
from spss_fast.nets.vnet import VNet, teacher_of
from spss_fast.settings import SelectionSettings

SETTINGS = SelectionSettings()


def test_paces_agree_with_the_vectors(vectors):
    for iteration, lam, last_loss, ramp, tau, keep in vectors("pace")["rows"].tolist():
        assert selfpaced.ramp(int(iteration), SETTINGS) == pytest.approx(ramp, rel=1e-6)
        assert selfpaced.tau(int(iteration), SETTINGS) == pytest.approx(tau, rel=1e-12)
        pace = torch.tensor(math.inf if math.isnan(last_loss) else last_loss)
        rate = selfpaced.ramp(int(iteration), SETTINGS) * selfpaced.tau(int(iteration), SETTINGS)
        assert int(selfpaced.keep_count(112 * 112 * 80, pace, lam, rate)) == keep


def test_threshold_grows_one_percent_an_epoch():
    assert selfpaced.threshold(0, SETTINGS) == 0.1
    assert selfpaced.threshold(100, SETTINGS) == pytest.approx(0.1 * 1.01**100)


def test_teacher_outvotes_registration_after_five_percent_of_the_schedule():
    before, after = (selfpaced.fusion_weight(t / 6000, 0.9, 0.2) for t in (300, 325))
    assert before < 0.5 < after
    assert selfpaced.fusion_weight(1, 0.9, 0.2) == selfpaced.fusion_weight(2, 0.9, 0.2) == 0.9


def test_noise_is_clipped_and_fresh():
    torch.manual_seed(0)
    x = torch.zeros(100_000)
    first, second = selfpaced.clipped_noise(x, SETTINGS), selfpaced.clipped_noise(x, SETTINGS)
    assert first.abs().max() == pytest.approx(0.2)
    assert 0.08 < first.std() < 0.1
    assert not torch.equal(first, second)
    assert (x == 0).all()


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_monte_carlo_passes_differ_in_noise_and_dropout_and_are_summed(amp):
    torch.manual_seed(0)
    settings, teacher = SelectionSettings(passes=3), teacher_of(VNet(classes=3, filters=2))
    mixed = torch.randn(2, 1, 32, 32, 16)
    torch.manual_seed(1)
    total = selfpaced.monte_carlo(teacher, mixed, 3, settings, amp)
    torch.manual_seed(1)
    passes = []
    for _ in range(settings.passes):
        with torch.no_grad(), torch.autocast("cpu", amp, enabled=amp is not None):
            passes.append(teacher(selfpaced.clipped_noise(mixed, settings)).float().softmax(1))
    assert total.dtype == torch.float32 and not total.requires_grad
    torch.testing.assert_close(total, sum(passes), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(passes[0], passes[1], atol=0.01)


def test_box_pastes_a_rectangle_through_every_slice():
    onto, source = torch.zeros(2, 3, 10, 12, 4), torch.ones(2, 3, 10, 12, 4)
    mixed = selfpaced.Box(2, 5, 3, 4).paste(onto, source)
    expected = torch.zeros(10, 12)
    expected[2:5, 5:9] = 1
    assert torch.equal(mixed, expected[None, None, :, :, None].expand_as(mixed))
    assert (onto == 0).all()


def test_random_boxes_stay_inside_and_span_ten_to_ninety_percent():
    torch.manual_seed(0)
    boxes = [selfpaced.random_box(100, 50) for _ in range(2000)]
    assert all(0 <= box.top and box.top + box.height <= 100 for box in boxes)
    assert all(0 <= box.left and box.left + box.width <= 50 for box in boxes)
    assert min(box.height for box in boxes) in (10, 11) and max(box.height for box in boxes) in (89, 90)
    assert min(box.width for box in boxes) in (5, 6) and max(box.width for box in boxes) in (44, 45)
