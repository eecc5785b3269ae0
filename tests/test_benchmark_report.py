"""What the benchmarks' report makes of its rows: ratios, bandwidth, growth, files."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from spss_fast.config import resolve
from spss_fast.engine.step import State
from spss_fast.ops.backends import active


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import harness

    return harness


def rows(harness, power: float):
    """Ours at four sizes, whose fastest call grows with a power of the elements, and a peer at the largest."""
    sizes = (1000, 2000, 4000, 8000)
    ours = [harness.Row("warp", "forward", str(n), "spss_fast", elements=n, bytes=12 * n, median=2e-6 * n,
                        fastest=1e-6 * n**power, iqr=1e-6, rounds=5) for n in sizes]
    return [*ours, harness.Row("warp", "forward", "8000", "monai", 8000, 96000, 0.2, 0.1, 0.01, 5)]


def test_table_has_ratio_and_share_of_the_bandwidth(harness):
    header, ours, peer, *smaller = harness.table(rows(harness, 1), bandwidth=12e6, matmul=1e9)
    assert "of matmul rate" not in header and "peak" not in header  # no row has either
    ours, peer = dict(zip(header, ours)), dict(zip(header, peer))
    assert (ours["size"], ours["median"], ours["fastest"]) == ("8000", "16.000 ms", "8.000 ms")
    assert ours["ours is faster by"] == "" and ours["of copy bandwidth"] == "50%"
    assert peer["provider"] == "monai" and peer["ours is faster by"] == "12.5x" and peer["of copy bandwidth"] == "4%"
    assert [line[2] for line in smaller] == ["4000", "2000", "1000"]


def test_share_of_the_matmul_rate(harness):
    product = harness.Row("step", "iteration", "LA", "spss_fast", 1, 0, median=2, fastest=1, iqr=0, rounds=3, flops=10)
    header, line = harness.table([product], bandwidth=1, matmul=20)
    assert dict(zip(header, line))["of matmul rate"] == "25%"
    a = torch.ones(3, 5, requires_grad=True)
    assert harness.count_flops(lambda: (a @ torch.ones(5, 7)).sum().backward()) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("power, exponent, smallest", [
    (1, "elements^1.00", "1000: 1.00"), (2, "elements^2.00", "1000: 0.12"),
])
def test_growth(harness, power, exponent, smallest):
    _, (operator, case, grows, relative) = harness.growth(rows(harness, power))
    assert (operator, case, grows) == ("warp", "forward", exponent)
    assert relative.startswith(smallest + ", ") and relative.endswith("8000: 1.00")
    assert harness.growth(rows(harness, power)[2:]) == []


def test_files(harness, tmp_path):
    written = harness.write(rows(harness, 1), "cpu", 12e6, 1e9, tmp_path / "results")
    assert [path.name for path in written] == ["warp-cpu.json", "warp-cpu.md", "warp-cpu.png"]
    body = json.loads(written[0].read_text())
    assert body["copy_bandwidth"] == 12e6 and len(body["rows"]) == 5 and body["rows"][-1]["fastest"] == 0.1
    text = written[1].read_text()
    assert harness.LEGEND in text and "elements^1.00" in text and written[2].stat().st_size > 1000


def _result(run):
    return run()


def test_a_benchmark_alone_runs_in_a_process_of_its_own(harness):
    with harness.alone("cpu", functools.partial, os.getpid) as run:
        assert run() is None
        assert run.ask(_result) not in (None, os.getpid())
    with harness.alone("cpu", functools.partial, torch.mm, torch.ones(2, 3), torch.ones(3, 5)) as run:
        assert harness.count_flops(run) == 2 * 2 * 3 * 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # in another process, and in this one
def test_a_backend_is_entered_around_a_benchmark(harness, device):
    before = active("warp", "cpu")
    with harness.alone(device, functools.partial, active, "warp", "cpu", prefer="reference") as run:
        assert (run.ask(_result) if device == "cpu" else run()) == "reference"
    assert active("warp", "cpu") == before


def test_a_benchmark_that_fails_alone_ends(harness, capfd):
    with pytest.raises(EOFError), harness.alone("cpu", functools.partial, int, "no number") as run:
        run()
    assert "no number" in capfd.readouterr().err


def test_momentum_of_the_peer_lies_as_its_parameters_do(harness):
    """Torch's fused SGD refuses anything else on a GPU, and only there."""
    import straightforward  # beside harness

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = straightforward.to_plain(State(resolve("phantom", {"filters": 2, "patch": "32,32,16"}), device, None))
    for parameter in state.student.parameters():
        assert state.sgd.state[parameter]["momentum_buffer"].stride() == parameter.stride()
        parameter.grad = torch.ones_like(parameter)
    state.sgd.step()
