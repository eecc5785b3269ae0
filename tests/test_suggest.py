"""Suggesting what to annotate: the folder that is made, what opens it, and what is never touched or looked at."""

import csv
import gzip
import io
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from rich.console import Console
from scipy.spatial.transform import Rotation

from spss_fast import suggest
from spss_fast.data.annotation_export import Suggestion, centring, export_case, read_grid, write_empty
from spss_fast.data.annotations import check_annotations
from spss_fast.data.geometry import oriented
from spss_fast.data.layouts import find_cases
from spss_fast.data.sampling import training_volumes
from spss_fast.data.viewers import slicer_view
from spss_fast.errors import UserError
from spss_fast.nets.regnet import RegistrationNet
from tests.data.writing import (
    KITS,
    ball,
    prepared,
    settings_of,
    write_h5,
    write_image,
    write_kits,
    write_la,
    write_object,
)

ROOT = Path(__file__).resolve().parents[1]
# the standard views as 3D Slicer itself writes them (orientationMatrixAxial and so on, of a scene)
SLICER = {"Red": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]], "Yellow": [[0, 0, -1], [-1, 0, 0], [0, 1, 0]],
          "Green": [[-1, 0, 0], [0, 0, 1], [0, 1, 0]]}
OBLIQUE = tuple(Rotation.from_euler("xyz", [8, -12, 20], degrees=True).as_matrix().ravel())


def run(data: Path, out: Path, budget: int, dataset: str = "folder", **flags) -> list[Suggestion]:
    settings = settings_of(dataset, out.parent, data_dir=str(data), **flags).data
    return suggest.suggest(settings, out, budget, Console(quiet=True))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "slices.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def geometry(path: Path) -> tuple:
    image = sitk.ReadImage(str(path))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def check_viewers(folder: Path, axis: int) -> None:
    """The scene's view lies in the middle slice, the workspace's landmark on it, and both name files that exist."""
    grid = read_grid(folder / "image.nii.gz")
    middle = grid.size[axis] // 2
    scene = ElementTree.parse(folder / "open.mrml").getroot()
    ids = [node.get("id") for node in scene]
    assert scene.tag == "MRML" and len(set(ids)) == len(ids)
    referred = [part.split(":")[1] for node in scene for part in node.get("references", "").split(";") if part]
    assert set(referred) <= set(ids)
    files = [node.get("fileName") for node in scene.iter("VolumeArchetypeStorage")]
    assert files == ["image.nii.gz", "annotation.nii.gz"] and all((folder / name).exists() for name in files)

    views = {node.get("name"): np.array(node.get("sliceToRAS").split(), float).reshape(4, 4)
             for node in scene.iter("Slice")}
    assert sorted(views) == ["Green", "Red", "Yellow"]
    aligned = set(np.abs(np.round(grid.direction, 6))) == {0, 1}
    for name, to_ras in views.items():
        rotation = to_ras[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(rotation, SLICER[name], atol=1e-6 if aligned else 0.5)
    to_ras = views[slicer_view(grid, axis).split()[0]]
    for corner in np.ndindex(2, 2, 2):  # of the slice: all in the plane of the view, whose third coordinate is 0
        voxel = np.array(corner) * (np.array(grid.size) - 1)
        voxel[axis] = middle
        point = np.append(grid.point(voxel) * (-1, -1, 1), 1)
        assert np.linalg.solve(to_ras, point)[2] == pytest.approx(0, abs=1e-3 * min(grid.spacing))

    registry = ElementTree.parse(folder / "workspace.itksnap").getroot()
    layers = registry.find("folder[@key='Layers']")
    entries = [{entry.get("key"): entry.get("value") for entry in layer} for layer in layers]
    assert [entry["Role"] for entry in entries] == ["MainRole", "SegmentationRole"]
    assert [Path(entry["AbsolutePath"]) for entry in entries] == [folder.resolve() / name for name in files]
    assert registry.find("entry[@key='SaveLocation']").get("value") == str(folder.resolve())
    landmark = {entry.get("key"): entry.get("value") for entry in registry.find(".//folder[@key='Element[0]']")}
    assert int(landmark["Plane"]) == axis
    position = [int(float(value)) for value in landmark["Pos"].split()]
    assert position[axis] == middle and all(0 <= p < n for p, n in zip(position, grid.size))


def check_case(out: Path, item: Suggestion, scan: sitk.Image) -> None:
    """The scan, the suggested slice in its middle, an empty uint8 label on exactly that grid, and what opens both."""
    folder = out / item.case
    label, image = (sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in ("annotation", "image"))
    assert label.GetPixelID() == sitk.sitkUInt8 and not sitk.GetArrayViewFromImage(label).any()
    assert geometry(folder / "annotation.nii.gz") == geometry(folder / "image.nii.gz")

    assert 0 <= item.slice < scan.GetSize()[item.axis]
    corner = [0, 0, 0]
    corner[item.axis] = image.GetSize()[item.axis] // 2 - item.slice
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(corner), scan.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(image.GetDirection(), scan.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(image.GetSpacing(), scan.GetSpacing(), rtol=1e-6)
    assert image.GetPixelID() == scan.GetPixelID()
    values, expected = sitk.GetArrayFromImage(image).T, sitk.GetArrayFromImage(scan).T
    inside = tuple(slice(start, start + n) for start, n in zip(corner, expected.shape))
    np.testing.assert_array_equal(values[inside], expected)
    # nothing but the lowest value is added, and only at one end
    added = np.subtract(values.shape, expected.shape)
    assert not np.delete(added, item.axis).any() and corner[item.axis] in (0, added[item.axis])
    outside = np.ones(values.shape, bool)
    outside[inside] = False
    assert (values[outside] == expected.min()).all()
    check_viewers(folder, item.axis)


def test_dicom_that_is_no_scan_is_said(tmp_path):
    write_image(tmp_path / "scans" / "a.nii.gz", ball()[0])
    write_object(tmp_path / "scans" / "a" / "1.dcm", "SEG")
    said = Console(file=io.StringIO())
    settings = settings_of("folder", tmp_path, data_dir=str(tmp_path / "scans")).data
    suggest.suggest(settings, tmp_path / "todo", 1, said)
    assert "left out, as no scan: 1 DICOM SEG (a/1.dcm); a label must be" in said.file.getvalue()


def test_a_folder_to_annotate_in(tmp_path, capsys):
    write_la(tmp_path / "la", 4)
    out = tmp_path / "todo"
    suggest.main(["--data-dir", str(tmp_path / "la"), "--out", str(out), "--budget", "2", "--workers", "1",
                  "--cache-dir", str(tmp_path / "cache")])
    shown = capsys.readouterr().out
    found = rows(out)
    assert len(found) == 2 and list(found[0]) == ["case", "axis", "slice"]
    assert {path.name for path in out.iterdir()} == {"README.txt", "slices.csv", *(row["case"] for row in found)}
    readme = (out / "README.txt").read_text()
    for row in found:
        item = Suggestion(row["case"], int(row["axis"]), int(row["slice"]))
        source = sitk.ReadImage(str(tmp_path / "la" / item.case / "lgemri.nrrd"))
        check_case(out, item, source)
        assert item.axis == 2 and abs(item.slice - 11.5) < 4
        assert f"{item.case}: slice {item.slice} of the scan along axis z, counted from 0" in shown
        middle = sitk.ReadImage(str(out / item.case / "image.nii.gz")).GetSize()[2] // 2
        assert f"{item.case}: Red (axial) view; in ITK-SNAP z = {middle + 1}" in readme


def test_kits_slices_lie_along_the_first_axis(tmp_path):
    for name in ("case_00000", "case_00001", "case_00002"):
        image = np.full((30, 32, 28), -1000, np.int16)
        image[10:, 4:28, 4:24] = np.random.default_rng(len(name)).integers(0, 100, (20, 24, 20))
        write_kits(tmp_path / "kits", name, image, None)
    found = run(tmp_path / "kits", tmp_path / "todo", 2, "kits", patch=(16, 16, 16), resample=(16, 16, 10))
    for item in found:
        assert item.axis == 0 and 18 <= item.slice <= 21  # half of the body: 10 to 29, three of them in a prepared one
        check_case(tmp_path / "todo", item, sitk.ReadImage(str(tmp_path / "kits" / item.case / "imaging.nii.gz")))
        assert f"{item.case}: Red (axial) view; in ITK-SNAP x = " in (tmp_path / "todo" / "README.txt").read_text()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_any_slice_becomes_the_middle_one(count):
    for index in range(count):
        before, after = centring(index, count)
        assert min(before, after) == 0 and (count + before + after) // 2 == index + before
        assert (before, after) == (0, 0) or (count + before + after) % 2 == 1


def test_a_scan_whose_suggested_slice_is_the_middle_one_is_copied_as_it_is(tmp_path):
    image, _ = ball((20, 24, 17), 1)
    image[:] = np.minimum(image, image[:, :, ::-1])  # the same above as below the middle
    for name in "ab":
        write_image(tmp_path / "scans" / f"{name}.nii.gz", image)
    item, = run(tmp_path / "scans", tmp_path / "todo", 1)
    assert item.slice == 8
    check_case(tmp_path / "todo", item, sitk.ReadImage(str(tmp_path / "scans" / f"{item.case}.nii.gz")))
    copied = (tmp_path / "todo" / item.case / "image.nii.gz").read_bytes()
    assert copied == (tmp_path / "scans" / f"{item.case}.nii.gz").read_bytes()


@pytest.mark.parametrize("axis", range(3))
def test_what_is_painted_in_the_padded_scan_comes_back_on_the_scan(tmp_path, axis):
    """Off the middle, along any axis of an oblique scan: the annotation is that of the scan's own slice."""
    shape, spacing, origin = (20, 24, 18), (1.2, 0.7, 1.1), (-31.7, 12.3, 99.1)
    random = np.random.default_rng(0)
    for name in "abc":
        write_image(tmp_path / "la" / name / "lgemri.nrrd", random.integers(0, 9, shape, np.uint8), spacing, OBLIQUE,
                    origin)
    for config, index in zip((settings_of("folder", tmp_path, plane=plane) for plane in
                              [["sagittal", "coronal", "axial"][axis]] * 2), (3, shape[axis] - 4)):
        case = prepared("folder", tmp_path / "la", config)[0]
        out = tmp_path / f"todo{index}"
        item = Suggestion("a", axis, index)
        export_case(out, case, item)
        check_case(out, item, sitk.ReadImage(str(case.case.image)))
        path = out / "a" / "annotation.nii.gz"
        label = sitk.ReadImage(str(path))
        drawn = random.integers(0, 2, np.delete(shape, axis)).astype(np.uint8)
        array = sitk.GetArrayFromImage(label).T
        middle = array.shape[axis] // 2
        cut = [slice(None)] * 3
        first = middle - index  # of the scan's own slices
        for place in (middle, first - 1 if index < shape[axis] // 2 else first + shape[axis]):
            array[:] = 0
            cut[axis] = place
            array[tuple(cut)] = drawn
            painted = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
            painted.CopyInformation(label)
            sitk.WriteImage(painted, str(path))
            given = settings_of("folder", tmp_path, plane=config.data.plane, annotations=str(out)).data
            if place == middle:
                check_annotations([case.case], given)
                volume, = training_volumes([case], given, 0)
                scan = np.zeros(shape, np.uint8)
                cut[axis] = index
                scan[tuple(cut)] = drawn
                expected, _ = oriented(scan, case.source, config.data.plane)
                assert expected[:, :, volume.index].any()
                np.testing.assert_array_equal(volume.annotation, expected[:, :, volume.index])
            else:
                with pytest.raises(UserError, match=r"annotated beyond the end of lgemri\.nrrd .*: annotate a slice"):
                    check_annotations([case.case], given)


@pytest.mark.parametrize("direction", [OBLIQUE, KITS, (0, 1, 0, 0, 0, -1, 1, 0, 0)])
def test_any_orientation_keeps_its_geometry_to_the_last_digit(tmp_path, direction):
    image, _ = ball((20, 24, 18), 1)
    for name in "ab":
        write_image(tmp_path / "la" / name / "lgemri.nrrd", image, (1.2, 0.7, 1.1), direction, (-31.7, 12.3, 99.1))
    item, = run(tmp_path / "la", tmp_path / "todo", 1)
    check_case(tmp_path / "todo", item, sitk.ReadImage(str(tmp_path / "la" / item.case / "lgemri.nrrd")))


@pytest.mark.parametrize("order", "<>")
def test_empty_labels_in_either_byte_order(tmp_path, order):
    header = bytearray(352)
    spacing = np.array([0.8, 0.7, 2.4])
    affine = np.column_stack([np.array(OBLIQUE).reshape(3, 3) * spacing, [7.25, -3.5, 11.125]])
    for offset, kind, values in ((0, "i", [348]), (40, "8h", [3, 4, 5, 6, 1, 1, 1, 1]), (70, "2h", [4, 16]),
                                 (76, "4f", [1, *spacing]), (108, "3f", [352, 2, 1]), (252, "2h", [0, 1]),
                                 (280, "12f", affine.ravel())):
        struct.pack_into(order + kind, header, offset, *values)
    header[344:348] = b"n+1\0"
    with gzip.open(tmp_path / "image.nii.gz", "wb") as file:
        file.write(bytes(header) + np.arange(120, dtype=order + "i2").tobytes())
    write_empty(tmp_path / "annotation.nii.gz", tmp_path / "image.nii.gz")
    assert geometry(tmp_path / "annotation.nii.gz") == geometry(tmp_path / "image.nii.gz")
    label = sitk.ReadImage(str(tmp_path / "annotation.nii.gz"))
    assert label.GetPixelID() == sitk.sitkUInt8 and label.GetSize() == (4, 5, 6)
    assert not sitk.GetArrayViewFromImage(label).any()


def test_all_slices_are_suggested_in_one_plane(tmp_path):
    """Else what is annotated would be refused afterwards."""
    for i, spacing in enumerate([(1.0, 1.0, 4.0), (4.0, 1.0, 1.0)] * 2 + [(1.0, 1.0, 4.0)]):
        shape = tuple(10 if side == 4 else 24 for side in spacing)
        write_image(tmp_path / "scans" / f"{i}.nii.gz", ball(shape, i)[0], spacing)
    said = r"different planes \(axial: 0, 2, 4; sagittal: 1, 3\).*choose it, like --plane axial"
    with pytest.raises(UserError, match=said):
        run(tmp_path / "scans", tmp_path / "todo", 5)
    assert not (tmp_path / "todo").exists()
    assert {item.axis for item in run(tmp_path / "scans", tmp_path / "todo", 3, plane="sagittal")} == {0}
    with pytest.raises(UserError, match="like --plane sagittal"):
        run(tmp_path / "scans", tmp_path / "todo", 5)
    assert len(run(tmp_path / "scans", tmp_path / "todo", 5, plane="sagittal")) == 5


def test_no_label_is_looked_at(tmp_path):
    write_la(tmp_path / "la", 5)
    before = run(tmp_path / "la", tmp_path / "before", 3)
    for path in (tmp_path / "la").glob("*/laendo.nrrd"):
        path.write_bytes(b"not a label")
    after = run(tmp_path / "la", tmp_path / "after", 3, cache_dir=str(tmp_path / "other"))
    assert before == after

    for i in range(3):
        image, label = ball(seed=i)
        write_h5(tmp_path / "h5" / f"{i}.h5", image=image.astype(np.float32), label=np.zeros_like(label))
    item, = run(tmp_path / "h5", tmp_path / "h5_todo", 1)
    assert item.axis == 2
    image, _ = ball(seed=int(item.case))
    check_case(tmp_path / "h5_todo", item, sitk.GetImageFromArray(image.T.astype(np.float32)))


def test_a_larger_budget_adds_and_touches_nothing(tmp_path):
    write_la(tmp_path / "la", 6)
    out = tmp_path / "todo"
    first = run(tmp_path / "la", out, 2)
    path = out / first[0].case / "annotation.nii.gz"
    label = sitk.ReadImage(str(path))
    label[3:6, 3:6, first[0].slice] = 1
    sitk.WriteImage(label, str(path))
    (out / first[1].case / "open.mrml").write_text("saved by the annotator")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*/*")}
    more = run(tmp_path / "la", out, 4)
    assert more[:2] == first and len({item.case for item in more}) == 4
    assert len(rows(out)) == 4 and len(list(out.glob("*/annotation.nii.gz"))) == 4
    assert before.items() <= {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*/*")}.items()
    assert run(tmp_path / "la", out, 3) == more

    # a table that was lost is made again around the folders that are there
    (out / "slices.csv").unlink()
    again = run(tmp_path / "la", out, 6)
    assert len(again) == 6
    assert before.items() <= {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*/*")}.items()


def test_test_cases_are_not_suggested(tmp_path):
    names = write_la(tmp_path / "la", 5)
    (tmp_path / "la" / "test.list").write_text("\n".join(names[1:4]) + "\n")
    assert {item.case for item in run(tmp_path / "la", tmp_path / "todo", 2)} == {"a", "e"}
    with pytest.raises(UserError, match=r"--budget 3 needs 1 scans more .* has 0, 3 more are in test\.list"):
        run(tmp_path / "la", tmp_path / "todo", 3)
    (tmp_path / "la" / "test.list").unlink()
    (tmp_path / "la" / "train.list").write_text("d\nb\n")
    assert {item.case for item in run(tmp_path / "la", tmp_path / "more", 2)} == {"b", "d"}
    with pytest.raises(UserError, match=r"has 0, 3 more are in test\.list or not in train\.list"):
        run(tmp_path / "la", tmp_path / "more", 3)


def test_copies_do_not_go_among_the_scans(tmp_path):
    write_image(tmp_path / "scans" / "a.nii.gz", ball()[0])
    for out in (tmp_path / "scans", tmp_path / "scans" / "todo"):
        with pytest.raises(UserError, match="which holds the scans, and copies of them there would be taken for scans"):
            run(tmp_path / "scans", out, 1)
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["a.nii.gz"]


def test_what_is_in_the_way_is_named(tmp_path):
    write_la(tmp_path / "la", 2)
    out = tmp_path / "todo"
    (out / "a").mkdir(parents=True)
    (out / "a" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a is there already and holds no image\.nii\.gz"):
        run(tmp_path / "la", out, 2)
    assert (out / "a" / "notes.txt").read_text() == "mine" and not list(out.glob(".*"))
    (out / "slices.csv").write_text("name,position\na,3\n")
    with pytest.raises(UserError, match=r"slices\.csv must begin with the line case,axis,slice"):
        run(tmp_path / "la", out, 2)


@pytest.mark.parametrize("arguments, said", [
    (["--out", "todo"], "--data-dir is missing"),
    (["--data-dir", "nowhere", "--out", "todo"], "the data folder nowhere does not exist"),
    (["--data-dir", "la", "--out", "todo", "--budget", "9"], "needs 9 scans more than todo holds, but la has 2"),
    (["--data-dir", "la", "--out", "todo", "--budget", "0"], "--budget must be 1 or more"),
    (["--data-dir", "la", "--out", "la/a/lgemri.nrrd"], "is a file: choose another --out"),
    (["--data-dir", "la", "--out", "todo", "--filters", "8"], "unknown flag --filters"),
])
def test_bad_command_lines_end_in_one_line_and_write_nothing(arguments, said, tmp_path):
    write_la(tmp_path / "la", 2)
    result = subprocess.run([sys.executable, "-m", "spss_fast.suggest", *arguments], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "todo").exists()


@pytest.mark.parametrize("flags", [{}, {"downsample": 2}, {"resample": "20 20 9"}, {"max_in_plane": 16}])
def test_prepared_slices_are_found_in_the_file_and_back(tmp_path, flags):
    write_kits(tmp_path / "kits", "case_00000", *ball((25, 40, 36)))
    case, = prepared("folder", tmp_path / "kits", settings_of("folder", tmp_path, **flags))
    slices = [case.slice_to_source(z) for z in range(case.grid.size[2])]
    assert case.slice_axis() == 0 and all(0 <= z < 25 for z in slices)
    assert slices == sorted(set(slices), reverse=True)  # the file's first axis runs to the feet
    assert [case.slice_from_source(z) for z in slices[:-1]] == list(range(case.grid.size[2] - 1))


def test_real_kits19_orientation(scans, tmp_path):
    source = sitk.ReadImage(str(scans("kits19") / "case_00017" / "segmentation.nii.gz"))
    small = source[:, ::16, ::16]
    values = sitk.GetArrayFromImage(small)
    random = np.random.default_rng(0)
    for name in ("case_00017", "case_00018"):
        image = sitk.GetImageFromArray((values * 60 + random.integers(20, 60, values.shape)).astype(np.int16))
        image.CopyInformation(small)
        (tmp_path / "kits" / name).mkdir(parents=True)
        sitk.WriteImage(image, str(tmp_path / "kits" / name / "imaging.nii.gz"))
    item = run(tmp_path / "kits", tmp_path / "todo", 1, "kits", patch=(32, 32, 32), resample=(32, 32, 32))[0]
    assert item.axis == 0 and abs(item.slice - 48) <= 6
    check_case(tmp_path / "todo", item, sitk.ReadImage(str(tmp_path / "kits" / item.case / "imaging.nii.gz")))


def test_real_left_atria(scans, tmp_path):
    names = (scans("la_raw") / "train.list").read_text().split()[:3]
    for name in names:
        (tmp_path / "la" / name).mkdir(parents=True)
        (tmp_path / "la" / name / "lgemri.nrrd").symlink_to(scans("la_raw") / name / "lgemri.nrrd")
    for item in run(tmp_path / "la", tmp_path / "todo", 2, downsample=2):
        check_case(tmp_path / "todo", item, sitk.ReadImage(str(tmp_path / "la" / item.case / "lgemri.nrrd")))
        atrium = sitk.ReadImage(str(scans("la_raw") / item.case / "laendo.nrrd"))
        assert sitk.GetArrayFromImage(atrium)[item.slice].any()


def test_the_measurement_of_the_rules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import suggest_rule

    write_la(tmp_path / "la", 5)
    config = settings_of("la", tmp_path, opening=1, closing=1)
    cases = prepared("la", tmp_path / "la", config)
    assert [case.name for case in cases] == [case.name for case in find_cases("la", tmp_path / "la")]
    network = RegistrationNet().eval()
    dice = [suggest_rule.dice_by_slice(case, network, config, torch.device("cpu")) for case in cases]
    for case, row in zip(cases, dice):
        np.testing.assert_array_equal(np.isnan(row), ~case.label().any((0, 1)))
        # an untrained network moves nothing: every slice is the annotated one again, and the widest is best but one
        assert np.nanargmax(row) == pytest.approx(np.flatnonzero(~np.isnan(row)).mean(), abs=4)
    table = suggest_rule.slice_table(cases, dice, seeds=3)
    values = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in table[2:8]}
    best, anywhere = values["best of all, by the labels"], values["random, any slice"]
    assert anywhere < values["random, any slice with foreground"] < best and 0 < values["suggested"] <= best
    lines = suggest_rule.volume_table(cases, dice, [2], draws=20)
    cells = [part.strip() for part in lines[-1].strip("|").split("|")]
    assert cells[0] == "2" and 0.3 < float(cells[1]) <= 1 and 0 <= int(cells[3].rstrip("%")) <= 100
