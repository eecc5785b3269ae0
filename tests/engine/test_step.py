"""A joint iteration against METHOD's steps taken one after the other, with the published numbers written out."""

import copy
import math

import pytest
import torch

from spss_fast.config import resolve
from spss_fast.data.sampling import Batch
from spss_fast.engine import pseudo_labels, registration, selfpaced
from spss_fast.engine.step import State, foreground_dice, joint_iteration, seed_for
from spss_fast.ops.contrastive import reference_contrastive_loss
from spss_fast.ops.losses import reference_masked_ce_dice, reference_weighted_ce_dice
from spss_fast.ops.uncertainty import reference_uncertainty_mask

# without dropout, so that only noise and geometry are drawn; fusion_iterations and momentum stay as published
SETTINGS = {"patch": "32,32,16", "filters": 2, "dropout": 0, "passes": 2, "registration_steps": 2, "opening": 1,
            "closing": 1, "registration_pairs": 4, "iterations": 3000, "classes": "1,2", "registration_lr": 1e-3}


def _batch() -> Batch:
    torch.manual_seed(0)
    y, x, z = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (32, 32, 16)), indexing="ij")
    volume = 2.0 * (torch.hypot(y - 0.2 * z, x) < 0.6)
    image, view1, view2 = (volume + 0.3 * torch.randn(4, 1, 32, 32, 16) for _ in range(3))
    index = torch.tensor([5, 9])
    annotation = ((volume[:, :, index] > 0) * (1 + (x[:, :, index] > 0))).movedim(-1, 0).to(torch.uint8).contiguous()
    return Batch(list("abcd"), image, view1, view2, annotation, index, None)


# the first one, and two on either side of a step of the learning rate: with selection open, as the last loss was below
# lambda, and closed
@pytest.mark.parametrize("t, pace, lr", [(0, math.inf, 0.01), (2499, 1.5, 0.01), (2500, 5.0, 0.001)])
def test_an_iteration_is_its_steps(t, pace, lr):
    state, batch = State(resolve("la", SETTINGS), torch.device("cpu"), None), _batch()
    state.iteration, state.last_loss = t, torch.tensor(pace, dtype=torch.float64)
    head = state.student.out_conv  # all three classes are predicted somewhere, or there were no negatives
    head.weight.data, head.bias.data = 3 * torch.tensor([[1.0, -1], [-1, 1], [0, 0]]).view(3, 2, 1, 1, 1), head.bias * 0
    for parameter in state.teacher.parameters():
        parameter.data *= 1.1  # another network than the student
    student, teacher, network = map(copy.deepcopy, (state.student, state.teacher, state.registration))
    for each in (state.student, state.teacher):
        each.eval()  # as a measurement may leave them
    outputs = joint_iteration(state, batch)

    selection, settings = state.config.selection, state.config.registration
    adam, volumes = torch.optim.Adam(network.parameters(), 1e-3), batch.image[:, 0]
    torch.manual_seed(seed_for(0, 2, t))

    pairs = {count: registration.sample_pairs(volumes[:count], settings) for count in (4, 2)}

    def steps(labels, count):  # 1, 10
        return registration.registration_steps(network, adam, volumes[:count], labels, pairs[count], settings, None)

    loss_registration = steps(None, 4)  # on all volumes
    flows = registration.outward_flows(network, volumes[:2], batch.index, None)  # 2
    reg = pseudo_labels.registration_labels(flows, batch.annotation, batch.index, 3, settings)
    with torch.no_grad():
        p_t = teacher(selfpaced.clipped_noise(batch.image, selection))[:2].softmax(1)  # 3
        box = selfpaced.random_box(32, 32)  # 5
        mixed = box.paste(batch.view1, batch.view2)
        pseudo = box.paste(teacher(batch.view1), teacher(batch.view2)).argmax(1)
        total = sum(teacher(selfpaced.clipped_noise(mixed, selection)).softmax(1) for _ in range(2))  # 4
    w = 0.1 * math.exp(-5 * (1 - (t // 150) / 40) ** 2)
    lam = 0.1 * 1.01 ** (t // 8)  # an epoch is 16 annotated volumes, two a batch
    rate = w * 0.8 * 1.4 ** (t // 500)
    keep = math.floor(32 * 32 * 16 * (0.1 if pace >= lam else 1 - pace / lam) * rate)
    _, mask = reference_uncertainty_mask(total, 2, keep)

    logits_s, logits_m = student(batch.image)[:2], student(mixed)
    ce_m, dice_m, dice_all = reference_masked_ce_dice(logits_m, pseudo, mask)  # 6
    loss_u = w * (ce_m + dice_m)
    a, b, n = (student.encode(x) for x in (batch.view1, batch.view2, mixed))  # 7
    loss_c = w * reference_contrastive_loss(
        *map(student.project, (a, b, n)), *(student.class_map(student.decode(x)) for x in (a, n)), 50, 0.07
    )
    w_p = 0.9 * (t / 6000) ** 0.2  # 8
    seg, label = pseudo_labels.fuse(reg, p_t, w_p, batch.annotation, batch.index)
    weights = 0.8 ** (torch.arange(16) - batch.index[:, None]).abs()[:, None, None].expand(2, 32, 32, 16)
    if t >= 1000:
        weights = weights * (1 + 2 * math.sqrt((t - 1000) / 1e5) * (reg != seg))
    ce, dice = reference_weighted_ce_dice(logits_s, label.long(), weights)
    loss_s = 0.5 * (ce + 0.3 * dice)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss_s + loss_u + loss_c, parameters, allow_unused=True)  # 9
    loss_labels = steps(torch.stack([label == 1, label == 2], 1).to(torch.uint8), 2)  # 10

    expected = {"loss": loss_s + loss_u + loss_c, "loss_s": loss_s, "loss_u": loss_u, "loss_c": loss_c,
                "loss_registration": loss_registration, "loss_registration_labels": loss_labels,
                "loss_pace": ce_m + dice_all, "lambda": lam, "w": w, "w_p": w_p, "K": keep}
    shown = {name: float(value) for name, value in outputs.metrics.items() if name != "entropy"}
    assert shown == pytest.approx({name: float(torch.as_tensor(x).detach()) for name, x in expected.items()}, rel=1e-4)
    assert float(state.last_loss) == shown["loss_pace"] and state.iteration == t + 1
    assert loss_c > 0 and (not t or (keep > 0 and loss_u > 0 and (label != reg).any()))
    for name, value in (("registration", reg), ("fused", label), ("mixed", mixed), ("mask", mask),
                        ("prediction", logits_s.argmax(1))):
        assert torch.equal(getattr(outputs, name), value.to(getattr(outputs, name).dtype)), name
    alpha = min(1 - 1 / (t + 1), 0.99)
    for new, old, gradient, taught, before in zip(
        state.student.parameters(), parameters, gradients, state.teacher.parameters(), teacher.parameters()
    ):
        if gradient is None:  # a bias before batch norm
            assert torch.equal(new, old)
        else:
            torch.testing.assert_close((old - new) / lr, gradient + 1e-4 * old, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(taught, alpha * before + (1 - alpha) * new)
    for new, own in zip(state.registration.parameters(), network.parameters()):
        torch.testing.assert_close(new, own, rtol=1e-3, atol=1e-5)


def test_dice_of_monitoring_is_averaged_over_classes():
    prediction, reference = torch.tensor([[[[1, 1, 2, 0]]]]), torch.tensor([[[[1, 2, 2, 0]]]], dtype=torch.uint8)
    dice = foreground_dice("d", prediction, reference, (0, 7, 5, 9))  # both lack the last class
    assert dice == pytest.approx({"d": 2 / 3, "d_7": 2 / 3, "d_5": 2 / 3, "d_9": math.nan}, nan_ok=True)
    assert foreground_dice("d", prediction > 0, reference > 0, (0, 1)) == {"d": 1}
    assert math.isnan(foreground_dice("d", prediction, None, (0, 1))["d"])
