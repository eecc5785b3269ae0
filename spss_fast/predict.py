"""Segment scans with a trained network: ``python -m spss_fast.predict IN [IN ...] OUT --run RUN``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spss_fast import __version__, cli
from spss_fast.config import PRESETS, resolve
from spss_fast.console import say
from spss_fast.data.images import ending
from spss_fast.data.inputs import find_inputs, output_paths, refuse_clashes
from spss_fast.data.output import write_like
from spss_fast.engine.device import resolve_amp, resolve_device
from spss_fast.engine.prediction import Options, Segmentation, segment
from spss_fast.engine.progress import Progress
from spss_fast.engine.weights import fingerprint, load_network
from spss_fast.errors import UserError, some
from spss_fast.files import atomically, refuse_among_scans, write_json
from spss_fast.nets.vnet import VNet
from spss_fast.settings import SECTION_OF, Config

DESCRIPTION = """Segment scans with a trained network: label maps in each scan's own geometry and format, into the
folder OUT. What is there already is skipped; scans that cannot be read are listed at the end, with exit status 1."""
# what a scan is prepared by
PREPARATION = ("patch", "plane", "window", "body_crop", "resample", "max_in_plane", "downsample")
RECORD = "predict.json"


@dataclass
class Summary:
    """What became of each scan, by the path of its image."""

    written: dict[Path, Path] = field(default_factory=dict)  # its label map
    skipped: dict[Path, Path] = field(default_factory=dict)  # its label map, which was there already
    bad: dict[Path, str] = field(default_factory=dict)  # why there is none, in one line
    empty: list[Path] = field(default_factory=list)  # those of the written ones that hold background alone


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary; settings that were not given are absent."""
    parser = cli.Parser(prog="spss_fast.predict", description=DESCRIPTION)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IN",
                        help="scans (NIfTI, NRRD, MHA), or folders of them or of DICOM series")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the label maps")
    parser.add_argument("--run", type=Path, help="folder of a trained run: its student, and how it prepares scans")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="another V-Net's weights (.pth, .safetensors)")
    parser.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows, as a fraction below 1")
    parser.add_argument("--mirror", action="store_true", help="average over in-plane flips: 4 times the work")
    parser.add_argument("--largest-component", action="store_true", help="keep the largest component of each class")
    parser.add_argument("--probabilities", action="store_true", help="write each foreground class's probability too")
    parser.add_argument("--entropy", action="store_true", help="write the entropy of the probabilities (nats) too")
    parser.add_argument("--tiles", type=int, default=4, help="windows through the network at once")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is there already")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision (default: the run's)")
    add_preset(parser, PREPARATION)
    return vars(parser.parse_args(arguments))


def add_preset(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """The flags of a preset and of the settings ``names``, for a network that comes without its run."""
    parser.add_argument("--dataset", choices=sorted(PRESETS), help="preset that scans are prepared by, without --run")
    parser.add_argument("--settings", type=Path, metavar="FILE.toml", help="settings that override the preset")
    cli.add_settings(parser, skip=tuple(name for name in SECTION_OF if name not in names))


def take_preset(given: dict[str, Any], names: Collection[str]) -> Config | None:
    """Takes what :func:`add_preset` added out of ``given`` and resolves it; None where no data set is given.

    Raises ``UserError`` where there is a run beside it, or settings without a data set.
    """
    settings = {name: given.pop(name) for name in names if name in given}
    dataset, file = given.pop("dataset"), given.pop("settings")
    if dataset is not None:
        if given["run"] is not None:
            raise UserError("--run brings its own settings: leave out --dataset")
        return resolve(dataset, settings, file)
    if settings or file:
        extra = ", ".join("--" + name.replace("_", "-") for name in settings) or "--settings"
        mend = "add --dataset" if given["run"] is None else "leave it out, a run brings its own settings"
        raise UserError(f"{extra} changes a preset: {mend}")
    return None


def predict(
    inputs: Path | str | Sequence[Path | str], out: Path | str, run: Path | str | None = None,
    weights: Path | str | None = None, config: Config | None = None, *, overlap: float = 0.5, mirror: bool = False,
    largest_component: bool = False, probabilities: bool = False, entropy: bool = False, tiles: int = 4,
    overwrite: bool = False, device: str = "auto", amp: str | None = None, console: Console | None = None,
) -> Summary:
    """Segments the scans of ``inputs`` (files or folders) into the folder ``out``.

    The network is the student of the folder ``run``, or that of the file ``weights``; scans are prepared by the
    settings of ``run``, or of a checkpoint of ours given as ``weights``, or else by ``config``. Windows overlap by the
    fraction ``overlap`` and blend with a Gaussian; ``mirror`` averages over in-plane flips.

    ``out`` then holds, per scan, ``NAME.EXT``: uint8 labels (0 background, 1 ... C - 1, or the label values of the
    run's ``classes``) of the scan's own size, spacing, origin and direction, in its format; with ``probabilities`` also
    ``NAME_probability.EXT`` (``...1``, ``...2`` for C > 2), and with ``entropy`` ``NAME_entropy.EXT`` (nats), both
    float32. A scan whose outputs are there and newer than it is skipped. A scan that cannot be used is reported in
    :attr:`Summary.bad`, and the others go on.

    Raises ``UserError`` where the network, its settings, or an input is missing, ``out`` holds predictions made in
    another way, or cannot be written.

    Example::

        import SimpleITK as sitk
        from spss_fast.predict import predict

        summary = predict(["scans", "one_more.nrrd"], "segmentations", run="runs/la", mirror=True)
        for scan, path in summary.written.items():
            label = sitk.ReadImage(path)  # lies on the scan's own voxels
        for scan, reason in summary.bad.items():
            print(reason)
    """
    console, out = console or Console(), Path(out)
    given = [inputs] if isinstance(inputs, (str, Path)) else inputs
    if ending(out) or out.is_file():
        raise UserError(f"{out} is to be the folder for the predictions, not a file: give a folder, after the scans")
    if not 0 <= overlap < 1 or tiles < 1:
        raise UserError(f"overlap = {overlap}, tiles = {tiles}: overlap must be from 0 to below 1, tiles at least 1")
    where = resolve_device(device)
    network, config, stopped = load_network(run and Path(run), weights and Path(weights), config)
    if stopped:
        say(console, f"note: {stopped}")
    cases = find_inputs([Path(path) for path in given])
    classes = network.out_conv.out_channels
    if config.data.classes and config.data.class_count != classes:
        raise UserError(f"the weights have {classes} classes, but the settings name the {config.data.class_count - 1} "
                        "label values of --classes: give the run of these weights")
    outputs = [output_paths(case, out, classes, probabilities, entropy) for case in cases]
    refuse_clashes(cases, outputs)
    refuse_among_scans(out, filter(Path.is_dir, map(Path, given)), "predictions")
    precision = resolve_amp(amp or config.training.amp, where)
    options = Options(overlap, mirror, largest_component, tiles, precision, config.network.statistics)
    _claim(out, _record(network, config, options), [path for paths in outputs for path in paths.values()], overwrite)
    network.to(where, memory_format=torch.channels_last_3d)

    summary = Summary()
    with Progress(console, "predicting", len(cases)) as progress:
        for done, (case, paths) in enumerate(zip(cases, outputs), 1):
            if _is_done(case.image, paths.values()):
                summary.skipped[case.image] = paths["label"]
                progress.update(done, f"{case.name} is there already")
                continue
            started = time.monotonic()
            try:
                result = segment(network, case, config.data, options, probabilities, entropy)
            except (UserError, MemoryError, torch.OutOfMemoryError) as error:
                known = isinstance(error, UserError)
                summary.bad[case.image] = str(error) if known else f"{case.image} does not fit into memory: lower tiles"
                progress.update(done, f"{case.name} failed")
                continue
            _write(result, paths, case.image)
            summary.written[case.image] = paths["label"]
            if not result.label.any():
                summary.empty.append(case.image)
            seconds = time.monotonic() - started
            progress.update(done, f"{case.name} {result.volume_ml():.1f} ml in {seconds:.1f} s")
    return summary


def _record(network: VNet, config: Config, options: Options) -> dict[str, Any]:
    """Whatever decides the label maps."""
    record = {name: getattr(config.data, name) for name in PREPARATION} | {
        "overlap": options.overlap, "mirror": options.mirror, "largest_component": options.largest_component,
        "statistics": options.statistics, "classes": network.out_conv.out_channels, "values": config.data.classes,
        "weights": fingerprint(network), "spss_fast": __version__,
    }
    return json.loads(json.dumps(record))  # as it will be read back: tuples are lists


def _claim(out: Path, record: dict[str, Any], outputs: list[Path], overwrite: bool) -> None:
    """Makes ``out`` the folder of predictions made as ``record`` says; with ``overwrite`` without its old ``outputs``.

    Otherwise what is there already would be skipped, and label maps of two networks would mix. A folder of images that
    no prediction left there, such as scans or a data set's own labels, is refused: label maps would pass for scans.
    """
    path = out / RECORD
    try:
        out.mkdir(parents=True, exist_ok=True)
        below = [folder for folder in out.iterdir() if folder.is_dir() and not (folder / RECORD).exists()]
        images = (file for folder in (out, *below) for file in folder.iterdir() if ending(file))
        foreign = [] if path.exists() else sorted(images)
        if foreign:
            raise UserError(f"{foreign[0]} is there already and no prediction (no {RECORD} beside it): choose another "
                            "folder")
        before = json.loads(path.read_text()) if path.exists() else record
        changed = [name for name in record if before.get(name) != record[name]]
        if changed and not overwrite:
            raise UserError(f"{out} holds predictions made with other {', '.join(changed)}: choose another folder, or "
                            "add --overwrite")
        if overwrite:
            for output in outputs:
                output.unlink(missing_ok=True)
        write_json(path, record)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a record of predictions: choose another folder") from error
    except OSError as error:
        raise UserError(f"the folder {out} cannot be written ({error.strerror}): choose another") from error


def _is_done(image: Path, paths: Iterable[Path]) -> bool:
    taken = image.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime >= taken for path in paths)


def _write(result: Segmentation, paths: dict[str, Path], source: Path) -> None:
    for kind, path in paths.items():
        array = {"label": result.label, "entropy": result.entropy}.get(kind)
        if array is None:
            array = result.probabilities[int(kind)]
        try:
            atomically(path, lambda temporary, array=array: write_like(array, result.grid, temporary, source))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be written ({str(error).splitlines()[-1]}): free space, or choose another "
                            "folder") from error


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a scan could not be predicted."""
    given = parse(arguments)
    summary = predict(config=take_preset(given, PREPARATION), **given)
    print(f"{len(summary.written)} predicted, {len(summary.skipped)} there already, {len(summary.bad)} failed; "
          f"label maps in {given['out']}")
    if summary.empty:
        shown = some(summary.empty)
        print(f"nothing but background was found in {len(summary.empty)} of them: {shown}; if they do show the "
              "structure, see that their modality and intensities are those of the training scans, and how well the "
              "run finds it there (evaluate, report): a training of few iterations does not", file=sys.stderr)
    for reason in summary.bad.values():
        print(f"error: {reason}", file=sys.stderr)
    return 1 if summary.bad else 0


if __name__ == "__main__":
    cli.run(main)
