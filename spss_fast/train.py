"""Train SPSS: ``python -m spss_fast.train --dataset {la,kits,phantom,folder} --data-dir DATA --out RUN``."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast import cli
from spss_fast.config import PRESETS, differing, located, resolve
from spss_fast.console import say
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
from spss_fast.engine.step import Outputs, State, foreground_dice, joint_iteration, registration_epoch
from spss_fast.errors import UserError
from spss_fast.settings import Config

DESCRIPTION = """Train a segmentation network from a folder of scans of which a few have ONE annotated slice.
Settings come from the data set's preset, then --settings FILE.toml, then the flags below; the run folder keeps the
resolved ones. --dataset phantom needs no data."""

FIRST = "waiting for the first batch, which takes longest as kernels are made"


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary; settings that were not given are absent."""
    parser = cli.Parser(prog="spss_fast.train", description=DESCRIPTION)
    parser.add_argument("--dataset", choices=sorted(PRESETS), help="data set, and its preset (default: phantom)")
    parser.add_argument("--out", type=Path, default=None, help="run folder (default: runs/DATASET)")
    parser.add_argument("--settings", type=Path, metavar="FILE.toml", help="settings that override the preset")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings (no "
                        "others are taken)")
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
    config = replace(config, data=replace(located(config.data), plane=annotated_plane(config.data)))
    dataset = load(config, console)
    state = State(config, device, amp)
    if resume:
        folder.refuse_other_cases(dataset.describe())
        checkpoint.restore(state, checkpoint.read(folder.checkpoint, device))
        folder.hold()
        folder.rewind(state.epoch, state.iteration)
    else:
        folder.create(config, device, dataset.describe())
        folder.hold()
        checkpoint.save(state, folder.checkpoint)  # so that there is one to go on from, wherever the run stops
    precision = "float32" if amp is None else str(amp).removeprefix("torch.")
    say(console, f"{dataset.summary()}; {device}, {precision}, {loader} loader; run folder {out}")
    finished = state.iteration >= config.training.iterations
    again = cli.command_line("train", "--out", out, "--resume")
    try:
        with determinism(config.training.deterministic):
            pretrain_registration(state, dataset, folder, console)
            train_jointly(state, dataset, folder, console)
            measure_registration_labels(state, dataset, folder, console)
        if peak := peak_memory(device):
            say(console, f"peak memory: {peak / 2**30:.2f} GiB")
        what = "done"
        if finished:
            what = f"nothing was left to train: this run had finished its {state.iteration} iterations (for more of " \
                   "them begin another run, with --iterations and another --out)"
        say(console, f"{what}; {_next_step(dataset, out)}")
    except Abandoned:
        say(console, f"stopped at once; go on from the last checkpoint with: {again}")
        raise
    except KeyboardInterrupt:
        checkpoint.save(state, folder.checkpoint)
        where = f"iteration {state.iteration}" if state.iteration else f"epoch {state.epoch} of stage 1"
        say(console, f"stopped after {where}; go on with: {again}")
        raise
    finally:
        folder.close()
    return state


def pretrain_registration(state: State, dataset: Dataset, folder: RunFolder, console: Console) -> None:
    """Stage 1: epochs of registration steps on whole batches."""
    config = state.config
    per_epoch = config.batches_per_epoch
    sampler = Sampler(dataset.labeled, dataset.unlabeled, config, config.training.seed + 1)
    epochs = config.registration.registration_epochs
    with (
        Progress(console, "stage 1: registration", epochs, state.epoch, FIRST) as progress,
        closing(batches(sampler, state.device, state.epoch * per_epoch, config.data.loader)) as loader,
    ):
        while state.epoch < epochs:
            with uninterrupted(console, "epoch"):
                loss = float(registration_epoch(state, islice(loader, per_epoch)))
                _refuse_divergence(config, f"epoch {state.epoch} of stage 1", loss_registration=loss)
                folder.log("registration", state.epoch, {"loss": loss})
                progress.update(state.epoch, f"loss {loss:.4f}")
                if state.epoch % max(1, config.training.checkpoint_every // per_epoch) == 0 or state.epoch == epochs:
                    checkpoint.save(state, folder.checkpoint)


def train_jointly(state: State, dataset: Dataset, folder: RunFolder, console: Console) -> None:
    """Stage 2: the joint iterations, with metrics, previews and checkpoints on the way."""
    config, training, values = state.config, state.config.training, state.config.data.class_values
    sampler = Sampler(dataset.labeled, dataset.unlabeled, config, training.seed)
    monitored = any(volume.reference is not None for volume in dataset.labeled)
    if state.iteration >= training.iterations:
        return
    with (
        Progress(console, "stage 2: joint training", training.iterations, state.iteration, FIRST) as progress,
        profiler(training.profile, state.device, folder.path, console) as profile,
        closing(batches(sampler, state.device, state.iteration, config.data.loader)) as loader,
    ):
        first = state.iteration + 1
        while state.iteration < training.iterations:
            with uninterrupted(console):
                with state.beside.place(), phase("data"):
                    batch = next(loader)
                outputs = joint_iteration(state, batch)
                if profile is not None:
                    profile.step()
                t, last = state.iteration, state.iteration == training.iterations
                logs, saves = (last or t % every == 0 for every in (training.log_every, training.checkpoint_every))
                shows = logs or t == first  # a slow machine takes minutes to the next
                if shows or saves:
                    row = _metrics(state, batch, outputs, monitored)
                if logs:
                    folder.log("joint", t, row)
                if shows:
                    progress.update(t, _status(row))
                if training.preview_every and (last or t % training.preview_every == 0):
                    state.beside.settle()
                    save_preview(folder.previews / f"{t:06d}.png", batch, outputs, t, values)
                if last and training.refresh_batches:
                    state.beside.settle()
                    images = (batch.image for batch in islice(loader, training.refresh_batches))
                    refresh_batch_norm(state.student, images, state.amp)
                if saves:
                    checkpoint.save(state, folder.checkpoint)


def measure_registration_labels(state: State, dataset: Dataset, folder: RunFolder, console: Console) -> None:
    """Measure the registration labels where there are full labels to compare with."""
    rows = evaluate_labels(state.registration, dataset.labeled, state.config, state.device, state.amp)
    if rows:
        write_metrics(folder.path / "registration_labels.csv", rows)
        say(console, f"registration labels of the {len(rows)} annotated volumes: {dice_line(rows)}")


def _metrics(state: State, batch: Batch, outputs: Outputs, monitored: bool) -> dict[str, float]:
    """What ``joint.csv`` keeps of an iteration, Dice too if ``monitored``; ``UserError`` where a loss is not finite."""
    state.beside.settle()
    row = {name: float(value) for name, value in outputs.metrics.items()}
    losses = {name: row[name] for name in ("loss_registration", "loss_registration_labels", "loss")}
    _refuse_divergence(state.config, f"iteration {state.iteration}", **losses)
    if monitored:  # a batch of volumes without full labels has nan, so that every row has the same columns
        values = state.config.data.class_values
        row |= foreground_dice("dice_registration", outputs.registration, batch.reference, values)
        row |= foreground_dice("dice_fused", outputs.fused, batch.reference, values)
    return row


def _refuse_divergence(config: Config, when: str, **losses: float) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            flag, rate = "--lr", config.training.lr
            if name != "loss":
                flag, rate = "--registration-lr", config.registration.registration_lr
            raise UserError(f"the {name} is {loss} at {when}, so training has failed: try a lower {flag} (it is {rate})"
                            " or --amp off; the last checkpoint is kept as it is")


def _next_step(dataset: Dataset, out: Path) -> str:
    if any(case.has_full_label for case in dataset.test):
        return f"measure it with: {cli.command_line('evaluate', '--run', out)}"
    predict = cli.command_line("predict", "SCANS", "OUT", "--run", out)
    evaluate = cli.command_line("evaluate", "--run", out, "--data-dir", "LABELLED_SCANS")
    return f"no test case has a full label; segment scans with: {predict}, or measure it on others with: {evaluate}"


def _status(row: dict[str, float]) -> str:
    text = f"L_s {row['loss_s']:.3f} L_u {row['loss_u']:.4f} L_c {row['loss_c']:.4f} K {row['K']:.0f} voxels"
    if not math.isnan(row.get("dice_fused", math.nan)):
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
        config = checkpoint.config_of(checkpoint.read(RunFolder(out).checkpoint))
        if dataset not in (None, config.data.dataset):
            raise UserError(f"the run in {out} is of --dataset {config.data.dataset}: leave out --dataset {dataset}")
        if others := differing(config, given, settings):
            flags = ["--" + name.replace("_", "-") for name in others if name in given] or ["--settings"]
            raise UserError(f"--resume goes on with the run's own settings, and {', '.join(others)} would be another: "
                            f"leave out {', '.join(flags)}")
    else:
        config = resolve(chosen, given, settings)
    train(config, out, resume)


if __name__ == "__main__":
    cli.run(main)
