"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)``, then move the result to ``path``: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
