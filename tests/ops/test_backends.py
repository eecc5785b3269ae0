"""The table of backends: what overrides it, and what happens without the compiled extension."""

import os
import subprocess
import sys

import pytest
import torch

from spss_fast.ops import backend, warp
from spss_fast.ops.backends import BACKENDS, PARTS, TABLE, active, available

COMPILED = "cpu" in available("warp", "cpu")
IMAGE, SHIFT = torch.rand(1, 1, 3, 4), torch.rand(1, 2, 3, 4)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_every_operator_has_a_reference_and_a_schema():
    assert TABLE.keys() == PARTS.keys()
    for operator, devices in TABLE.items():
        for device, backends in devices.items():
            assert backends[-1] == "reference" and set(backends) <= set(BACKENDS)
            assert active(operator, device) == available(operator, device)[0]
        for part in PARTS[operator]:
            assert hasattr(torch.ops.spss_fast, part)


def test_backend_is_undone_also_by_an_error():
    before = active("warp", "cpu")
    with pytest.raises(RuntimeError, match="inside"):
        with backend("reference"):
            assert active("warp", "cpu") == "reference"
            raise RuntimeError("inside")
    assert active("warp", "cpu") == before
    with backend("reference"):
        with backend(before):
            assert active("warp", "cpu") == before
        assert active("warp", "cpu") == "reference"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"^name must be one of cpu, cuda, triton, reference"), backend("fast"):
        pass


@pytest.mark.skipif("cuda" in available("warp", "cuda"), reason="the CUDA operators are built here")
def test_absent_backend():
    with pytest.raises(ValueError, match="'cuda' does not exist here"), backend("cuda"):
        pass


def test_the_raw_operator_follows_the_override():
    if "triton" not in available("warp", "cpu") or not COMPILED:
        pytest.skip("needs the compiled and the interpreted Triton operators")
    calls = []
    from spss_fast.kernels import warp as kernels

    original = kernels.warp
    kernels.warp = lambda *arguments: calls.append(1) or original(*arguments)
    try:
        expected = torch.ops.spss_fast.warp(IMAGE, SHIFT, "bilinear", "zeros")
        with backend("triton"):
            actual = torch.ops.spss_fast.warp(IMAGE, SHIFT, "bilinear", "zeros")
        torch.ops.spss_fast.warp(IMAGE, SHIFT, "bilinear", "zeros")
    finally:
        kernels.warp = original
    assert calls == [1]
    torch.testing.assert_close(actual, expected)


def test_environment_variable():
    code = "from spss_fast.ops.backends import active; print(active('warp', 'cpu'), active('propagate', 'cpu'))"
    assert python(code, SPSS_FAST_BACKEND="reference").stdout.split() == ["reference", "reference"]
    wrong = python(code, SPSS_FAST_BACKEND="fast")
    assert wrong.returncode != 0 and "SPSS_FAST_BACKEND must be one of" in wrong.stderr


def test_without_the_extension_the_reference_runs_and_says_so_once():
    code = """
import sys, warnings
sys.modules["spss_fast._C"] = None  # as where it was never built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from spss_fast.ops import warp, propagate
    from spss_fast.ops.backends import active
    on_import = len(caught)  # nothing: a command that ends in one line about its flags has no second one
    u = torch.rand(1, 2, 3, 4, requires_grad=True)
    warp(torch.rand(1, 1, 3, 4), u).sum().backward()
    warp(torch.rand(1, 1, 3, 4), u)
print(active("warp", "cpu"), u.grad.shape[1], on_import, sum("compiled extension" in str(w.message) for w in caught))
"""
    done = python(code, TRITON_INTERPRET="0")
    assert done.stdout.split() == ["reference", "2", "0", "1"], done.stderr


@pytest.mark.skipif(not COMPILED, reason="the compiled extension is not built")
def test_an_extension_older_than_the_schemas_is_told_apart():
    code = """
import pathlib
read = pathlib.Path.read_text
newer = 'SPSS_FAST_OPERATOR("tomorrows(Tensor x) -> Tensor")' + chr(10)
pathlib.Path.read_text = lambda path, *rest, **named: (
    read(path, *rest, **named) + newer * (path.name == "schemas.inc")
)
import spss_fast.ops
"""
    said = python(code).stderr.splitlines()[-1]
    assert said.startswith("RuntimeError: the compiled extension of spss_fast is older") and "lacks tomorrows:" in said


def test_importing_the_operators_does_not_import_triton():
    code = "import sys, spss_fast.ops; print('triton.language' in sys.modules)"
    assert python(code).stdout.strip() == "False"


def test_compiled_code_notices_the_override():
    compiled = torch.compile(warp, fullgraph=True, backend="eager")
    torch.compiler.reset()
    expected = compiled(IMAGE, SHIFT)
    with backend("reference"):
        torch.testing.assert_close(compiled(IMAGE, SHIFT), expected)
