"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spss_fast.errors import UserError


def atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)``, then move the result to ``path``: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name's ending stays: writers of images choose the format by it
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_among_scans(out: Path, folders: Iterable[Path], written: str) -> None:
    """Raises ``UserError`` where ``out`` is one of ``folders``, which hold scans, or lies below it: what is ``written``
    there would be found as scans the next time."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{out} is or lies below {folder}, which holds the scans, and {written} there would be "
                            "taken for scans: choose another folder")


def write_json(path: Path, content: Any) -> None:
    """``content`` as an indented JSON file, whole or absent; what JSON has no type for as its text."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
