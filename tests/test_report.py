"""The report of a run: a well-formed page of its own, in agreement with the run's files, whatever of them is there."""

import base64
import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from rich.console import Console

from spss_fast import evaluate, report, train
from spss_fast.config import resolve
from spss_fast.data.annotations import Annotation
from spss_fast.data.cache import prepare
from spss_fast.data.geometry import Grid
from spss_fast.data.layouts import find_cases
from spss_fast.data.phantom import write_phantoms
from spss_fast.engine.preview import class_color
from spss_fast.engine.selfpaced import fusion_weight
from spss_fast.errors import UserError
from spss_fast.reporting import charts, findings, gallery, panels, record
from spss_fast.reporting import page as page_module
from tests.data.writing import prepared, settings_of, write_la

SMALL = {
    "n_labeled": 2, "n_test": 3, "phantoms": 7, "patch": (32, 32, 16), "resample": (32, 32, 16), "filters": 2,
    "iterations": 3, "registration_epochs": 1, "registration_steps": 2, "registration_pairs": 4, "passes": 2,
    "negatives": 5, "log_every": 1, "preview_every": 3, "refresh_batches": 1, "workers": 1, "amp": "off",
    "device": "cpu",
}
QUIET = Console(quiet=True)
VOID = {"meta", "br", "input", "img", "link", "hr"}


class Page(HTMLParser):
    """A page as elements; fails on tags that do not match, and collects what a reader and a browser would see."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text_of_file = path.read_text(encoding="utf-8")
        self.feed(self.text_of_file)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def metrics(self, title: str) -> list[list[str]]:
        """The rows of the tables of metrics that start with ``title``, header and mean left out."""
        first = next(i for i, table in enumerate(self.tables) if len(table) > 1 and table[1][0].startswith(title))
        return self.tables[first][2:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> Path:
    """A finished run with an evaluation; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    write_phantoms(folder / "data", 7, 0, workers=1, progress=False)
    config = resolve("phantom", SMALL | {"data_dir": str(folder / "data"), "cache_dir": str(cache)})
    train.train(config, folder / "run", console=QUIET)
    evaluate.main(["--run", str(folder / "run"), "--stride", "16,16,8"])
    return folder / "run"


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Page:
    return Page(report.report(finished, tmp_path_factory.mktemp("page") / "report.html", console=QUIET))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run to alter."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _read(path: Path) -> dict[str, dict[str, float]]:
    with path.open(newline="") as file:
        return {row.pop("case"): {name: float(v) for name, v in row.items()} for row in csv.DictReader(file)}


def _page(run: Path, cases: int = 0, **options) -> Page:
    return Page(report.report(run, cases=cases, console=QUIET, **options))


def test_nothing_is_fetched_and_no_script_runs(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    style = page.text_of_file
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    assert len(page.text_of_file) < 5e6


def test_references_within_the_page_have_one_target_each(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [a[name][1:] for _, a in page.tags for name in ("href", "xlink:href") if a.get(name, "").startswith("#")]
    assert used and set(used) <= set(ids)


def test_metrics_agree_with_the_files_worst_first(page, finished):
    for title, file in (("mean ± sd of 3", "evaluation.csv"), ("mean ± sd of 2", "registration_labels.csv")):
        rows = _read(finished / file)
        expected = sorted(rows, key=lambda case: rows[case]["dice"])
        shown = page.metrics(title)
        assert [line[0] for line in shown] == expected
        for line in shown:
            for cell, name in zip(line[1:], ("dice", "jaccard", "hd95", "asd")):
                value = rows[line[0]][name]
                assert cell == "–" if np.isnan(value) else abs(float(cell) - value) <= 0.0051
    dice = np.array([row["dice"] for row in _read(finished / "evaluation.csv").values()])
    assert f"{dice.mean():.4f} ± {dice.std():.4f}" in page.text
    assert f"Dice {dice.mean():.3f} ± {dice.std():.3f}" in page.text
    assert f"(median {np.median(dice):.3f}, from {dice.min():.3f} to {dice.max():.3f}) over 3 held-out" in page.text
    assert "Measured on the 32 x 32 x 16 voxels that scans are resampled to" in page.text


def test_the_gallery_goes_from_the_worst_to_the_best(page, finished):
    rows = _read(finished / "evaluation.csv")
    worst, middle, best = sorted(rows, key=lambda case: rows[case]["dice"])
    places = [page.text.index(f"{rank} of 3 {case}")
              for rank, case in (("Worst", worst), ("Median", middle), ("Best", best))]
    assert places == sorted(places)
    annotated = json.loads((finished / "cases.json").read_text())["annotated_in_file"]
    for name, index in annotated.items():
        assert name in page.text and f"Slice {index}: annotated" in page.text
    classes = [attributes.get("class", "").split()[:1] for tag, attributes in page.tags if tag == "path"]
    assert {"annotated", "registration", "fused", "prediction", "reference"} <= {c[0] for c in classes if c}
    assert sum(tag == "image" for tag, _ in page.tags) > 10  # scans and overlays


def test_curves_settings_and_environment_are_there(page):
    titles = ("Stage 1: registration", "Stage 2: losses", "Quality of the pseudo labels", "Pace: L_pace",
              "K, the voxels", "Uncertainty of the teacher", "Teacher's share of the fused labels", "Ramp")
    assert all(title in page.text for title in titles)
    settings = {row[0]: row[1] for table in page.tables for row in table if len(row) == 2}
    assert "annotations" not in settings and settings["max_in_plane"] == "0"  # what is none in the preset too
    assert settings["iterations"] == f"3 (preset: {resolve('phantom').training.iterations})"
    assert settings["temperature"] == "0.07"
    assert settings["torch"] and settings["command"] and settings["held out"] == "yes"


def test_slices_have_the_numbers_of_the_files(run):
    """Those of the prepared volumes only where an older run says no others."""
    cases = json.loads((run / "cases.json").read_text())
    page = _page(run)
    name, index = next(iter(cases["annotated_in_file"].items()))
    assert f"{name} (slice {index})" in page.text and "from 0 along the slice axis of the scan's file" in page.text
    del cases["annotated_in_file"]
    cases["annotated"][name] = 99
    (run / "cases.json").write_text(json.dumps(cases))
    page = _page(run)
    assert f"{name} (slice 99)" in page.text and "from 0 along the slices of the prepared volume" in page.text


def test_gallery_and_cases_agree_on_the_annotated_slice(run, finished, tmp_path):
    """Of a volume of fewer slices than its file the annotation says which slice of the file it is."""
    cases = json.loads((run / "cases.json").read_text())
    name = next(iter(cases["annotated"]))
    read = record.read(run)
    case = gallery._prepared("phantom", finished.parent / "data", [name], read.config.data)[name]
    index = cases["annotated"][name]
    lost = next(z for z in range(case.source.size[2]) if case.slice_to_source(case.slice_from_source(z)) != z)
    read.cases["annotated"][name] = case.slice_from_source(lost)
    networks = gallery._Networks(read, torch.device("cpu"))
    named = gallery._annotated_example(networks, case, "", read, {name: Annotation(lost)})
    assert named.in_file[named.annotated] == lost
    assert panels.rows(named, (0, 1), "")[0].title.startswith(f"Slice {lost}: annotated")
    read.cases["annotated"][name] = index
    drawn = gallery._annotated_example(networks, case, "", read, {})
    assert drawn.in_file[index] == cases["annotated_in_file"][name] == case.slice_to_source(index)


def test_names_are_text_and_not_markup(run):
    evil = '<img src="https://example.org/x" onerror=go()>&"\''
    cases = json.loads((run / "cases.json").read_text())
    for name in ("evaluation.csv", "registration_labels.csv"):
        rows = _read(run / name)
        shown = [evil, *list(rows)[1:]]
        with (run / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "dice", "jaccard", "hd95", "asd"])
            writer.writerows([case, *row.values()] for case, row in zip(shown, rows.values()))
    cases["test"][0] = evil
    (run / "cases.json").write_text(json.dumps(cases))
    page = _page(run)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert evil in page.text
    assert [line[0] for line in page.metrics("mean ± sd of 3")].count(evil) == 1


def test_without_an_evaluation_the_command_is_named(run):
    (run / "evaluation.csv").unlink()
    page = _page(run, cases=1)
    assert f"python -m spss_fast.evaluate --run {run}" in page.text and "not measured yet" in page.text
    assert "mean ± sd of 3" not in page.text and "mean ± sd of 2" in page.text
    assert "Number 1 of 3" in page.text and "the prediction drawn here has Dice" in page.text


def test_an_evaluation_of_older_weights_is_called_so(run):
    assert "of earlier weights" not in _page(run).text
    os.utime(run / "evaluation.csv", (0, 0))
    assert "of earlier weights" in _page(run).text


def test_an_evaluation_of_another_folder_is_called_so_and_drawn_from_there(run, tmp_path):
    """Also where its cases have names that the run's own have too."""
    own = json.loads((run / "cases.json").read_text())
    other, named = tmp_path / "other", dict(zip([*own["annotated"], "another"], own["test"]))
    for name, original in named.items():
        (other / name).mkdir(parents=True)
        for path in (Path(own["data_dir"]) / original).iterdir():
            (other / name / path.name).symlink_to(path)
    evaluate.main(["--run", str(run), "--data-dir", str(other)])
    page = _page(run, cases=1)
    assert f"{len(named)} cases of another folder than the run's own, {other}" in page.text
    assert "Not in the data folder" not in page.text
    assert {line[0] for line in page.metrics("mean ± sd of 3")} == set(named)

    read = record.read(run)
    made = gallery.gallery(read, 3, torch.device("cpu"), QUIET)
    scans = {case.name: case for case in find_cases("phantom", Path(own["data_dir"]))}
    drawn = {(example.name, False): example for example in made.tested}
    drawn |= {(example.name, True): example for example in made.annotated}
    assert len(drawn) == len(named) + len(own["annotated"])
    for (name, annotated), example in drawn.items():
        scan, = prepare([scans[name if annotated else named[name]]], read.config.data)
        np.testing.assert_array_equal(example.image, scan.image)
        assert example.scores == (read.labels if annotated else read.evaluation)[name]


def test_an_evaluation_of_the_runs_data_moved_is_drawn_from_there(run, finished, tmp_path):
    moved = Path(shutil.copytree(finished.parent / "data", tmp_path / "moved"))
    cases = json.loads((run / "cases.json").read_text())
    (run / "cases.json").write_text(json.dumps(cases | {"data_dir": str(tmp_path / "gone")}))
    evaluate.main(["--run", str(run), "--data-dir", str(moved)])
    page = _page(run, cases=1)
    assert f"3 held-out cases of the run, now in {moved}" in page.text
    assert "could not be read" not in page.text and "Test cases" in page.text


def test_distances_carry_the_unit_they_were_measured_in(run):
    assert "HD95 and ASD are in voxels" in _page(run).text
    about = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(about | {"units": "mm"}))
    assert "HD95 and ASD are in mm" in _page(run).text
    (run / "evaluation.json").unlink()
    assert "in the unit that evaluate was asked for" in _page(run).text


def test_a_run_under_way(run):
    """No checkpoint yet, a line of a CSV half written, nothing measured."""
    for name in ("evaluation.csv", "registration_labels.csv", "checkpoints/last.pt"):
        (run / name).unlink()
    lines = (run / "joint.csv").read_text().splitlines()
    (run / "joint.csv").write_text("\n".join([*lines[:3], lines[3][:10]]))
    page = _page(run, cases=3)
    assert "2 of 3 joint iterations, not finished" in page.text
    assert "There is no checkpoint yet" in page.text and "measured at the end of training" in page.text
    (run / "joint.csv").unlink()
    (run / "registration.csv").unlink()
    page = _page(run)
    assert "Too little is logged yet" in page.text and "0 of 3 joint iterations" in page.text


def test_scans_that_are_gone_leave_the_rest(run, finished):
    for name in ("cases.json", "evaluation.json"):
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(content | {"data_dir": str(run / "moved")}))
    page = _page(run, cases=1)
    assert f"The scans could not be read: the data folder {run / 'moved'} does not exist" in page.text
    assert "mean ± sd of 3" in page.text
    page = _page(run, cases=1, data_dir=finished.parent / "data")
    assert "could not be read" not in page.text and "Worst of 3" in page.text


def test_annotations_that_are_gone_leave_the_test_cases(run, tmp_path):
    content = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    content["config"]["data"]["annotations"] = str(tmp_path / "gone.csv")
    torch.save(content, run / "checkpoints" / "last.pt")
    page = _page(run, cases=1)
    assert "Annotated volumes are left out" in page.text and "gone.csv" in page.text and "Worst of 3" in page.text


def test_without_full_labels_nothing_is_compared(run, finished, tmp_path):
    """Test cases without a label, annotated ones with a label of the annotated slice alone."""
    cases = json.loads((run / "cases.json").read_text())
    data = Path(shutil.copytree(finished.parent / "data", tmp_path / "data"))
    for name in cases["test"]:
        (data / name / "segmentation.nii.gz").unlink()
    for name in cases["annotated"]:
        path = data / name / "segmentation.nii.gz"
        image = sitk.ReadImage(str(path))
        label = sitk.GetArrayFromImage(image)  # slices last, see test_train
        kept = int(np.argmax((label > 0).sum((0, 1))))
        label = np.where(np.arange(label.shape[2]) == kept, label, 0).astype(label.dtype)
        alone = sitk.GetImageFromArray(label)
        alone.CopyInformation(image)
        sitk.WriteImage(alone, str(path))
        cases["annotated"][name] = None
    for name in ("evaluation.csv", "registration_labels.csv"):
        (run / name).unlink()
    found = gallery._prepared("phantom", data, cases["annotated"], record.read(run).config.data)
    for name, case in found.items():
        cases["annotated"][name] = int(case.label().sum((0, 1)).argmax())
    (run / "cases.json").write_text(json.dumps(cases))
    page = _page(run, cases=1, data_dir=data)
    assert "Not measured: it has no full label." in page.text
    assert "No label beside the annotated slice, so nothing to compare with: " in page.text
    assert "most uncertain" in page.text and "registration label and prediction differ most" in page.text
    assert "no annotated volume has a full label" in page.text
    drawn = [a["class"] for tag, a in page.tags if tag == "path" and a.get("class") == "reference"]
    assert len(drawn) == 1  # the legend's


def test_the_command_says_where_the_page_is(run, capsys):
    report.main(["--run", str(run), "--cases", "0"])
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    assert "Left out, as asked for" in Page(run / "report.html").text


@pytest.mark.parametrize("options, said", [
    ({"cases": -1}, "--cases -1 must not be negative"),
    ({"out": "."}, "is a folder: name the page"),
    ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
])
def test_options_that_cannot_be(run, options, said):
    with pytest.raises(UserError, match=said):
        report.report(run, **options)
    with pytest.raises(UserError, match="the page cannot be written to"):
        report.report(run, run / "config.toml" / "report.html", cases=0)


def test_files_that_cannot_be_read(run, tmp_path):
    with pytest.raises(UserError, match=r"no run in .* no config\.toml: give one of those in it, .*/run$"):
        report.report(tmp_path)
    (run / "evaluation.csv").write_text("case,dice\na,many\n")
    with pytest.raises(UserError, match=r"evaluation\.csv is not as the run wrote it"):
        report.report(run, cases=0)
    (run / "evaluation.csv").write_text("name,value\n")
    with pytest.raises(UserError, match="make it again with spss_fast"):
        report.report(run, cases=0)
    (run / "cases.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*cases\.json"):
        report.report(run, cases=0)


def test_chosen_cases_spread_from_worst_to_best():
    rows = {f"case {i}": {"dice": i / 10} for i in range(9)}
    assert gallery._chosen(rows, [], 3) == {
        "case 0": "worst of 9", "case 4": "median of 9", "case 8": "best of 9"}
    assert gallery._chosen(rows, [], 1) == {"case 0": "worst of 9"}
    assert gallery._chosen(None, ["a", "b"], 5) == {"a": "number 1 of 2", "b": "number 2 of 2"}
    assert gallery._chosen(None, [], 3) == {}


def test_the_networks_are_used_as_the_run_uses_them(finished, monkeypatch):
    told, seen = record.read(finished), []
    told.config.network.statistics = "case"
    networks, softmax = gallery._Networks(told, torch.device("cpu")), torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    monkeypatch.setattr(networks, "window", lambda network, image, statistics="running":
                        seen.append((network, statistics)) or softmax)
    assert (networks.predict(torch.zeros(1, 1, 1)) == 1).all()
    entropy, _ = networks.uncertainty(torch.zeros(1, 1, 1))
    assert seen == [(networks.student, "case"), *[(networks.teacher, "running")] * 2]
    assert entropy.item() == pytest.approx(0.5623, abs=1e-4)  # of the mean over the passes
    for name in ("student", "teacher"):
        assert torch.equal(getattr(networks, name).out_conv.weight, told.content[name]["out_conv.weight"])


def test_a_tested_case_is_shown_where_it_is_most_wrong_and_where_it_is_largest():
    prediction, reference = np.zeros((2, 6, 6, 8), np.uint8)
    prediction[:5, :5, 4] = reference[:6, :5, 4] = reference[:3, :3, 2] = 1
    networks = SimpleNamespace(predict=lambda image: prediction, uncertainty=lambda image: (np.zeros((6, 6, 8)), None))
    case = SimpleNamespace(name="a", image=np.zeros((6, 6, 8), np.float32), spacing=(1, 1, 1), grid=Grid((6, 6, 8)),
                           has_full_label=True, full_label=lambda: reference, slice_to_source=lambda z: z)
    example = gallery._tested_example(networks, case, "", SimpleNamespace(evaluation=None))
    assert example.slices == [(2, "largest disagreement"), (4, "largest section of the reference")]
    reference[:, :, 6] = prediction[:, :, 6] = 1
    prediction[1:, :, 6] = 2  # of the wrong class
    example = gallery._tested_example(networks, case, "", SimpleNamespace(evaluation=None))
    assert example.slices[0] == (6, "largest disagreement, largest section of the reference")


def test_what_is_shown_holds_the_contours_at_the_shape_they_have_in_the_body():
    gray, mask = np.zeros((40, 20)), np.zeros((40, 20), bool)
    assert panels._Frame(gray, {"prediction": mask}, (1.0, 3.0, 1.0), "key").aspect == pytest.approx(40 / 60)
    mask[30:38, 2:6] = True
    (left, right), (top, bottom) = panels._Frame(gray, {"prediction": mask}, (1.0, 3.0, 1.0), "key").box
    assert 0 <= left <= 30 and 38 <= right <= 40 and 0 <= top <= 2 and 6 <= bottom <= 20


@pytest.mark.parametrize("classes", [2, 3])
def test_uncertainty_is_opaque_where_all_classes_are_equal(classes):
    colors = panels._entropy_colors(np.log([[1, classes**0.5, classes]]), classes)
    np.testing.assert_allclose(colors[0, :, 3], [0, 0.425, 0.85])


def test_contours_lie_on_the_borders_of_voxels():
    mask = np.zeros((5, 4), bool)
    mask[3, 1] = True  # its square reaches from (3, 1) to (4, 2); the outline joins the middles of its sides
    points = {tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", panels._outline(mask))}
    assert points == {(3.0, 1.5), (3.5, 1.0), (4.0, 1.5), (3.5, 2.0)}
    assert panels._outline(np.zeros((5, 4), bool)) == ""
    corner = np.zeros((5, 4), bool)
    corner[0, 0] = True
    assert panels._outline(corner).endswith("Z")  # closed, though it touches the border


@pytest.mark.parametrize("plane, upright", [("axial", False), ("coronal", True), ("sagittal", True)])
def test_patients_stand_upright_in_coronal_and_sagittal_slices(plane, upright, tmp_path):
    """Axis 1 runs down the page: to the back of the patient in axial slices, else from the head to the feet."""
    write_la(tmp_path / "data", 1)
    config = settings_of("la", tmp_path, plane=plane)
    case, = prepared("la", tmp_path / "data", config)
    image = np.zeros((20, 12, 3), np.float32)
    image[:, 10:] = 1  # the end of axis 1
    example = gallery.Example("a", "", {}, image, (1, 1, 1), {"prediction": image > 0}, image, slices=[(1, "why")],
                              head_last=gallery._head_last(case), in_file=[0, 1, 2])
    row, = panels.rows(example, (0, 1), "key")
    for panel, kind in ((row.panels[0], "scan"), (row.panels[1], "uncertainty")):
        data = re.search(rf'class="{kind}".*?base64,([^"]+)', panel.svg)[1]
        shown = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))[..., :4].mean(-1).mean(1)
        assert len(shown) == 12 and (shown[0] > shown[-1]) == upright
    outline = re.search(r'<path class="prediction" d="([^"]+)"', row.panels[0].svg)[1]
    assert (min(float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", outline)) < 6) == upright


def test_curves_are_averaged_and_smoothed():
    values = np.arange(1200.0)
    assert len(charts.averaged(values)) == charts.POINTS and charts.averaged(values)[0] == 1.5
    np.testing.assert_allclose(charts.trend(np.full(40, 3.0)), 3.0)
    assert charts.trend(values)[600] == 600


def test_a_loss_of_zero_does_not_break_the_trend_of_a_logarithmic_curve(monkeypatch):
    monkeypatch.setattr(charts, "_svg", lambda figure, label: figure)
    values = np.random.default_rng(0).uniform(1, 2, 200)
    values[::10] = 0
    _, line = charts._chart("L_c", "", np.arange(200), {"L_c": values}, "iteration", log=True).svg.axes[0].lines
    assert (line.get_ydata() > 0.9).all()


def test_trusted_voxels_are_drawn_as_a_share_of_a_patch_and_learning_rates_where_they_fall(finished):
    told = record.read(finished)
    told.joint["K"] = np.array([0, 4096, 8192])
    chart, = (chart for chart in charts.charts(told) if chart.title.startswith("K,"))
    assert 40 <= max(float(share) for share in re.findall(r">([\d.]+)%<", chart.svg)) <= 60  # the highest tick
    told.config.training.lr_every = 2
    assert charts._learning_rate_steps(told) == [2]


def test_the_line_among_the_cases_is_their_mean(monkeypatch):
    monkeypatch.setattr(charts, "_svg", lambda figure, label: figure)
    figure = charts.dice_of_cases({"student": {name: {"dice": dice} for name, dice in zip("abc", (0.1, 0.8, 0.9))}})
    _, line = figure.axes[0].lines
    assert list(line.get_xdata()) == pytest.approx([0.6, 0.6])


def test_labels_by_distance_pool_the_volumes():
    """Two volumes: both right at the annotated slice, one of them short of a voxel one slice further."""
    reference = np.zeros((4, 1, 5), np.uint8)
    reference[:2, :, 1:4] = 1
    worse = reference.copy()
    worse[0, :, 1] = 0
    examples = [
        gallery.Example("a", "", {}, np.zeros((4, 1, 5)), (1, 1, 1), {"registration": mask, "reference": reference},
                        None, False, [0, 1, 2, 3, 4], 2)
        for mask in (reference, worse)
    ]
    np.testing.assert_allclose(charts.dice_by_distance(examples)["registration"], [1, 2 * 7 / 15])
    assert "2 annotated volumes" in charts.by_distance(examples).note
    assert charts.by_distance([]) is None


def test_labels_by_distance_are_the_mean_over_the_classes_that_are_there():
    """Two classes at the annotated slice, one of them swapped for the other beside it, one alone beyond that."""
    reference = np.zeros((4, 1, 4), np.uint8)
    reference[:2], reference[2:, :, :2] = 1, 2
    label = reference.copy()
    label[2:, :, 1] = 1
    example = gallery.Example("a", "", {}, np.zeros((4, 1, 4)), (1, 1, 1),
                              {"registration": label, "reference": reference}, None, False, [0, 1, 2, 3], 0)
    dice = charts.dice_by_distance([example])["registration"]
    np.testing.assert_allclose(dice, [1, (2 * 2 / 6 + 0) / 2, 1, 1])


@pytest.fixture
def told(finished):
    """What is said about training when some curves are others."""

    def say(**changes):
        told = record.read(finished)
        told.joint |= {name: np.array(values, float) for name, values in changes.items()}
        return {finding.text: finding.kind for finding in findings._training(told).findings}

    return say


@pytest.mark.parametrize("changes, said, kind", [
    ({"loss_s": [0.5, 0.3, 0.2]}, "The supervised loss L_s fell from 0.5 to 0.2.", "good"),
    ({"loss_s": [0.2, 0.3, 0.5]}, "The supervised loss L_s rose: 0.2 at first, 0.5 in the end.", "note"),
    ({"loss_u": [0.1, np.nan, 0.1]}, "Not finite at some point: loss_u.", "bad"),
    ({"dice_registration": [0.7] * 3, "dice_fused": [0.8] * 3}, "the teacher mends them", "good"),
    ({"dice_registration": [0.7] * 3, "dice_fused": [0.5, 0.6, 0.8]},
     "the fused labels have Dice 0.800, the registration labels 0.700: the teacher mends them", "good"),
    ({"dice_registration": [0.8] * 3, "dice_fused": [0.7] * 3}, "the teacher spoils them", "bad"),
    ({"dice_registration": [0.8] * 3, "dice_fused": [0.8] * 3, "w_p": [0.1, 0.2, 0.3]},
     "with 0.30, the teacher's share never came to matter", "note"),
    ({"loss_pace": [3, 2, 1], "lambda": [1.5, 2.5, 2.6], "K": [1, 2, 1638]},
     "Selection opened (L_pace below λ) by iteration 2; in the end K = 1,638 voxels, 10% of one patch", "good"),
    ({"loss_pace": [3, 3, 3], "lambda": [1, 1, 1]}, "Selection never opened: L_pace stayed above λ (3", "note"),
])
def test_what_is_said_about_training(told, changes, said, kind):
    assert [k for text, k in told(**changes).items() if said in text] == [kind]


def test_iterations_without_full_labels_say_nothing_of_the_pseudo_labels(told, finished, monkeypatch):
    """Their Dice is NaN: it has no part in the verdict, and the curve goes through the others."""
    nan, step = np.nan, np.arange(1, 9)
    some = {"step": step, "dice_registration": [nan] * 6 + [0.7, nan], "dice_fused": [nan] * 6 + [0.8, nan]}
    said, = (text for text in told(**some) if "last quarter" in text)
    assert said.startswith("Over the last quarter (1 of 2 logged iterations) the fused labels have Dice 0.800")
    none = {"step": step, "dice_registration": [0.7] * 4 + [nan] * 4, "dice_fused": [0.6] * 4 + [nan] * 4}
    assert not [text for text in told(**none) if "last quarter" in text or "nan" in text]

    monkeypatch.setattr(charts, "_svg", lambda figure, label: figure)
    record_ = record.read(finished)
    record_.joint = {name: np.resize(np.array(values, float), 8) for name, values in (record_.joint | none).items()}
    chart, = (chart for chart in charts.charts(record_) if chart.title.startswith("Quality"))
    assert chart.note.endswith("Of the 8 logged iterations 4: the others have no value.")
    registration, fused = chart.svg.axes[0].lines
    assert list(registration.get_xdata()) == [1, 2, 3, 4] and list(fused.get_ydata()) == [0.6] * 4
    record_.joint["dice_registration"][:] = record_.joint["dice_fused"][:] = nan
    assert not [chart for chart in charts.charts(record_) if chart.title.startswith("Quality")]


def test_losses_that_are_not_finite_are_said_to_be_so_alone(told):
    nan = np.nan
    said = told(loss_s=[0.5, nan, nan], loss_pace=[nan] * 3, **{"lambda": [1, 1, 1]})
    assert any(text.startswith("Not finite at some point: loss_pace, loss_s.") for text in said)
    assert not [text for text in said if "nan" in text or "Selection" in text]


def test_cases_that_show_nothing_are_left_out_of_every_statistic(run, monkeypatch):
    """Neither prediction nor reference: they have no Dice. A class that only one of both shows has no distance."""
    cases = json.loads((run / "cases.json").read_text())["test"]
    header = "case,dice,jaccard,hd95,asd,dice_1,hd95_1,dice_2,hd95_2\n"
    (run / "evaluation.csv").write_text(
        header + f"{cases[0]},nan,nan,nan,nan,nan,nan,nan,nan\n{cases[1]},0.8,0.7,2,1,0.8,2,nan,nan\n"
        f"{cases[2]},0.4,0.3,4,2,0.8,4,0,nan\n")
    page = _page(run)
    assert "Dice 0.600 ± 0.200" in page.text
    assert "(median 0.600, from 0.400 to 0.800) over those 2 of 3 held-out cases" in page.text
    assert f"Worst case of the student: {cases[2]}, Dice 0.400" in page.text
    assert f"Neither prediction nor reference shows anything in {cases[0]}: no Dice" in page.text
    assert f"Prediction or reference of a class is empty in {cases[2]}." in page.text
    shown = page.metrics("mean ± sd of 3")
    assert [line[0] for line in shown] == [cases[2], cases[1], cases[0]] and shown[2][1] == "–"
    means, = (table[1] for table in page.tables if len(table) > 1 and table[1][0] == "mean ± sd of 3")
    assert [" ".join(mean.split()) for mean in means[1:3]] == ["0.6000 ± 0.2000 of 2", "0.5000 ± 0.2000 of 2"]
    assert "nan" not in page.text_of_file.lower().replace("font", "")

    evaluation = record.read(run).evaluation
    assert gallery._chosen(evaluation, [], 3) == {cases[2]: "worst of 2", cases[1]: "best of 2"}
    monkeypatch.setattr(charts, "_svg", lambda figure, label: figure)
    axis, = charts.dice_of_cases({"student": evaluation}).axes
    dots, mean = axis.lines
    assert list(dots.get_xdata()) == [0.4, 0.8] and mean.get_xdata()[0] == pytest.approx(0.6)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["student (2)"]


def test_where_no_case_shows_anything_there_is_no_dice(run):
    (run / "evaluation.csv").write_text("case,dice,jaccard,hd95,asd\na,nan,nan,nan,nan\n")
    page = _page(run)
    assert "In none of the 1 " in page.text and "nothing to measure" in page.text and "no case has a Dice" in page.text


@pytest.mark.parametrize("student, said, kind", [
    (0.9, "the student is 0.100 above them", "good"), (0.78, "the student is 0.020 below them", "note"),
    (0.7, "the student is 0.100 below them", "bad"),
])
def test_the_student_is_compared_with_the_labels_it_learnt_from(finished, student, said, kind):
    told = record.read(finished)
    told.evaluation, told.labels = {"a": {"dice": student}}, {"b": {"dice": 0.8}}
    assert [finding.kind for finding in findings._quality(told).findings if said in finding.text] == [kind]


def test_the_worst_case_and_outliers_are_named(finished):
    measured = record.read(finished)
    dice = [0.1, 0.8, 0.82, 0.83, 0.84, 0.85, 0.86]
    measured.evaluation = {f"case {i}": {"dice": d, "hd95": 3.0 if i else np.nan} for i, d in enumerate(dice)}
    answer = findings._failures(measured, gallery.Gallery())
    texts = [finding.text for finding in answer.findings]
    assert answer.figure == "worst: 0.100" and texts[0] == "Worst case of the student: case 0, Dice 0.100."
    assert any(text.startswith("1 outlier ") and text.endswith("case 0.") for text in texts)
    assert any(text.endswith("is empty in case 0.") for text in texts)


def test_what_is_missed_and_what_is_added_are_told_apart():
    reference, prediction = np.zeros((2, 4, 4, 3), np.uint8)
    reference[:2, :, 1] = 1
    prediction[1:3, :, 1] = prediction[0, 0, 1] = 1
    labels = {"prediction": prediction, "reference": reference}
    slices = {name: label[:, :, 1] for name, label in labels.items()}
    assert panels._differences(slices) == "Of its 8 reference voxels: prediction misses 3, adds 4."
    colors = panels._error_colors(slices["prediction"], slices["reference"])
    for place, color in (((0, 1), panels.MISSED), ((2, 0), panels.ADDED)):
        np.testing.assert_allclose(colors[place], matplotlib.colors.to_rgba(color, 0.75))
    assert not colors[[0, 1, 3], [0, 1, 1]].any()
    example = gallery.Example("a", "", {}, np.zeros((4, 4, 3)), (1, 1, 1), labels, None, False, [8, 7, 6])
    finding, = findings._kind_of_error([example])
    assert "the prediction misses 38% of the reference's voxels and adds 50% as many; half" in finding.text
    assert finding.text.endswith("lie in 1 of 3 prepared slices, most of them in the file's slice 7.")


def test_a_voxel_of_the_wrong_class_is_missed_and_added():
    reference = np.zeros((4, 4, 3), np.uint8)
    reference[:2, :, 1], reference[2:, :, 1] = 1, 2
    swapped = np.array([0, 2, 1], np.uint8)[reference]
    labels = {"prediction": swapped, "reference": reference}
    example = gallery.Example("a", "", {}, np.zeros((4, 4, 3)), (1, 1, 1), labels, None, False, [0, 1, 2],
                              slices=[(1, "why")])
    finding, = findings._kind_of_error([example])
    assert finding.text.startswith("In it the prediction misses 100% of the reference's voxels and adds 100% as many (")
    assert "half of these errors lie in 1 of 3 prepared slices, most of them in the file's slice 1" in finding.text
    row, = panels.rows(example, (0, 3, 7), "key")
    assert row.text == "Of its 16 reference voxels: prediction misses 16, adds 16."
    np.testing.assert_allclose(panels._error_colors(swapped, reference)[..., 1, :],
                               np.full((4, 4, 4), matplotlib.colors.to_rgba(panels.WRONG_CLASS, 0.75)))
    drawn = re.findall(r'class="(\w+)" style="stroke:(#\w+)" d=[^>]*><title>([^<]*)<', row.panels[0].svg)
    one, two = (class_color(c) for c in (1, 2))
    assert drawn == [("prediction", one, "prediction, label value 3"), ("prediction", two, "prediction, label value 7"),
                     ("reference", one, "reference, label value 3"), ("reference", two, "reference, label value 7")]
    assert "Dice 0.0000" in page_module._unmeasured(example, (0, 3, 7))


def test_nothing_is_said_of_where_errors_lie_if_there_are_none():
    label = np.ones((2, 2, 3), np.uint8)
    example = gallery.Example("a", "", {}, np.zeros((2, 2, 3)), (1, 1, 1), {"prediction": label, "reference": label},
                              None, False, [0, 1, 2])
    finding, = findings._kind_of_error([example])
    assert finding.text == "In it the prediction misses 0% of the reference's voxels and adds 0% as many."


@pytest.mark.parametrize("settings", [{}, {"fusion": 0.6, "fusion_iterations": 300, "fusion_power": 0.5}])
def test_the_teacher_outvotes_registration_from_the_iteration_that_is_named(settings):
    training = resolve("la", settings).training
    first = findings._outvotes(training)
    before, after = (
        fusion_weight(t / training.fusion_iterations, training.fusion, training.fusion_power)
        for t in (first - 1, first)
    )
    assert before <= 0.5 < after
    assert findings._outvotes(resolve("la", {"fusion": 0.5}).training) is None
