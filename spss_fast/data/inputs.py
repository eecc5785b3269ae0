"""Scans to predict, from files and folders: which there are, and what their outputs are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from spss_fast.data.folders import find_images
from spss_fast.data.images import ENDINGS, ending, stem
from spss_fast.data.layouts import LAYOUTS, RAW, Case, cases_of, find_cases
from spss_fast.data.output import OUTPUTS
from spss_fast.errors import UserError

READ = ", ".join(ENDINGS)
# names of files that say what they are, not of whom: the folder's name does
GENERAL = {"image", *(stem(Path(image)) for image, _ in RAW.values())}
DATA_SETS = tuple(layout for layout in LAYOUTS["folder"] if layout != "plain")


def find_inputs(paths: Sequence[Path]) -> list[Case]:
    """The scans of ``paths``, none with a label, in the order given and by name within a folder.

    A file is a scan, named after its folder where it is called ``image``, ``imaging`` or ``lgemri``. A folder is one
    case of a raw layout, holds one of the data sets' layouts (:mod:`spss_fast.data.layouts`), files and DICOM series;
    which of these are label maps their names say, as in training. Raises ``UserError`` for a path that is missing or
    holds no scan.
    """
    return [case for path in paths for case in (_of_folder(path) if path.is_dir() else [_of_file(path)])]


def _of_file(path: Path) -> Case:
    if not path.exists():
        raise UserError(f"{path} does not exist: give files or folders of scans, then the folder for the predictions")
    if not ending(path):
        raise UserError(f"{path} is no scan by its name: {READ} are read, or the folder of an HDF5 layout")
    return Case(_named(stem(path), path.parent), path, None, "image")


def _named(name: str, folder: Path) -> str:
    return folder.resolve().name if name in GENERAL else name


def _of_folder(folder: Path) -> list[Case]:
    for layout, (image, _) in RAW.items():
        if (folder / image).exists():  # not its label map beside it
            return [Case(folder.resolve().name, folder / image, None, layout)]
    if not any(folder.iterdir()):
        raise UserError(f"the folder {folder} is empty: put scans ({READ}) into it, or give another")
    cases: list[Case] = next(filter(None, (cases_of(layout, folder) for layout in DATA_SETS)), [])
    # what lies with a case of a data set belongs to it, and below nnU-Net's and the Decathlon's lie labels and tests
    own, nested = {case.image.parent for case in cases} - {folder}, not (folder / "imagesTr").is_dir()
    images = [(name, path) for name, path in find_images(folder)
              if path.parent == folder or (nested and own.isdisjoint({path, *path.parents}))]
    if all(name.endswith("_0000") for name, _ in images):  # nnU-Net's number of the one channel, which its labels lack
        images = [(name.removesuffix("_0000"), path) for name, path in images]
    cases = [Case(case.name, case.image, None, case.layout) for case in cases]
    cases += [Case(_named(name, folder), path, None, "plain") for name, path in images]
    if not cases:
        try:
            find_cases("folder", folder)  # says where to look instead
        except UserError as error:
            raise UserError(f"no {READ} in {folder}, nor a data set: {error}") from error
    return sorted(cases, key=lambda case: case.name)


def output_paths(case: Case, out: Path, classes: int, probabilities: bool, entropy: bool) -> dict[str, Path]:
    """Where the outputs of ``case`` go: ``label``, then, as asked for, ``1`` ... ``classes - 1`` (the probability of
    each foreground class) and ``entropy``; in the format of the input, or NIfTI where that is HDF5."""
    suffix = OUTPUTS.get(ending(case.image), ".nii.gz")
    names = {"label": ""}
    if probabilities:
        names |= {str(c): f"_probability{c if classes > 2 else ''}" for c in range(1, classes)}
    if entropy:
        names["entropy"] = "_entropy"
    return {kind: out / f"{case.name}{name}{suffix}" for kind, name in names.items()}


def refuse_clashes(cases: Iterable[Case], outputs: Iterable[dict[str, Path]]) -> None:
    """Raises ``UserError`` where two scans would have the same output, or an output would replace a scan."""
    taken: dict[Path, Path] = {}
    sources = {case.image.resolve() for case in cases}
    for case, paths in zip(cases, outputs):
        for path in paths.values():
            if path.resolve() in sources:
                raise UserError(f"{path} is a scan, and would be overwritten: choose another folder for predictions")
            if path in taken:
                raise UserError(f"{case.image} and {taken[path]} would both be predicted into {path}: predict them "
                                "into folders of their own")
            taken[path] = case.image
