"""Exported students: against PyTorch, without this package, and what is said where something is missing."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from rich.console import Console
from torch import nn

from spss_fast import export
from spss_fast.config import resolve
from spss_fast.data.cache import prepare
from spss_fast.data.layouts import Case
from spss_fast.data.phantom import write_phantoms
from spss_fast.engine import checkpoint
from spss_fast.engine.inference import sliding_window
from spss_fast.engine.step import State
from spss_fast.engine.weights import load_student
from spss_fast.errors import UserError
from spss_fast.nets.vnet import VNet
from tests.data.writing import to_source, write_la
from tests.test_docs import blocks

QUIET = Console(quiet=True)
for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package, reason="the packages of the extra `export` are not installed")


def _settle(student: nn.Module) -> None:
    """Weights and statistics that are not those of a fresh network, so that each of them matters."""
    torch.manual_seed(1)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
            module.bias.data.normal_(0, 0.5)


def _run(folder: Path, dataset: str, data: Path, test: list[str], **settings) -> Path:
    """A run folder with an untrained student."""
    common = {"filters": 2, "workers": 1, "device": "cpu", "data_dir": str(data), "cache_dir": str(folder / "cache")}
    state = State(resolve(dataset, common | settings), torch.device("cpu"), None)
    _settle(state.student)
    checkpoint.save(state, folder / "run" / "checkpoints" / "last.pt")
    (folder / "run" / "cases.json").write_text(json.dumps({"data_dir": str(data), "test": test, "train": []}))
    return folder / "run"


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantoms(folder / "data", 1, 0, shape=(30, 60, 60), spacing=(6.4, 5.6, 5.6), workers=1, progress=False)
    return _run(folder, "phantom", folder / "data", ["case_00000"], patch=(32, 32, 16), resample=(40, 36, 20),
                statistics="running")


@pytest.fixture(scope="module")
def exported(phantom_run) -> export.Exported:
    return export.export(phantom_run, phantom_run.parent / "student", console=QUIET)


@pytest.fixture(scope="module")
def forwards(exported, phantom_run) -> dict[str, export.Forward]:
    """The networks of the written files."""
    return {name: export._read(name, path, _student(phantom_run)) for name, path in exported.files.items()}


def _student(run: Path) -> nn.Module:
    return load_student(checkpoint.read(run / "checkpoints" / "last.pt"), torch.device("cpu"))


def test_every_file_computes_what_pytorch_does(exported, forwards, phantom_run):
    assert list(exported.checks) == list(exported.files) == list(export.FILES) and exported.case == "case_00000"
    for name, check in exported.checks.items():
        assert check.voxels == 8 * 32 * 32 * 16 and check.passed and check.agreement == 1
        assert check.max_difference < 1e-4 and (check.max_difference == 0) == (name in ("state_dict", "safetensors"))
    torch.manual_seed(0)
    x = 2 * torch.randn(3, 1, 48, 64, 16)  # another batch and other sides than those it was traced with
    with torch.no_grad():
        expected = _student(phantom_run)(x)
        assert expected.argmax(1).float().mean() not in (0, 1)
        for forward in forwards.values():
            torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-4)


def test_the_graphs_are_plain_operators(exported, forwards):
    import onnx

    called = {str(node.target) for node in forwards["torch"].graph.nodes if node.op == "call_function"}
    called -= {"_guards_fn"}
    assert called == {"aten.conv3d.default", "aten.conv_transpose3d.input", "aten.relu.default", "aten.add.Tensor"}
    model = onnx.load(exported.files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} == {"Conv", "ConvTranspose", "Relu", "Add"}
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 1, "height", "width", 16]  # 16 is the patch's
    for path in exported.files.values():
        assert str(Path(__file__).resolve().parents[1]).encode() not in path.read_bytes()


def test_the_files_are_read_where_this_package_is_not(exported):
    code = f"""
import sys
sys.modules["spss_fast"] = None
import torch
program = torch.export.load({str(exported.files["torch"])!r})
print(tuple(program.module()(torch.zeros(1, 1, 32, 64, 16)).shape))
weights = torch.load({str(exported.files["state_dict"])!r}, weights_only=True)
print(weights["block_one.conv.0.weight"].shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["(1, 2, 32, 64, 16)", "2"], done.stderr


def test_weights_are_those_of_the_literatures_names(exported, phantom_run):
    from safetensors.torch import load_file

    expected = _student(phantom_run).state_dict()
    loaded = torch.load(exported.files["state_dict"], weights_only=True), load_file(exported.files["safetensors"])
    for weights in loaded:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def _follow(description: Path, scan: Path, folder: Path, monkeypatch) -> sitk.Image:
    """The label map that the script of docs/export.md makes."""
    folder.mkdir()
    (folder / "student").symlink_to(description.parent)
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(folder / "scan.nii.gz"))
    monkeypatch.chdir(folder)
    (script,) = blocks("export.md")
    exec(compile(script, "export.md", "exec"), {"__name__": "script"})
    return sitk.ReadImage("label.nii.gz")


def _expected(run: Path, scan: Path) -> sitk.Image:
    config = checkpoint.config_of(checkpoint.read(run / "checkpoints" / "last.pt"))
    (case,) = prepare([Case("scan", scan, None, "image")], config.data, progress=False)
    patch = config.data.patch
    stride = export.window_stride(patch)
    probability = sliding_window(_student(run), torch.from_numpy(case.image), patch, stride)
    return to_source(case, probability.argmax(0).to(torch.uint8).numpy())


def _assert_same(actual: sitk.Image, expected: sitk.Image) -> None:
    assert actual.GetSize() == expected.GetSize() and actual.GetDirection() == pytest.approx(expected.GetDirection())
    actual, expected = sitk.GetArrayFromImage(actual), sitk.GetArrayFromImage(expected)
    assert 0.01 < (expected > 0).mean() < 0.99
    assert (actual == expected).mean() > 0.9999


def test_the_description_suffices_for_a_ct(exported, phantom_run, tmp_path, monkeypatch):
    """Body crop, window, and resampling that shrinks by more than 2 along some axes; KiTS19's orientation."""
    described = json.loads(exported.preprocessing.read_text())
    names = [step["step"] for step in described["preprocessing"]["steps"]]
    assert names == ["orient", "body_crop", "window", "resample", "z_score"]
    scan = phantom_run.parent / "data" / "case_00000" / "imaging.nii.gz"
    _assert_same(_follow(exported.preprocessing, scan, tmp_path / "empty", monkeypatch), _expected(phantom_run, scan))


def test_the_description_suffices_for_a_cropped_half_resolution_mr(exported, tmp_path, monkeypatch):
    write_la(tmp_path / "data", 1, shape=(75, 51, 43))
    run = _run(tmp_path, "la", tmp_path / "data", ["a"], max_in_plane=64, downsample=2, patch=(32, 32, 16))
    here = export.export(run, tmp_path / "student", ("state_dict",), console=QUIET)
    assert sorted(path.name for path in here.preprocessing.parent.iterdir()) == ["preprocessing.json", "student.pth"]
    described = json.loads(here.preprocessing.read_text())
    assert [step["step"] for step in described["preprocessing"]["steps"]] == [
        "orient", "centre_crop", "resample", "z_score"
    ]
    assert described["files"] == {"state_dict": "student.pth"}
    # such a run is measured with statistics of each case, and told that its files have not got them
    assert described["statistics"]["of"] == "case"
    assert 0 < described["statistics"]["foreground_dice"] == here.statistics_dice < 1
    # both runs have the same weights, and one conversion to ONNX takes long enough
    shutil.copy(exported.files["onnx"], here.preprocessing.parent)
    here.preprocessing.write_text(json.dumps(described | {"files": {"onnx": "student.onnx"}}))
    scan = tmp_path / "data" / "a" / "lgemri.nrrd"
    _assert_same(_follow(here.preprocessing, scan, tmp_path / "empty", monkeypatch), _expected(run, scan))


def test_foregrounds_that_neither_statistics_find_do_not_agree(phantom_run):
    image, student = torch.zeros(32, 32, 16), _student(phantom_run)
    with torch.no_grad():
        student.out_conv.bias[0] = 1e3
    assert math.isnan(export._statistics_dice(student, image, (32, 32, 16)))


def test_a_real_scan(phantom_run, forwards, scans, tmp_path, capsys):
    scan = scans("ct") / "example_ct_sm.nii.gz"
    arguments = ["--run", str(phantom_run), "--out", str(tmp_path), "--format", "state_dict, safetensors"]
    export.main([*arguments, "--scan", str(scan)])
    shown = capsys.readouterr().out
    assert "checking on example_ct_sm, 40 x 36 x 20 voxels" in shown
    assert "student.safetensors (" in shown and "100.0000% of labels agree" in shown
    described = json.loads((tmp_path / "preprocessing.json").read_text())
    assert described["checked_on"]["case"] == "example_ct_sm" and "onnx" not in described["made_by"]
    assert described["statistics"]["of"] == "running" and described["statistics"]["foreground_dice"] is None
    assert described["checked_on"]["state_dict"] == {"voxels": 131072, "max_difference": 0, "different_labels": 0}
    config = checkpoint.config_of(checkpoint.read(phantom_run / "checkpoints" / "last.pt"))
    (case,) = prepare([Case("scan", scan, None, "image")], config.data, progress=False)
    checks = export.compare(_student(phantom_run), forwards, torch.from_numpy(case.image), config.data.patch)
    assert all(check.passed and check.voxels == 131072 for check in checks.values())
    assert 0 < checks["onnx"].max_difference < 1e-4 and 0 < checks["torch"].max_difference < 1e-4


def test_a_file_that_differs_is_refused_and_leaves_what_was_there(phantom_run, tmp_path, monkeypatch):
    write = export._write

    def altered(student, *rest):
        other = copy.deepcopy(student)
        other.out_conv.bias.data[0] += 0.002
        return write(other, *rest)

    monkeypatch.setattr(export, "_write", altered)
    (tmp_path / "student.pth").write_text("older")
    with pytest.raises(UserError, match=r"student\.pth does not compute what PyTorch does on case_00000: .* 0\.002 "):
        export.export(phantom_run, tmp_path, ("state_dict",), console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]
    assert (tmp_path / "student.pth").read_text() == "older"


def test_tolerances():
    check = export.Check()
    expected = torch.zeros(1, 2, 10, 100, 100)
    expected[:, 0] = 1e-4
    actual = expected.clone()
    actual[0, 1, 0, 0, :10] = 2e-4
    check.add(actual, expected)
    assert check.passed and check.different_labels == 10 and check.agreement == pytest.approx(0.9999)
    actual[0, 1, 1, 1, 1] = 2e-4
    check.add(actual, expected)
    assert not check.passed and check.max_difference < export.LOGIT_TOLERANCE
    check = export.Check()
    check.add(torch.full_like(expected, torch.nan), expected)
    check.add(expected, expected)
    assert not check.passed
    with pytest.raises(ValueError, match="logits of shape"):
        check.add(expected[:, :1], expected)


@pytest.mark.parametrize("missing, formats, said", [
    ("onnxruntime", "onnx", r"--format onnx needs onnxruntime .*pip install onnx onnxscript"),
    ("onnxscript", "torch,onnx", "--format onnx needs onnxscript"),
    ("safetensors", "safetensors", "--format safetensors needs safetensors"),
    (None, "tflite", "--format tflite: choose from onnx, torch, state_dict, safetensors"),
    (None, ",", "choose from onnx"),
])
def test_missing_packages_and_unknown_formats_are_named_first(missing, formats, said, tmp_path, monkeypatch):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=said):
        export.main(["--run", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--format", formats])
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(phantom_run, tmp_path):
    with pytest.raises(UserError, match="give the folder of a training"):
        export.export(tmp_path, tmp_path / "out", ("state_dict",), console=QUIET)
    with pytest.raises(UserError, match=r"nowhere\.nii\.gz cannot be opened"):
        export.export(phantom_run, tmp_path / "out", ("state_dict",), tmp_path / "nowhere.nii.gz", QUIET)
    with pytest.raises(UserError, match="is a folder: give the file of one scan"):
        export.export(phantom_run, tmp_path / "out", ("state_dict",), tmp_path, QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written .*another --out"):
        export.export(phantom_run, tmp_path / "file", ("state_dict",), console=QUIET)
    moved = _run(tmp_path, "phantom", tmp_path / "gone", ["case_00000"], patch=(32, 32, 16))
    with pytest.raises(UserError, match=r"the scans of .* are not found .*--scan FILE"):
        export.export(moved, tmp_path / "out", ("state_dict",), console=QUIET)
    (moved / "cases.json").unlink()
    with pytest.raises(UserError, match=r"the scans of .* are not found"):
        export.export(moved, tmp_path / "out", ("state_dict",), console=QUIET)


def test_folding_batch_norm_leaves_the_student_as_it_was():
    student = VNet(filters=1)
    _settle(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    folded = export.plain(student)
    assert not any(isinstance(module, nn.BatchNorm3d | nn.Dropout3d) for module in folded.modules())
    assert not list(folded.buffers())
    assert student.training and student.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
