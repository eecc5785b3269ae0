"""Images in another file's own geometry, to the last digit."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from spss_fast.data.geometry import Grid, to_image
from spss_fast.data.images import ENDINGS, byte_order, ending, nifti_start

# the input's ending, and the one that its outputs get: one file each, and header fields that hold the same digits
OUTPUTS = {end: end for end in ENDINGS} | {".nhdr": ".nrrd", ".mhd": ".mha"}
# where a NIfTI-1 header keeps geometry: float32, of which ITK makes orthonormal axes in double precision
NIFTI = np.dtype({
    "names": ["pixdim", "units", "codes", "quaternion", "rows"],
    "formats": ["8f4", "u1", "2i2", "6f4", "12f4"],
    "offsets": [76, 123, 252, 256, 280],
    "itemsize": 348,
})


def write_like(array: np.ndarray, grid: Grid, path: Path, source: Path) -> None:
    """Writes ``array`` (H, W, D) on ``grid``, the grid of the file ``source``, to ``path``, compressed.

    ITK rounds the axes of an oblique scan anew whenever it writes NIfTI or NRRD, in the 9th or the 16th digit; so the
    fields of the header that hold geometry are copied from ``source`` where that is of the same format. The ending of
    ``path`` chooses the format.
    """
    image = to_image(array, grid)
    if ending(path) in (".nii", ".nii.gz"):
        _write_nifti(image, path, source)
        return
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
    if ending(path) == ".nrrd" and ending(source) in (".nrrd", ".nhdr"):
        _copy_nrrd_geometry(path, source)


def _write_nifti(image: sitk.Image, path: Path, source: Path) -> None:
    plain = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".plain.nii")
    try:
        sitk.WriteImage(image, str(plain))
        if ending(source) in (".nii", ".nii.gz"):
            start = nifti_start(source, NIFTI.itemsize)
            header = np.frombuffer(start, NIFTI.newbyteorder(byte_order(start)))[0]
            written = np.memmap(plain, NIFTI.newbyteorder("<"), mode="r+", shape=1)
            for name in NIFTI.names:
                written[name] = header[name]
            written.flush()
            del written  # or Windows could not move the file
        if ending(path) == ".nii":
            plain.replace(path)
            return
        with open(plain, "rb") as content, gzip.open(path, "wb", compresslevel=1) as file:
            shutil.copyfileobj(content, file, 1 << 22)
    finally:
        plain.unlink(missing_ok=True)


def _copy_nrrd_geometry(path: Path, source: Path) -> None:
    """Puts the lines ``space``, ``space directions``, ``space origin`` ... of ``source`` in place of ``path``'s."""
    geometry = [line for line in _nrrd_header(source) if line.startswith(b"space")]
    if not any(line.startswith(b"space directions") for line in geometry):
        return  # spacings alone, along the axes: exact as written
    header = _nrrd_header(path)
    kept = [line for line in header if not line.startswith(b"space")]
    patched = path.with_name(path.name + ".patched")
    try:
        with path.open("rb") as content, patched.open("wb") as file:
            content.seek(sum(map(len, header)) + 1)
            file.writelines([*kept, *geometry, b"\n"])
            shutil.copyfileobj(content, file, 1 << 22)
        patched.replace(path)
    finally:
        patched.unlink(missing_ok=True)


def _nrrd_header(path: Path) -> list[bytes]:
    """The lines of a NRRD header, each with its end, up to the empty one."""
    lines = []
    with path.open("rb") as file:
        while (line := file.readline()).strip():
            lines.append(line)
    return lines
