"""One joint iteration of stage 2, and what it works on (METHOD, stage 2, steps 1 to 10)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spss_fast.data.sampling import Batch
from spss_fast.engine import optimizers, selfpaced
from spss_fast.engine.beside import InTurn, choose_beside
from spss_fast.engine.device import upload
from spss_fast.engine.graphs import Replayed
from spss_fast.engine.profiling import phase
from spss_fast.engine.pseudo_labels import foreground_masks, fuse, registration_labels, voxel_weights
from spss_fast.engine.registration import outward_flows, registration_steps, sample_pairs
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet, teacher_of, update_teacher
from spss_fast.ops.contrastive import contrastive_loss
from spss_fast.ops.losses import masked_ce_dice, weighted_ce_dice
from spss_fast.ops.uncertainty import uncertainty_mask
from spss_fast.settings import Config


@dataclass
class State:
    """Everything that training changes: networks, optimizers, the clock, and the pace of the last iteration.

    Registration runs beside the V-Nets, on a GPU on a second stream: many small kernels, which leave most of the GPU to
    them. So between two iterations call ``beside.settle()`` before anything here is read or changed. On a GPU the
    networks' work is launched as CUDA graphs.
    """

    config: Config
    device: torch.device
    amp: torch.dtype | None  # autocast type of the networks' forward passes; None is float32
    student: VNet = field(init=False)
    teacher: VNet = field(init=False)
    registration: RegistrationNet = field(init=False)
    sgd: torch.optim.Optimizer = field(init=False)
    adam: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)  # of the student's loss; does nothing but in fp16
    registration_scaler: torch.amp.GradScaler = field(init=False)
    # the functions of the same names below; on a GPU each is one launch
    registration_steps: Callable[..., Tensor] = field(init=False)
    outward_flows: Callable[[Tensor, Tensor], Tensor] = field(init=False)
    teacher_passes: Callable[..., tuple[Tensor, ...]] = field(init=False)
    monte_carlo: Callable[[Tensor], Tensor] = field(init=False)
    student_passes: Callable[..., tuple[Tensor, ...]] = field(init=False)
    epoch: int = 0  # of stage 1
    iteration: int = 0  # t, of stage 2
    average: optimizers.Average = field(init=False)  # how the teacher follows the student
    last_loss: Tensor = field(init=False)  # L_pace of the last iteration; inf before the first
    beside: InTurn = field(init=False)  # where registration runs

    def __post_init__(self) -> None:
        network, training = self.config.network, self.config.training
        torch.manual_seed(training.seed)
        # channels last is what the convolutions of CPUs and GPUs are fastest in; apex knows it for two axes, not three
        layout = torch.channels_last_3d if training.optimizer == "torch" else torch.contiguous_format
        self.student = VNet(self.config.data.class_count, network.filters, network.dropout).to(
            self.device, memory_format=layout
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
        self.last_loss = torch.tensor(float("inf"), dtype=torch.float64, device=self.device)
        functions = _registration_steps, _outward_flows, teacher_passes, monte_carlo, student_passes
        bound = [functools.partial(f, self) for f in functions]
        self.beside = choose_beside(self.device, (self.student, self.teacher), training.deterministic)
        if self.device.type == "cuda":
            bound[1:] = (Replayed(bound[1], "propagation", priority=-1), Replayed(bound[2], "teacher"),
                         Replayed(bound[3], "teacher"), Replayed(bound[4], "student", self.student.parameters()))
            # Adam's steps are part of the graph: apex's counts them on the host, and a gradient scaler's `step` and
            # `update` have not been tried in one (the student's only scales the loss there, and steps outside)
            if not scaled and training.optimizer == "torch":
                bound[0] = Replayed(bound[0], "registration", priority=-1)
        (self.registration_steps, self.outward_flows, self.teacher_passes, self.monte_carlo,
         self.student_passes) = bound

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
    settings = state.config.registration
    for batch in batches:
        volumes = batch.image.to(state.device)[:, 0]
        loss = state.registration_steps(volumes, None, *sample_pairs(volumes, settings))
    state.epoch += 1
    return loss


def _registration_steps(state: State, volumes: Tensor, labels: Tensor | None, *pairs: Tensor) -> Tensor:
    with phase("registration"):
        return registration_steps(
            state.registration, state.adam, volumes, labels, pairs, state.config.registration, state.amp,
            state.registration_scaler,
        )


def _outward_flows(state: State, volumes: Tensor, index: Tensor) -> Tensor:
    with phase("propagation"):
        return outward_flows(state.registration, volumes, index, state.amp)


@torch.no_grad()
def teacher_passes(state: State, image: Tensor, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's softmax on the noisy image (step 3), and its logits on the views (step 5)."""
    with phase("teacher"), state.autocast():
        noisy = state.teacher(selfpaced.clipped_noise(image, state.config.selection))
        return noisy.float().softmax(1), state.teacher(view1), state.teacher(view2)


def monte_carlo(state: State, mixed: Tensor) -> Tensor:
    """Sum of the softmax of the Monte-Carlo passes (step 4)."""
    config = state.config
    with phase("teacher"):
        return selfpaced.monte_carlo(state.teacher, mixed, config.data.class_count, config.selection, state.amp)


def student_passes(
    state: State, image: Tensor, mixed: Tensor, view1: Tensor, view2: Tensor, label: Tensor, weights: Tensor,
    pseudo_label: Tensor, mask: Tensor, ramp: Tensor,
) -> tuple[Tensor, ...]:
    """The student's passes, the losses, and their gradients in its parameters (steps 3 and 5 to 9).

    ``label`` and ``weights`` (L, h, w, d) belong to the first volumes of ``image``, ``pseudo_label`` and ``mask``
    (B, h, w, d) to ``mixed``; ``ramp`` is w(t), a scalar. Returns the loss, L_s, L_u, L_c and L_pace, and the
    student's labels (L, h, w, d) uint8, all detached.
    """
    student, selection, labeled = state.student, state.config.selection, len(label)
    parameters = list(student.parameters())
    student.zero_grad(set_to_none=True)
    with phase("student"), state.autocast():
        # 3. on the clean view; the whole batch, for the batch norm's sake
        logits_s = student(image)[:labeled].float()

    # 8. supervised loss on the fused labels, and 9. its gradients
    def supervise() -> tuple[Tensor | None, ...]:
        with phase("losses"):
            ce, dice = weighted_ce_dice(logits_s, label.long(), weights)
            loss_s = 0.5 * (ce + 0.3 * dice)
        with phase("student"):
            gradients = torch.autograd.grad(state.scaler.scale(loss_s), parameters, allow_unused=True)
        return loss_s.detach(), *gradients

    # what follows shares nothing with them but the parameters: a CPU computes both at once, and on a GPU, where a graph
    # is of one stream, the feature maps are gone by then
    supervised = (state.beside if state.device.type == "cpu" else InTurn()).run(supervise)

    with phase("student"), state.autocast():
        # 5. on m
        encoded_m = student.encode(mixed)
        decoded_m = student.decode(encoded_m)
        logits_m, features_m = student.classify(decoded_m).float(), student.project(encoded_m).float()
        with torch.no_grad():
            classes_m = student.class_map(decoded_m).float()
        # 7. no loss needs A2's decoder, nor gradients through A1's
        encoded_a = student.encode(view1)
        features_a = student.project(encoded_a).float()
        features_b = student.project(student.encode(view2)).float()
        with torch.no_grad():
            classes_a = student.class_map(student.decode(encoded_a)).float()
    with phase("losses"):
        # 6. unsupervised loss over the selected voxels
        ce_m, dice_m, dice_all = masked_ce_dice(logits_m, pseudo_label, mask, selection.unsupervised_ce)
        loss_u = ramp * (ce_m + dice_m)
        # 7. SC
        loss_c = ramp * contrastive_loss(
            features_a, features_b, features_m, classes_a, classes_m, selection.negatives, selection.temperature,
            selection.contrast == "bidirectional",
        )
    # 9. gradients of L_u + L_c, and those of L_s
    with phase("student"):
        state.scaler.scale(loss_u + loss_c).backward()
        loss_s, *gradients = supervised.receive()
        both = [(p.grad, g) for p, g in zip(parameters, gradients) if g is not None]  # L_u reaches all that L_s does
        torch._foreach_add_(*map(list, zip(*both)))
    losses = (loss_s + loss_u + loss_c, loss_s, loss_u, loss_c, (ce_m + dice_all).double())
    return *(x.detach() for x in losses), logits_s.detach().max(1).indices.to(torch.uint8)


def joint_iteration(state: State, batch: Batch) -> Outputs:
    """Stage 2, one iteration: the numbered steps are METHOD's.

    On a GPU it returns before that has done the work. ``batch`` is ready there in ``state.beside.place()``, and the
    outputs may be looked at after ``state.beside.settle()``.
    """
    config, t = state.config, state.iteration
    registration, selection, training = config.registration, config.selection, config.training
    classes, labeled = config.data.class_count, len(batch.annotation)
    torch.manual_seed(seed_for(training.seed, 2, t))
    state.student.train()
    state.teacher.train()  # its dropout is the Monte-Carlo dropout, its batch norm uses the batch

    def upload_and_draw() -> tuple[Tensor, ...]:
        channels_last = {"device": state.device, "memory_format": torch.channels_last_3d}
        image, view1, view2 = (x.to(**channels_last) for x in (batch.image, batch.view1, batch.view2))
        annotation, index = (upload(x, state.device) for x in (batch.annotation, batch.index))
        pairs = *sample_pairs(image[:, 0], registration), *sample_pairs(image[:labeled, 0], registration)
        return image, view1, view2, annotation, index, *pairs

    image, view1, view2, annotation, index, *pairs = state.beside.run(upload_and_draw).receive()
    volumes = image[:, 0]

    # 1. registration steps without labels, and 2. registration labels, beside the teacher's passes
    def register() -> tuple[Tensor, Tensor]:
        loss = state.registration_steps(volumes, None, *pairs[:3])
        flows = state.outward_flows(volumes[:labeled], index)
        with phase("propagation"):
            return loss, registration_labels(flows, batch.annotation, index, classes, registration)

    registered = state.beside.run(register)

    # 3 and 5, the teacher's half: on the noisy image and on both views
    probability_t, logits_1, logits_2 = state.teacher_passes(image, view1, view2)

    # 8. fused labels, and 10. registration steps on them, beside the passes of steps 4 to 9
    w_p = selfpaced.fusion_weight(t / training.fusion_iterations, training.fusion, training.fusion_power)

    def fuse_labels(probability_t: Tensor) -> tuple[Tensor, Tensor]:
        with phase("losses"):
            return fuse(registered.value[1], probability_t[:labeled], w_p, annotation, index)

    def register_fused() -> Tensor:
        masks = foreground_masks(fused.value[1], classes)
        return state.registration_steps(volumes[:labeled], masks, *pairs[3:])

    fused = state.beside.run(fuse_labels, probability_t)
    registered_fused = state.beside.run(register_fused)

    # 5. the mixed image m comes before step 4 here, because the mask of step 4 selects voxels of m
    box = selfpaced.random_box(*image.shape[2:4])
    mixed = box.paste(view1, view2)
    pseudo_label = box.paste(logits_1, logits_2).max(1).indices  # argmax is the same, and many times slower on CPUs

    # 4. SU: Monte-Carlo entropy, and the K least uncertain voxels of the batch
    total = state.monte_carlo(mixed)
    with phase("teacher"):
        weight = selfpaced.ramp(t, selection)
        lam = selfpaced.threshold(t // config.batches_per_epoch, selection)
        keep = selfpaced.keep_count(
            image[0, 0].numel(), state.last_loss, lam, weight * selfpaced.tau(t, selection)
        )
        entropy, mask = uncertainty_mask(total, selection.passes, keep)

    # 8. weights of the supervised loss on the fused labels
    _, label_reg = registered.receive()
    label_seg, label = fused.receive()
    with phase("losses"):
        weights = voxel_weights(
            label_reg, label_seg, index, t, training.distance_decay, training.disagreement_from,
            training.label_weights == "truncated",
        )

    # 3, 5, 6, 7 and 9: the student's passes, all losses and their gradients
    ramp = torch.full((), weight, device=state.device)
    loss, loss_s, loss_u, loss_c, state.last_loss, prediction = state.student_passes(
        image, mixed, view1, view2, label, weights, pseudo_label, mask, ramp
    )

    # 9. one SGD step, then the teacher's moving average
    for group in state.sgd.param_groups:
        group["lr"] = training.lr * training.lr_factor ** (t // training.lr_every)
    with phase("optimizer"):
        state.scaler.step(state.sgd)
        state.scaler.update()
        update_teacher(state.teacher, state.student, t, training.ema, state.average)

    state.iteration += 1
    return Outputs(
        metrics={
            "loss": loss, "loss_s": loss_s, "loss_u": loss_u, "loss_c": loss_c,
            "loss_registration": registered.value[0], "loss_registration_labels": registered_fused.value,
            "loss_pace": state.last_loss, "lambda": lam, "w": weight, "w_p": w_p, "K": keep,
            "entropy": entropy.mean(),
        },
        registration=label_reg, fused=label, prediction=prediction, mixed=mixed, mask=mask,
    )


def foreground_dice(
    name: str, prediction: Tensor, reference: Tensor | None, values: Sequence[int]
) -> dict[str, float]:
    """Dice of two labels in [0, C) averaged over the foreground classes that either shows, as ``name``, for monitoring;
    NaN where that is none, and without a ``reference``. Several classes stand beside it, each as ``name_VALUE``;
    ``values`` are the classes' label values."""
    dice = {f"{name}_{value}": math.nan for value in values[1:]}
    if reference is not None:
        reference = reference.to(prediction.device)
        for c, of_class in enumerate(dice, 1):
            p, r = prediction == c, reference == c
            total = int(p.sum()) + int(r.sum())
            dice[of_class] = 2 * int((p & r).sum()) / total if total else math.nan
    known = [value for value in dice.values() if not math.isnan(value)]
    return {name: sum(known) / len(known) if known else math.nan} | (dice if len(dice) > 1 else {})
