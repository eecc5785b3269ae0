"""spss_fast: self-paced sample selection for barely-supervised 3-D medical image segmentation, fast."""

import sys

__version__ = "0.1.0"


def _interrupted(kind, error, trace):
    """Ctrl-C while a command's module is still importing torch, before its ``cli.run`` could take it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m spss_fast.COMMAND, whose module is looked for
    sys.excepthook = _interrupted
