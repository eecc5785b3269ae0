"""``python -m spss_fast COMMAND``: the same as ``spss-fast COMMAND``."""

from spss_fast.commands import run

if __name__ == "__main__":
    run()
