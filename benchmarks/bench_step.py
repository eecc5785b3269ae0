"""A joint iteration, its registration and the V-Net alone against their straightforward formulations.

A step draws from one batch of made-up scans: what it costs does not depend on what they show.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from unittest import mock

import pytest
import torch
from harness import Alone, alone, count_flops
from torch import Tensor, nn
from torch.nn import functional as F

from spss_fast.config import resolve
from spss_fast.data.sampling import Batch
from spss_fast.engine.device import keep_freed_memory, resolve_amp
from spss_fast.engine.graphs import Replayed
from spss_fast.engine.pseudo_labels import foreground_masks, registration_labels
from spss_fast.engine.registration import registration_steps, sample_pairs
from spss_fast.engine.step import State, joint_iteration
from spss_fast.nets import vnet
from spss_fast.nets.vnet import VNet
from spss_fast.ops import backend
from spss_fast.settings import Config

PRESETS = {"LA": {}, "LA --downsample 2 --filters 8": {"downsample": 2, "filters": 8}}
PROVIDERS = ("spss_fast", "straightforward")
CASES = ("10 registration steps", "registration, METHOD's steps 1, 2 and 10")
KEPT = "straightforward, freed memory kept"  # as train keeps it on a CPU, in place of what PyTorch finds there
EAGER = "spss_fast, eager"  # as a GPU runs it outside a CUDA graph
NETWORKS = ("spss_fast", EAGER, "plain eager float32", "MONAI VNet float32")
# under the operators' reference backend
ON_REFERENCE = (PROVIDERS[1], KEPT, NETWORKS[2])
PACKAGES = {"straightforward": "cv2", KEPT: "cv2", NETWORKS[2]: "cv2", NETWORKS[3]: "monai.networks.nets"}


def settings(preset: str, **changes) -> Config:
    return resolve("la", PRESETS[preset] | changes)


@functools.lru_cache(maxsize=1)
def data(patch: tuple[int, int, int]) -> Batch:
    """Noisy ellipsoids, drifting a little from slice to slice."""
    torch.manual_seed(0)
    h, w, d = patch
    y, x, z = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (h, w, d)), indexing="ij")
    inside = ((y - 0.1 * z) ** 2 / 0.2 + x**2 / 0.15 + z**2 / 0.8 < 1).float()
    views = [2 * inside.expand(4, 1, h, w, d) + 0.3 * torch.randn(4, 1, h, w, d) for _ in range(3)]
    index = torch.tensor([d // 3, d // 2])
    annotation = inside[:, :, index].movedim(-1, 0).to(torch.uint8).contiguous()
    reference = inside.to(torch.uint8).expand(2, h, w, d).contiguous()
    return Batch(["a", "b", "c", "d"], *views, annotation, index, reference)


def iteration(provider: str, config: Config, device: str):
    """A function that runs one iteration and returns its losses."""
    state, batch = state_of(provider, config, device), data(config.data.patch)
    # where the loader leaves them
    batch = replace(batch, **{name: getattr(batch, name).to(state.device) for name in ("image", "view1", "view2")})
    if provider == "spss_fast":
        return lambda: joint_iteration(state, batch).metrics
    straightforward = imported_straightforward()
    return lambda: straightforward.joint_iteration(state, batch)


def state_of(provider: str, config: Config, device: str) -> State:
    set_memory(provider, device)
    place = torch.device(device)
    if provider == "spss_fast":
        return State(config, place, resolve_amp(config.training.amp, place))
    return imported_straightforward().to_plain(State(config, place, None))


def set_memory(provider: str, device: str) -> None:
    """Ours as train has it; peers as they find it."""
    if device == "cpu" and provider in ("spss_fast", KEPT):
        keep_freed_memory()


def require(provider: str) -> None:
    """Skip what the bench extra is not installed for."""
    if provider in PACKAGES:
        pytest.importorskip(PACKAGES[provider], reason=f"{PACKAGES[provider]} comes with the bench extra")


def imported_straightforward() -> ModuleType:
    import straightforward  # needs OpenCV

    return straightforward


@functools.cache
def check_that_both_compute_the_same(device: str) -> None:
    with alone(device, functools.partial, compare, device) as check:
        check()


def compare(device: str) -> None:
    """In float32 and without dropout, from the same seed, two iterations long: then rounding begins to tell voxels of
    nearly equal confidence apart."""
    config = settings(
        "LA --downsample 2 --filters 8", patch="32,32,32", dropout=0, amp="off", registration_pairs=4,
        fusion_iterations=4, ramp_every=1,
    )
    ours, peer = (iteration(provider, config, device) for provider in PROVIDERS)
    with float32_convolutions():
        for tolerance in (1e-4, 1e-2):
            actual = ours()
            with backend("reference"):
                expected = peer()
            for name, value in expected.items():
                torch.testing.assert_close(
                    actual[name].float(), value.float(), rtol=tolerance, atol=1e-6,
                    msg=lambda m, name=name: f"{name}: {m}",
                )


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """On GPUs float32 convolutions round their inputs to 10 bits otherwise (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("provider", [*PROVIDERS, KEPT])
@pytest.mark.parametrize("preset", PRESETS)
def bench_iteration(measure, device, preset, provider):
    if provider == KEPT and device != "cpu":
        pytest.skip("PyTorch keeps a GPU's memory itself")
    require("straightforward")
    check_that_both_compute_the_same(device)
    config = settings(preset)
    made = functools.partial(alone, device, iteration, provider, config, device, prefer=preference(provider))
    with made() as run:
        row = measure(run, operator="step", case="iteration", size=preset, provider=provider,
                      elements=data(config.data.patch).image.numel(), bytes=0)
    if provider == "spss_fast":
        row.flops = count_needed_flops(made)


def preference(provider: str) -> str | None:
    return "reference" if provider in ON_REFERENCE else None


def count_needed_flops(made: Callable[[], AbstractContextManager[Callable[[], object]]]) -> int:
    """FLOPs of one call without the zeros that narrow convolutions are filled up with, and as many as torch's own
    convolutions take where ours take fewer.

    Of another function than the one that was timed: a CUDA graph that is replayed shows none, and one that was recorded
    after such a call would not be what training records.
    """
    with made() as run:
        return run.ask(_count_needed) if isinstance(run, Alone) else _count_needed(run)


def _count_needed(run: Callable[[], object]) -> int:
    direct = nn.Conv3d._conv_forward
    with mock.patch.object(vnet._NarrowConvolution, "_conv_forward", direct), backend("reference"):
        return count_flops(run)


def registration(provider: str, config: Config, device: str, case: str):
    """A function that runs ten registration steps, or all the registration of an iteration: one of ``CASES``."""
    state, batch = state_of(provider, config, device), data(config.data.patch)
    volumes, annotation, index = (x.to(state.device) for x in (batch.image[:, 0], batch.annotation, batch.index))
    labeled = volumes[:len(index)]

    def steps(volumes: Tensor, masks: Tensor | None) -> Tensor:
        pairs = sample_pairs(volumes, config.registration)
        if provider == "spss_fast":
            return state.registration_steps(volumes, masks, *pairs)
        return registration_steps(state.registration, state.adam, volumes, masks, pairs, config.registration, state.amp)

    def labels() -> Tensor:
        if provider == "spss_fast":
            classes = config.data.class_count
            flows = state.outward_flows(labeled, index)
            return registration_labels(flows, batch.annotation, index, classes, config.registration)
        return imported_straightforward().carried_labels(
            state.registration, labeled, annotation, index, config.registration
        )

    def run() -> None:
        steps(volumes, None)
        if case == CASES[1]:
            steps(labeled, foreground_masks(labels(), config.data.class_count))

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES)
def bench_registration(measure, device, case, preset, provider):
    require(provider)
    config = settings(preset)
    made = functools.partial(alone, device, registration, provider, config, device, case, prefer=preference(provider))
    with made() as run:
        row = measure(run, operator="step", case=case, size=preset, provider=provider,
                      elements=data(config.data.patch).image.numel(), bytes=0)
    row.flops = count_needed_flops(made)


PATCH = (1, 1, 112, 112, 80)  # of LA


def network(provider: str, device: str):
    """A function that runs a V-Net forward and backward."""
    set_memory(provider, device)
    torch.manual_seed(0)
    image, target = torch.randn(PATCH, device=device), torch.randint(0, 2, (1, *PATCH[2:]), device=device)
    if provider == "MONAI VNet float32":
        from monai.networks.nets import VNet as MonaiVNet

        net, amp = MonaiVNet(in_channels=1, out_channels=2).to(device), None
    elif provider == "plain eager float32":
        net, amp = imported_straightforward().plain(VNet().to(device)), None
    else:
        net, image = (x.to(device, memory_format=torch.channels_last_3d) for x in (VNet(), image))
        amp = resolve_amp("auto", torch.device(device))

    def run() -> Tensor:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, amp, enabled=amp is not None):
            logits = net(image)
        loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        return loss.detach()

    return Replayed(run, "student", net.parameters()) if provider == "spss_fast" and device == "cuda" else run


@pytest.mark.parametrize("provider", NETWORKS)
def bench_network(measure, device, provider):
    if provider == EAGER and device == "cpu":
        pytest.skip("there are CUDA graphs on a GPU only")
    require(provider)
    made = functools.partial(alone, device, network, provider, device, prefer=preference(provider))
    with made() as run:
        row = measure(run, operator="step", case="V-Net forward + backward", size="x".join(map(str, PATCH)),
                      provider=provider, elements=math.prod(PATCH), bytes=0)
    row.flops = count_needed_flops(made)
