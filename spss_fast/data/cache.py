"""Prepared volumes on disk: made on first use, in parallel, and found again until a setting or a file changes.

Each volume is one folder named after its case and a hash of everything that shapes it. The folder is filled under
another name and then renamed, so that it is whole or absent, whoever else prepares the same scans and whenever the
work is interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from spss_fast.data.annotations import Annotation
from spss_fast.data.geometry import Grid
from spss_fast.data.images import files_of
from spss_fast.data.layouts import Case, Scan, read_case, read_label
from spss_fast.data.parallel import parallel
from spss_fast.data.preparation import classes_shown, prepare_scan, refuse_label_map, resampled_label
from spss_fast.errors import UserError
from spss_fast.settings import DataSettings

FORMAT = 3  # raised whenever the same scan and settings would be prepared differently


@dataclass
class PreparedCase:
    """One prepared volume; its arrays stay on disk until they are read."""

    name: str
    image: np.ndarray  # (H, W, D) float32, z-scored, memory-mapped copy-on-write
    spacing: tuple[float, float, float]  # mm, in array order
    case: Case
    grid: Grid  # where the prepared array lies
    source: Grid  # where the array of the original file lies
    shown: tuple[int, ...]  # by slice of the file, how many foreground classes its label shows; empty without a label
    folder: Path

    @property
    def has_label(self) -> bool:
        """Whether there is a label that shows foreground, if only in one slice."""
        return any(self.shown)

    def label(self) -> np.ndarray | None:
        """The label (H, W, D) uint8 in [0, C), or None; what shows one slice may be no more than its annotation."""
        return np.load(self.folder / "label.npy", mmap_mode="c") if self.has_label else None

    @property
    def has_full_label(self) -> bool:
        """Whether the label shows more than one slice of the file, whatever is left of them here.

        What shows only one is an annotation, against which nothing can be measured.
        """
        return np.count_nonzero(self.shown) > 1

    @property
    def only_slice(self) -> int | None:
        """The slice of the file that the label shows, where it shows one and no other."""
        return None if self.has_full_label or not self.has_label else int(np.argmax(self.shown))

    def full_label(self) -> np.ndarray | None:
        """:meth:`label` where it is a full one, else None; for monitoring and evaluation only."""
        return self.label() if self.has_full_label else None

    def slice_axis(self) -> int:
        """The axis of the original file's array along which the slices lie."""
        return int(np.abs(self.source.axes.T @ self.grid.axes[:, 2]).argmax())

    def slice_from_source(self, index: int) -> int:
        """The prepared slice nearest to slice ``index`` of the file; not in 0 .. D - 1 where it was cropped away."""
        position = (np.array(self.source.size) - 1) / 2
        position[self.slice_axis()] = index
        return int(np.floor(self.grid.index(self.source.point(position))[2] + 0.5))

    def slice_to_source(self, index: int) -> int:
        """The file's slice nearest to prepared slice ``index``, the inverse of :meth:`slice_from_source`."""
        position = (np.array(self.grid.size) - 1) / 2
        position[2] = index
        axis = self.slice_axis()
        here = np.floor(self.source.index(self.grid.point(position))[axis] + 0.5)
        return int(np.clip(here, 0, self.source.size[axis] - 1))  # a shrunk grid may reach past the last slice

    def annotation_from_source(self, annotation: Annotation, settings: DataSettings) -> np.ndarray:
        """The annotated slice, uint8 (H, W) in [0, C) on the prepared grid's in-plane lattice, from the file that holds
        it: that of ``annotation``, or the case's own label.

        Resampling the whole label would fall between slices where it shrinks their number, and find nothing where
        only this one is annotated.
        """
        own, label = annotation.label is None, annotation.label or self.case.label
        whole, grid = read_label(replace(self.case, label=label), self.source, settings.plane, padded=not own)
        position = (np.array(self.source.size) - 1) / 2
        position[self.slice_axis()] = annotation.index_in(self.source)
        here = int(np.rint(grid.index(self.source.point(position))[2]))
        slab = grid.cropped((0, 0, here), (*grid.size[:2], 1))
        along = (np.array(slab.origin) - self.grid.origin) @ self.grid.axes[:, 2] / self.grid.spacing[2]
        target = self.grid.cropped((0, 0, along), (*self.grid.size[:2], 1))
        as_thick = replace(slab, spacing=(*slab.spacing[:2], target.spacing[2]))
        return resampled_label(whole[:, :, here : here + 1], as_thick, target, settings)[:, :, 0]


def cache_root(settings: DataSettings) -> Path:
    """``settings.cache_dir``, else ``$XDG_CACHE_HOME/spss_fast``, else ``~/.cache/spss_fast``."""
    if settings.cache_dir:
        return Path(settings.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spss_fast"


def prepare(cases: list[Case], settings: DataSettings, progress: bool = True) -> list[PreparedCase]:
    """The prepared volumes of ``cases``, in their order; those that the cache does not hold are made first.

    Volumes keep their size where they are smaller than the patch: the sampler pads them. Raises ``UserError`` with
    the first unusable case, and how many more there are; every case is tried, so the good ones are ready by then.
    """
    root = cache_root(settings)
    folders = [root / f"{case.name}-{_key(case, settings)}" for case in cases]
    found = {case.name: prepared for case, folder in zip(cases, folders) if (prepared := _load(case, folder))}
    missing = [(case, folder) for case, folder in zip(cases, folders) if case.name not in found]
    failures = {}
    if missing:
        _make_root(root)
        jobs = [(case, folder, settings) for case, folder in missing]
        for position, failure in parallel(_build, jobs, settings.workers, "preparing scans", progress):
            if failure:
                failures[missing[position][0].name] = failure
    for case, folder in missing:
        if case.name not in failures:
            prepared = _load(case, folder)
            if prepared is None:
                failures[case.name] = f"the prepared volume in {folder} cannot be read back: check the disk"
            else:
                found[case.name] = prepared
    if failures:
        first = next(case.name for case in cases if case.name in failures)
        others = len(failures) - 1
        raise UserError(failures[first] + (f" ({others} more of the {len(cases)} cases fail too)" if others else ""))
    return [found[case.name] for case in cases]


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {root} cannot be made ({error.strerror}): set cache_dir") from error
    # what killed processes left more than a day ago
    for path in root.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)


def _key(case: Case, settings: DataSettings) -> str:
    """Hash of whatever shapes the prepared volume: format, settings, and the identity of the files."""
    files = files_of(case.image) + ([case.label] if case.label not in (None, case.image) else [])
    try:
        identity = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be opened ({error.strerror}): fetch the file again") from error
    relevant = {
        "window": settings.window, "body_crop": settings.body_crop, "resample": settings.resample,
        "max_in_plane": settings.max_in_plane, "foreground": sorted(settings.foreground), "classes": settings.classes,
        "plane": settings.plane,
        # config has applied the factor to resample already
        "downsample": settings.downsample if settings.resample is None else None,
    }
    text = json.dumps([FORMAT, case.layout, case.label is not None, relevant, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _load(case: Case, folder: Path) -> PreparedCase | None:
    """The prepared volume in ``folder``, or None where there is none that can be used."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        image = np.load(folder / "image.npy", mmap_mode="c")
        grid, source = (Grid(**{key: tuple(value) for key, value in meta[name].items()}) for name in ("grid", "source"))
        shapes = {image.shape} | ({np.load(folder / "label.npy", mmap_mode="r").shape} if meta["label"] else set())
        if shapes != {grid.size}:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return PreparedCase(case.name, image, grid.spacing, case, grid, source, tuple(meta["shown"]), folder)


def _build(case: Case, folder: Path, settings: DataSettings) -> str | None:
    """Prepares one case into ``folder``; returns the message for the user where that is not possible."""
    try:
        scan = read_case(case, settings.plane)
        refuse_label_map(scan.image, case)
        image, label, grid = prepare_scan(scan, case, settings)
    except UserError as error:
        return str(error)
    except MemoryError:
        return f"{case.image} does not fit into memory: lower workers, or free some"
    try:
        _write(case, folder, image, label, grid, scan.source, _shown(scan, settings))
    except OSError as error:
        return f"the cache folder {folder.parent} cannot be written ({error.strerror}): free space, or set cache_dir"
    return None


def _shown(scan: Scan, settings: DataSettings) -> list[int]:
    """How many foreground classes the label shows in each slice of the file; empty without a label."""
    if scan.label is None:
        return []
    along = scan.source.axes.T @ scan.grid.axes[:, 2]  # as oriented, slices may be counted from the other end
    return classes_shown(scan.label, settings)[:: -1 if along[np.abs(along).argmax()] < 0 else 1].tolist()


def _write(
    case: Case, folder: Path, image: np.ndarray, label: np.ndarray | None, grid: Grid, source: Grid, shown: list[int]
) -> None:
    """Fills a folder under a temporary name and renames it to ``folder``."""
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        np.save(temporary / "image.npy", image)
        if label is not None:
            np.save(temporary / "label.npy", label)
        meta = {"grid": asdict(grid), "source": asdict(source), "label": label is not None, "shown": shown}
        (temporary / "meta.json").write_text(json.dumps(meta))
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists() and _load(case, folder) is None:
            shutil.rmtree(folder)  # damaged
        try:
            os.replace(temporary, folder)
        except OSError:
            if _load(case, folder) is None:
                raise
            # else another process was faster, with the same content
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

