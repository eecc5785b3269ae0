"""Builds spss_fast._C from csrc/: the CPU operators always, the CUDA ones where torch has CUDA and nvcc is there.

Without torch or without a C++ compiler the package is pure Python and runs on its reference (and Triton) operators.
A compiler that is there but fails is an error: a build must not lose its fast operators in silence.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup

# One source for every x86-64: csrc/cpu/multiarch.h compiles the hot loops for several instruction sets and picks one
# when the library is loaded, so there is no -march=native and the build runs on any machine of a cluster.
HOST_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
if platform.machine() in ("x86_64", "AMD64"):
    # Tunes only, the instruction sets are chosen at run time: gather instructions where there are any, and registers of
    # 512 bits, which GCC otherwise leaves alone for the sake of the first CPUs that had them.
    HOST_FLAGS += ["-mtune=skylake-avx512", "-mprefer-vector-width=512"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
COMPILER = (os.environ.get("CXX") or "c++").split()


def note(text: str) -> None:
    print(f"spss_fast: {text}", file=sys.stderr)


def compiles(source: str, *flags: str) -> bool:
    """Whether the C++ compiler takes ``source``."""
    command = [*COMPILER, "-x", "c++", "-std=c++20", "-fsyntax-only", *flags, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def threads() -> list[str]:
    """The flag for OpenMP, whose threads are torch's own, or none."""
    if compiles("#include <omp.h>\nint n = omp_get_max_threads();", "-fopenmp"):
        return ["-fopenmp"]
    note("no OpenMP, so that the CPU operators run on one thread: for more of them install what brings omp.h for "
         f"{COMPILER[0]} (libomp-dev for clang), or set CXX to another compiler, and install again")
    return []


def warn_of_slow_code() -> None:
    if platform.machine() not in ("x86_64", "AMD64") or compiles(
        '#include "csrc/cpu/multiarch.h"\n#if !SPSS_HAS_FMA\n#error\n#endif', "-I."
    ):
        return
    note(f"{COMPILER[0]} compiles the CPU operators without FMA and AVX-512: GCC 12 or newer on Linux makes faster "
         "ones")


def has_cuda(torch, cuda_home: str | None, include_paths) -> bool:
    """Whether the CUDA operators can be built: torch's CUDA and nvcc must be of one major version, and CUDA's headers
    where torch looks for them."""
    if torch.version.cuda is None:
        return False
    nvcc = os.path.join(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not os.path.exists(nvcc):
        note(f"CUDA operators left out: no nvcc; put that of CUDA {torch.version.cuda} on PATH, or its toolkit's "
             "folder into CUDA_HOME, and install again")
        return False
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        note(f"CUDA operators left out: torch has CUDA {torch.version.cuda}, {nvcc} is of another major version")
        return False
    if not compiles("#include <cuda_runtime_api.h>", *(f"-I{folder}" for folder in include_paths("cuda"))):
        note(f"CUDA operators left out: {cuda_home}, where the nvcc on PATH lies, does not have CUDA's headers; set "
             "CUDA_HOME to the toolkit's folder, and install again")
        return False
    return True


def extension() -> dict:
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
    except ImportError:
        note("no torch at build time, so a pure-Python package; use pip install --no-build-isolation with torch there")
        return {}
    if shutil.which(COMPILER[0]) is None:
        note("no C++ compiler, so a pure-Python package")
        return {}
    warn_of_slow_code()
    openmp = threads()
    cuda = has_cuda(torch, CUDA_HOME, include_paths)
    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    if cuda:
        sources += glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
    built = (CUDAExtension if cuda else CppExtension)(
        "spss_fast._C",
        sorted(sources),
        include_dirs=[os.path.abspath("csrc"), os.path.abspath("spss_fast/ops")],
        extra_compile_args={"cxx": HOST_FLAGS + openmp, "nvcc": CUDA_FLAGS},
        extra_link_args=openmp,
    )
    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
