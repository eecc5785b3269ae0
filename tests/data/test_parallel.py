"""Work on several processes from a person's own script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """from spss_fast.data.parallel import parallel

{guard}print(sorted(parallel(abs, [(-1,), (-2,)], 2, "working", progress=False)))
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_is_told_where_to_do_its_work(tmp_path, guarded):
    (tmp_path / "mine.py").write_text(SCRIPT.format(guard='if __name__ == "__main__":\n    ' * guarded))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if guarded:
        assert (result.returncode, result.stdout) == (0, "[(0, 1), (1, 2)]\n")
        return
    said = [line for line in result.stderr.splitlines() if "UserError: " in line]
    assert result.returncode == 1 and "bootstrapping phase" not in result.stderr
    assert any('put what it does under `if __name__ == "__main__":`' in line for line in said)
    assert 'A script of yours must do this under `if __name__ == "__main__":`' in said[-1]
