"""What the commands say."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """``text`` as it is: brackets and colons in names mean nothing, and only a terminal breaks a line that is long."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
