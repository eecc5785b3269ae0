"""One page about a run: ``python -m spss_fast.report --run RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from spss_fast import cli
from spss_fast.engine.device import resolve_device
from spss_fast.errors import UserError
from spss_fast.files import atomically
from spss_fast.reporting.gallery import Gallery, gallery
from spss_fast.reporting.page import render
from spss_fast.reporting.record import read

DESCRIPTION = """One self-contained HTML page about a run, finished or not: is it good, where does it fail, did training
behave; metrics by case with the worst first, a gallery of slices, curves, settings. Run evaluate first for metrics."""


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line to a dictionary."""
    parser = cli.Parser(prog="spss_fast.report", description=DESCRIPTION)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    parser.add_argument("--cases", type=int, default=3,
                        help="test cases, and as many annotated volumes, in the gallery, from the worst to the best")
    parser.add_argument("--data-dir", type=Path,
                        help="where the run's scans lie now, for the gallery (default: where training found them, or "
                        "evaluate)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return vars(parser.parse_args(arguments))


def report(
    run: Path, out: Path | None = None, cases: int = 3, data_dir: Path | None = None, device: str = "auto",
    console: Console | None = None,
) -> Path:
    """Write the page about the run in the folder ``run`` to ``out`` (default: ``run``/report.html); returns its path.

    ``cases`` test cases and as many annotated volumes are segmented anew for the gallery, on ``device``; 0 leaves the
    gallery out. They are read from ``data_dir``, by default where training or ``evaluate`` found them; where they
    are gone, the page says so and shows the rest. Raises ``UserError`` where there is no run, where one of its files
    cannot be read, and where the page cannot be written.

    Example::

        from spss_fast.report import report
        page = report("runs/la")  # runs/la/report.html
    """
    run = Path(run)
    out = Path(out) if out else run / "report.html"
    if cases < 0:
        raise UserError(f"--cases {cases} must not be negative (0 leaves the gallery out)")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name the page, like {out / 'report.html'}")
    where = resolve_device(device)
    record = read(run, where)
    shown = Gallery(notes=["Left out, as asked for (--cases 0)."])
    if cases:
        shown = gallery(record, cases, where, console or Console(), data_dir)
    page = render(record, shown)
    try:
        atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the page cannot be written to {out} ({error.strerror}): name another --out") from error
    return out


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    out = report(**parse(arguments))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    cli.run(main)
