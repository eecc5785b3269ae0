"""A run's settings: presets for the known data sets, laptop scaling (``downsample``), TOML file < command line.

``resolve`` puts them together in this order, later ones winning; ``spss_fast.settings`` says what there is to set.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

from spss_fast.errors import UserError
from spss_fast.settings import SECTION_OF, SECTIONS, Config, DataSettings, check, typed

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


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


def _assign(config: Config, values: dict[str, Any], origin: str) -> None:
    for name, value in values.items():
        if name not in SECTION_OF:
            close = difflib.get_close_matches(name, SECTION_OF, 1)
            hint = f" (did you mean {close[0]}?)" if close else " (train --help lists them)"
            raise UserError(f"unknown setting {name} in {origin}{hint}")
        setattr(getattr(config, SECTION_OF[name]), name, typed(name, value))


def _read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file by name; tables named after the sections of ``Config`` are flattened."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        mend = " (prepare writes one for a folder of scans)" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the settings file {path}: {error.strerror}{mend}") from error
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
        factor = typed("downsample", values.get("downsample", before))
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
    check(config)
    return config


def located(data: DataSettings) -> DataSettings:
    """``data`` with absolute paths, which mean the same in another working directory."""
    return dataclasses.replace(data, **{name: _located(getattr(data, name)) for name in PATHS})


def _located(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""


def _value(config: Config, name: str) -> Any:
    return getattr(getattr(config, SECTION_OF[name]), name)


def differing(config: Config, flags: dict[str, Any], file: Path | None = None) -> list[str]:
    """The settings among ``flags`` and those of ``file``, as ``flags`` scale them, that are not as in ``config``."""
    asked = {}
    if file:
        resolved = resolve(config.data.dataset, flags, file)
        asked = {name: _value(resolved, name) for name in _read_toml(file) if name != "dataset"}
    asked |= {name: typed(name, value) for name, value in flags.items()}
    own = {name: _value(config, name) for name in asked}
    return [name for name, value in asked.items()
            if own[name] != value and not (name in PATHS and _located(own[name]) == _located(value))]


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
