"""CUDA kernels that race for their result, with threads of the CPU for those of a GPU: what they compute needs none."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from operator_cases.holes import CASES, SHAPES

from spss_fast.ops.holes import reference
from tests.ops.test_native_builds import CXX

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_on_threads"
ENTRY = """
#include <climits>
#include <vector>
extern "C" void fill_holes(
    int64_t batch, int height, int width, int depth, int classes, const uint8_t* labels, uint8_t* filled) {
  const size_t voxels = static_cast<size_t>(height) * width * depth;
  std::vector<int> parent(batch * (voxels + 1), -1), count(parent), tightest(batch * voxels, INT_MAX);
  spss::launch_fill_holes(
      {batch, height, width, depth}, classes, labels, filled, parent.data(), count.data(), tightest.data(), nullptr);
}
"""


@pytest.fixture(scope="module")
def fill_holes(tmp_path_factory):
    if CXX is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_threads")
    launches = re.compile(r"(\w+)<<<(\w+), (\w+), 0, stream>>>\((.*?)\);", re.DOTALL)
    text, count = launches.subn(r"run_blocks(\2, \3, [=] { \1(\4); });", (ROOT / "csrc/cuda/holes.cu").read_text())
    assert count == 4
    (folder / "holes.cpp").write_text(text + ENTRY)
    command = [CXX, "-std=c++20", "-O2", "-pthread", "-shared", "-fPIC", f"-I{HERE}", f"-I{ROOT / 'csrc'}",
               str(folder / "holes.cpp"), "-o", str(folder / "holes.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "holes.so"))

    def fill(labels: torch.Tensor, classes: int) -> torch.Tensor:
        filled = labels.clone()
        library.fill_holes(ctypes.c_int64(len(labels)), *labels.shape[1:], classes, ctypes.c_void_p(labels.data_ptr()),
                           ctypes.c_void_p(filled.data_ptr()))
        return filled

    return fill


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_fill_holes_of_noise(fill_holes, shape, classes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        (labels,) = CASES[0].make(shape, torch.float32, generator)
        assert torch.equal(fill_holes(labels, classes), reference(labels, classes))


def test_fill_holes_of_a_maze_and_of_chambers(fill_holes):
    """Ways that wind through every row, and the same ways closed: the longest that union-find has to walk."""
    maze = torch.ones(2, 17, 33, 40, dtype=torch.uint8)
    maze[:, 1:-1:2, 1:-1, 1:-1] = 0
    maze[:, 2:-1:4, -2, -2] = maze[:, 4:-1:4, 1, 1] = 0  # from one plane to the next, at either end in turn
    maze[0, 0, 1, 1] = 0  # a way in
    filled = fill_holes(maze, 2)
    assert torch.equal(filled, reference(maze, 2))
    assert torch.equal(filled[0], maze[0]) and (filled[1] == 1).all()
