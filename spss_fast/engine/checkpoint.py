"""Checkpoints: everything needed to go on, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from spss_fast.config import from_dict, to_dict
from spss_fast.engine.run_folder import no_run
from spss_fast.engine.step import State
from spss_fast.errors import UserError
from spss_fast.files import atomically
from spss_fast.settings import Config

PARTS = ("student", "teacher", "registration", "sgd", "adam", "scaler", "registration_scaler")


def save(state: State, path: Path) -> None:
    """Write networks, optimizers, clocks and settings to ``path``."""
    state.beside.settle()
    content = {part: getattr(state, part).state_dict() for part in PARTS}
    content |= {
        "epoch": state.epoch, "iteration": state.iteration, "last_loss": state.last_loss.cpu(),
        "config": to_dict(state.config),
    }
    atomically(path, lambda temporary: torch.save(content, temporary))


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint; only tensors and plain values are unpickled."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        run = Path(path).parent.parent
        raise no_run(run, str(Path(path).relative_to(run))) from error
    # the last three are what the unpickler raises over text
    except (pickle.UnpicklingError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: it is damaged, or pickles more than tensors and plain "
                        "values, which are all that is ever loaded (save a state_dict)") from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise UserError(f"cannot read the checkpoint {path} (truncated, or not one of ours): {reason}") from error


def restore(state: State, content: dict[str, Any]) -> None:
    """Put a checkpoint's content into a fresh ``state``: CUDA graphs would go on with the optimizers' old numbers."""
    state.beside.settle()
    for part in PARTS:
        getattr(state, part).load_state_dict(content[part])
    for group in state.adam.param_groups:  # whether a CUDA graph may hold it is this device's matter, not the saver's
        group |= {name: value for name, value in state.adam.defaults.items() if name == "capturable"}
    state.epoch, state.iteration = content["epoch"], content["iteration"]
    state.last_loss = content["last_loss"].to(state.device)


def config_of(content: dict[str, Any]) -> Config:
    """The settings that a checkpoint was trained with."""
    return from_dict(content["config"])


def stopped(content: dict[str, Any]) -> str:
    """How far the training of a checkpoint came, in words; empty where it came to its end."""
    done, planned = content["iteration"], config_of(content).training.iterations
    return f"training stopped at iteration {done} of {planned}" if done < planned else ""
