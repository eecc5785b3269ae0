"""Every setting, once: one dataclass per concern, presets for the known data sets, TOML file < command line.

The defaults are the published method at full resolution (METHOD: 112 x 112 x 80, 6000 iterations). ``resolve``
builds a configuration in this order, later ones winning: preset, laptop scaling (``downsample``), TOML file, flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from spss_fast.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


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


PATHS = ("data_dir", "annotations", "cache_dir")
PRESETS: dict[str, dict[str, Any]] = {
    "la": {"patch": (112, 112, 80), "max_in_plane": 320},
    "kits": {
        "patch": (176, 176, 64), "window": (-160.0, 240.0), "body_crop": True, "resample": (192, 192, 64),
        # kidneys are small beside an atrium: the published morphology would wipe out their ends
        "structures": 2, "opening": 3, "closing": 3, "far_iterations": 1,
    },
    # small enough that two CPU cores train it in minutes; same route as kits. Half of the published 16 channels
    # survive the published dropout; of 8 filters too few would. Slices lie 6 mm apart, so a slice of distance costs
    # more. The ramp is the published one, so SU and SC have hardly begun when training ends: as fast as the schedule is
    # short they cost accuracy (Dice 0.85 against 0.88), because the teacher is still behind the registration labels.
    # For that reason its weight in the fused labels keeps the published pace too (w_p ends at 0.47), and the schedule
    # ends before disagreement_from.
    "phantom": {
        "patch": (64, 64, 32), "window": (-160.0, 240.0), "body_crop": True, "resample": (64, 64, 32),
        "phantoms": 32, "n_labeled": 12, "n_test": 8,
        "filters": 8, "dropout": 0.2, "statistics": "case", "passes": 4,
        "structures": 2, "opening": 3, "closing": 1, "far_iterations": 1,
        "registration_epochs": 32, "registration_steps": 3, "registration_pairs": 16, "registration_lr": 1e-3,
        "iterations": 240, "lr": 0.1, "lr_every": 160, "distance_decay": 0.6, "refresh_batches": 24,
    },
    "folder": {"patch": (112, 112, 80)},
}


def _scaled(config: Config) -> None:
    """Shrink a full-resolution configuration by ``data.downsample`` so that a laptop can train it, in place.

    Lengths in voxels shrink by the factor, and the weight that a slice of distance costs grows with it; a patch side is
    rounded up to a multiple of 16, which the V-Net's four halvings need. There are factor^3 fewer voxels to learn, so
    the joint schedule is shorter by that, with its learning-rate steps and its ramps. It takes a higher learning rate
    and less dropout to get there, and so few iterations leave the network sensitive to a scan's own contrast, which
    statistics of each case take out. Three paces are not shortened as much. Two hand over to a teacher that has to have
    learnt first: lambda's stays, and the teacher's weight in the fused labels grows faster by the factor only (on LA it
    ends at 0.68; labels fused with 0.57 to 0.70 were measured best then, 0.74; with 0.75 and more, below 0.67). And
    ``disagreement_from`` stays: with the published 1000, past the end of what ``downsample = 2`` leaves of the
    published schedule (750 iterations), voxels on which registration and teacher disagree never weigh more.
    """
    factor = config.data.downsample
    data, registration, training = config.data, config.registration, config.training
    selection = config.selection
    data.patch = tuple(16 * math.ceil(side / factor / 16) for side in data.patch)
    if data.resample is not None:
        data.resample = tuple(side // factor for side in data.resample)
    registration.opening = 2 * round((registration.opening // 2) / factor) + 1
    registration.closing = 2 * round((registration.closing // 2) / factor) + 1
    registration.far_distance = max(1, registration.far_distance // factor)
    registration.registration_epochs = max(1, registration.registration_epochs // (5 * factor**2))
    registration.registration_pairs = max(1, registration.registration_pairs // factor)
    registration.registration_lr = max(registration.registration_lr, 1e-3)
    shorter = factor**3
    training.iterations = max(1, training.iterations // shorter)
    training.lr_every = max(1, training.lr_every // shorter)
    selection.ramp_every = max(1, selection.ramp_every // shorter)
    selection.tau_every = max(1, selection.tau_every // shorter)
    training.lr = max(training.lr, 0.1)
    training.distance_decay **= factor
    training.fusion_iterations = max(1, training.fusion_iterations // factor)
    config.network.dropout = min(config.network.dropout, 0.2)
    config.network.statistics = "case"
    training.refresh_batches = 32


def _names() -> dict[str, str]:
    return {item.name: section for section, cls in SECTIONS.items() for item in fields(cls)}


def _typed(name: str, value: Any) -> Any:
    """``value`` as the type that the setting ``name`` declares, or a UserError."""
    cls = SECTIONS[_names()[name]]
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
        typed = hint(value) if hint is str else _number(hint, value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"setting {name} = {value!r} is not valid ({item.metadata['help']}): {error}") from error
    choices = item.metadata.get("choices")
    if choices and typed not in choices:
        raise UserError(f"setting {name} = {value!r}: choose one of {', '.join(choices)}")
    return typed


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool):
        raise ValueError("needs a number")
    if kind is int and isinstance(value, float) and value % 1 != 0:  # NaN and infinity too
        raise ValueError("needs a whole number")
    return kind(value)


def _assign(config: Config, values: dict[str, Any], origin: str) -> None:
    names = _names()
    for name, value in values.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {close[0]}?)" if close else " (train --help lists them)"
            raise UserError(f"unknown setting {name} in {origin}{hint}")
        setattr(getattr(config, names[name]), name, _typed(name, value))


def _read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file by name; tables named after the sections of ``Config`` are flattened."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the settings file {path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in SECTIONS:
                raise UserError(f"unknown table [{key}] in {path}: use {', '.join(SECTIONS)}, or none")
            flat.update(value)
        else:
            flat[key] = value
    return flat


def resolve(dataset: str, flags: dict[str, Any] | None = None, file: Path | None = None) -> Config:
    """The configuration of a run: the data set's preset, then ``file``, then ``flags``.

    ``flags`` maps setting names to values (strings are converted to the setting's type). ``downsample`` scales whatever
    stands before it: the preset where ``file`` names it, the preset and ``file`` where ``flags`` do, so that each of
    the scaled values can still be set. Raises ``UserError`` for an unknown setting or data set, for a value that does
    not fit, and where ``file`` and ``flags`` disagree on ``downsample``.
    """
    flags = dict(flags or {})
    from_file = _read_toml(file) if file else {}
    config = Config()
    preset = PRESETS.get(dataset)
    if preset is None:
        raise UserError(f"unknown data set {dataset!r}: choose one of {', '.join(PRESETS)}")
    _assign(config, preset, f"preset {dataset}")
    for values, origin in ((from_file, str(file)), (flags, "the command line")):
        before = config.data.downsample
        factor = _typed("downsample", values.get("downsample", before))
        if factor < 1:
            raise UserError("setting downsample must be 1 or more")
        if factor != before:
            if before != 1:
                raise UserError(f"{file} holds settings for downsample = {before}: leave out --downsample, or give a "
                                "file of full resolution")
            config.data.downsample = factor
            _scaled(config)
        _assign(config, values, origin)
    config.data.dataset = dataset
    _check(config)
    return config


def located(data: DataSettings) -> DataSettings:
    """``data`` with absolute paths, which mean the same in another working directory."""
    return dataclasses.replace(data, **{name: _located(getattr(data, name)) for name in PATHS})


def _located(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""


def differing(config: Config, flags: dict[str, Any], file: Path | None = None) -> list[str]:
    """The settings among ``flags`` and those of ``file``, as ``flags`` scale them, that are not as in ``config``."""
    names = _names()
    asked = {}
    if file:
        resolved = resolve(config.data.dataset, flags, file)
        asked = {name: getattr(getattr(resolved, names[name]), name) for name in _read_toml(file) if name != "dataset"}
    asked |= {name: _typed(name, value) for name, value in flags.items()}
    own = {name: getattr(getattr(config, names[name]), name) for name in asked}
    return [name for name, value in asked.items()
            if own[name] != value and not (name in PATHS and _located(own[name]) == _located(value))]


def _check(config: Config) -> None:
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


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, for JSON and checkpoints."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`to_dict`."""
    config = Config()
    for section in values.values():
        _assign(config, section, "the run's settings")
    return config


def toml_literal(value: Any) -> str:
    """A setting's value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_literal(part) for part in value) + "]"
    return repr(value)


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that ``resolve`` reads back, whatever the preset says."""
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            lines.append(f"{name} = {toml_literal('none' if value is None else value)}")
        lines.append("")
    return "\n".join(lines)
