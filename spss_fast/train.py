"""Train SPSS: ``python -m spss_fast.train --dataset {la,kits,phantom,folder} --data-dir DATA --out RUN``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast import cli
from spss_fast.config import PRESETS, Config, resolve
from spss_fast.data.annotations import annotated_plane
from spss_fast.data.dataset import Dataset, load
from spss_fast.data.loader import batches, resolve_loader
from spss_fast.data.sampling import Batch, Sampler
from spss_fast.engine import checkpoint
from spss_fast.engine.device import determinism, keep_freed_memory, peak_memory, resolve_amp, resolve_device
from spss_fast.engine.evaluation import dice_line, evaluate_labels, write_metrics
from spss_fast.engine.inference import refresh_batch_norm
from spss_fast.engine.interrupts import Abandoned, uninterrupted
from spss_fast.engine.preview import save_preview
from spss_fast.engine.profiling import phase, profiler
from spss_fast.engine.progress import Progress
from spss_fast.engine.run_folder import RunFolder
from spss_fast.engine.step import State, foreground_dice, joint_iteration, registration_epoch
from spss_fast.errors import UserError

DESCRIPTION = """Train a segmentation network from a folder of scans of which a few have ONE annotated slice.
Settings come from the data set's preset, then --settings FILE.toml, then the flags below; the run folder keeps the
resolved ones. --dataset phantom needs no data."""


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary; settings that were not given are absent."""
    parser = cli.Parser(prog="spss_fast.train", description=DESCRIPTION)
    parser.add_argument("--dataset", choices=sorted(PRESETS), help="data set, and its preset (default: phantom)")
    parser.add_argument("--out", type=Path, default=None, help="run folder (default: runs/DATASET)")
    parser.add_argument("--settings", type=Path, metavar="FILE.toml", help="settings that override the preset")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    cli.add_settings(parser, skip=("dataset",))
    return vars(parser.parse_args(arguments))


def train(config: Config, out: Path, resume: bool = False, console: Console | None = None) -> State:
    """Both stages on ``config``'s data, into the run folder ``out``; returns the final state.

    With ``resume`` the run in ``out`` goes on from its last checkpoint, exactly as if it had not stopped. Raises
    ``UserError`` for anything the user can mend, before any training starts.
    """
    console = console or Console()
    folder = RunFolder(out)
    if not resume:
        folder.refuse_if_used()
    device = resolve_device(config.training.device)
    amp = resolve_amp(config.training.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    loader = resolve_loader(config.data.loader, device)
    # evaluation prepares its scans by the run's settings, so they name the plane that was annotated
    config = replace(config, data=replace(config.data, plane=annotated_plane(config.data)))
    dataset = load(config, console)
    state = State(config, device, amp)
    if resume:
        checkpoint.restore(state, checkpoint.read(folder.checkpoint, device))
        folder.rewind("registration", state.epoch)
        folder.rewind("joint", state.iteration)
    else:
        folder.create(config, device, dataset.describe())
    precision = "float32" if amp is None else str(amp).removeprefix("torch.")
    console.print(f"{dataset.summary()}; {device}, {precision}, {loader} loader; run folder {out}",
                  highlight=False, soft_wrap=True)
    try:
        with determinism(config.training.deterministic):
            pretrain_registration(state, dataset, folder, console)
            train_jointly(state, dataset, folder, console)
        if peak := peak_memory(device):
            console.print(f"peak memory: {peak / 2**30:.2f} GiB", highlight=False)
        console.print(f"done; {_next_step(dataset, out)}", highlight=False, soft_wrap=True)
    except Abandoned:
        console.print(f"stopped amid an iteration: --out {out} --resume goes on from the last checkpoint",
                      highlight=False, soft_wrap=True)
        raise
    except KeyboardInterrupt:
        checkpoint.save(state, folder.checkpoint)
        console.print(f"stopped at iteration {state.iteration}: --out {out} --resume goes on from here")
        raise
    finally:
        folder.close()
    return state


def pretrain_registration(state: State, dataset: Dataset, folder: RunFolder, console: Console) -> None:
    """Stage 1: epochs of registration steps on whole batches."""
    config = state.config
    per_epoch = max(1, config.data.n_labeled // config.training.batch_labeled)
    sampler = Sampler(dataset.labeled, dataset.unlabeled, config, config.training.seed + 1)
    epochs = config.registration.registration_epochs
    with (
        Progress(console, "stage 1: registration", epochs, state.epoch) as progress,
        closing(batches(sampler, state.device, state.epoch * per_epoch, config.data.loader)) as loader,
    ):
        while state.epoch < epochs:
            with uninterrupted(console):
                loss = registration_epoch(state, islice(loader, per_epoch))
                folder.log("registration", state.epoch, {"loss": float(loss)})
                progress.update(state.epoch, f"loss {float(loss):.4f}")
                if state.epoch % max(1, config.training.checkpoint_every // per_epoch) == 0 or state.epoch == epochs:
                    checkpoint.save(state, folder.checkpoint)


def train_jointly(state: State, dataset: Dataset, folder: RunFolder, console: Console) -> None:
    """Stage 2: the joint iterations, with metrics, previews and checkpoints on the way."""
    config, training, values = state.config, state.config.training, state.config.data.class_values
    sampler = Sampler(dataset.labeled, dataset.unlabeled, config, training.seed)
    if state.iteration >= training.iterations:
        return
    with (
        Progress(console, "stage 2: joint training", training.iterations, state.iteration) as progress,
        profiler(training.profile, state.device, folder.path, console) as profile,
        closing(batches(sampler, state.device, state.iteration, config.data.loader)) as loader,
    ):
        while state.iteration < training.iterations:
            with uninterrupted(console):
                with state.beside(), phase("data"):
                    batch = next(loader)
                outputs = joint_iteration(state, batch)
                t = state.iteration
                if profile is not None:
                    profile.step()
                if t % training.log_every == 0 or t == training.iterations:
                    state.settle()
                    row = {name: float(value) for name, value in outputs.metrics.items()}
                    if not math.isfinite(row["loss"]):
                        raise UserError(
                            f"the loss is {row['loss']} at iteration {t}, so training has failed: try a lower --lr (it "
                            f"is {training.lr}) or --amp off; the last checkpoint is kept as it is"
                        )
                    if batch.reference is not None:
                        row |= foreground_dice("dice_registration", outputs.registration, batch.reference, values)
                        row |= foreground_dice("dice_fused", outputs.fused, batch.reference, values)
                    folder.log("joint", t, row)
                    progress.update(t, _status(row))
                if training.preview_every and (t % training.preview_every == 0 or t == training.iterations):
                    save_preview(folder.previews / f"{t:06d}.png", batch, outputs, t, values)
                if t == training.iterations:
                    finish(state, dataset, loader, folder, console)
                if t % training.checkpoint_every == 0 or t == training.iterations:
                    checkpoint.save(state, folder.checkpoint)


def finish(state: State, dataset: Dataset, loader: Iterator[Batch], folder: RunFolder, console: Console) -> None:
    """Settle the student's batch norm for inference, and measure the registration labels where they can be."""
    state.settle()
    refresh = state.config.training.refresh_batches
    if refresh:
        refresh_batch_norm(state.student, (batch.image for batch in islice(loader, refresh)), state.amp)
    rows = evaluate_labels(state.registration, dataset.labeled, state.config, state.device, state.amp)
    if rows:
        write_metrics(folder.path / "registration_labels.csv", rows)
        console.print(f"registration labels of the {len(rows)} annotated volumes: {dice_line(rows)}")


def _next_step(dataset: Dataset, out: Path) -> str:
    if any(case.has_full_label for case in dataset.test):
        return f"measure it with: python -m spss_fast.evaluate --run {out}"
    return (f"no test case has a full label; segment scans with: python -m spss_fast.predict SCANS OUT --run {out}, or "
            f"measure it on others with: python -m spss_fast.evaluate --run {out} --data-dir LABELLED_SCANS")


def _status(row: dict[str, float]) -> str:
    text = f"L_s {row['loss_s']:.3f} L_u {row['loss_u']:.4f} L_c {row['loss_c']:.4f} K {row['K']:.0f}"
    if "dice_fused" in row:
        text += f" Dice reg {row['dice_registration']:.2f} fused {row['dice_fused']:.2f}"
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = parse(arguments)
    dataset, out = given.pop("dataset"), given.pop("out")
    settings, resume = given.pop("settings"), given.pop("resume")
    chosen = dataset or "phantom"
    out = out or Path("runs") / chosen
    if resume:
        if given or settings:
            extra = ", ".join("--" + name.replace("_", "-") for name in given) or "--settings"
            raise UserError(f"--resume goes on with the run's own settings: leave out {extra}")
        config = checkpoint.config_of(checkpoint.read(RunFolder(out).checkpoint))
        if dataset not in (None, config.data.dataset):
            raise UserError(f"the run in {out} is of --dataset {config.data.dataset}: leave out --dataset {dataset}")
    else:
        config = resolve(chosen, given, settings)
    train(config, out, resume)


if __name__ == "__main__":
    cli.run(main)
