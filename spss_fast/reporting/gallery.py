"""The gallery's cases: which they are, what the networks make of them, and the slices that tell most."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from spss_fast.data.annotations import Annotation, read_annotations
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.geometry import PLANES
from spss_fast.data.layouts import find_cases
from spss_fast.data.sampling import annotated_slice, index_in_file
from spss_fast.engine import selfpaced
from spss_fast.engine.device import resolve_amp
from spss_fast.engine.evaluation import Rows
from spss_fast.engine.inference import sliding_window
from spss_fast.engine.progress import Progress
from spss_fast.engine.pseudo_labels import fuse, registration_labels
from spss_fast.engine.registration import outward_flows
from spss_fast.engine.weights import load_student
from spss_fast.errors import UserError
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import teacher_of
from spss_fast.ops.uncertainty import uncertainty_mask
from spss_fast.reporting.record import Record, measured
from spss_fast.settings import DataSettings


@dataclass
class Example:
    """One case of the gallery. ``labels`` are (H, W, D) uint8 in [0, C), by name; that of the annotated slice is 0
    elsewhere."""

    name: str
    rank: str  # why this case, such as "worst of 20"
    scores: dict[str, float]  # as evaluated; empty where that was not done
    image: np.ndarray  # (H, W, D) float32
    spacing: tuple[float, float, float]
    labels: dict[str, np.ndarray]
    entropy: np.ndarray | None  # (H, W, D) float32; None before any joint iteration
    head_last: bool  # whether axis 1 runs to the patient's head, as in coronal and sagittal slices
    in_file: list[int]  # of every slice, which one of the scan's file it is, from 0 along the file's slice axis
    annotated: int | None = None
    slices: list[tuple[int, str]] = field(default_factory=list)  # slice, and why this one


@dataclass
class Gallery:
    """Examples of the test cases, of the annotated training volumes, and what could not be shown."""

    tested: list[Example] = field(default_factory=list)
    annotated: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def missed_and_added(label: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ``label`` misses ``reference`` and where it adds to it, both bool; a voxel of the wrong class is both."""
    wrong = label != reference
    return wrong & (reference > 0), wrong & (label > 0)


class _Networks:
    """The networks of a checkpoint, and what they say about one volume."""

    def __init__(self, record: Record, device: torch.device):
        content = record.content
        self.config, self.iteration, self.device = record.config, record.iteration, device
        self.amp = resolve_amp(record.config.training.amp, device)
        self.student = load_student(content, device)
        # the same network, in training mode as ever: its dropout is the Monte-Carlo dropout
        self.teacher = teacher_of(load_student(content | {"student": content["teacher"]}, device)).train()
        self.registration = RegistrationNet().to(device, memory_format=torch.channels_last)
        self.registration.load_state_dict(content["registration"])

    def window(self, network: nn.Module, image: torch.Tensor, statistics: str = "running") -> torch.Tensor:
        """Mean softmax (C, H, W, D) over windows that overlap by half."""
        patch = self.config.data.patch
        return sliding_window(
            network, image, patch, [side // 2 for side in patch], self.amp, statistics=statistics
        )

    def predict(self, image: torch.Tensor) -> np.ndarray:
        """The student's label, (H, W, D) uint8."""
        probability = self.window(self.student, image, self.config.network.statistics)
        return probability.argmax(0).to(torch.uint8).cpu().numpy()

    def uncertainty(self, image: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """METHOD step 4 on a whole volume: entropy (H, W, D) of the teacher's mean softmax; and one pass's softmax
        (C, H, W, D), as step 8 fuses it."""
        selection, total = self.config.selection, None
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.training.seed)
            for _ in range(selection.passes):
                noisy = selfpaced.clipped_noise(image.to(self.device), selection)
                probability = self.window(self.teacher, noisy)
                total = probability if total is None else total + probability
        entropy, _ = uncertainty_mask(total[None], selection.passes, 0)
        return entropy[0].cpu().numpy(), probability

    def labels(self, image: torch.Tensor, annotation: torch.Tensor, index: int) -> torch.Tensor:
        """The registration label, (1, H, W, D) uint8."""
        where = torch.tensor([index], device=self.device)
        return registration_labels(
            outward_flows(self.registration, image[None].to(self.device), where, self.amp), annotation[None], where,
            self.config.data.class_count, self.config.registration,
        )

    def fused(self, label: torch.Tensor, probability: torch.Tensor, annotation: torch.Tensor, index: int) -> np.ndarray:
        """The fused label as the last iteration makes it, (H, W, D) uint8."""
        training = self.config.training
        progress = max(0, self.iteration - 1) / training.fusion_iterations
        weight = selfpaced.fusion_weight(progress, training.fusion, training.fusion_power)
        where = torch.tensor([index], device=self.device)
        _, fused = fuse(label, probability[None], weight, annotation[None].to(self.device), where)
        return fused[0].cpu().numpy()


def gallery(
    record: Record, count: int, device: torch.device, console: Console, data_dir: Path | None = None
) -> Gallery:
    """``count`` test cases and as many annotated volumes, from the worst to the best, with labels made anew from the
    run's checkpoint. What cannot be shown is said in ``notes``: no checkpoint, no scans."""
    made = Gallery()
    if record.content is None:
        made.notes.append("There is no checkpoint yet, so no network to draw labels with.")
        return made
    recorded, data = record.cases, record.config.data
    tested = _chosen(record.evaluation, recorded["test"], count)
    annotated = _chosen(record.labels, list(recorded["annotated"]), count)
    try:
        own = data.dataset, Path(data_dir or record.data_dir)
        measured = ("folder", Path(record.about["data_dir"])) if record.foreign else own
        prepared = [_prepared(*measured, tested, data), _prepared(*own, annotated, data)]  # names may be in both
    except UserError as error:
        made.notes.append(f"The scans could not be read: {error}. Where they lie now is what --data-dir says.")
        return made
    try:
        given = read_annotations(data)
    except UserError as error:
        given, annotated, prepared[1] = {}, {}, {}
        made.notes.append(f"Annotated volumes are left out, as their annotations could not be read: {error}.")
    lost = [name for names, found in zip((tested, annotated), prepared) for name in names if name not in found]
    if lost:
        made.notes.append(f"Not in the data folder, and so not shown: {', '.join(lost)}. Where the scans lie now is "
                          "what --data-dir says.")
    if not record.iteration:
        made.notes.append("No joint iteration is behind the checkpoint: predictions, fused labels and uncertainty are "
                          "left out, as the student has learnt nothing yet.")
    networks = _Networks(record, device)
    jobs = [(case, tested[name], False) for name, case in prepared[0].items() if record.iteration]
    jobs += [(case, annotated[name], True) for name, case in prepared[1].items()]
    with Progress(console, "gallery", len(jobs)) as progress:
        for done, (case, rank, labeled) in enumerate(jobs, 1):
            if labeled:
                example = _annotated_example(networks, case, rank, record, given)
                made.annotated.append(example)
            else:
                made.tested.append(_tested_example(networks, case, rank, record))
            progress.update(done, case.name)
    bare = [example.name for example in made.annotated if "reference" not in example.labels]
    if bare:
        made.notes.append(f"No label beside the annotated slice, so nothing to compare with: {', '.join(bare)}.")
    return made


def _chosen(rows: Rows | None, names: Sequence[str], count: int) -> dict[str, str]:
    """``count`` cases spread evenly from the worst to the best of those that have a Dice, each with its place; by list
    where none is measured."""
    ordered = list(measured(rows)) if rows else list(names)
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return {ordered[place]: _rank(place, len(ordered), bool(rows)) for place in places}


def _rank(place: int, total: int, measured: bool) -> str:
    if not measured:
        return f"number {place + 1} of {total}"
    if place in (0, total - 1) and total > 1:
        return f"{'best' if place else 'worst'} of {total}"
    return f"median of {total}" if place == round((total - 1) / 2) else f"rank {place + 1} of {total} from the worst"


def _prepared(
    dataset: str, folder: Path, names: Collection[str], settings: DataSettings
) -> dict[str, PreparedCase]:
    cases = {case.name: case for case in find_cases(dataset, folder)}
    return {case.name: case for case in prepare([cases[name] for name in names if name in cases], settings)}


def _tested_example(networks: _Networks, case: PreparedCase, rank: str, record: Record) -> Example:
    image = torch.from_numpy(case.image)
    labels = {"prediction": networks.predict(image)}
    entropy, _ = networks.uncertainty(image)
    if case.has_full_label:
        labels["reference"] = np.asarray(case.full_label())
    scores = (record.evaluation or {}).get(case.name, {})
    example = Example(case.name, rank, scores, case.image, case.spacing, labels, entropy, _head_last(case),
                      _in_file(case))
    if "reference" in labels:
        doubt, why, whole = labels["prediction"] != labels["reference"], "largest disagreement", "reference"
    else:
        doubt, why, whole = entropy, "most uncertain", "prediction"
    first = _largest(doubt)
    example.slices = [(first, why), (_largest(labels[whole] > 0), f"largest section of the {whole}")]
    if example.slices[1][0] == first:
        far = np.abs(np.arange(doubt.shape[2]) - first) > doubt.shape[2] // 8
        example.slices.append((_largest(doubt * far), f"{why} elsewhere"))
    example.slices = _distinct(example.slices)
    return example


def _annotated_example(
    networks: _Networks, case: PreparedCase, rank: str, record: Record, given: dict[str, Annotation]
) -> Example:
    image, index = torch.from_numpy(case.image), record.cases["annotated"][case.name]
    annotation = annotated_slice(case, index, given.get(case.name), record.config.data)
    label = networks.labels(image, annotation, index)
    drawn = np.zeros(case.image.shape, np.uint8)
    drawn[:, :, index] = annotation.numpy()
    labels, entropy = {"annotated": drawn, "registration": label[0].cpu().numpy()}, None
    if record.iteration:
        entropy, probability = networks.uncertainty(image)
        fused = networks.fused(label, probability, annotation, index)
        labels |= {"fused": fused, "prediction": networks.predict(image)}
    full = case.full_label()
    if full is not None:
        labels["reference"] = np.asarray(full)
    example = Example(
        case.name, rank, (record.labels or {}).get(case.name, {}), case.image, case.spacing, labels, entropy,
        _head_last(case), _in_file(case), index,
    )
    example.in_file[index] = index_in_file(case, index, given.get(case.name))
    example.slices = [(index, "annotated")]
    other = labels.get("reference", labels.get("prediction"))
    if other is not None:
        against = "reference" if "reference" in labels else "prediction"
        why = f"registration label and {against} differ most"
        example.slices.append((_largest(labels["registration"] != other), why))
    example.slices = _distinct(example.slices)
    return example


def _head_last(case: PreparedCase) -> bool:
    return case.grid.patient_axes()[1] == PLANES["axial"]


def _in_file(case: PreparedCase) -> list[int]:
    return [case.slice_to_source(z) for z in range(case.image.shape[2])]


def _largest(values: np.ndarray) -> int:
    """The slice with the largest sum."""
    return int(values.sum((0, 1)).argmax())


def _distinct(slices: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """One entry for each slice, with all that it was chosen for."""
    reasons: dict[int, list[str]] = {}
    for place, why in slices:
        reasons.setdefault(place, []).append(why)
    return [(place, ", ".join(why)) for place, why in reasons.items()]
