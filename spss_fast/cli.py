"""What the commands share: flags made from the settings, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import takewhile
from typing import Any, NoReturn

from spss_fast.errors import UserError
from spss_fast.settings import SECTIONS

DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults after each help text, but where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with a suggestion."""

    console = False  # whether the command was called through spss-fast, as is then shown of others too

    def __init__(self, prog: str, **kwargs: Any) -> None:
        if self.console:
            prog = prog.replace("spss_fast.", "spss-fast ")
        super().__init__(prog, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, but what begins with a minus and a digit, like ``-160,240``, is the value of the flag before
        it: argparse takes single negative numbers only."""
        valued = {option for action in self._actions if action.nargs != 0 for option in action.option_strings}
        joined: list[str] = []
        for part in sys.argv[1:] if args is None else args:
            if re.match(r"-\.?\d", part) and joined and joined[-1] in valued and "--" not in joined:
                joined[-1] += "=" + part
            else:
                joined.append(part)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            flag = message.removeprefix(unknown).split()[0].split("=")[0]
            # without the dashes, which all have in common
            known = {option.lstrip("-"): option for action in self._actions for option in action.option_strings}
            typed = flag.lstrip("-")
            close = difflib.get_close_matches(typed, known)

            def alike(name: str) -> float:  # and all the more so where they begin alike: --iters is not --filters
                beginning = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, typed)))
                return difflib.SequenceMatcher(None, name, typed).ratio() + beginning / len(typed)

            best = max(close, key=alike, default=None)
            hint = f"did you mean {known[best]}?" if best else "--help lists them"
            stray = f"{flag} belongs to no flag: lists are written with commas, like 1,2"
            message = f"unknown flag {flag}: {hint}" if flag.startswith("-") else stray
        elif choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            close = difflib.get_close_matches(choice[1].lower(), re.findall(r"[\w-]+", choice[2]), 1)
            message += f": did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}\n")


def command_line(command: str, *arguments: object) -> str:
    """How to run another command, as a shell takes it, and the way this one was called."""
    called = f"spss-fast {command}" if Parser.console else f"python -m spss_fast.{command}"
    return f"{called} {shlex.join(map(str, arguments))}"


def add_settings(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """One flag per setting, grouped by concern. A flag that is not given is absent from the parsed namespace."""
    for section, cls in SECTIONS.items():
        items = [item for item in fields(cls) if item.name not in skip]
        if not items:
            continue
        group = parser.add_argument_group(section, cls.__doc__)
        for item in items:
            default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
            shown = "" if default in (None, "") else f" (unless preset: {default})"
            choices = item.metadata.get("choices")
            bare = {"nargs": "?", "const": item.metadata["bare"]} if "bare" in item.metadata else {}
            group.add_argument(
                "--" + item.name.replace("_", "-"), **bare, dest=item.name, default=argparse.SUPPRESS,
                metavar="{" + ",".join(choices) + "}" if choices else "VALUE",
                help=item.metadata["help"].replace("%", "%%") + shown,
            )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command: a ``UserError`` becomes one line on standard error and exit status 2, and so does a disk that is
    full or may not be written."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; see to its permissions and to the space on its disk",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
