"""Loaders: DALI's batches are plain PyTorch's, from any batch on, made ahead, on either device."""

import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

from spss_fast.data.loader import PREFETCH, ahead, batches, resolve_loader
from spss_fast.data.sampling import Sampler, training_volumes, unlabeled_volumes
from spss_fast.errors import UserError
from tests.data.test_sampling import SHAPE, same, sampler_of
from tests.data.writing import prepared, settings_of, write_la

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = ("image", "view1", "view2")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and tested")


@pytest.fixture(params=["torch", "dali"])
def loader(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install spss_fast[dali])")
    return request.param


@pytest.fixture
def dali():
    """The module that needs DALI."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install spss_fast[dali])")
    from spss_fast.data import dali

    return dali


def take(count: int, sampler: Sampler, device: torch.device, start: int, loader: str) -> list:
    with closing(batches(sampler, device, start, loader)) as row:
        return list(islice(row, count))


@pytest.mark.parametrize("shape, patch", [
    (SHAPE, "32 16 16"), (SHAPE, "16 32 16"), ((20, 40, 10), "32 16 16"), ((10, 12, 8), "32 48 16"),
    ((45, 37, 13), "16 16 16"), ((33, 31, 16), "32 32 16"), ((16, 32, 16), "16 32 16"),
])
def test_a_loader_gives_the_samplers_batches(loader, shape, patch):
    """Image, views, noise and labels voxel by voxel, so that both loaders have one distribution: the sampler's."""
    sampler = sampler_of(shape=shape, patch=patch, index=min(12, shape[2] - 2))
    for step, batch in enumerate(take(30, sampler, CPU, 0, loader)):
        same(batch, sampler.batch(step))
        assert all(getattr(batch, name).is_contiguous() for name in IMAGES)


def test_minimum_pads_where_intensities_are_negative(loader):
    sampler = sampler_of(shape=(10, 40, 8), patch="16 16 16", index=3)
    for i, volume in enumerate((*sampler.labeled, *sampler.unlabeled)):
        volume.image -= 500 * (i + 1)
    for step, batch in enumerate(take(9, sampler, CPU, 0, loader)):
        same(batch, sampler.batch(step))


@pytest.mark.parametrize("start", [1, 5, 1000])
def test_the_row_begins_at_any_batch(loader, start):
    sampler = sampler_of()
    for step, batch in enumerate(take(4, sampler, CPU, start, loader), start):
        same(batch, sampler.batch(step))


def test_ranks_share_the_row_of_a_single_process(loader):
    alone = take(6, sampler_of(), CPU, 0, loader)
    for rank in range(2):
        for step, batch in enumerate(take(3, sampler_of(rank=rank, world=2), CPU, 0, loader)):
            same(batch, alone[2 * step + rank])


def test_volumes_from_the_cache(loader, tmp_path):
    write_la(tmp_path / "la", 6)
    config = settings_of("la", tmp_path, patch="32 32 16", n_labeled=2)
    cases = prepared("la", tmp_path / "la", config)
    sampler = Sampler(training_volumes(cases[:2], config.data, 0), unlabeled_volumes(cases[2:]), config, 0)
    for step, batch in enumerate(take(6, sampler, CPU, 0, loader)):
        same(batch, sampler.batch(step))
        assert batch.reference.any()


def test_no_reference_unless_every_annotated_volume_has_one(loader):
    sampler = sampler_of(labeled=2, unlabeled=2)
    sampler.labeled[1].reference = None
    batch = take(1, sampler, CPU, 0, loader)[0]
    assert batch.reference is None
    same(batch, sampler.batch(0))


def test_batches_are_memory_of_their_own(loader):
    # the patch is the whole volume: nothing may be handed through
    sampler = sampler_of(shape=(16, 16, 16), patch="16 16 16")
    expected = [sampler.batch(step) for step in range(8)]
    with closing(batches(sampler, CPU, 0, loader)) as row:
        kept = []
        for step, batch in enumerate(islice(row, 8)):
            same(batch, expected[step])
            kept.append(replace(batch, **{name: getattr(batch, name).clone() for name in IMAGES}))
            for tensor in (batch.image, batch.view1, batch.view2, batch.annotation, batch.reference):
                tensor.fill_(7)
    for batch, again in zip(kept, expected):
        assert torch.equal(batch.image, again.image)
    assert all(torch.equal(sampler.batch(step).image, batch.image) for step, batch in enumerate(expected))


def test_batches_are_made_ahead(loader, monkeypatch):
    sampler, drawn = sampler_of(), []
    draw = sampler.draw
    monkeypatch.setattr(sampler, "draw", lambda step: drawn.append(step) or draw(step))
    with closing(batches(sampler, CPU, 0, loader)) as row:
        next(row)
        until = time.monotonic() + 20
        while len(drawn) < 1 + PREFETCH and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        # without being asked, but not without end: each of DALI's two stages holds as many
        assert set(range(1 + PREFETCH)) <= set(drawn) <= set(range(1 + 2 * PREFETCH + 1))


def test_closing_ends_the_thread(loader):
    row = batches(sampler_of(), CPU, 0, loader)
    next(row)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    row.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_error_in_the_thread_is_the_callers():
    def make(step: int) -> int:
        if step == 5:
            raise OSError("the disk is gone")
        return step

    with closing(ahead(make, 3)) as row:
        assert [next(row), next(row)] == [3, 4]
        with pytest.raises(OSError, match="the disk is gone"):
            next(row)


FIRST_LOOP = """
import torch
from spss_fast.data.loader import ahead
from spss_fast.ops import accumulate_softmax
torch.set_num_threads(2)
row = ahead(lambda step: torch.get_num_threads(), 0)
assert next(row) == 1
accumulate_softmax(*torch.zeros(2, 1, 2, 64, 64, 64))
assert torch.get_num_threads() == 2
row.close()
"""


def test_the_threads_of_the_step_stay_its_own():
    """Each library reads the number of threads when it first runs a parallel loop, hence a process of its own."""
    subprocess.run([sys.executable, "-c", FIRST_LOOP], check=True, timeout=120)


def test_auto_is_what_was_measured(monkeypatch):
    assert resolve_loader("auto", CPU) == "torch"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as if it were not installed
    assert resolve_loader("auto", CUDA) == "torch"
    assert resolve_loader("torch", CUDA) == "torch"
    with pytest.raises(UserError, match=r"DALI cannot be imported.*pip install nvidia-dali"):
        resolve_loader("dali", CPU)


def test_auto_is_dali_on_a_gpu(dali):
    assert resolve_loader("auto", CUDA) == "dali" == resolve_loader("dali", CPU)


@needs_no_gpu
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_pipeline_of_a_gpu_can_be_defined_without_one(dali, resident, padded):
    """As far as it goes here: DALI accepts operators, arguments and devices, and asks for a GPU only to run them."""
    feed = dali.Feed(sampler_of(), 0, None)
    pipeline = dali.cut(feed, True, resident, padded, batch_size=4, num_threads=1, device_id=0)
    with pytest.raises(RuntimeError, match="CUDA is not available"):
        pipeline.build()


@needs_gpu
@pytest.mark.parametrize("resident", [0.0, 0.1])
@pytest.mark.parametrize("shape", [SHAPE, (20, 40, 10)])
def test_batches_on_a_gpu(loader, resident, shape, monkeypatch):
    if loader == "dali":
        monkeypatch.setattr("spss_fast.data.dali.RESIDENT", resident)
    sampler = sampler_of(shape=shape, index=5, noise=0.1, noise_clip=0.2)
    noises = []
    for step, batch in enumerate(take(12, sampler, CUDA, 3, loader), 3):
        clean, plain = sampler.patches(sampler.draw(step)), sampler.batch(step)
        for name in IMAGES:
            assert getattr(batch, name).device.type == "cuda"
        for name in ("annotation", "index", "reference"):
            assert torch.equal(getattr(batch, name), getattr(clean, name))  # on the CPU, both
        assert torch.equal(batch.image.cpu(), clean.image)
        for name in ("view1", "view2"):
            noise = getattr(batch, name).cpu() - clean.view1
            noisy = noise.flatten(1).any(1)
            assert torch.equal(noisy, (getattr(plain, name) - clean.view1).flatten(1).any(1))
            noises.append(noise[noisy].flatten())
    # another generator than the CPU's, the same distribution; codes near 40 000 carry an error of 0.004
    noise = torch.cat(noises)
    assert noise.abs().max() <= 0.205
    assert noise.std() == pytest.approx(0.0959, abs=0.003) and abs(float(noise.mean())) < 0.002


@needs_gpu
def test_both_loaders_draw_the_same_noise_on_a_gpu(dali):
    sampler = sampler_of()
    for one, other in zip(take(6, sampler, CUDA, 0, "dali"), take(6, sampler, CUDA, 0, "torch")):
        same(one, other)


def test_a_draw_reads_no_image_and_gives_the_same_patches_however_often_it_is_cut():
    sampler, blind = sampler_of(), sampler_of()
    for volume in (*blind.labeled, *blind.unlabeled):
        volume.image = volume.image.to("meta")  # a shape without voxels
    draw, unseen = sampler.draw(4), blind.draw(4)
    assert (draw.names, draw.noise_seed) == (unseen.names, unseen.noise_seed)
    for sample, other in zip(draw.samples, unseen.samples):
        assert (sample.supervised, sample.views, sample.noisy) == (other.supervised, other.views, other.noisy)
    one, other = sampler.patches(draw), sampler.patches(draw)
    same(one, other)
    sampler.add_noise(one, draw)
    same(sampler.patches(draw), other)
