"""Ctrl-C falls between iterations: what has begun is finished, so that a run goes on from exactly where it stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from rich.console import Console

from spss_fast.console import say


class Abandoned(KeyboardInterrupt):
    """A second interrupt: what had begun is half done."""


@contextlib.contextmanager
def uninterrupted(console: Console, what: str = "iteration") -> Iterator[None]:
    """Put an interrupt (SIGINT) off to the end of the block, and say that this ``what`` is finished first; a second one
    comes at once, as ``Abandoned``.

    Where interrupts are ignored, and outside the main thread, which alone gets them, it does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise Abandoned
        asked = True
        say(console, f"stopping after this {what}; interrupt again to stop at once")

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if asked:
        raise KeyboardInterrupt
