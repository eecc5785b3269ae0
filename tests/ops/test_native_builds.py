"""csrc/ without setup.py: nvcc compiles all of csrc/cuda; CMake builds the LibTorch library, which passes its CTest.

Neither needs a GPU. This machine may lack the tools; where it has them, what does not compile fails here.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
CXX = shutil.which(os.environ.get("CXX", "c++").split()[0])


def run(*command) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def cmake_is_old() -> bool:
    version = re.search(r"version (\d+)\.(\d+)", run("cmake", "--version"))
    return tuple(map(int, version.groups())) < (3, 25)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_for_sm_80_and_sm_90(source, tmp_path):
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    # No optimisation: what does not compile at -O3 does not at -O0 either, in half the time.
    run(NVCC, "-std=c++17", "-Xcicc=-O0", "-Xptxas=-O0", "--expt-relaxed-constexpr", "--threads=2", *code, "-Icsrc",
        "-c", source, "-o", tmp_path / "kernels.o")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_bindings_compile_without_cuda_in_torch(tmp_path):
    """Also against a CPU build of torch: it is nvcc that knows where CUDA's own headers are."""
    includes = [f"-I{path}" for path in ("csrc", *include_paths())]
    run(NVCC, "-std=c++20", *includes, "-c", "csrc/cuda/bindings.cpp", "-o", tmp_path / "bindings.o")


@pytest.mark.skipif(shutil.which("cmake") is None or cmake_is_old(), reason="cmake >= 3.25 is not installed")
@pytest.mark.skipif(shutil.which("make") is None or CXX is None, reason="make or a C++ compiler is not installed")
@pytest.mark.skipif(torch.version.cuda is not None and not Path(CUDA_HOME or "", "lib64/libnvrtc.so").exists(),
                    reason="this CUDA build of torch demands the CUDA toolkit of CMake, and it is not there as a whole")
def test_cmake_builds_the_library_and_its_ctest_passes(tmp_path):
    # torch's own CMake files ask for both where torch has CUDA: the architectures, as there may be no GPU to tell them
    toolkit = (f"-DCUDA_TOOLKIT_ROOT_DIR={CUDA_HOME}", "-DTORCH_CUDA_ARCH_LIST=9.0") if torch.version.cuda else ()
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Unix Makefiles",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", *toolkit)
    run("cmake", "--build", tmp_path, "--parallel", "2")
    assert "100% tests passed, 0 tests failed out of 1" in run("ctest", "--test-dir", tmp_path)
