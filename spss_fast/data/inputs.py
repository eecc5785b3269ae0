"""Scans to predict, from files and folders: which there are, and what their outputs are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from spss_fast.data.images import stem
from spss_fast.data.layouts import RAW, Case, find_cases
from spss_fast.data.output import SUFFIXES, suffix_of
from spss_fast.errors import UserError

ENDINGS = ", ".join(SUFFIXES)
# names of files that say what they are, not of whom: the folder's name does
GENERAL = {"image", *(stem(Path(image)) for image, _ in RAW.values())}


def find_inputs(paths: Sequence[Path]) -> list[Case]:
    """The scans of ``paths``, none with a label, in the order given and by name within a folder.

    A file is a scan, named after its folder where it is called ``image``, ``imaging`` or ``lgemri``. A folder holds
    scans as files, one of the data sets' layouts (:mod:`spss_fast.data.layouts`), or is one case of a raw layout.
    Raises ``UserError`` for a path that is missing or holds no scan.
    """
    return [case for path in paths for case in (_of_folder(path) if path.is_dir() else [_of_file(path)])]


def _of_file(path: Path) -> Case:
    if not path.exists():
        raise UserError(f"{path} does not exist: give files or folders of scans, then the folder for the predictions")
    suffix = suffix_of(path)
    if not suffix:
        raise UserError(f"{path} is no scan by its name: {ENDINGS} are read, or the folder of an HDF5 layout")
    name = path.name[: -len(suffix)]
    return Case(path.resolve().parent.name if name in GENERAL else name, path, None, "image")


def _of_folder(folder: Path) -> list[Case]:
    for layout, (image, _) in RAW.items():
        if (folder / image).exists():  # not its label map beside it
            return [Case(folder.resolve().name, folder / image, None, layout)]
    files = sorted(path for path in folder.iterdir() if suffix_of(path) and path.name[0] != "." and path.is_file())
    if files:
        return [_of_file(path) for path in files]
    if not any(folder.iterdir()):
        raise UserError(f"the folder {folder} is empty: put scans ({ENDINGS}) into it, or give another")
    try:
        cases = find_cases("folder", folder)
    except UserError as error:
        raise UserError(f"no {ENDINGS} in {folder}, nor a data set: {error}") from error
    return [Case(case.name, case.image, None, case.layout) for case in cases]


def output_paths(case: Case, out: Path, classes: int, probabilities: bool, entropy: bool) -> dict[str, Path]:
    """Where the outputs of ``case`` go: ``label``, then, as asked for, ``1`` ... ``classes - 1`` (the probability of
    each foreground class) and ``entropy``; in the format of the input, or NIfTI where that is HDF5."""
    suffix = SUFFIXES.get(suffix_of(case.image), ".nii.gz")
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
