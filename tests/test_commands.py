"""spss-fast: its table, its dispatch, and that it is the same as python -m."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from spss_fast import __version__, cli, commands
from spss_fast.config import tomllib

ROOT = Path(__file__).resolve().parents[1]


def spss_fast(*arguments: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess:
    """``python -m spss_fast`` with arguments, or Python code, in an empty folder."""
    call = ["-c", code] if code else ["-m", "spss_fast", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *call], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def usage_lines_as_before():
    before = cli.Parser.console
    yield
    cli.Parser.console = before


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_module(name, capsys):
    module = import_module(f"spss_fast.{name}")
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith(f"usage: spss_fast.{name} ")


def test_every_command_of_the_package_is_in_the_table():
    named = {path.stem for path in (ROOT / "spss_fast").glob("*.py") if "cli.run(main)" in path.read_text()}
    assert named - {"commands"} == set(commands.COMMANDS)


def test_help_names_every_command_and_imports_none(tmp_path):
    shown = spss_fast("--help", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for name, meaning in commands.COMMANDS.items():
        assert f"\n    {name} " in shown.stdout and " ".join(shown.stdout.split()).count(meaning) == 1
    assert spss_fast(cwd=tmp_path).stdout == shown.stdout
    code = "import sys; from spss_fast import commands; commands._parser(); print('torch' in sys.modules)"
    assert spss_fast(cwd=tmp_path, code=code).stdout == "False\n"


def test_other_commands_are_shown_as_this_one_was_called_and_as_a_shell_takes_them():
    arguments = "--run", Path("my runs/a"), "--resume"
    assert cli.command_line("train", *arguments) == "python -m spss_fast.train --run 'my runs/a' --resume"
    cli.Parser.console = True
    assert cli.command_line("train", *arguments) == "spss-fast train --run 'my runs/a' --resume"


def test_version(tmp_path):
    shown = spss_fast("--version", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, f"spss_fast {__version__}\n")


@pytest.mark.parametrize("arguments, meant", [
    (["tran"], "train"), (["evalute"], "evaluate"), (["train", "--dataset", "kit"], "kits"),
    (["train", "--dataset", "LA"], "la"),
])
def test_the_nearest_choice_is_suggested(arguments, meant, capsys):
    with pytest.raises(SystemExit):
        commands.main(arguments)
    assert capsys.readouterr().err.endswith(f": did you mean {meant}?\n")


@pytest.mark.parametrize("arguments, said", [
    (["tran"], "spss-fast: error: argument COMMAND: invalid choice: 'tran' (choose from "),
    (["--versoin"], "spss-fast: error: unknown flag --versoin: did you mean --version?"),
    (["--", "train"], "spss-fast: error: "),
    (["report"], "spss-fast report: error: the following arguments are required: --run"),
    (["evaluate", "--rum", "x", "--run", "x"], "spss-fast evaluate: error: unknown flag --rum: did you mean --run?"),
    (["report", "--unit", "mm", "--run", "x"], "spss-fast report: error: unknown flag --unit: --help lists them"),
])
def test_errors_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        commands.main(arguments)
    shown = capsys.readouterr()
    assert exit.value.code == 2 and shown.out == ""
    assert shown.err.startswith(said) and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["suggest", "prepare", "train"])
def test_a_value_may_begin_with_a_minus(name):
    parse = import_module(f"spss_fast.{name}").parse
    for window in ("-160,240", "-1000", "-.5,.5"):
        given = parse(["--data-dir", "d", "--window", window, "--workers", "2", "--out", "o"])
        assert (given["window"], given["workers"], given["out"]) == (window, "2", Path("o"))
    assert parse(["--data-dir", "d", "--out", "o", "--window=-160,240"])["window"] == "-160,240"


def test_scans_whose_names_begin_with_a_minus_follow_two(capsys):
    arguments = ["--mirror", "--run", "r", "--window", "-9,9", "--", "-1.nii", "o"]
    given = import_module("spss_fast.predict").parse(arguments)
    assert given["inputs"] == [Path("-1.nii")] and given["mirror"] and given["window"] == "-9,9"
    with pytest.raises(SystemExit):
        import_module("spss_fast.train").parse(["--window", "-w"])
    assert "argument --window: expected one argument" in capsys.readouterr().err


def test_what_the_user_can_mend_ends_in_one_line(tmp_path):
    result = spss_fast("evaluate", "--run", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: there is no folder {tmp_path / 'nowhere'}: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_among_the_imports_leaves_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    for module, arguments in (("spss_fast.train", ()), ("spss_fast", ("train",))):
        result = subprocess.run([sys.executable, "-m", module, *arguments], cwd=tmp_path, capture_output=True,
                                text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert result.returncode and result.stderr == "interrupted\n"


@pytest.mark.parametrize("kind, said", [(errno.ENOSPC, "error: a/b.csv: No space left"), (errno.ENOENT, None)])
def test_a_full_disk_is_said_in_one_line(kind, said, capsys):
    def main():
        raise OSError(kind, os.strerror(kind), "a/b.csv")

    with pytest.raises(SystemExit if said else FileNotFoundError):
        cli.run(main)
    assert not said or capsys.readouterr().err.startswith(said)


def test_a_command_gets_its_arguments_as_they_are_and_its_status_is_kept(monkeypatch):
    from spss_fast import evaluate

    given = []
    monkeypatch.setattr(evaluate, "main", lambda arguments: given.extend(arguments) or 1)
    assert commands.main(["evaluate", "--run", "a b", "--", "--help", ""]) == 1
    assert given == ["--run", "a b", "--", "--help", ""]


def test_the_console_entry_is_there():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = entry["spss-fast"].partition(":")
    assert getattr(import_module(module), function) is commands.run
