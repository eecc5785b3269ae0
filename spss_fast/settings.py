"""Every setting, once: one dataclass per concern, and which values fit.

The defaults are the published method at full resolution (METHOD: 112 x 112 x 80, 6000 iterations).
``spss_fast.config`` puts the settings of a run together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from spss_fast.errors import UserError


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the text that ``--help`` shows for it; ``bare`` is what its flag means without a value,
    ``least`` and ``most`` bound its number (0 and infinity where they are not given)."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataSettings:
    """Which scans, and how they become training volumes."""

    dataset: str = setting("phantom", "data set: la, kits, phantom, or folder (any layout, recognised by its files)")
    data_dir: str = setting("", "folder of the scans (phantom: written there if empty)")
    annotations: str = setting(
        "", "CSV of case,slice naming the annotated slices, or folder of <case>/annotation.nii.gz with one annotated "
        "slice each; drawn at random where not given"
    )
    n_labeled: int = setting(
        16, "annotated volumes, one slice each: those that annotations names, then the first of the training list"
    )
    n_test: int = setting(20, "volumes split off for testing where the data set brings no train.list")
    patch: tuple[int, int, int] = setting((112, 112, 80), "training patch in voxels: height, width, slices")
    window: tuple[float, float] | None = setting(None, "intensity window mapped to [0, 1] before z-scoring (CT: HU)")
    body_crop: bool = setting(
        False, "crop to the body (largest component above -500 HU) before resampling", bare=True
    )
    resample: tuple[int, int, int] | None = setting(None, "voxels every volume is resampled to; none keeps the grid")
    plane: str = setting(
        "auto", "plane of the slices (auto: that of the annotation folder, else axial unless another axis is coarsest)",
        choices=("auto", "axial", "coronal", "sagittal"),
    )
    max_in_plane: int = setting(0, "centre-crop slices to at most this many voxels a side; 0 keeps them whole")
    foreground: tuple[int, ...] = setting((), "label values merged into the foreground; empty means every value > 0")
    classes: tuple[int, ...] = setting(
        (), "label values kept apart, each a class of its own, instead of one foreground; other values are background"
    )
    downsample: int = setting(
        1, "shrink volumes, patch and registration labels' morphology by this factor, and the schedule with them (a "
        "--settings file that does not name it is taken to be for full resolution, and shrunk too)"
    )
    cache_dir: str = setting("", "where prepared volumes are kept (default: $XDG_CACHE_HOME/spss_fast)")
    workers: int = setting(0, "processes that prepare volumes; 0 means one per core")
    loader: str = setting(
        "auto", "who cuts the training patches; both give the same (auto: dali on a GPU where it is installed)",
        choices=("auto", "dali", "torch"),
    )
    phantoms: int = setting(28, "phantom volumes to write when the phantom folder is empty", least=1)

    @property
    def class_values(self) -> tuple[int, ...]:
        """The label value of each class c of the networks: 0 of the background, then those of ``classes``; 1 of the
        one foreground where none are kept apart."""
        return (0, *(self.classes or (1,)))

    @property
    def class_count(self) -> int:
        """C, the channels of the segmentation networks: the background and every foreground class."""
        return len(self.class_values)


@dataclass
class NetworkSettings:
    """V-Net and its projector."""

    filters: int = setting(16, "channels of the V-Net's first level (8: half width)", least=1)
    dropout: float = setting(0.5, "channel dropout at the bottleneck and before the last convolution", most=1)
    statistics: str = setting(
        "running", "batch-norm statistics at inference: the running ones, or those of each case's own windows",
        choices=("running", "case"),
    )


@dataclass
class RegistrationSettings:
    """Stage 1 and the registration labels."""

    registration_epochs: int = setting(200, "stage 1: epochs of n_labeled/2 batches")
    registration_steps: int = setting(10, "Adam steps per batch, in both stages")
    registration_pairs: int = setting(32, "neighbouring slice pairs per step", least=1)
    registration_lr: float = setting(1e-4, "Adam learning rate of the registration network")
    similarity: str = setting("mse", "image similarity between warped and fixed slices", choices=("mse", "ncc"))
    opening: int = setting(5, "width in voxels of the cross that opens registration labels")
    closing: int = setting(5, "width in voxels of the square that closes far registration labels")
    far_distance: int = setting(10, "slices from the annotated one beyond which labels are cleaned harder")
    structures: int = setting(
        1, "components of the annotated slice carried each on their own (2: paired organs)", least=1
    )
    far_iterations: int = setting(5, "erosions, then dilations, of a far label's opening")


@dataclass
class SelectionSettings:
    """SU and SC: which voxels and which features to trust."""

    passes: int = setting(8, "Monte-Carlo dropout passes T of the teacher", least=1)
    noise: float = setting(0.1, "standard deviation of the noise on teacher inputs and views")
    noise_clip: float = setting(0.2, "bound of that noise")
    lambda_start: float = setting(0.1, "pace threshold at the start of stage 2")
    lambda_growth: float = setting(1.01, "growth of lambda per epoch")
    tau_start: float = setting(0.8, "tau at the start of stage 2")
    tau_growth: float = setting(1.4, "growth of tau every tau_every iterations")
    tau_every: int = setting(500, "iterations between growths of tau", least=1)
    ramp_every: int = setting(150, "iterations per step of the ramp w(t)", least=1)
    ramp_length: int = setting(40, "steps of the ramp w(t)", least=1)
    ramp_max: float = setting(0.1, "final value of the ramp w(t)")
    unsupervised_ce: str = setting(
        "probabilities", "input that the cross entropy of the unsupervised loss takes as logits",
        choices=("probabilities", "logits"),
    )
    negatives: int = setting(50, "prototypes k per class in the contrastive loss")
    temperature: float = setting(0.07, "temperature of the contrastive loss", least=1e-3)
    contrast: str = setting(
        "bidirectional", "anchors of the contrastive loss", choices=("bidirectional", "unidirectional")
    )


@dataclass
class TrainingSettings:
    """Stage 2: the joint iterations."""

    iterations: int = setting(6000, "joint iterations t_max")
    batch_labeled: int = setting(2, "annotated volumes per batch", least=1)
    batch_unlabeled: int = setting(2, "unlabelled volumes per batch")
    lr: float = setting(0.01, "SGD learning rate")
    momentum: float = setting(0.9, "SGD momentum")
    weight_decay: float = setting(1e-4, "SGD weight decay")
    lr_every: int = setting(2500, "iterations between learning-rate steps", least=1)
    lr_factor: float = setting(0.1, "factor of a learning-rate step")
    ema: float = setting(0.99, "upper bound of the teacher's moving-average coefficient", most=1)
    fusion: float = setting(0.9, "final weight of the teacher in the fused labels", most=1)
    fusion_iterations: int = setting(
        6000, "iteration at which that weight is reached; more than iterations keeps the teacher from early power",
        least=1,
    )
    fusion_power: float = setting(0.2, "power of the fused labels' schedule")
    distance_decay: float = setting(0.8, "weight per slice of distance from the annotated one")
    label_weights: str = setting(
        "decayed", "voxel weights of the supervised cross entropy: real-valued, or truncated to integers as released",
        choices=("decayed", "truncated"),
    )
    disagreement_from: int = setting(1000, "iteration from which disagreeing voxels weigh more")
    refresh_batches: int = setting(
        0, "batches whose exact statistics replace the running batch-norm ones at the end; 0 keeps the running ones"
    )
    seed: int = setting(0, "seed of the split, the annotated slices, the weights and the sampling")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: str = setting("auto", "mixed precision", choices=("auto", "bf16", "fp16", "off"))
    optimizer: str = setting("torch", "whose fused SGD and Adam: torch's, or NVIDIA apex's", choices=("torch", "apex"))
    deterministic: bool = setting(
        False, "the same seed on the same machine gives the same bits, at some cost in speed", bare=True
    )
    profile: int = setting(
        0, "iterations of stage 2 to profile: a table by phase and a Chrome trace; 0 profiles none", bare=10
    )
    log_every: int = setting(10, "iterations between rows of joint.csv", least=1)
    preview_every: int = setting(100, "iterations between preview PNGs; 0 makes none")
    checkpoint_every: int = setting(100, "iterations between checkpoints", least=1)


SECTIONS = {
    "data": DataSettings,
    "network": NetworkSettings,
    "registration": RegistrationSettings,
    "selection": SelectionSettings,
    "training": TrainingSettings,
}
SECTION_OF = {item.name: section for section, settings in SECTIONS.items() for item in fields(settings)}


@dataclass
class Config:
    """All settings of one run, by concern."""

    data: DataSettings = field(default_factory=DataSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which training passes over the annotated volumes once."""
        return max(1, self.data.n_labeled // self.training.batch_labeled)


def typed(name: str, value: Any) -> Any:
    """``value`` as the type that the setting ``name`` declares, or a UserError."""
    cls = SECTIONS[SECTION_OF[name]]
    hint, item = get_type_hints(cls)[name], next(f for f in fields(cls) if f.name == name)
    optional = type(None) in get_args(hint)
    if optional and (value is None or value in ("none", "")):
        return None
    if optional:
        hint = next(part for part in get_args(hint) if part is not type(None))
    try:
        if get_origin(hint) is tuple:
            kinds = get_args(hint)
            parts = value.replace(",", " ").split() if isinstance(value, str) else list(value)
            if kinds[-1] is not Ellipsis and len(parts) != len(kinds):
                raise ValueError(f"needs {len(kinds)} values")
            return tuple(_number(kinds[0], part) for part in parts)
        if hint is bool:
            if isinstance(value, str):
                value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
            return bool(value)
        result = hint(value) if hint is str else _number(hint, value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"setting {name} = {value!r} is not valid ({item.metadata['help']}): {error}") from error
    choices = item.metadata.get("choices")
    if choices and result not in choices:
        raise UserError(f"setting {name} = {value!r}: choose one of {', '.join(choices)}")
    return result


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool):
        raise ValueError("needs a number")
    if kind is int and isinstance(value, float) and value % 1 != 0:  # NaN and infinity too
        raise ValueError("needs a whole number")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value!r} is no {'whole ' if kind is int else ''}number") from None


def check(config: Config) -> None:
    """Values that no type can rule out."""
    data, training, registration = config.data, config.training, config.registration
    wrong = [side for side in data.patch if side < 16 or side % 16]
    if wrong:
        raise UserError(f"setting patch = {data.patch}: sides must be multiples of 16 (four halvings in the V-Net)")
    if data.window is not None and not data.window[0] < data.window[1]:
        raise UserError(f"setting window = {data.window}: the lower bound must be below the upper")
    if data.classes and data.foreground:
        raise UserError("settings foreground and classes exclude each other: one merges label values, the other keeps "
                        "them apart")
    if len(data.classes) == 1 or len(set(data.classes)) < len(data.classes):
        raise UserError(f"setting classes = {data.classes}: name two or more different label values (foreground takes "
                        "those that make one class)")
    for name in ("classes", "foreground"):
        values = getattr(data, name)
        if not all(0 < value < 256 for value in values):
            raise UserError(f"setting {name} = {values}: label values lie between 1 and 255, 0 is background")
    if data.resample is not None and min(data.resample) < 1:
        raise UserError(f"setting resample = {data.resample}: sides must be at least 1")
    if not all(width > 0 and width % 2 for width in (registration.opening, registration.closing)):
        raise UserError("settings opening and closing must be odd (1 leaves labels as they are)")
    if data.n_labeled < training.batch_labeled:
        raise UserError(f"setting n_labeled must be at least batch_labeled = {training.batch_labeled}")
    for section in SECTIONS:
        for item in fields(SECTIONS[section]):
            value = getattr(getattr(config, section), item.name)
            least, most = item.metadata.get("least", 0), item.metadata.get("most", math.inf)
            # NaN is not within bounds, nor beyond them
            if isinstance(value, (int, float)) and not least <= value <= most:
                need = f"must be at most {most}" if value > most else (
                    f"must be at least {least}" if least else "must not be negative")
                raise UserError(f"setting {item.name} = {value} {need} ({item.metadata['help']})")
