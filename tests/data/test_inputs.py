"""Which scans a list of files and folders holds, and what their outputs are called."""

from pathlib import Path

import pytest

from spss_fast.data.inputs import find_inputs, output_paths, refuse_clashes
from spss_fast.data.layouts import Case
from spss_fast.errors import UserError
from tests.data.writing import ball, write_series


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_and_folders_in_their_order(tmp_path):
    folder = tmp_path / "scans"
    _touch(*(folder / name for name in ("b.nii.gz", "a.1.NRRD", ".hidden.nii.gz", "notes.txt")), tmp_path / "c.mha")
    cases = find_inputs([tmp_path / "c.mha", folder])
    assert [case.name for case in cases] == ["c", "a.1", "b"]
    assert all(case.label is None and not case.preprocessed for case in cases)


def test_layouts_and_a_single_case_of_one(tmp_path):
    la, h5 = tmp_path / "la", tmp_path / "h5"
    _touch(la / "x" / "lgemri.nrrd", la / "x" / "laendo.nrrd", la / "y" / "lgemri.nrrd", h5 / "z" / "mri_norm2.h5")
    assert [(case.name, case.label) for case in find_inputs([la])] == [("x", None), ("y", None)]
    case, = find_inputs([la / "x"])
    assert (case.name, case.image) == ("x", la / "x" / "lgemri.nrrd")  # and not the label map beside it
    case, = find_inputs([h5])
    assert case.preprocessed and output_paths(case, tmp_path, 2, False, False)["label"] == tmp_path / "z.nii.gz"


def _found(folder: Path) -> dict[str, str]:
    return {case.name: str(case.image.relative_to(folder)) for case in find_inputs([folder])}


def test_label_maps_beside_the_scans_are_left_out(tmp_path):
    flat, series, images = (tmp_path / name for name in ("flat", "p1", "images"))
    _touch(*(flat / name for name in ("a.nii.gz", "a_seg.nii.gz", "b.nii.gz", "labels/b.nii.gz", "c_mask.nrrd")))
    assert _found(flat) == {"a": "a.nii.gz", "b": "b.nii.gz"}
    write_series(series, ball((8, 8, 4))[0])
    _touch(series / "label.nii.gz")
    assert _found(series) == {"p1": "."}
    write_series(flat / "p2" / "axial", ball((8, 8, 4))[0])  # beside loose files, and a label of another name there
    _touch(flat / "p2" / "segmentation.nii.gz")
    assert _found(flat) == {"a": "a.nii.gz", "b": "b.nii.gz", "p2_axial": "p2/axial"}
    _touch(images / "images" / "image.nii.gz", images / "labels" / "image.nii.gz", images / "extra.nhdr")
    assert _found(images) == {"images": "images/image.nii.gz", "extra": "extra.nhdr"}
    with pytest.raises(UserError, match=r"c_mask.nrrd is a label without a scan"):
        _touch(tmp_path / "only" / "c_mask.nrrd")
        find_inputs([tmp_path / "only"])


def test_scans_beside_a_data_set(tmp_path):
    _touch(*(tmp_path / name for name in ("x/lgemri.nrrd", "x/laendo.nrrd", "x/raw/a.nii", "y.nii.gz", "z/t/ct.nrrd")))
    assert _found(tmp_path) == {"x": "x/lgemri.nrrd", "y": "y.nii.gz", "z_t": "z/t/ct.nrrd"}
    _touch(*(tmp_path / "h5" / name for name in ("a.h5", "b.nii.gz")))
    assert _found(tmp_path / "h5") == {"a": "a.h5", "b": "b.nii.gz"}


def test_nnunet_numbers_are_no_part_of_a_name(tmp_path):
    one, two, dataset = (tmp_path / name for name in ("imagesTs", "numbered", "dataset"))
    _touch(one / "a_0000.nii.gz", one / "b_0000.nii.gz", two / "a_0000.nii.gz", two / "a_0001.nii.gz")
    assert _found(one) == {"a": "a_0000.nii.gz", "b": "b_0000.nii.gz"}
    assert _found(two) == {"a_0000": "a_0000.nii.gz", "a_0001": "a_0001.nii.gz"}
    _touch(dataset / "imagesTr" / "a_0000.nii.gz", dataset / "labelsTr" / "a.nii.gz")
    assert _found(dataset) == {"a": "imagesTr/a_0000.nii.gz"}


def test_a_file_that_says_only_what_it_is_goes_by_its_folder(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a/imaging.nii.gz", "b/lgemri.nrrd", "c/image.mha", "d/image_1.mha")]
    _touch(*files)
    assert [case.name for case in find_inputs(files)] == ["a", "b", "c", "image_1"]
    assert [case.name for case in find_inputs([tmp_path / "c"])] == ["c"]
    monkeypatch.chdir(tmp_path / "a")
    assert [case.name for case in find_inputs([Path("imaging.nii.gz")])] == ["a"]


@pytest.mark.parametrize("name, said", [
    ("nowhere", "nowhere does not exist"),
    ("empty", "empty is empty"),
    ("other", "no .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd in"),
    ("other/notes.txt", "notes.txt is no scan by its name"),
])
def test_what_holds_no_scan(name, said, tmp_path):
    (tmp_path / "empty").mkdir()
    _touch(tmp_path / "other" / "notes.txt")
    with pytest.raises(UserError, match=said) as error:
        find_inputs([tmp_path / name])
    assert "\n" not in str(error.value)


def test_outputs_have_the_inputs_format_and_name(tmp_path):
    def names(path, *arguments):
        case = Case(Path(path).name.split(".")[0], Path(path), None, "image")
        return [path.name for path in output_paths(case, tmp_path, *arguments).values()]

    assert names("a.nii.gz", 2, False, False) == ["a.nii.gz"]
    assert names("a.mhd", 2, True, True) == ["a.mha", "a_probability.mha", "a_entropy.mha"]
    assert names("a.nrrd", 3, True, False) == ["a.nrrd", "a_probability1.nrrd", "a_probability2.nrrd"]


def test_scans_are_never_overwritten_and_outputs_never_shared(tmp_path):
    _touch(tmp_path / "one" / "a.nii.gz", tmp_path / "two" / "a.nii.gz")
    cases = find_inputs([tmp_path / "one", tmp_path / "two"])

    def refuse(cases, out):
        refuse_clashes(cases, [output_paths(case, out, 2, False, False) for case in cases])

    refuse(cases[:1], tmp_path / "out")
    with pytest.raises(UserError, match="would be overwritten"):
        refuse(cases[:1], tmp_path / "one")
    with pytest.raises(UserError, match="would both be predicted into"):
        refuse(cases, tmp_path / "out")
