"""The joint iteration in its straightforward formulation: what bench_step measures the engine against.

The same numbers from the same seed (bench_step compares them before it times), computed the way this literature's code
does: float32, contiguous tensors, plain PyTorch operators, labels carried slice by slice through the host, T outputs
stored and sorted, an N x N contrastive loss, every network run from end to end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spss_fast.data.sampling import Batch
from spss_fast.engine import selfpaced
from spss_fast.engine.pseudo_labels import fuse, restore_annotation, voxel_weights
from spss_fast.engine.registration import registration_steps, sample_pairs
from spss_fast.engine.step import State, seed_for
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet, update_teacher
from spss_fast.ops.losses import reference_masked_ce_dice, reference_weighted_ce_dice
from spss_fast.settings import RegistrationSettings


def plain(network: nn.Module) -> nn.Module:
    """``network``, a V-Net or a registration net, of nothing but PyTorch's layers, in its default memory format."""
    if isinstance(network, VNet):
        for block in (network.block_one, network.block_nine):
            ours = block.conv[0]
            block.conv[0] = nn.Conv3d(ours.in_channels, ours.out_channels, 3, padding=1)
            block.conv[0].weight, block.conv[0].bias = ours.weight, ours.bias
        network.__class__ = _PlainVNet
    else:
        network.__class__ = _PlainRegistrationNet
    return network.to(memory_format=torch.contiguous_format)


class _PlainVNet(VNet):
    """Dropout on the feature map, and the class map from logits of full resolution."""

    def classify(self, decoded: Tensor) -> Tensor:
        return self.out_conv(self.dropout(decoded))

    def class_map(self, decoded: Tensor) -> Tensor:
        logits = self.out_conv(decoded)
        return F.interpolate(logits, scale_factor=1 / 8, mode="trilinear", align_corners=False)


class _PlainRegistrationNet(RegistrationNet):
    """Upsample, concatenate, convolve."""

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        levels = [torch.cat([moving, fixed], 1)]
        for block in self.enc:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in self.dec[:3]:
            x = torch.cat([F.interpolate(block(x), scale_factor=2), levels.pop()], 1)
        x = self.dec[4](self.dec[3](x))
        x = torch.cat([F.interpolate(x, scale_factor=2), levels.pop()], 1)
        return self.flow(self.vm2_conv(self.dec[5](x)))


def to_plain(state: State) -> State:
    """Its networks plain, and in float32."""
    for network in (state.student, state.teacher, state.registration):
        plain(network)
    for parameter, own in state.sgd.state.items():  # a fused step on a GPU takes no momentum of another memory format
        own["momentum_buffer"] = torch.zeros_like(parameter)
    state.amp = None
    return state


def slice_chain(flow_of: Callable[[int, int, int], Tensor], labels: Tensor, index: Tensor, depth: int,
                settings: RegistrationSettings) -> Tensor:
    """The chain of slices with this literature's tools: F.grid_sample, SimpleITK components, OpenCV morphology.

    ``flow_of(volume, z, to)`` is the displacement (2, H, W) that takes slice z to slice ``to``; ``labels`` (B, H, W)
    are the annotated slices. Returns uint8 (B, H, W, D) on the CPU.
    """
    import cv2  # of the bench extra

    batch, height, width = labels.shape
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (settings.opening, settings.opening))
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (settings.closing, settings.closing))
    axes = [torch.arange(side, dtype=torch.float32, device=labels.device) for side in (height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    out = np.zeros((batch, height, width, depth), np.uint8)

    def moved(current: np.ndarray, flow: Tensor) -> np.ndarray:
        position = grid + flow
        normalised = torch.stack([2 * position[1] / (width - 1) - 1, 2 * position[0] / (height - 1) - 1], -1)
        moving = torch.from_numpy(current).to(labels.device, torch.float32)[None, None]
        warped = F.grid_sample(moving, normalised[None], "nearest", align_corners=True)[0, 0]
        return warped.to(torch.uint8).cpu().numpy()

    def cleaned(current: np.ndarray, distance: int) -> np.ndarray:
        components = sitk.ConnectedComponent(sitk.GetImageFromArray(current), True)
        current = sitk.GetArrayFromImage(sitk.RelabelComponent(components, sortByObjectSize=True) == 1)
        far = distance > settings.far_distance
        times = settings.far_iterations if far else 1
        current = cv2.morphologyEx(current, cv2.MORPH_OPEN, cross, iterations=times)
        return cv2.morphologyEx(current, cv2.MORPH_CLOSE, square) if far else current

    for b, start in enumerate(index.tolist()):
        out[b, :, :, start] = labels[b].cpu().numpy()
        for step, stop in ((1, depth), (-1, -1)):
            current = out[b, :, :, start].copy()
            for z in range(start + step, stop, step):
                current = cleaned(moved(current, flow_of(b, z - step, z)), abs(z - start))
                out[b, :, :, z] = current
    return torch.from_numpy(out)


def carried_labels(network, volumes: Tensor, annotation: Tensor, index: Tensor,
                   settings: RegistrationSettings) -> Tensor:
    """Step 2, the network run slice by slice."""

    @torch.no_grad()
    def flow_of(volume: int, z: int, to: int) -> Tensor:
        moving, fixed = volumes[volume, None, None, :, :, z], volumes[volume, None, None, :, :, to]
        return network(moving.contiguous(), fixed.contiguous())[0]

    annotation = annotation.to(volumes.device)
    labels = slice_chain(flow_of, annotation, index, volumes.shape[-1], settings)
    return restore_annotation(labels.to(volumes.device), annotation, index)


def least_uncertain(outputs: list[Tensor], keep: int) -> Tensor:
    """Step 4 on T stored outputs: mean softmax, entropy, and a sort of every voxel."""
    p = torch.stack(outputs).softmax(2).mean(0)
    entropy = -(p * (p + 1e-6).log()).sum(1)
    mask = torch.zeros(entropy.numel(), dtype=torch.bool, device=entropy.device)
    mask[entropy.flatten().argsort(stable=True)[:keep]] = True
    return mask.view_as(entropy)


def contrastive_n_by_n(a: Tensor, b: Tensor, n: Tensor, logits_a: Tensor, logits_n: Tensor, k: int,
                       temperature: float) -> Tensor:
    """Step 7 with all N x N similarities, and per anchor a search for the k most confident voxels of another class."""
    a, b, n = (F.normalize(x.movedim(1, -1).flatten(0, -2), dim=1) for x in (a, b, n))
    confidence, predicted = (x.flatten() for x in logits_n.softmax(1).max(1))
    other_class = logits_a.argmax(1).flatten()[:, None] != predicted
    ranked, chosen = torch.where(other_class, confidence, -1.0).topk(k, dim=1)
    positive = (a * b).sum(1, keepdim=True) / temperature
    loss = 0
    for query in (a, b):
        negative = (query @ n.T / temperature).gather(1, chosen).masked_fill(ranked < 0, -torch.inf)
        loss = loss + (torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]).mean()
    return loss


def joint_iteration(state: State, batch: Batch) -> dict[str, Tensor]:
    """METHOD's steps 1 to 10 on the same random numbers as ``engine.step.joint_iteration``; returns the losses.

    To be called under ``backend("reference")``, which takes time to enter.
    """
    config, t = state.config, state.iteration
    registration, selection, training = config.registration, config.selection, config.training
    torch.manual_seed(seed_for(training.seed, 2, t))
    image, view1, view2 = (x.to(state.device) for x in (batch.image, batch.view1, batch.view2))
    annotation, index = batch.annotation.to(state.device), batch.index.to(state.device)
    labeled, volumes = len(annotation), image[:, 0]

    pairs, labeled_pairs = (sample_pairs(x, registration) for x in (volumes, volumes[:labeled]))

    def steps(volumes: Tensor, labels: Tensor | None, pairs: tuple[Tensor, ...]) -> Tensor:
        return registration_steps(state.registration, state.adam, volumes, labels, pairs, registration, None)

    loss_registration = steps(volumes, None, pairs)  # 1
    label_reg = carried_labels(state.registration, volumes[:labeled], annotation, index, registration)  # 2

    logits_s = state.student(image)[:labeled]  # 3
    with torch.no_grad():
        probability_t = state.teacher(selfpaced.clipped_noise(image, selection))[:labeled].softmax(1)
        box = selfpaced.random_box(*image.shape[2:4])  # 5
        mixed = box.paste(view1, view2)
        pseudo_label = box.paste(state.teacher(view1), state.teacher(view2)).argmax(1)
        outputs = [state.teacher(selfpaced.clipped_noise(mixed, selection)) for _ in range(selection.passes)]  # 4
    weight = selfpaced.ramp(t, selection)
    lam = selfpaced.threshold(t // config.batches_per_epoch, selection)
    rate = weight * selfpaced.tau(t, selection)
    mask = least_uncertain(outputs, int(selfpaced.keep_count(image[0, 0].numel(), state.last_loss, lam, rate)))

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = state.student.encode(x)
        decoded = state.student.decode(encoded)
        logits = state.student.classify(decoded)
        return logits, state.student.project(encoded), state.student.class_map(decoded)

    logits_m, features_m, classes_m = run(mixed)
    ce_m, dice_m, dice_all = reference_masked_ce_dice(logits_m, pseudo_label, mask, selection.unsupervised_ce)  # 6
    loss_u = weight * (ce_m + dice_m)
    state.last_loss = (ce_m + dice_all).detach().double()

    _, features_a, classes_a = run(view1)  # 7
    _, features_b, _ = run(view2)
    loss_c = weight * contrastive_n_by_n(
        features_a, features_b, features_m, classes_a, classes_m, selection.negatives, selection.temperature
    )
    w_p = selfpaced.fusion_weight(t / training.fusion_iterations, training.fusion, training.fusion_power)  # 8
    label_seg, label = fuse(label_reg, probability_t, w_p, annotation, index)
    weights = voxel_weights(label_reg, label_seg, index, t, training.distance_decay, training.disagreement_from, False)
    ce, dice = reference_weighted_ce_dice(logits_s, label.long(), weights)
    loss_s = 0.5 * (ce + 0.3 * dice)

    state.sgd.zero_grad()  # 9
    (loss_s + loss_u + loss_c).backward()
    state.sgd.step()
    update_teacher(state.teacher, state.student, t, training.ema)
    steps(volumes[:labeled], label[:, None], labeled_pairs)  # 10
    state.iteration += 1
    return {"loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "loss_c": loss_c.detach(),
            "loss_registration": loss_registration}
