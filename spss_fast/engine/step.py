"""One joint iteration of stage 2, and what it works on (METHOD, stage 2, steps 1 to 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spss_fast.config import Config
from spss_fast.data.sampling import Batch
from spss_fast.engine import optimizers, selfpaced
from spss_fast.engine.device import upload
from spss_fast.engine.graphs import Replayed
from spss_fast.engine.profiling import phase
from spss_fast.engine.pseudo_labels import foreground_masks, fuse, registration_labels, voxel_weights
from spss_fast.engine.registration import registration_steps
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet, teacher_of, update_teacher
from spss_fast.ops.contrastive import contrastive_loss
from spss_fast.ops.losses import masked_ce_dice, weighted_ce_dice
from spss_fast.ops.uncertainty import uncertainty_mask


@dataclass
class State:
    """Everything that training changes: networks, optimizers, the clock, and the pace of the last iteration."""

    config: Config
    device: torch.device
    amp: torch.dtype | None  # autocast type of the networks' forward passes; None is float32
    student: nn.Module = field(init=False)
    teacher: nn.Module = field(init=False)
    registration: nn.Module = field(init=False)
    sgd: torch.optim.Optimizer = field(init=False)
    adam: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)  # of the student's loss; does nothing but in fp16
    registration_scaler: torch.amp.GradScaler = field(init=False)
    # (volumes, labels or None) -> loss: all steps of `registration_steps`, on a GPU in one launch
    registration_steps: Callable[[Tensor, Tensor | None], Tensor] = field(init=False)
    # m -> sum of the teacher's softmax: all its passes, on a GPU in one launch
    monte_carlo: Callable[[Tensor], Tensor] = field(init=False)
    epoch: int = 0  # of stage 1
    iteration: int = 0  # t, of stage 2
    average: optimizers.Average = field(init=False)  # how the teacher follows the student
    last_loss: Tensor = field(init=False)  # L_pace of the last iteration; inf before the first

    def __post_init__(self) -> None:
        network, training = self.config.network, self.config.training
        torch.manual_seed(training.seed)
        # channels last is what the convolutions of CPUs and GPUs are fastest in
        self.student = VNet(self.config.data.class_count, network.filters, network.dropout).to(
            self.device, memory_format=torch.channels_last_3d
        )
        self.teacher = teacher_of(self.student)
        self.registration = RegistrationNet().to(self.device, memory_format=torch.channels_last)
        self.sgd, self.adam = optimizers.build(
            self.config, self.student.parameters(), self.registration.parameters(), self.device
        )
        self.average = optimizers.moving_average(training.optimizer, self.device)
        scaled = self.amp == torch.float16
        self.scaler, self.registration_scaler = (
            torch.amp.GradScaler(self.device.type, enabled=scaled) for _ in range(2)
        )
        self.registration_steps, self.monte_carlo = self._registration_steps, self._monte_carlo
        if self.device.type == "cuda":
            self.monte_carlo = Replayed(self._monte_carlo)
        # gradient scaling decides on the host whether to step, and apex's Adam counts its steps there
        if self.device.type == "cuda" and not scaled and training.optimizer == "torch":
            self.registration_steps = Replayed(self._registration_steps)
        self.last_loss = torch.tensor(float("inf"), dtype=torch.float64, device=self.device)

    def _registration_steps(self, volumes: Tensor, labels: Tensor | None) -> Tensor:
        return registration_steps(
            self.registration, self.adam, volumes, labels, self.config.registration, self.amp, self.registration_scaler
        )

    def _monte_carlo(self, mixed: Tensor) -> Tensor:
        config = self.config
        return selfpaced.monte_carlo(self.teacher, mixed, config.data.class_count, config.selection, self.amp)

    def autocast(self) -> torch.autocast:
        """Mixed precision for the segmentation networks; losses take their outputs in float32."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)


@dataclass
class Outputs:
    """What one iteration shows of itself; tensors stay on the device until somebody looks."""

    metrics: dict[str, Tensor | float]
    registration: Tensor  # L_reg (L, h, w, d) uint8 in [0, C)
    fused: Tensor  # y (L, h, w, d) uint8 in [0, C)
    prediction: Tensor  # the student's, in training mode, on the supervised view (L, h, w, d) uint8
    mixed: Tensor  # m (B, 1, h, w, d)
    mask: Tensor  # M (B, h, w, d) bool, voxels of m


def seed_for(seed: int, stage: int, position: int) -> int:
    """One seed per iteration, so that a resumed run draws what an uninterrupted one would have drawn."""
    return (seed * 2 + stage) * 1_000_003 + position


def registration_epoch(state: State, batches: Iterable[Batch]) -> Tensor:
    """Stage 1: one epoch of registration pre-training; returns the last loss."""
    torch.manual_seed(seed_for(state.config.training.seed, 1, state.epoch))
    for batch in batches:
        loss = state.registration_steps(batch.image.to(state.device)[:, 0], None)
    state.epoch += 1
    return loss


def joint_iteration(state: State, batch: Batch) -> Outputs:
    """Stage 2, one iteration: the numbered steps are METHOD's."""
    config, t = state.config, state.iteration
    registration, selection, training = config.registration, config.selection, config.training
    classes = config.data.class_count
    torch.manual_seed(seed_for(training.seed, 2, t))
    channels_last = {"device": state.device, "memory_format": torch.channels_last_3d}
    image, view1, view2 = (x.to(**channels_last) for x in (batch.image, batch.view1, batch.view2))
    annotation, index = (upload(x, state.device) for x in (batch.annotation, batch.index))
    labeled = len(annotation)
    volumes = image[:, 0]
    state.student.train()
    state.teacher.train()  # its dropout is the Monte-Carlo dropout, its batch norm uses the batch

    # 1. registration steps without labels
    with phase("registration"):
        registration_loss = state.registration_steps(volumes, None)
    # 2. registration labels
    with phase("propagation"):
        label_reg = registration_labels(
            state.registration, volumes[:labeled], batch.annotation, index, classes, registration, state.amp
        )

    # 3. student on the clean view, teacher on the noisy one; the whole batch, for the batch norm's sake
    with phase("student"), state.autocast():
        logits_s = state.student(image)[:labeled].float()
    with phase("teacher"), state.autocast(), torch.no_grad():
        logits_t = state.teacher(selfpaced.clipped_noise(image, selection))[:labeled].float()
        probability_t = logits_t.softmax(1)

    # 8, first half: the host fills the holes of these labels while a GPU goes on with the passes that follow
    with phase("losses"):
        w_p = selfpaced.fusion_weight(t / training.fusion_iterations, training.fusion, training.fusion_power)
        fused = fuse(label_reg, probability_t, w_p)

    # 5, first half: the mixed image m comes before step 4 here, because the mask of step 4 selects voxels of m
    height, width = image.shape[2:4]
    box = selfpaced.random_box(height, width)
    mixed = box.paste(view1, view2)
    with phase("teacher"), state.autocast(), torch.no_grad():
        logits = box.paste(state.teacher(view1), state.teacher(view2))
        pseudo_label = logits.max(1).indices  # argmax is the same, and many times slower on CPUs

    # 4. SU: Monte-Carlo entropy, and the K least uncertain voxels of the batch
    with phase("teacher"), torch.no_grad():
        total = state.monte_carlo(mixed)
        weight = selfpaced.ramp(t, selection)
        epoch = t // max(1, config.data.n_labeled // training.batch_labeled)
        lam = selfpaced.threshold(epoch, selection)
        keep = selfpaced.keep_count(
            image[0, 0].numel(), state.last_loss, lam, weight * selfpaced.tau(t, selection)
        )
        entropy, mask = uncertainty_mask(total, selection.passes, keep)

    # 5, second half: student on m
    with phase("student"), state.autocast():
        encoded_m = state.student.encode(mixed)
        decoded_m = state.student.decode(encoded_m)
        logits_m = state.student.classify(decoded_m).float()
        features_m = state.student.project(encoded_m).float()
        with torch.no_grad():
            classes_m = state.student.class_map(decoded_m).float()

    # 6. unsupervised loss over the selected voxels
    with phase("losses"):
        ce_m, dice_m, dice_all = masked_ce_dice(logits_m, pseudo_label, mask, selection.unsupervised_ce)
        loss_u = weight * (ce_m + dice_m)
        state.last_loss = (ce_m + dice_all).detach().double()

    # 7. SC: no loss needs A2's decoder, nor gradients through A1's
    with phase("student"), state.autocast():
        encoded_a = state.student.encode(view1)
        features_a = state.student.project(encoded_a).float()
        features_b = state.student.project(state.student.encode(view2)).float()
        with torch.no_grad():
            classes_a = state.student.class_map(state.student.decode(encoded_a)).float()
    with phase("losses"):
        loss_c = weight * contrastive_loss(
            features_a, features_b, features_m, classes_a, classes_m, selection.negatives, selection.temperature,
            selection.contrast == "bidirectional",
        )

    # 8, second half: fused labels, and the supervised loss on them
    with phase("losses"):
        label_seg, label = fused.finished(annotation, index)
        weights = voxel_weights(
            label_reg, label_seg, index, t, training.distance_decay, training.disagreement_from,
            training.label_weights == "truncated",
        )
        ce, dice = weighted_ce_dice(logits_s, label.long(), weights)
        loss_s = 0.5 * (ce + 0.3 * dice)

    # 9. one SGD step, then the teacher's moving average
    loss = loss_s + loss_u + loss_c
    for group in state.sgd.param_groups:
        group["lr"] = training.lr * training.lr_factor ** (t // training.lr_every)
    state.sgd.zero_grad(set_to_none=True)
    with phase("student"):
        state.scaler.scale(loss).backward()
    with phase("optimizer"):
        state.scaler.step(state.sgd)
        state.scaler.update()
        update_teacher(state.teacher, state.student, t, training.ema, state.average)

    # 10. registration steps on the fused labels
    with phase("registration"):
        supervised_registration_loss = state.registration_steps(volumes[:labeled], foreground_masks(label, classes))
    state.iteration += 1
    return Outputs(
        metrics={
            "loss": loss.detach(), "loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "loss_c": loss_c.detach(),
            "loss_registration": registration_loss, "loss_registration_labels": supervised_registration_loss,
            "loss_pace": state.last_loss, "lambda": lam, "w": weight, "w_p": w_p, "K": keep,
            "entropy": entropy.mean(),
        },
        registration=label_reg, fused=label, prediction=logits_s.detach().max(1).indices.to(torch.uint8),
        mixed=mixed, mask=mask,
    )


def foreground_dice(name: str, prediction: Tensor, reference: Tensor, values: Sequence[int]) -> dict[str, float]:
    """Dice of two labels in [0, C) averaged over foreground classes, as ``name``, for monitoring; 1 where both are
    empty. Several classes stand beside it, each as ``name_VALUE``; ``values`` are the classes' label values."""
    reference, dice = reference.to(prediction.device), {}
    for c, value in enumerate(values[1:], 1):
        p, r = prediction == c, reference == c
        total = int(p.sum()) + int(r.sum())
        dice[f"{name}_{value}"] = 2 * int((p & r).sum()) / total if total else 1.0
    return {name: sum(dice.values()) / len(dice)} | (dice if len(dice) > 1 else {})
