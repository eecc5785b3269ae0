"""A trained V-Net from a file: this project's checkpoints and this literature's, of which only tensors are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spss_fast.engine import checkpoint
from spss_fast.engine.run_folder import RunFolder
from spss_fast.errors import UserError
from spss_fast.nets.vnet import VNet
from spss_fast.settings import Config

# where published checkpoints keep the network beside optimizers and clocks; ours keeps the student
WRAPPERS = ("student", "state_dict", "net", "model", "model_state_dict")
STEM, HEAD, FEATURES = "block_one.conv.0.weight", "out_conv.weight", "projector.2.weight"


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a ``.pth``/``.pt`` or ``.safetensors`` file, on the CPU.

    Raises ``UserError`` for a file that is missing, damaged, or pickles anything but tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a .pth or .safetensors file")
    if path.suffix != ".safetensors":
        content = checkpoint.read(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__} instead of named tensors: save a state_dict")
        return content
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read the weights {path}: {str(error).splitlines()[0]}") from error


def state_dict_of(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The named tensors of a V-Net in a file's ``content``: on top, or under one of ``WRAPPERS``; the ``module.`` that
    data-parallel training puts before every name is taken away."""
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if STEM not in tensors or HEAD not in tensors:
        names = list(map(str, tensors or inner))
        found = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
        raise UserError(f"{path} holds no V-Net of this literature: {STEM} and {HEAD} are expected, found {found}")
    return tensors


def build_network(tensors: dict[str, Tensor], origin: Path | str) -> VNet:
    """The V-Net that fits ``tensors``, with them loaded, in evaluation mode; width and classes are read off their
    shapes, and ``origin`` says in errors where they come from. The projector may be missing, as in checkpoints of
    related methods, and so may the counts of batches, as in old ones: neither plays a part in a prediction.

    Raises ``UserError`` for names or shapes that are not this V-Net's, or values that are not finite.
    """
    stem, head = tensors[STEM], tensors[HEAD]
    if stem.ndim != 5 or head.ndim != 5:
        raise UserError(f"{origin} holds a network of {stem.ndim - 2} dimensions instead of 3")
    if stem.shape[1] != 1:
        raise UserError(f"{origin} holds a network of {stem.shape[1]} input channels: scans have one")
    if head.shape[0] < 2:
        raise UserError(f"{origin} holds a network of one output channel: background and foreground need one each")
    features = tensors[FEATURES].shape[0] if FEATURES in tensors else 64
    network = VNet(classes=head.shape[0], filters=stem.shape[0], features=features)
    own = network.state_dict()
    needless = [name for name in own if name.startswith("projector.") or name.endswith(".num_batches_tracked")]
    absent = [name for name in own if name not in tensors and name not in needless]
    foreign = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    for names, what in ((absent, "lacks"), (foreign, "has, beyond the V-Net's,"), (shapes, "has another shape for")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{origin} does not fit the V-Net of this literature: it {what} {names[0]}{others}")
    broken = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise UserError(f"{origin} holds values of {broken} that are NaN or infinite: training diverged, so take an "
                        "earlier checkpoint")
    network.load_state_dict(own | tensors)
    return network.eval()


def load_student(content: dict[str, Any], device: torch.device) -> VNet:
    """The student of a checkpoint, ready for inference."""
    return build_network(content["student"], "the checkpoint").to(device, memory_format=torch.channels_last_3d)


def load_network(run: Path | None, weights: Path | None, config: Config | None = None) -> tuple[VNet, Config, str]:
    """The V-Net of the file ``weights``, else the student of the folder ``run``, in evaluation mode, on the CPU; the
    settings that scans are prepared by, those of the run or of our checkpoint where ``config`` is not given; and how
    far its training came, in words, where that did not end.

    Raises ``UserError`` where one of them is missing or cannot be read, or both a run and ``config`` are given.
    """
    if run is None and weights is None:
        raise UserError("no network: give --run RUN, or --weights FILE")
    if run is not None and config is not None:
        raise UserError("a run brings its own settings: leave out either the run or the settings")
    path = RunFolder(run).checkpoint if run is not None else weights
    content = checkpoint.read(path) if run is not None else read_weights(path)
    if run is not None or (config is None and "student" in content and "config" in content):
        config = checkpoint.config_of(content)
    if config is None:
        raise UserError(f"{weights} does not say how scans are prepared: add --run, or --dataset for a preset's way")
    if weights is not None and run is not None:
        path, content = weights, read_weights(weights)
    # weights alone do not say
    stopped = checkpoint.stopped(content) if {"student", "config", "iteration"} <= content.keys() else ""
    return build_network(state_dict_of(content, path), path), config, stopped


def fingerprint(network: VNet) -> str:
    """SHA-256 of everything that decides a prediction: names and values, without the projector."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if not name.startswith("projector."):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
