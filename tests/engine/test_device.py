"""What a process does with memory that tensors on the CPU free."""

import platform
import subprocess
import sys

import pytest

RESIDENT = """
import torch
from spss_fast.engine.device import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

if {keep}:
    keep_freed_memory()
torch.ones(2**20, dtype=torch.uint8)  # what torch's first work brings into memory stays
before = resident()
tensor = torch.ones(2**26, dtype=torch.uint8)
held = resident() - before
del tensor
print((resident() - before) / held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept():
    """In processes of their own, as it holds for a whole process; without it the C library gives 64 MiB back."""
    given_back, kept = (
        float(subprocess.run([sys.executable, "-c", RESIDENT.format(keep=keep)], check=True, text=True,
                             stdout=subprocess.PIPE).stdout)
        for keep in (False, True)
    )
    assert given_back < 0.1 and kept > 0.9
