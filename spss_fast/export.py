"""Take a run's student to other runtimes: ``python -m spss_fast.export --run RUN --out FOLDER``."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spss_fast import __version__, cli, metrics
from spss_fast.console import say
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.description import class_descriptions, preparation_steps
from spss_fast.data.layouts import Case, find_cases
from spss_fast.engine import checkpoint
from spss_fast.engine.evaluation import window_stride
from spss_fast.engine.inference import sliding_window
from spss_fast.engine.run_folder import RunFolder
from spss_fast.engine.weights import load_student
from spss_fast.errors import UserError
from spss_fast.nets.vnet import VNet
from spss_fast.settings import Config

DESCRIPTION = """Write the student of a run for other runtimes and pipelines, each file checked on a real scan against
what PyTorch computes here, and beside them preprocessing.json: how a scan becomes the network's input, and its output
a label map, in steps that need nothing of this package."""
FILES = {
    "onnx": "student.onnx", "torch": "student.pt2", "state_dict": "student.pth", "safetensors": "student.safetensors",
}
# what a format needs beyond this package's own dependencies: the extra `export`
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
LOGIT_TOLERANCE = 1e-3  # float32 sums in another order differ by about 1e-5 where logits are about 10
LABEL_TOLERANCE = 1e-4  # share of voxels: those whose best two logits are that close

Forward = Callable[[Tensor], Tensor]


@dataclass
class Check:
    """How a written file compares with the student in PyTorch, both in float32, over all windows of one scan."""

    voxels: int = 0
    max_difference: float = 0.0  # of any logit
    different_labels: int = 0  # voxels whose argmax differs

    @property
    def agreement(self) -> float:
        """Share of voxels that get the same label."""
        return 1 - self.different_labels / max(1, self.voxels)

    @property
    def passed(self) -> bool:
        """Whether both differences are within tolerance; NaN is not."""
        return self.max_difference <= LOGIT_TOLERANCE and self.different_labels <= LABEL_TOLERANCE * self.voxels

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Logits (B, C, h, w, d) of one more batch of windows."""
        if actual.shape != expected.shape:
            raise ValueError(f"logits of shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
        self.voxels += expected[:, 0].numel()
        difference = float((actual - expected).abs().max())
        self.max_difference = float(np.maximum(self.max_difference, difference))  # max() would forget a NaN
        self.different_labels += int((actual.argmax(1) != expected.argmax(1)).sum())


@dataclass
class Exported:
    """What :func:`export` wrote."""

    files: dict[str, Path] = field(default_factory=dict)  # by format
    preprocessing: Path = Path()
    case: str = ""  # the scan of the check
    checks: dict[str, Check] = field(default_factory=dict)  # by format
    # of a run that is measured with batch-norm statistics of each case: the Dice between the foreground so found on the
    # scan of the check and that of the written networks, which hold the running statistics, NaN where neither has
    # any; None of any other run
    statistics_dice: float | None = None


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary."""
    parser = cli.Parser(prog="spss_fast.export", description=DESCRIPTION)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; older ones there are replaced")
    parser.add_argument("--format", default=",".join(FILES), help="which of these files to write, separated by commas")
    parser.add_argument("--scan", type=Path, metavar="FILE", help="scan of the check (default: a case of the run)")
    return vars(parser.parse_args(arguments))


def export(
    run: Path, out: Path, formats: Sequence[str] = tuple(FILES), scan: Path | None = None,
    console: Console | None = None,
) -> Exported:
    """Writes the student of the folder ``run`` into ``out``, and ``preprocessing.json`` beside it.

    ``formats``: ``onnx`` and ``torch`` (a ``torch.export`` program, .pt2) map images (B, 1, h, w, d) to logits
    (B, C, h, w, d), float32, for any B and sides that are multiples of 16 (from 32 on; a side in which the run's patch
    has 16 is fixed at that). They hold plain operators only, batch norm folded into the convolutions. ``state_dict``
    (.pth) and ``safetensors`` hold the weights under this literature's names. All hold the running batch-norm
    statistics, also of a run whose setting ``statistics`` is ``case``: no fixed graph has those of a whole scan.

    Each file is read back and compared with the student, over all windows of ``scan`` (or of the run's first test case)
    as the run prepares it: logits within 1e-3, labels equal in 99.99% of voxels. Raises ``UserError`` where a file
    misses that, a package is not installed, or run, scan or folder cannot be used; ``out`` then holds what it held.
    """
    console = console or Console()
    _check_formats(formats)
    content = checkpoint.read(RunFolder(run).checkpoint)
    config = checkpoint.config_of(content)
    student = load_student(content, torch.device("cpu")).float().to(memory_format=torch.contiguous_format)
    case = _case(run, config, scan)
    result = Exported(preprocessing=out / "preprocessing.json", case=case.name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary:
            written = _write(student, formats, Path(temporary), config.data.patch)
            forwards = {name: _read(name, path, student) for name, path in written.items()}
            say(console, f"checking on {case.name}, {' x '.join(map(str, case.grid.size))} voxels")
            image = torch.from_numpy(case.image)
            result.checks = compare(student, forwards, image, config.data.patch)
            for name, check in result.checks.items():
                if not check.passed:
                    raise UserError(
                        f"{FILES[name]} does not compute what PyTorch does on {case.name}: logits differ by up to "
                        f"{check.max_difference:.2g} (tolerance {LOGIT_TOLERANCE:g}), {check.different_labels} of "
                        f"{check.voxels} labels; it is not kept: try other versions of {', '.join(_versions([name]))}"
                    )
            if config.network.statistics == "case":
                result.statistics_dice = _statistics_dice(student, image, config.data.patch)
            description = Path(temporary) / result.preprocessing.name
            description.write_text(json.dumps(_describe(student, config, content, result), indent=2) + "\n")
            for name, path in written.items():
                result.files[name] = out / FILES[name]
                os.replace(path, result.files[name])
            os.replace(description, result.preprocessing)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    return result


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FILES]
    if unknown or not formats:
        raise UserError(f"--format {','.join(formats)}: choose from {', '.join(FILES)}, separated by commas")
    for name in formats:
        for package in PACKAGES.get(name, ()):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(f"--format {name} needs {package} ({error}): pip install onnx onnxscript onnxruntime "
                                "safetensors, or choose --format torch,state_dict") from error


def _case(run: Path, config: Config, scan: Path | None) -> PreparedCase:
    """The prepared scan of the check: ``scan``, or the run's first test case."""
    if scan is not None:
        if scan.is_dir():
            raise UserError(f"--scan {scan} is a folder: give the file of one scan (NIfTI, NRRD, MHA or HDF5)")
        layout = "h5" if scan.suffix == ".h5" else "image"
        return prepare([Case(scan.name.split(".")[0], scan, None, layout)], config.data, progress=False)[0]
    try:
        recorded = RunFolder(run).cases()
        cases = {case.name: case for case in find_cases(config.data.dataset, Path(recorded["data_dir"]))}
        name = next(name for name in (*recorded["test"], *recorded["train"]) if name in cases)
    except (OSError, ValueError, KeyError, StopIteration, UserError) as error:
        raise UserError(f"the scans of {run} are not found ({error}): give one to check on with --scan FILE") from error
    return prepare([cases[name]], config.data, progress=False)[0]


def plain(student: VNet) -> VNet:
    """A copy of the student for inference alone: batch norm folded into the convolutions (which saves a tenth of the
    time of the ``torch`` file; ONNX exporters do it in any case), neither dropout nor the projector."""
    network = copy.deepcopy(student).eval().requires_grad_(False)
    for block in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for i, norm in enumerate(block):
            if isinstance(norm, nn.BatchNorm3d):
                transposed = isinstance(block[i - 1], nn.ConvTranspose3d)
                block[i - 1] = fuse_conv_bn_eval(block[i - 1], norm, transposed)
                block[i] = nn.Identity()
    for module in network.modules():
        if hasattr(module, "placed_taps"):  # for GPUs without an export, and yet it would be part of the files
            del module.placed_taps
    network.dropout = nn.Identity()
    del network.projector
    return network


def program(student: VNet, patch: Sequence[int]) -> torch.export.ExportedProgram:
    """The student in plain ``aten`` operators, for any batch and sides that are multiples of 16.

    torch's shape analysis takes no size of 1 for a case of "any", and a side of 16 has that at the bottleneck: where
    ``patch`` has such a side, it is fixed.
    """
    sides = [16 if side == 16 else example for side, example in zip(patch, (32, 48, 64))]
    dynamic = {0: torch.export.Dim("batch", min=1)}
    for axis, name in enumerate(("height", "width", "slices"), 2):
        if sides[axis - 2] > 16:
            dynamic[axis] = 16 * torch.export.Dim(f"{name}_16ths", min=2)
    exported = torch.export.export(plain(student), (torch.zeros(2, 1, *sides),), dynamic_shapes=(dynamic,))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return exported


def _write(student: VNet, formats: Sequence[str], folder: Path, patch: Sequence[int]) -> dict[str, Path]:
    """The files of ``formats`` in ``folder``."""
    paths = {name: folder / FILES[name] for name in formats}
    if "onnx" in paths or "torch" in paths:
        exported = program(student, patch)
        if "torch" in paths:
            torch.export.save(exported, paths["torch"])
        if "onnx" in paths:
            _write_onnx(exported, paths["onnx"])
    if "state_dict" in paths:
        torch.save(student.state_dict(), paths["state_dict"])
    if "safetensors" in paths:
        from safetensors.torch import save  # save_file would keep the file from other users

        paths["safetensors"].write_bytes(save(student.state_dict()))
    return paths


def _write_onnx(exported: torch.export.ExportedProgram, path: Path) -> None:
    """The program as one ONNX file, its axes by name."""
    import onnx_ir

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators that are not here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        onnx = torch.onnx.export(
            exported, dynamo=True, input_names=["image"], output_names=["logits"], verbose=False
        )
    graph = onnx.model.graph
    for node in graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in graph.outputs:
                value.shape = None  # in symbols that the names below replace
    names = ("batch", None, "height", "width", "slices")
    for value in (graph.inputs[0], graph.outputs[0]):
        value.shape = onnx_ir.Shape(
            [size if isinstance(size, int) else name for size, name in zip(value.shape, names)]
        )
    onnx.save(path, external_data=False)


def _read(name: str, path: Path, student: VNet) -> Forward:
    """The network of a written file, as a function of images (B, 1, h, w, d)."""
    if name == "torch":
        return torch.export.load(path).module()
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])
    if name == "safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, weights_only=True)
    network = copy.deepcopy(student)
    network.load_state_dict(tensors)
    return network.eval()


class _Compared(nn.Module):
    """The student, which compares its logits on each batch of windows with those of other ``forwards``."""

    def __init__(self, student: VNet, forwards: dict[str, Forward]) -> None:
        super().__init__()
        self.student = student
        self._forwards = dict(forwards)
        self.checks = {name: Check() for name in forwards}

    def forward(self, x: Tensor) -> Tensor:
        expected = self.student(x)
        for name, forward in self._forwards.items():
            self.checks[name].add(forward(x.contiguous()), expected)
        return expected


def compare(student: VNet, forwards: dict[str, Forward], image: Tensor, patch: Sequence[int]) -> dict[str, Check]:
    """Each of ``forwards`` (images (B, 1, h, w, d) to logits) against the student, over windows of ``patch`` that
    cover ``image`` (H, W, D)."""
    compared = _Compared(student.eval(), forwards)
    sliding_window(compared, image, patch, patch, tiles=2)
    return compared.checks


def _statistics_dice(student: VNet, image: Tensor, patch: Sequence[int]) -> float:
    """Dice between the foregrounds of ``image`` (H, W, D) with the running and with the case's own statistics; NaN
    where there is neither."""
    fixed, own = (
        sliding_window(copy.deepcopy(student), image, patch, patch, tiles=2, statistics=name).argmax(0).numpy() > 0
        for name in ("running", "case")
    )
    return metrics.dice(fixed, own) if fixed.any() or own.any() else math.nan


def _versions(formats: Sequence[str]) -> dict[str, str]:
    packages = ["torch", *(package for name in formats for package in PACKAGES.get(name, ()))]
    return {package: metadata.version(package) for package in packages}


def _describe(student: VNet, config: Config, content: dict[str, Any], result: Exported) -> dict[str, Any]:
    """The content of ``preprocessing.json``."""
    classes, patch, dice = student.out_conv.out_channels, config.data.patch, result.statistics_dice
    return {
        "files": {name: FILES[name] for name in result.checks},
        "input": {
            "name": "image", "dtype": "float32", "axes": ["batch", 1, "height", "width", "slices"],
            "text": "The prepared volume, or windows of it: [0, 0, i, j, k] is its voxel (i, j, k). Sides are "
            "multiples of 16, 32 or more; where the patch has 16, a side of exactly 16.",
        },
        "output": {
            "name": "logits", "dtype": "float32", "axes": ["batch", classes, "height", "width", "slices"],
            "text": "Softmax over axis 1 gives probabilities, argmax the class.",
        },
        "classes": class_descriptions(config.data, classes),
        "preprocessing": {
            "steps": preparation_steps(config.data),
            "text": "For NIfTI, NRRD, MHA and such. HDF5 files of this literature (an `image` of mri_norm2.h5 or "
            "CASE.h5) hold scans that are oriented, cropped and windowed: for them only resample and z_score apply.",
        },
        "inference": {
            "patch": list(patch), "stride": list(window_stride(patch)),
            "text": "Pad a volume smaller than `patch` with its minimum, half of it (rounded down) before. Windows of "
            "`patch` begin every `stride` voxels, the last one flush with the end; larger strides up to `patch` are "
            "faster. The mean of the windows' softmax is a voxel's probability.",
        },
        "statistics": {
            "of": config.network.statistics, "foreground_dice": None if dice is None or math.isnan(dice) else dice,
            "text": "The files hold the running batch-norm statistics. Where `of` is `case`, spss_fast replaces them "
            "by those of each scan's own windows before it segments, and its labels differ: `foreground_dice` is "
            "between both on the scan of the check, null where neither finds any.",
        },
        "back": "Resample the label map (nearest) or the probabilities (linear) onto the scan's own voxels through the "
        "geometry that the steps gave; what they cropped away is background.",
        "made_by": {
            "spss_fast": __version__, **_versions(list(result.checks)), "dataset": config.data.dataset,
            "iteration": content["iteration"], "iterations": config.training.iterations,
        },
        "checked_on": {
            "case": result.case, "logit_tolerance": LOGIT_TOLERANCE, "label_tolerance": LABEL_TOLERANCE,
            **{name: asdict(check) for name, check in result.checks.items()},
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = parse(arguments)
    console = Console()
    formats = [part.strip() for part in given["format"].split(",") if part.strip()]
    result = export(given["run"], given["out"], formats, given["scan"], console)
    for name, check in result.checks.items():
        size = result.files[name].stat().st_size / 1e6
        say(console, f"{result.files[name]} ({size:.1f} MB): logits differ from PyTorch's by at most "
                     f"{check.max_difference:.2g} (tolerance {LOGIT_TOLERANCE:g}), "
                     f"{check.agreement:.4%} of labels agree")
    if result.statistics_dice is not None:
        found = f"the foregrounds so found have a Dice of {result.statistics_dice:.3f}"
        if math.isnan(result.statistics_dice):
            found = "neither finds any foreground"
        say(console, "note: the run is measured with batch-norm statistics of each scan, the files hold the running "
                     f"ones; on {result.case} {found}")
    say(console, f"{result.preprocessing}: what their input and output are")


if __name__ == "__main__":
    cli.run(main)
