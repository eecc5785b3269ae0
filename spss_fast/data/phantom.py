"""CT-like abdominal phantoms in the raw KiTS19 layout, for trying everything without any data.

Two kidneys (now and then with a tumour) of varying shape, size and place lie among liver, spleen, bowel, muscle and
vessels of similar intensity, in a body that differs from volume to volume and bends from slice to slice; noise and a
bias field cover all of it. Organs are ellipsoids in millimetres, bent and roughened by smooth random fields. Nothing
in them comes from a patient. Labels are KiTS19's, kidney and tumour, and on request liver and spleen beside them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation

from spss_fast.data.geometry import Grid, to_image
from spss_fast.data.layouts import RAW
from spss_fast.data.parallel import parallel
from spss_fast.errors import UserError

IMAGE, LABEL = RAW["kits_raw"]
KIDNEY, TUMOUR = 1, 2
ORGANS = LIVER, SPLEEN = 3, 4  # not in KiTS19
# KiTS19's files: first axis from head to feet, then front to back, then right to left
KITS_DIRECTION = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0)


def write_phantoms(
    folder: Path, count: int, seed: int, shape: tuple[int, int, int] = (48, 128, 128),
    spacing: tuple[float, float, float] = (4.0, 2.8, 2.8), workers: int = 0, progress: bool = True,
    organs: bool = False,
) -> int:
    """Writes ``case_00000`` to ``count`` - 1 into ``folder``, each with an image and a label; returns how many.

    ``shape`` and ``spacing`` (mm) are those of the files: slices first. Case i depends on ``seed``, i and them alone;
    with ``organs`` its label holds liver and spleen too.
    A folder that holds ``case_*`` of any other origin is left as it is, 0 are written; one that an interrupted call
    with the same arguments left is completed. No existing case is written to. Raises ``UserError`` where the folder
    cannot be written, or holds anything else.
    """
    folder = Path(folder)
    recipe = f"phantoms of seed {seed}, shape {tuple(shape)}, spacing {tuple(map(float, spacing))}"
    recipe += ", with organs\n" if organs else "\n"
    marker = folder / "phantoms.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            if any(folder.glob("case_*")):
                return 0
            if other := next((path.name for path in sorted(folder.iterdir()) if path.name[0] != "."), None):
                raise UserError(f"{folder} holds {other} and no phantoms, and they would be written between what is "
                                "there: give a new folder, or --dataset folder if these are scans of yours")
            marker.write_text(recipe)
        elif marker.read_text() != recipe:
            return 0
        missing = [i for i in range(count) if not (folder / f"case_{i:05d}").exists()]
        if not missing:
            return 0
        jobs = [(folder, i, seed, shape, spacing, organs) for i in missing]
        for _ in parallel(_write, jobs, workers, "writing phantoms", progress):
            pass
    except OSError as error:
        raise UserError(f"phantoms cannot be written to {folder} ({error.strerror}): give another folder") from error
    return len(missing)


def _write(
    folder: Path, number: int, seed: int, shape: Sequence[int], spacing: Sequence[float], organs: bool
) -> None:
    image, label = phantom(np.random.default_rng([seed, number]), shape, spacing, organs)
    grid = Grid(tuple(shape), tuple(map(float, spacing)), direction=KITS_DIRECTION)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        for name, array in ((IMAGE, image), (LABEL, label)):
            sitk.WriteImage(to_image(array, grid), str(temporary / name), useCompression=True)
        temporary.chmod(0o755)
        if not (folder / f"case_{number:05d}").exists():
            os.rename(temporary, folder / f"case_{number:05d}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def phantom(
    random: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], organs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One volume: image int16 in Hounsfield units and label uint8 (1 kidney, 2 tumour, with ``organs`` 3 liver and 4
    spleen), both of ``shape``: slices from head to feet, rows from front to back, columns from right to left;
    ``spacing`` in mm per axis."""
    scene = _Scene(random, shape, spacing)
    _torso(scene)
    _digestive(scene)
    _skeleton(scene)
    _kidneys(scene)
    if organs:
        scene.label = np.where(scene.label > 0, scene.label, scene.organs)
    return scene.scan()


class _Scene:
    """The canvas: HU values and labels on bent coordinates in mm, x to the left, y to the back, z to the head, from
    the middle of the volume."""

    def __init__(self, random: np.random.Generator, shape: Sequence[int], spacing: Sequence[float]):
        self.random, self.shape, self.spacing = random, tuple(shape), spacing
        depth, rows, columns = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing))
        z, y, x = np.meshgrid(-depth, rows, columns, indexing="ij", copy=True)
        # the body bends smoothly and shifts from slice to slice; organs and labels go with it
        drift = gaussian_filter(random.normal(size=(2, shape[0])), (0, 1.5)) * 5.0
        drift -= drift.mean(axis=1, keepdims=True)
        x += self.field(5.0, (5, 4, 4)) + drift[0][:, None, None]
        y += self.field(5.0, (5, 4, 4)) + drift[1][:, None, None]
        z += self.field(4.0, (4, 4, 4))
        self.points = np.stack([x, y, z]).astype(np.float32)
        self.hu = np.full(shape, -1000, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.organs = np.zeros(shape, np.uint8)  # labels of what other organs do not cover yet
        self.box = (slice(None),) * 3  # where to compute and paint
        self.height = shape[0] * spacing[0] / 2  # half, mm
        self.width = random.uniform(0.80, 0.93) * shape[2] * spacing[2] / 2  # the body's half axes, mm
        self.depth = self.width * random.uniform(0.62, 0.74)
        self.roughness = self.field(0.16, (10, 10, 10))  # of organ surfaces, in organ radii
        self.cavity = self.wall = None  # body radius in units of the abdominal cavity's, of the wall's middle

    def field(self, amplitude: float, knots: tuple[int, int, int]) -> np.ndarray:
        """A smooth random field of standard deviation about ``amplitude``."""
        values = (self.random.normal(size=knots) * 1.5 * amplitude).astype(np.float32)
        for n, k in zip(self.shape, knots):
            # cubic interpolation along one axis after the other, as a matrix: far faster than zooming in 3-D
            weights = zoom(np.eye(k), (n / k, 1), order=3, mode="nearest").astype(np.float32)
            values = np.tensordot(values, weights, (0, 1))
        return values

    def uniform(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    @contextlib.contextmanager
    def near(self, centre: Sequence[float], reach: float) -> Iterator[None]:
        """Computes and paints only within ``reach`` mm of ``centre`` meanwhile (the bending allowed for)."""
        z, y, x = centre[2], centre[1], centre[0]
        box = []
        for place, n, step in zip((-z, y, x), self.shape, self.spacing):
            middle, half = place / step + (n - 1) / 2, (reach + 25) / step
            box.append(slice(max(0, int(middle - half)), max(1, int(middle + half) + 2)))
        self.box = tuple(box)
        yield
        self.box = (slice(None),) * 3

    def radius(self, centre, semi, degrees=(0, 0, 0)) -> np.ndarray:
        """Distance from ``centre`` (mm) in units of an ellipsoid's semi-axes (mm), turned about x, y and z."""
        turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix().T / np.array(semi)[:, None]
        turn = turn.astype(np.float32)
        offset = turn @ np.asarray(centre, np.float32)
        points = self.points[(slice(None), *self.box)]
        total = np.zeros(points.shape[1:], np.float32)
        for row, shift in zip(turn, offset):
            along = sum(weight * axis for weight, axis in zip(row, points) if abs(weight) > 1e-9)
            total += np.square(along - shift)
        return np.sqrt(total, out=total)

    def paint(self, radius: np.ndarray, semi: float, hu: float | np.ndarray) -> None:
        """Fills where ``radius`` < 1 with ``hu``; the border blends over a voxel. ``semi``: mm of one radius unit."""
        cover = np.clip(0.5 - (radius - 1) * (semi / self.spacing[2]), 0, 1)
        canvas = self.hu[self.box]
        canvas += cover * (hu - canvas)
        self.organs[self.box][radius < 1] = 0

    def organ(self, centre, semi, hu: float, degrees=(0, 0, 0), roughness: float = 1.0) -> np.ndarray:
        """Paints an ellipsoid with a rough surface, within the muscular wall; returns its radius field."""
        rough = roughness * self.roughness[self.box]
        radius = np.maximum(self.radius(centre, semi, degrees) + rough, self.cavity[self.box])
        self.paint(radius, min(semi), hu)
        return radius

    def scan(self) -> tuple[np.ndarray, np.ndarray]:
        """What the scanner makes of it: blur within slices, bias field, correlated noise, whole Hounsfield units."""
        bias = self.field(7.0, (3, 3, 3)) * (self.hu > -900)
        noise = gaussian_filter(self.random.normal(size=self.shape), (0, 0.6, 0.6)) * self.uniform(20, 30)
        image = gaussian_filter(self.hu, (0.3, 0.4, 0.4)) + bias + noise
        return np.clip(np.rint(image), -1024, 2000).astype(np.int16), self.label


def _torso(scene: _Scene) -> None:
    """Skin, fat, the muscular wall, the lungs' bases, liver, spleen, and the table."""
    u = scene.uniform
    x, y, z = scene.points
    belly = 1 + 0.06 * np.sin(z / scene.height * 1.5 + u(0, 6))
    round_ = (np.abs(x / scene.width) ** 2.4 + np.abs(y / (scene.depth * belly)) ** 2.4) ** (1 / 2.4)
    table = np.abs(y - scene.depth * 1.12 - 6 + np.square(x / scene.width) * 22)
    scene.hu[table < 3] = u(-400, -150)
    scene.paint(round_, scene.depth, -105)
    fat, muscle = u(8, 22) / scene.depth, u(9, 14) / scene.depth
    scene.paint(round_ / (1 - fat), scene.depth, u(52, 64))
    scene.paint(round_ / (1 - fat - muscle), scene.depth, -98)
    scene.cavity = round_ / (1 - fat - muscle)
    scene.wall = round_ / (1 - fat - muscle / 2)
    w, d, h = scene.width, scene.depth, scene.height
    organ = u(88, 118)
    liver = (0.50 * w, 0.66 * d, u(0.66, 0.95) * h)
    right = scene.organ((-0.42 * w, -0.10 * d, 0.62 * h), liver, organ, (0, u(10, 28), 0), 0.7)
    left = scene.organ((0.10 * w, -0.42 * d, 0.72 * h), (0.42 * w, 0.30 * d, 0.35 * h), organ, (0, 10, 0), 0.7)
    scene.organs[np.minimum(right, left) < 1] = LIVER
    spleen = (0.66 * w, 0.28 * d, u(0.45, 0.70) * h)
    semi = (0.21 * w, 0.36 * d, u(0.36, 0.48) * h)
    scene.organs[scene.organ(spleen, semi, organ + u(10, 45), (0, 0, u(-25, 0))) < 1] = SPLEEN
    for side in (-1, 1):
        lung = scene.radius((side * 0.5 * w, 0.15 * d, 1.45 * h), (0.42 * w, 0.72 * d, u(0.62, 0.80) * h))
        scene.paint(np.maximum(lung, scene.cavity / 1.02), 0.4 * w, u(-860, -780))


def _digestive(scene: _Scene) -> None:
    """Stomach, bowel loops with fluid or gas, the pancreas."""
    u, (w, d, h) = scene.uniform, (scene.width, scene.depth, scene.height)
    scene.organ((0.40 * w, -0.36 * d, u(0.35, 0.6) * h), (0.26 * w, 0.26 * d, 0.33 * h), u(20, 55), (20, 0, u(-20, 20)))
    gas = scene.radius((0.40 * w, -0.52 * d, 0.5 * h), (0.15 * w, 0.09 * d, 0.2 * h))
    scene.paint(gas, 0.1 * d, -850)
    pancreas = (0.42 * w, 0.11 * d, 0.11 * h)
    scene.organ((0.05 * w, -0.05 * d, u(0.1, 0.3) * h), pancreas, u(75, 110), (0, u(-20, 20), u(-15, 5)))
    for _ in range(36):
        # in front and at the flanks, where they come close to the kidneys
        angle, reach = u(-1.15, 1.15), u(0.25, 0.80)
        centre = (np.sin(angle) * reach * w * 0.95, -np.cos(angle) * reach * d * 0.9 + 0.08 * d, u(-1.1, 0.15) * h)
        size = u(11, 19)
        semi = (size * u(1.0, 1.8), size, size * u(1.0, 2.2))
        with scene.near(centre, 1.3 * max(semi)):
            loop = scene.organ(centre, semi, u(55, 118), (u(-60, 60), u(-60, 60), u(-60, 60)))
            scene.paint(loop / 0.72, 0.72 * size, u(-900, -700) if u(0, 1) < 0.18 else u(10, 95))


def _skeleton(scene: _Scene) -> None:
    """Vertebrae and discs, the muscles beside them, ribs, aorta and vena cava."""
    u, (w, d) = scene.uniform, (scene.width, scene.depth)
    x, y, z = scene.points
    tall = 10 * scene.height
    psoas = u(54, 68)
    for side in (-1, 1):
        grown = np.clip(1.15 - 0.35 * z / scene.height, 0.5, 1.6)
        column = scene.radius((side * (0.20 * w + 4), 0.42 * d, 0), (17, 21, tall), (0, 0, side * 15))
        scene.paint(column / grown, 17, psoas)
        scene.organ((side * 0.24 * w, 0.80 * d, 0), (0.23 * w, 0.17 * d, tall), u(50, 62), roughness=0.4)
    phase = u(0, 34)
    disc = np.clip((np.abs((z + phase) % 34 - 17) - 13) / 2, 0, 1)
    bone = u(170, 230)
    body = scene.radius((0, 0.50 * d, 0), (24, 18, tall))
    scene.paint(body, 18, bone + 130 - disc * (bone + 45))
    scene.paint(body / 0.80, 18, bone - disc * (bone - 85))
    arch = scene.radius((0, 0.50 * d + 27, 0), (21, 13, tall))
    scene.paint(arch, 13, bone + 60)
    scene.paint(scene.radius((0, 0.50 * d + 25, 0), (10, 8, tall)), 8, 30)
    scene.paint(scene.radius((0, 0.50 * d + 48, 0), (4, 14, tall)), 4, bone + 60 - disc * (bone + 0))
    # ribs slope down and forward, so that a slice cuts each at a different place of the wall
    angle = np.arctan2(np.abs(x) / w, y / d)
    height = (z + 42 * angle + u(0, 28)) % 28 - 14
    across = (scene.wall - 1) * d / 4.5
    rib = np.sqrt(np.square(height / 6.5) + np.square(across)) + 4.0 * np.clip(angle - 2.2, 0, 1)
    rib[z < -0.25 * scene.height] = 9
    scene.paint(rib, 4.5, u(260, 420))
    blood = u(115, 190)
    scene.paint(scene.radius((8, 0.50 * d - 30, 0), (10, 10, tall)), 10, blood + u(0, 25))
    scene.paint(scene.radius((-20, 0.50 * d - 28, 0), (13, 9, tall)), 9, blood - u(10, 60))


def _kidneys(scene: _Scene) -> None:
    """Both kidneys in their fat, with cortex, sinus and vessels; tumours now and then. The only labelled organs."""
    u, (w, d, h) = scene.uniform, (scene.width, scene.depth, scene.height)
    tissue = u(140, 180)  # contrast-enhanced, as KiTS19: brighter than the liver, like the spleen and the vessels
    level, lower = u(-0.20, 0.08) * h, u(0, 14)  # the right one lies a little lower
    for side in (-1, 1):
        centre = np.array([side * u(0.40, 0.50) * w, u(0.20, 0.38) * d, level + side * lower / 2 + u(-5, 5)])
        semi = np.array([u(24, 31), u(28, 38), u(48, 62)])
        turn = (u(-16, 16), side * u(-22, 4), side * u(-40, 15))
        radius = np.maximum(scene.radius(centre, semi, turn) + 0.9 * scene.roughness, scene.cavity)
        scene.paint(radius / u(1.02, 1.28), semi[0], -92)
        inward = Rotation.from_euler("xyz", turn, degrees=True).apply([-side * semi[0], 0, 0])
        hilum = centre + u(0.80, 1.0) * inward
        sinus = scene.radius(hilum, semi * (u(0.5, 0.75), u(0.28, 0.40), u(0.28, 0.42)), turn) + 0.5 * scene.roughness
        vessel = scene.radius(centre + 1.5 * inward, (0.9 * semi[0], 6, 7), (0, 0, turn[2]))
        scene.paint(vessel, 6, tissue + u(-5, 40))
        kidney = np.maximum(radius, 2 - sinus)
        scene.paint(kidney, semi[0], tissue + u(-6, 6))
        scene.paint(np.maximum(radius / 0.72, 2.35 - sinus), 0.7 * semi[0], tissue - u(5, 28))
        scene.paint(sinus, 0.35 * semi[1], u(-70, 25))
        inside = kidney < 1
        scene.label[inside] = KIDNEY
        if u(0, 1) < 0.3:
            size = u(11, 22)
            place = scene.random.normal(size=3)
            place[0] = side * abs(place[0])  # away from the hilum
            place = Rotation.from_euler("xyz", turn, degrees=True).apply(place / np.linalg.norm(place) * semi * 0.9)
            tumour = scene.organ(centre + place, (size, size, size * u(0.9, 1.2)), tissue + u(-45, 8), roughness=0.6)
            scene.label[(tumour < 1)] = TUMOUR
