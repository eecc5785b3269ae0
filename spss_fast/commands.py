"""``spss-fast COMMAND``, beside ``python -m spss_fast.COMMAND``: one table, and no import before its command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from spss_fast import __version__, cli

DESCRIPTION = """Segment 3-D scans from a few annotated slices: self-paced sample selection for barely-supervised
medical image segmentation (SPSS, MICCAI 2024). Not a medical device."""
EPILOG = """spss-fast COMMAND --help lists a command's flags; python -m spss_fast.COMMAND is the same command. To see
all of it work, without any data: spss-fast train, then spss-fast evaluate --run runs/phantom"""

# spss_fast/COMMAND.py, with its main(arguments), in the order of their use
COMMANDS = {
    "suggest": "which volumes to annotate, and which slice of each, as files that viewers open",
    "prepare": "settings that suit a folder of scans, and its volumes prepared for training",
    "train": "train a network from a folder of scans, a few of which have one annotated slice",
    "evaluate": "Dice, Jaccard and surface distances of a trained run, per case",
    "predict": "label maps of scans, in their own geometry and format",
    "report": "one HTML page about a run: curves, a gallery, the metrics of every case",
    "export": "the trained network as ONNX, torch.export and plain weights, with the preprocessing it expects",
}


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="spss-fast", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"spss_fast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        commands.add_parser(name, help=meaning, add_help=False)
    return parser


def main(arguments: list[str] | None = None) -> int | None:
    """Runs the command that the first of ``arguments`` names with the others; without any, prints what there is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    command = parser.parse_args(arguments[:1] or ["--help"]).command
    if command is None:
        parser.error(f"a command comes first: {', '.join(COMMANDS)}")
    cli.Parser.console = True
    return import_module(f"spss_fast.{command}").main(arguments[1:])


def run() -> NoReturn:
    """The console entry."""
    cli.run(main)
