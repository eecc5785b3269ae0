"""Small scans written to disk for the tests, in every layout."""

import struct
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from spss_fast.config import resolve
from spss_fast.data.cache import PreparedCase, prepare
from spss_fast.data.geometry import to_image
from spss_fast.data.layouts import find_cases
from spss_fast.settings import Config

# column a of the direction is the patient axis (left, back, head) of file axis a: KiTS19's first one runs to the feet
KITS = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def write_image(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=IDENTITY, origin=(0.0, 0.0, 0.0)):
    """Writes ``array``, its axes as the file's, so that reading it with nibabel would give the same array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path), useCompression=path.suffix != ".nii")


def write_series(
    folder: Path, array: np.ndarray, spacing=(0.8, 0.9, 3.0), axes=((1, 0, 0), (0, 1, 0)), along=(0, 0, 1), uid="1.2.3",
    modality="CT", skip=(), first=0, kind="ORIGINAL\\PRIMARY\\AXIAL",
):
    """Writes ``array``, its slices last, as a DICOM series: a file per slice, but for those in ``skip``.

    ``axes`` are the directions of columns and rows, ``along`` that in which slices follow each other ``spacing[2]`` mm
    apart; files are numbered from ``first``, against the order of their positions. ``kind`` is their ImageType.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in set(range(array.shape[2])) - set(skip):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T.astype(np.int16))[None])
        image.SetSpacing(spacing)
        text = "\\".join
        for tag, value in {
            "0008|0060": modality, "0008|0018": f"{uid}.{first + k + 1}", "0020|000d": f"{uid}.1000", "0020|000e": uid,
            "0008|0008": kind,
            "0020|0013": str(k + 1), "0020|0032": text(str(k * spacing[2] * part) for part in along),
            "0020|0037": text(str(part) for axis in axes for part in axis), "0018|0050": str(spacing[2]),
            "0028|0030": f"{spacing[1]}\\{spacing[0]}", "0028|1052": "-1024", "0028|1053": "1",
        }.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{first + array.shape[2] - k:04d}.dcm"))
        writer.Execute(image)


def write_object(path: Path, modality: str, explicit=True):
    """A DICOM file of ``modality`` without an image, its fields with their types (``explicit``) or without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = modality.encode() + b" " * (len(modality) % 2)
    field = b"CS" + struct.pack("<H", len(value)) if explicit else struct.pack("<I", len(value))
    path.write_bytes(bytes(128) + b"DICM" + b"\x08\0\x60\0" + field + value)


def ball(shape=(40, 36, 24), seed=0) -> tuple[np.ndarray, np.ndarray]:
    """An MR-like image (uint8) of a bright ball, and its label (uint8, 0/1); the ball differs with the seed."""
    random = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + random.uniform(-2, 2, 3)
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    label = sum((axis - place) ** 2 for axis, place in zip(axes, centre)) < random.uniform(6, 8) ** 2
    image = 40 + 60 * label + random.normal(0, 5, shape)
    return image.clip(0, 255).astype(np.uint8), label.astype(np.uint8)


def write_la(folder: Path, count: int, shape=(40, 36, 24)) -> list[str]:
    """``count`` cases a, b, ... in the raw LA layout; their names."""
    names = [chr(ord("a") + i) for i in range(count)]
    for i, name in enumerate(names):
        image, label = ball(shape, i)
        write_image(folder / name / "lgemri.nrrd", image)
        write_image(folder / name / "laendo.nrrd", label * 255)
    return names


def write_kits(folder: Path, name: str, image: np.ndarray, label: np.ndarray | None, spacing=(3.0, 0.8, 0.8)):
    """One case in the raw KiTS19 layout; arrays in the file's order, slices first."""
    write_image(folder / name / "imaging.nii.gz", image, spacing, KITS)
    if label is not None:
        write_image(folder / name / "segmentation.nii.gz", label, spacing, KITS)


def write_h5(path: Path, **arrays: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


def settings_of(dataset: str, folder: Path, **flags) -> Config:
    """The data set's configuration with a cache in ``folder`` and everything done in this process."""
    return resolve(dataset, {"cache_dir": str(folder / "cache"), "workers": 1, **flags})


def to_source(case: PreparedCase, array: np.ndarray) -> sitk.Image:
    """A label map (H, W, D) on the prepared grid, taken back onto the file's own grid (nearest), 0 beyond the crop."""
    reference = to_image(np.zeros(case.source.size, np.uint8), case.source)
    image = to_image(np.ascontiguousarray(array), case.grid)
    return sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor)


def prepared(dataset: str, data: Path, config: Config) -> list[PreparedCase]:
    return prepare(find_cases(dataset, data), config.data, progress=False)
