"""Every Triton kernel compiles to machine code for the GPUs in use, also where there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "activation": ("_forward", "_backward", "_bias_gradient"),
    "contrastive": ("_confidence", "_loss"),
    "losses": ("_forward", "_backward"),
    "norm": ("_moments", "_statistics", "_apply", "_add_gradients", "_gradients", "_input_gradient"),
    "uncertainty": ("_accumulate", "_entropy", "_next_digit", "_count_equals", "_mask"),
    "warp": ("_forward", "_backward"),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_compiles_for_sm_80_and_sm_90(tmp_path):
    script = Path(__file__).with_name("compile_triton_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    runs = [  # side by side: each takes half a minute
        subprocess.Popen([sys.executable, script, str(architecture)], text=True, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for architecture in (80, 90)
    ]
    expected = {f"spss_fast.kernels.{module}.{kernel}" for module, kernels in KERNELS.items() for kernel in kernels}
    for run, (output, errors) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, errors
        assert set(output.split("\n")) >= expected
