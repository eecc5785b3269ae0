"""The table of backends: what overrides it, and what happens without the compiled extension."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import setuptools
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths

from spss_fast.ops import backend, backends, fill_holes, propagate, warp
from spss_fast.ops.backends import BACKENDS, PARTS, TABLE, active, available

COMPILED = "cpu" in available("warp", "cpu")
SETUP = Path(__file__).resolve().parents[2] / "setup.py"
IMAGE, SHIFT = torch.rand(1, 1, 3, 4), torch.rand(1, 2, 3, 4)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_every_operator_has_a_reference_and_a_schema():
    assert TABLE.keys() == PARTS.keys()
    for operator, devices in TABLE.items():
        for device, names in devices.items():
            assert names[-1] == "reference" and set(names) <= set(BACKENDS)
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
def test_an_extension_without_fma_says_so_once(monkeypatch):
    monkeypatch.setattr(backends, "_without_fma", True)
    backends._say.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with backend("reference"):
            warp(IMAGE, SHIFT)
        assert not caught  # it was asked for
        warp(IMAGE, SHIFT)
        warp(IMAGE, SHIFT)
    backends._say.cache_clear()
    assert ["compiled without FMA and AVX-512" in str(said.message) for said in caught] == [True]


class Devices(TorchDispatchMode):
    """Notes on which device each operator of the package runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        if operator.namespace == "spss_fast":
            self.seen.append((operator._opname, arguments[0].device.type))
        return operator(*arguments, **named or {})


@pytest.fixture
def without_cuda_operators(monkeypatch):
    """As where nvcc was missing at installation: CUDA tensors, which only look like such, and no kernel for them."""
    for operator in ("warp", "propagate", "fill_holes"):
        monkeypatch.setitem(backends._active, (operator, "cuda"), "reference")
    backends._say.cache_clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    backends._say.cache_clear()


@pytest.mark.skipif(not COMPILED, reason="the compiled extension is not built")
def test_without_the_cuda_operators_the_reference_says_so_once(without_cuda_operators, monkeypatch):
    image = torch.zeros(1, 1, 3, 4, device="cuda")
    monkeypatch.setattr(backends, "_preferred", "reference")
    assert backends.use_reference("warp", image) and not without_cuda_operators  # it was asked for
    monkeypatch.setattr(backends, "_preferred", None)
    assert all(backends.use_reference("warp", image) for _ in range(2))
    (said,) = without_cuda_operators
    assert "CUDA operators are not built, so warp runs on the slower reference" in str(said.message)


@pytest.mark.skipif(not COMPILED, reason="the compiled extension is not built")
def test_without_the_cuda_operators_propagate_runs_on_copies_on_the_host(without_cuda_operators):
    labels = torch.zeros(2, 3, 4, dtype=torch.uint8, device="cuda")
    index, flow = torch.zeros(2, dtype=torch.long, device="cuda"), torch.zeros(2, 5, 2, 3, 4, device="cuda")
    with Devices() as devices:
        volume = propagate(labels, index, flow, flow)
    assert devices.seen == [("propagate", "cpu")]
    assert volume.device.type == "cuda" and volume.shape == (2, 3, 4, 6)
    assert "propagate runs on copies on the CPU" in str(without_cuda_operators[0].message)


@pytest.mark.skipif(not COMPILED, reason="the compiled extension is not built")
def test_without_the_cuda_operators_holes_are_filled_in_copies_on_the_host(without_cuda_operators):
    with Devices() as devices:
        filled = fill_holes(torch.zeros(2, 3, 4, 5, dtype=torch.uint8, device="cuda"), 2)
    assert devices.seen == [("fill_holes", "cpu")] and filled.device.type == "cuda" and filled.shape == (2, 3, 4, 5)


@pytest.mark.parametrize("home", [None, "/nowhere"])
def test_the_build_says_that_it_leaves_the_cuda_operators_out(home, monkeypatch, capsys):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    has_cuda = runpy.run_path(str(SETUP))["has_cuda"]
    capsys.readouterr()
    monkeypatch.setattr(torch.version, "cuda", None)
    # a CPU build of torch: nothing is missing
    assert not has_cuda(torch, home, include_paths) and capsys.readouterr().err == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not has_cuda(torch, home, include_paths)
    assert "CUDA operators left out: no nvcc; put that of CUDA 13.0 on PATH" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_build_looks_for_the_headers_of_cuda(monkeypatch, tmp_path, capsys):
    """An nvcc on PATH may be a script that calls one elsewhere; torch takes the folder above it for the toolkit's."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CPATH", raising=False)
    has_cuda = runpy.run_path(str(SETUP))["has_cuda"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvcc, headers = tmp_path / "bin" / "nvcc", tmp_path / "include"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    headers.mkdir()
    capsys.readouterr()
    assert not has_cuda(torch, str(tmp_path), lambda device: [str(headers)])
    assert f"{tmp_path}, where the nvcc on PATH lies, does not have CUDA's headers" in capsys.readouterr().err
    (headers / "cuda_runtime_api.h").touch()
    assert has_cuda(torch, str(tmp_path), lambda device: [str(headers)]) and capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
def test_the_build_says_what_a_compiler_costs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(SETUP.parent)

    def noted(compiler: str) -> tuple[list[str], str]:
        monkeypatch.setenv("CXX", compiler)
        build = runpy.run_path(str(SETUP))
        capsys.readouterr()
        build["warn_of_slow_code"]()
        return build["threads"](), capsys.readouterr().err

    without_openmp = tmp_path / "c++"
    without_openmp.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1 ;; esac\nexec g++ "$@"\n')
    without_openmp.chmod(0o755)
    flags, said = noted(str(without_openmp))
    assert flags == [] and f"no OpenMP, so that the CPU operators run on one thread: for more of them install what " \
        f"brings omp.h for {without_openmp}" in said
    flags, said = noted("g++ -U__GNUC__ -D__GNUC__=11")
    assert flags == ["-fopenmp"] and "g++ compiles the CPU operators without FMA and AVX-512" in said


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
