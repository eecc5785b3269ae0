"""Written images lie exactly where the file they belong to lies, whatever its format and however oblique."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from spss_fast.data.geometry import Grid
from spss_fast.data.images import ENDINGS, ending
from spss_fast.data.output import OUTPUTS, write_like
from tests.data.writing import write_image


def _oblique(path: Path, seed: int) -> Grid:
    random = np.random.default_rng(seed)
    direction = Rotation.random(random_state=seed).as_matrix().ravel().tolist()
    write_image(path, random.integers(0, 100, (4, 5, 6)).astype(np.int16), random.uniform(0.3, 5, 3).tolist(),
                direction, random.uniform(-300, 300, 3).tolist())
    return Grid.of(sitk.ReadImage(str(path)))


def _written(grid: Grid, path: Path, source: Path, dtype=np.uint8) -> sitk.Image:
    array = np.random.default_rng(1).integers(0, 3, grid.size).astype(dtype)
    write_like(array, grid, path, source)
    image = sitk.ReadImage(str(path))
    assert sitk.GetArrayFromImage(image).dtype == dtype
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, array)
    return image


@pytest.mark.parametrize("suffix", ENDINGS)
def test_geometry_to_the_last_digit(suffix, tmp_path):
    for seed in range(20):
        source, path = tmp_path / f"scan{suffix}", tmp_path / f"label{OUTPUTS[suffix]}"
        grid = _oblique(source, seed)
        assert Grid.of(_written(grid, path, source)) == grid
    before = set(tmp_path.iterdir())
    assert Grid.of(_written(grid, path, source, np.float32)) == grid
    assert set(tmp_path.iterdir()) == before  # nothing temporary stays


def test_both_nifti_transforms_and_their_codes_are_kept(tmp_path):
    """ITK reads one of the two; other programs may take the other, or decide by the codes."""
    source, path = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    _oblique(source, 0)
    content = bytearray(gzip.open(source).read())
    content[252:256] = struct.pack("<2h", 1, 2)
    content[268:272] = struct.pack("<f", 12.3)  # the quaternion's offset, elsewhere than the rows'
    source.write_bytes(gzip.compress(bytes(content)))
    _written(Grid.of(sitk.ReadImage(str(source))), path, source)
    written = gzip.open(path).read()
    assert written[76:108] == content[76:108] and written[252:328] == content[252:328]
    assert written[123] == content[123]
    assert struct.unpack("<hh", written[70:74]) == (2, 8)  # uint8


def test_a_big_endian_scan(tmp_path):
    source, path = tmp_path / "scan.nii", tmp_path / "label.nii"
    _oblique(source, 3)
    content = source.read_bytes()
    fields = "i10s18sihcB8h3f4h8f3fhcB4f2i80s24s2h6f12f16s4s"
    header = struct.pack(">" + fields, *struct.unpack("<" + fields, content[:348]))
    voxels = np.frombuffer(content[352:], "<i2").astype(">i2").tobytes()
    source.write_bytes(header + content[348:352] + voxels)
    grid = Grid.of(sitk.ReadImage(str(source)))
    assert Grid.of(_written(grid, path, source)) == grid


def test_a_nrrd_of_another_space_and_one_of_spacings_alone(tmp_path):
    source, path = tmp_path / "scan.nrrd", tmp_path / "label.nrrd"
    lines = ["NRRD0004", "type: uint8", "dimension: 3", "sizes: 4 5 6", "encoding: raw"]
    for geometry in (
        ["space: right-anterior-superior", "space directions: (0.7,0.1,0) (-0.1,0.7,0) (0,0,1.3)",
         "space origin: (1.1,-2.2,3.3)"],
        ["spacings: 0.7 0.9 1.3"],
    ):
        source.write_bytes("\n".join([*lines, *geometry, "", ""]).encode() + bytes(120))
        grid = Grid.of(sitk.ReadImage(str(source)))
        assert Grid.of(_written(grid, path, source)) == grid


def test_endings():
    assert ending(Path("a.b.NII.GZ")) == ".nii.gz" and ending(Path("a.nii")) == ".nii"
    assert ending(Path("a.gz")) == ending(Path("a.h5")) == ending(Path("nii")) == ""
