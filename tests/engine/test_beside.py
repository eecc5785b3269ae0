"""Registration beside the V-Nets on a CPU: order, results, errors, and whose the cores are."""

import sys
import threading

import pytest
import torch
from torch import nn

from spss_fast.config import resolve
from spss_fast.engine import beside
from spss_fast.engine.beside import InThread, InTurn, choose_beside
from spss_fast.engine.step import State

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    """What torch may use, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _beside(networks: tuple[nn.Module, ...] = ()) -> InThread:
    thread = choose_beside(CPU, networks, False)
    if not isinstance(thread, InThread):
        pytest.skip("torch runs without OpenMP here")
    return thread


def test_functions_run_one_after_the_other_and_return(three_threads):
    thread, begin, order = _beside(), threading.Event(), []

    def add(x: torch.Tensor) -> torch.Tensor:
        begin.wait(60)
        order.append(float(x))
        return x + 1

    results = [thread.run(add, torch.tensor(float(i))) for i in range(3)]
    assert order == []  # the caller was not held up
    begin.set()
    assert [float(result.receive()) for result in results] == [1, 2, 3] and order == [0, 1, 2]


def test_an_error_comes_to_whoever_asks_for_the_result(three_threads):
    thread = _beside()

    def fail() -> None:
        raise ValueError("no such slice")

    failed = thread.run(fail)
    after = thread.run(lambda: failed.value)
    thread.settle()
    for result in (failed, after):
        with pytest.raises(ValueError, match="no such slice"):
            result.receive()


def test_the_threads_take_turns_more_often_while_something_runs_beside(three_threads):
    before, thread = sys.getswitchinterval(), _beside()
    running, failing = thread.run(sys.getswitchinterval), thread.run(lambda: 1 / 0)
    thread.settle()
    assert running.value == pytest.approx(beside.TURN) and beside.TURN < before
    with pytest.raises(ZeroDivisionError):
        failing.receive()
    assert sys.getswitchinterval() == before


def test_the_cores_are_shared_while_something_runs_beside(three_threads):
    network = nn.Sequential(nn.Identity(), nn.Identity())
    thread, end = _beside((network,)), threading.Event()

    def threads() -> int:
        end.wait(60)
        return torch.get_num_threads()

    for _ in range(2):
        running = thread.run(threads)
        assert torch.get_num_threads() == 2
        end.set()
        assert running.value == 1
        while not thread.last.done():
            pass
        network(torch.zeros(1))  # the next block of the network takes all cores back
        assert torch.get_num_threads() == 3
        end.clear()
    elsewhere = []
    other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    other.start(), other.join()
    assert elsewhere == [3]  # torch's own number, which a loader's thread restores, is as it was


def test_all_cores_come_back_when_it_is_settled(three_threads):
    thread, begin = _beside(), threading.Event()
    thread.run(begin.wait, 60)
    assert torch.get_num_threads() == 2
    begin.set()
    thread.settle()
    assert thread.last.done() and torch.get_num_threads() == 3


def test_where_there_is_one_core_or_bits_count_it_runs_in_turn(three_threads, monkeypatch):
    settings = {"patch": "32,32,16", "filters": 2}
    exact = State(resolve("la", settings | {"deterministic": True}), CPU, None)
    assert type(exact.beside) is InTurn
    torch.set_num_threads(1)
    assert type(State(resolve("la", settings), CPU, None).beside) is InTurn
    torch.set_num_threads(3)
    monkeypatch.setattr(beside, "_openmp", lambda: None)  # as on Windows
    assert type(choose_beside(CPU, (), False)) is InTurn
    caller = threading.get_ident()
    assert exact.beside.run(threading.get_ident).receive() == caller
