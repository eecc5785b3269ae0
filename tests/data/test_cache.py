"""The cache of prepared volumes: found again, rebuilt when something changes, whole or absent whatever happens."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spss_fast.config import resolve
from spss_fast.data import cache
from spss_fast.data.annotations import Annotation
from spss_fast.data.cache import prepare
from spss_fast.data.layouts import find_cases
from spss_fast.errors import UserError
from tests.data.writing import prepared, settings_of, write_image, write_kits, write_la

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def reads(monkeypatch):
    """The names of the cases that were read from their files, in order."""
    names = []

    def counted(case, plane):
        names.append(case.name)
        return original(case, plane)

    original = cache.read_case
    monkeypatch.setattr(cache, "read_case", counted)
    return names


def whole(root: Path) -> list[str]:
    """The names of the finished entries; fails where one is not whole."""
    for folder in root.glob("[a-z]*"):
        assert {path.name for path in folder.iterdir()} == {"image.npy", "label.npy", "meta.json"}
        assert np.load(folder / "image.npy").shape == np.load(folder / "label.npy").shape
    return sorted(path.name.split("-")[0] for path in root.glob("[a-z]*"))


def test_second_use_reads_no_scan(tmp_path, reads):
    names = write_la(tmp_path / "la", 3)
    config = settings_of("la", tmp_path)
    first, second = prepared("la", tmp_path / "la", config), prepared("la", tmp_path / "la", config)
    assert reads == names
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label(), other.label())
        assert (one.grid, one.source, one.spacing) == (other.grid, other.source, other.spacing)


@pytest.mark.parametrize("flags", [
    {"window": "0 100"}, {"max_in_plane": 30}, {"resample": "16 16 16"}, {"foreground": "255"}, {"downsample": 2},
    {"classes": "1,255"}, {"plane": "coronal"}, {"body_crop": True},
])
def test_a_setting_that_matters_rebuilds(tmp_path, reads, flags):
    write_la(tmp_path / "la", 1)
    first, = prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    second, = prepared("la", tmp_path / "la", settings_of("la", tmp_path, **flags))
    assert reads == ["a", "a"] and first.folder != second.folder
    prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    assert reads == ["a", "a"]


@pytest.mark.parametrize("flags", [{"patch": "32 32 16"}, {"n_labeled": 4}, {"seed": 5}, {"filters": 8}])
def test_a_setting_that_does_not_matter_rebuilds_nothing(tmp_path, reads, flags):
    write_la(tmp_path / "la", 1)
    prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    prepared("la", tmp_path / "la", settings_of("la", tmp_path, **flags))
    assert reads == ["a"]


@pytest.mark.parametrize("name", ["lgemri.nrrd", "laendo.nrrd"])
def test_a_changed_file_rebuilds_its_case_only(tmp_path, reads, name):
    write_la(tmp_path / "la", 2)
    config = settings_of("la", tmp_path)
    prepared("la", tmp_path / "la", config)
    os.utime(tmp_path / "la" / "b" / name, ns=(1, 1))
    prepared("la", tmp_path / "la", config)
    assert reads == ["a", "b", "b"]


def test_a_label_that_is_taken_away_is_gone(tmp_path):
    write_la(tmp_path / "la", 1)
    config = settings_of("la", tmp_path)
    assert prepared("la", tmp_path / "la", config)[0].has_label
    (tmp_path / "la" / "a" / "laendo.nrrd").unlink()
    case, = prepared("la", tmp_path / "la", config)
    assert not case.has_label and case.label() is None


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "meta.json"])
def test_a_damaged_entry_is_replaced(tmp_path, reads, name):
    write_la(tmp_path / "la", 1)
    config = settings_of("la", tmp_path)
    case, = prepared("la", tmp_path / "la", config)
    image = np.array(case.image)
    path = case.folder / name
    path.write_bytes(path.read_bytes()[:-50])
    again, = prepared("la", tmp_path / "la", config)
    assert reads == ["a", "a"]
    np.testing.assert_array_equal(again.image, image)
    assert whole(tmp_path / "cache") == ["a"]


def test_an_exception_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    write_la(tmp_path / "la", 3)
    config = settings_of("la", tmp_path)
    saved, original = [], np.save

    def interrupted(path, array):
        saved.append(path)
        if len(saved) == 4:  # the second case's label, its image being written
            raise KeyboardInterrupt
        original(path, array)

    monkeypatch.setattr(cache.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared("la", tmp_path / "la", config)
    assert whole(tmp_path / "cache") == ["a"] and not list((tmp_path / "cache").glob(".*"))
    monkeypatch.setattr(cache.np, "save", original)
    assert len(prepared("la", tmp_path / "la", config)) == 3


def start(data: Path, root: Path) -> subprocess.Popen:
    """Another process that prepares ``data``."""
    code = (
        "import sys; from pathlib import Path; from spss_fast.config import resolve\n"
        "from spss_fast.data.cache import prepare; from spss_fast.data.layouts import find_cases\n"
        "config = resolve('la', {'cache_dir': sys.argv[2], 'workers': 1})\n"
        "print(len(prepare(find_cases('la', Path(sys.argv[1])), config.data, progress=False)))\n"
    )
    command = [sys.executable, "-c", code, str(data), str(root)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_whole_entries_only(tmp_path, reads):
    names = write_la(tmp_path / "la", 12, (90, 80, 60))
    process = start(tmp_path / "la", tmp_path / "cache")
    limit = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("[a-z]*")) and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = whole(tmp_path / "cache")
    assert done
    cases = prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    assert [case.name for case in cases] == names and sorted(reads + done) == names
    assert whole(tmp_path / "cache") == names


def test_two_processes_prepare_the_same_scans_at_once(tmp_path):
    names = write_la(tmp_path / "la", 4)
    processes = [start(tmp_path / "la", tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs == ["4\n", "4\n"] and [process.returncode for process in processes] == [0, 0]
    assert whole(tmp_path / "cache") == names and not list((tmp_path / "cache").glob(".*"))


def test_worker_processes_give_what_this_process_gives(tmp_path):
    write_la(tmp_path / "la", 3)
    (tmp_path / "la" / "b" / "lgemri.nrrd").write_bytes(b"spoiled" * 50)
    config = settings_of("la", tmp_path, workers=2)
    with pytest.raises(UserError, match=r"b/lgemri.nrrd cannot be read"):
        prepared("la", tmp_path / "la", config)
    assert whole(tmp_path / "cache") == ["a", "c"]  # the good ones are ready
    alone = resolve("la", {"cache_dir": str(tmp_path / "other"), "workers": 1})
    for name in ("a", "c"):
        cases = [case for case in find_cases("la", tmp_path / "la") if case.name == name]
        one, other = prepare(cases, config.data, progress=False)[0], prepare(cases, alone.data, progress=False)[0]
        np.testing.assert_array_equal(one.image, other.image)


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path):
    write_la(tmp_path / "la", 1)
    old, new = tmp_path / "cache" / ".building-old", tmp_path / "cache" / ".building-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "image.npy").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    assert not old.exists() and new.exists()


def test_nothing_is_written_beside_the_scans(tmp_path):
    write_la(tmp_path / "la", 2)
    before = sorted(tmp_path.glob("la/**/*"))
    prepared("la", tmp_path / "la", settings_of("la", tmp_path))
    assert sorted(tmp_path.glob("la/**/*")) == before


def test_default_place_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root(resolve("la").data) == tmp_path / "xdg" / "spss_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root(resolve("la").data) == Path.home() / ".cache" / "spss_fast"


def test_an_impossible_cache_folder_is_named(tmp_path):
    write_la(tmp_path / "la", 1)
    (tmp_path / "file").write_text("not a folder")
    config = settings_of("la", tmp_path, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache cannot be made.*set cache_dir"):
        prepared("la", tmp_path / "la", config)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.h5").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"b.h5 cannot be opened \(No such file"):
        prepared("kits", tmp_path / "d", settings_of("kits", tmp_path))


@pytest.mark.parametrize("slices, resample", [((9, 11), "32 32 5"), ((1, 2), "8 8 24")])
def test_a_full_label_stays_one_whatever_the_grid_leaves_of_it(tmp_path, slices, resample):
    label = np.zeros((40, 40, 24), np.uint8)
    label[1:3, 1:3, slice(*slices)] = label[1:3, 1:3, 20] = 1
    write_image(tmp_path / "d" / "a" / "lgemri.nrrd", np.random.default_rng(0).normal(size=label.shape))
    write_image(tmp_path / "d" / "a" / "laendo.nrrd", label)
    case, = prepared("la", tmp_path / "d", settings_of("la", tmp_path, resample=resample))
    assert np.count_nonzero(case.label().any((0, 1))) < 2 and case.has_full_label and case.only_slice is None


def test_slices_of_the_file_and_of_the_prepared_volume(tmp_path):
    """KiTS19 counts from the head, prepared volumes from the feet; a slice's label is taken from the file itself."""
    image = np.random.default_rng(0).integers(-100, 200, (24, 16, 16)).astype(np.int16)
    label = np.zeros((24, 16, 16), np.uint8)
    label[5, 2:9, 3:7] = 2  # one annotated slice
    write_kits(tmp_path / "d", "case_00000", image, label)
    config = settings_of("kits", tmp_path, body_crop=False, resample="16 16 8")
    case, = prepared("kits", tmp_path / "d", config)
    assert case.slice_axis() == 0 and case.only_slice == 5 and len(case.shown) == 24
    assert [case.slice_from_source(s) for s in (23, 22, 21, 20, 5, 0)] == [0, 0, 0, 1, 6, 7]
    expected = np.zeros((16, 16), np.uint8)
    expected[3:7, 2:9] = 1
    np.testing.assert_array_equal(case.annotation_from_source(Annotation(5), config.data), expected)
    assert not case.annotation_from_source(Annotation(6), config.data).any()
