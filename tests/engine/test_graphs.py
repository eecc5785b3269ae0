"""Replaying as a CUDA graph: when it records, what it copies, and on a GPU the same bits as without it."""

import copy
from dataclasses import replace

import pytest
import torch

from spss_fast.config import resolve
from spss_fast.data.sampling import Batch
from spss_fast.engine import checkpoint
from spss_fast.engine.beside import InTurn
from spss_fast.engine.graphs import Recording, Replayed
from spss_fast.engine.registration import registration_steps, sample_pairs
from spss_fast.engine.selfpaced import monte_carlo
from spss_fast.engine.step import State, joint_iteration
from spss_fast.nets.regnet import RegistrationNet
from spss_fast.nets.vnet import VNet, teacher_of
from spss_fast.settings import RegistrationSettings, SelectionSettings


class StandIn:
    """In place of a CUDA graph: replaying it runs the function on the recording's own inputs, as a graph would."""

    def __init__(self, function, inputs):
        self.function, self.inputs, self.output = function, inputs, torch.empty(())

    def replay(self):
        self.output.copy_(self.function(*self.inputs))


@pytest.fixture
def without_a_gpu(monkeypatch):
    def record(self, *inputs):
        own = tuple(None if x is None else torch.full_like(x, float("nan")) for x in inputs)
        graph = StandIn(self.function, own)
        return Recording(graph, own, graph.output, [])

    monkeypatch.setattr(Replayed, "_first", lambda self, *inputs: self.function(*inputs))
    monkeypatch.setattr(Replayed, "_record", record)


def test_it_records_once_a_shape_and_reads_what_it_is_given(without_a_gpu):
    seen = []

    def total(x, y):
        seen.append(x.data_ptr())
        return x.sum() if y is None else (x * y).sum()

    replayed, given, results = Replayed(total, "teacher"), [torch.full((3,), float(i)) for i in range(4)], []
    for x in given:
        results.append(replayed(x, None))
    assert [float(result) for result in results] == [0, 3, 6, 9]  # and none was overwritten by a later call
    assert seen[0] == given[0].data_ptr() and len(set(seen[1:])) == 1 and seen[1] not in {x.data_ptr() for x in given}
    assert float(replayed(given[1], given[3])) == 9 and float(replayed(given[1], given[3])) == 9
    assert float(replayed(torch.ones(2, 3), None)) == 6
    assert len(replayed.recordings) == 3


def test_a_checkpoint_brings_no_say_on_graphs_along():
    """One that was saved on a GPU goes on on a CPU, where torch refuses a capturable Adam."""
    state = State(resolve("phantom", {"filters": 2, "patch": "32,32,16"}), torch.device("cpu"), None)
    content = {part: copy.deepcopy(getattr(state, part).state_dict()) for part in checkpoint.PARTS}
    content["adam"]["param_groups"][0]["capturable"] = True
    checkpoint.restore(state, content | {"epoch": 1, "iteration": 2, "last_loss": torch.tensor(0.5)})
    assert state.adam.param_groups[0]["capturable"] is False
    assert (state.epoch, state.iteration, float(state.last_loss)) == (1, 2, 0.5)
    volumes = torch.randn(2, 32, 32, 4)
    assert torch.isfinite(state.registration_steps(volumes, None, *sample_pairs(volumes, state.config.registration)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_registration_replayed_is_registration(amp, monkeypatch):
    """Six calls, of which four are replays, with and without labels in turn: the same bits in losses and weights."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings, outcomes = RegistrationSettings(registration_steps=3, registration_pairs=4), []
    volumes = torch.randn(2, 32, 32, 6, device="cuda")
    labels = (torch.rand(2, 1, 32, 32, 6, device="cuda") > 0.5).to(torch.uint8)
    for replay in (False, True):
        torch.manual_seed(0)
        network = RegistrationNet().cuda()
        adam = torch.optim.Adam(network.parameters(), 1e-3, fused=True, capturable=True)

        def steps(volumes, labels, *pairs, network=network, adam=adam):
            return registration_steps(network, adam, volumes, labels, pairs, settings, amp)

        run, losses = Replayed(steps, "registration") if replay else steps, []
        for call in range(6):
            torch.manual_seed(call)
            losses.append(run(volumes + call, labels if call % 2 else None, *sample_pairs(volumes, settings)))
        outcomes.append([*map(float, losses), *(parameter.detach().cpu() for parameter in network.parameters())])
    assert len(outcomes[0]) > 6
    for actual, expected in zip(*outcomes):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_monte_carlo_passes_replayed_are_the_passes(amp, monkeypatch):
    """Four calls, of which three are replays, with weights that move in between: the same bits, noise and dropout."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings, outcomes = SelectionSettings(passes=3), []
    layout = {"memory_format": torch.channels_last_3d}
    mixed = torch.randn(2, 1, 32, 32, 16, device="cuda").contiguous(**layout)
    for replay in (False, True):
        torch.manual_seed(0)
        teacher = teacher_of(VNet(filters=4).cuda().to(**layout))

        def passes(mixed, teacher=teacher):
            return monte_carlo(teacher, mixed, 2, settings, amp)

        run, sums = Replayed(passes, "teacher") if replay else passes, []
        for call in range(4):
            torch.manual_seed(call)
            sums.append(run(mixed + call))
            teacher.out_conv.bias.data += 0.1
        outcomes.append(sums)
    assert not torch.equal(*outcomes[0][:2])
    for actual, expected in zip(*outcomes):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs and streams")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_iterations_replayed_beside_each_other_are_the_iterations(amp, monkeypatch):
    """Five of them, of which three are replays with registration on its own stream, each begun before the last has
    ended: the same bits in losses and weights as in plain calls one after the other."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = resolve("la", {"patch": "32,32,16", "filters": 4, "passes": 2, "registration_steps": 3, "ramp_every": 1,
                            "lambda_start": 100.0})
    batches, outcomes = [_batch(seed) for seed in range(5)], []
    for plain in (True, False):
        state = State(config, torch.device("cuda"), amp)
        if plain:
            state.beside = InTurn()
            for name in ("registration_steps", "outward_flows", "teacher_passes", "monte_carlo", "student_passes"):
                setattr(state, name, getattr(state, name).function)
        metrics = []
        for batch in batches:
            with state.beside.place():
                images = {name: getattr(batch, name).cuda() for name in ("image", "view1", "view2")}
                batch = replace(batch, **images)
            metrics.append(joint_iteration(state, batch).metrics)
        state.beside.settle()
        metrics = [{name: float(value) for name, value in of_one.items()} for of_one in metrics]
        networks = (state.student, state.teacher, state.registration)
        outcomes.append((metrics, [x.detach().cpu() for network in networks for x in network.state_dict().values()]))
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[0][0][-1]["loss_u"] > 0 and outcomes[0][0][-1]["K"] > 0
    for actual, expected in zip(outcomes[1][1], outcomes[0][1]):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    disk = torch.hypot(*torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")) < 0.5
    volume = disk[None, None, :, :, None].expand(4, 1, 32, 32, 16).float()
    views = [volume + 0.3 * torch.randn(volume.shape, generator=generator) for _ in range(3)]
    annotation, index = disk.expand(2, 32, 32).to(torch.uint8).contiguous(), torch.tensor([5, 9])
    return Batch(list("abcd"), *views, annotation, index, None)
