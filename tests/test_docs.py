"""The documentation: its Python runs, its links and the files that it names are there."""

import re
import shutil
from pathlib import Path

import pytest

from spss_fast import commands, ops
from spss_fast.config import resolve
from spss_fast.data.annotations import read_annotations
from spss_fast.data.layouts import find_cases, source_grid
from spss_fast.data.phantom import write_phantoms
from spss_fast.suggest import suggest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page of docs/."""
    return re.findall(r"^```python\n(.*?)^```$", _text(ROOT / "docs" / page), re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """What a link may name after #, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_of_the_project_that_a_page_names_are_there(page):
    """`spss_fast/ops/warp.py`, `csrc/math/warp.h`, `tests/ops/operator_cases/` ..."""
    named = re.findall(r"`((?:spss_fast|csrc|kernels|tests|docs|benchmarks)/[\w./-]*)`", _text(page))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_page_is_in_the_index():
    index = _text(ROOT / "docs" / "index.md")
    assert not [page.name for page in PAGES if page.name != "index.md" and f"]({page.name})" not in index]


@pytest.mark.parametrize("number", range(len(blocks("operators.md"))))
def test_the_examples_of_the_operators_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("operators.md")[number], f"operators.md, block {number}", "exec"), {"__name__": "example"})


def test_the_example_of_a_new_data_set_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (block,) = blocks("extending.md")
    exec(compile(block, "extending.md", "exec"), {"__name__": "example"})


def test_every_public_operator_has_an_example():
    examples = "\n".join(blocks("operators.md"))
    assert not [name for name in ops.__all__ if not re.search(rf"\b{name}\(", examples)]


def test_the_examples_of_the_commands_run_in_order(tmp_path, monkeypatch):
    """As in one notebook, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examples = blocks("index.md") + blocks("predict.md")
    assert all(f"### {name}\n" in _text(ROOT / "docs" / "index.md") for name in commands.COMMANDS)
    namespace = {"__name__": "example"}
    for number, block in enumerate(examples):
        exec(compile(block, f"index.md and predict.md, block {number}", "exec"), namespace)
    assert len(namespace["dice"]) == 2 and all(0 <= dice <= 1 for dice in namespace["dice"])


def test_the_script_of_the_quick_start_annotates_what_was_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_phantoms(Path("phantoms"), 4, 0, workers=1, progress=False)
    for case in Path("phantoms").glob("case_*"):
        Path("scans").mkdir(exist_ok=True)
        shutil.copy(case / "imaging.nii.gz", f"scans/{case.name}.nii.gz")
    settings = resolve("folder", {"data_dir": "scans", "annotations": "TO_ANNOTATE", "workers": 1}).data
    suggested = {item.case: item for item in suggest(settings, Path("TO_ANNOTATE"), budget=2)}
    (block,) = blocks("quick-start.md")
    exec(compile(block, "quick-start.md", "exec"), {"__name__": "example"})
    scans = {case.name: case for case in find_cases("folder", Path("scans"))}
    given = read_annotations(settings)
    assert set(given) == set(suggested)
    for name, annotation in given.items():
        assert annotation.axis == suggested[name].axis
        assert annotation.index_in(source_grid(scans[name])) == suggested[name].slice
