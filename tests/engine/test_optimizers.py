"""Optimizers: torch's fused ones, and apex's where the real one is there."""

import sys
import types

import pytest
import torch

from spss_fast.config import resolve
from spss_fast.engine import optimizers
from spss_fast.errors import UserError


def test_torchs_are_fused_and_take_the_settings():
    config = resolve("la", {"lr": 0.5, "registration_lr": 0.25})
    weight = torch.nn.Parameter(torch.ones(3))
    sgd, adam = optimizers.build(config, [weight], [weight], torch.device("cpu"))
    assert sgd.defaults["fused"] and adam.defaults["fused"]
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.5, 0.9, 1e-4)
    assert adam.defaults["lr"] == 0.25


def test_a_first_step_that_overflows_leaves_no_trace():
    """Gradient scaling skips it; torch's fused SGD would make its momentum of whatever lies in memory."""
    weight = torch.nn.Parameter(torch.ones(1000))
    sgd, _ = optimizers.build(resolve("la", {"lr": 1.0, "weight_decay": 0.0}), [weight], [weight], torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    lying = [torch.full((1000,), 1e30) for _ in range(8)]
    del lying
    for gradient in (torch.inf, 0.5):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))  # scaling begins with the first loss
        weight.grad = torch.full((1000,), gradient * scale)
        scaler.step(sgd)
        scaler.update()
    assert scaler.get_scale() == 2.0
    assert (weight == 0.5).all()


def test_apex_needs_a_gpu():
    with pytest.raises(UserError, match="--optimizer apex needs a GPU, and this run is on cpu"):
        optimizers.build(resolve("la", {"optimizer": "apex"}), [], [], torch.device("cpu"))


@pytest.mark.parametrize("module", [None, types.ModuleType("apex")], ids=["none", "the unrelated package"])
def test_apex_that_is_not_nvidias_is_told_apart(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", module)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UserError, match=r"not installed .*build it from github.com/NVIDIA/apex.*another project"):
        optimizers.build(resolve("la", {"optimizer": "apex"}), [], [], torch.device("cuda"))


def test_apexs_kernels_are_called_as_it_documents_them(monkeypatch):
    """A stand-in with apex's signatures, axpby in plain torch: what we pass must give the moving average."""
    apex, kernels = types.ModuleType("apex"), types.ModuleType("amp_C")
    apex.optimizers, applier = types.ModuleType("apex.optimizers"), types.ModuleType("apex.multi_tensor_apply")
    apex.optimizers.FusedSGD = torch.optim.SGD
    apex.optimizers.FusedAdam = lambda params, lr, adam_w_mode: (lr, adam_w_mode)

    def axpby(chunk, overflow, lists, a, b, checked):
        assert overflow.dtype == torch.int32
        for x, y, out in zip(*lists):
            out.copy_(a * x + b * y)

    kernels.multi_tensor_axpby = axpby
    applier.multi_tensor_applier = lambda kernel, overflow, lists, *rest: kernel(2048 * 32, overflow, lists, *rest)
    for name, module in (("apex", apex), ("apex.optimizers", apex.optimizers), ("amp_C", kernels),
                         ("apex.multi_tensor_apply", applier)):
        monkeypatch.setitem(sys.modules, name, module)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kind: zeros(*shape, **kind))
    weight = torch.nn.Parameter(torch.ones(2))
    sgd, adam = optimizers.build(resolve("la", {"optimizer": "apex"}), [weight], [], torch.device("cuda"))
    assert sgd.defaults["momentum"] == 0.9 and adam == (1e-4, False)
    targets, sources = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 5.0)]
    optimizers.moving_average("apex", torch.device("cuda"))(targets, sources, 0.25)
    torch.testing.assert_close(targets, [torch.full((2,), 0.25), torch.full((3,), 2.0)])
