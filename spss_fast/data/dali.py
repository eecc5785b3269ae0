"""The patches of a batch by NVIDIA DALI, on the CPU or on a GPU. Importing this needs nvidia-dali; ``loader`` does so.

Volumes go through the pipeline as (1, H, W, D): to DALI that is CDHW, one channel, and axes H, W, D of ours are its
depth, height and width.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali.data_node import DataNode

from spss_fast.data.loader import PREFETCH, ahead
from spss_fast.data.sampling import Batch, Draw, Geometry, Sampler

RESIDENT = 0.1  # share of a GPU's free memory that the images may take; where they need more they are streamed
LOWEST = float(np.finfo(np.float32).min)
BLANK = np.zeros((1, 1, 1, 1), np.uint8)  # in place of a label that there is not


def dali_batches(sampler: Sampler, device: torch.device, start: int) -> Generator[Batch, None, None]:
    """``loader.batches`` by DALI.

    On a GPU the images stay where they fit (:data:`RESIDENT`) and are cut there; where they do not, the CPU cuts them
    and the patches are copied and turned beside the step, on DALI's own stream. Labels are cut on the CPU.
    """
    gpu = device.type == "cuda"
    volumes = [*sampler.labeled, *sampler.unlabeled]
    resident = gpu and sum(v.image.nbytes for v in volumes) <= RESIDENT * torch.cuda.mem_get_info(device)[0]
    feed = Feed(sampler, start, device if resident else None)
    h, w, d = sampler.patch
    sides = max(h, w), max(h, w), d  # turned or not
    batch_size = sum(sampler.counts)
    pipeline = cut(
        feed, gpu, resident, padded=any(full < side for v in volumes for full, side in zip(v.image.shape, sides)),
        batch_size=batch_size, num_threads=min(batch_size, torch.get_num_threads()),
        device_id=torch.empty(0, device=device).get_device() if gpu else None, prefetch_queue_depth=PREFETCH,
    )
    pipeline.build()

    def batch(step: int) -> Batch:
        # on a GPU the outputs belong to torch's stream, and so does their memory until that is done with it
        outputs = pipeline.run(torch.cuda.current_stream(device) if gpu else None)
        image, view, annotation, reference = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        draw = feed.take(step)
        labeled = len(draw.labeled)
        # a copy: where DALI's memory is pinned, the step would copy from it without waiting, and DALI take it back
        annotation = annotation[:labeled, 0, :, :, 0].clone()
        clean = Batch(draw.names, image, view, view, annotation, draw.index,
                      reference[:labeled, 0] if draw.has_reference else None)
        return sampler.add_noise(clean, draw)

    # on a GPU nothing is left to do but to launch the noise
    yield from map(batch, count(start)) if gpu else ahead(batch, start)


class Feed:
    """What the pipeline asks for in its iteration i: the volumes of batch ``start`` + i, and how each is cut.

    Nothing is copied: DALI reads volumes where they lie, in the mapped files of the cache or on ``device``.
    """

    def __init__(self, sampler: Sampler, start: int, device: torch.device | None):
        self.sampler, self.start = sampler, start
        self._images = {
            id(volume): volume.image[None].numpy() if device is None else volume.image[None].to(device)
            for volume in (*sampler.labeled, *sampler.unlabeled)
        }
        self._draws: dict[int, Draw] = {}

    def draw(self, i: int) -> Draw:
        step = self.start + i
        if step not in self._draws:
            self._draws[step] = self.sampler.draw(step)
        return self._draws[step]

    def take(self, step: int) -> Draw:
        """The draw of a batch that has come out of the pipeline."""
        return self._draws.pop(step)

    def images(self, i: int) -> list[np.ndarray | torch.Tensor]:
        return [self._images[id(sample.volume)] for sample in self.draw(i).samples]

    def minima(self, i: int) -> np.ndarray:
        return np.array([self.sampler.minimum(sample.volume) for sample in self.draw(i).samples], np.float32)

    def annotations(self, i: int) -> list[np.ndarray]:
        draw = self.draw(i)
        return [s.volume.annotation[None, :, :, None].numpy() for s in draw.labeled] + [BLANK] * len(draw.unlabeled)

    def references(self, i: int) -> list[np.ndarray]:
        draw = self.draw(i)
        if not draw.has_reference:
            return [BLANK] * len(draw.samples)
        return [s.volume.reference[None].numpy() for s in draw.labeled] + [BLANK] * len(draw.unlabeled)

    def supervised(self, i: int) -> tuple[np.ndarray, ...]:
        return _arrays([sample.supervised for sample in self.draw(i).samples])

    def views(self, i: int) -> tuple[np.ndarray, ...]:
        return _arrays([sample.views for sample in self.draw(i).samples])


def _arrays(geometries: list[Geometry]) -> tuple[np.ndarray, ...]:
    """Start and size (B, 3), and the three steps (B,) of turning and mirroring."""
    start = np.array([geometry.start for geometry in geometries], np.int32)
    size = np.array([geometry.size for geometry in geometries], np.int32)
    turned, rows, columns = zip(*(geometry.steps for geometry in geometries))
    return start, size, np.array(turned, bool), np.array(rows, np.int32), np.array(columns, np.int32)


@pipeline_def(enable_conditionals=True)
def cut(feed: Feed, gpu: bool, resident: bool, padded: bool) -> tuple[DataNode, ...]:
    """Supervised view and the view of A1 and A2 (B, 1, h, w, d) float32, on the GPU if ``gpu``; annotation
    (B, 1, h, w, 1) and reference (B, 1, h, w, d) uint8, on the CPU and 0 where there is none. ``resident``: the images
    lie on the GPU. ``padded``: some volume is smaller than the patch."""
    image = fn.external_source(feed.images, device="gpu" if resident else "cpu", layout="CDHW", no_copy=True)
    annotation = fn.external_source(feed.annotations, layout="CDHW", no_copy=True)
    reference = fn.external_source(feed.references, layout="CDHW", no_copy=True)
    supervised = fn.external_source(feed.supervised, num_outputs=5)
    views = fn.external_source(feed.views, num_outputs=5)
    pair = placed(image, supervised, gpu, LOWEST), placed(image, views, gpu, LOWEST)
    if padded:
        # DALI pads all samples alike; the minimum of each volume then takes the place of the least number there is
        minimum = fn.external_source(feed.minima)
        pair = [math.max(patch, minimum.gpu() if gpu else minimum) for patch in pair]
    return *pair, placed(annotation, supervised, axes=2), placed(reference, supervised)


def placed(volume: DataNode, geometry: list[DataNode], gpu: bool = False, fill: float = 0, axes: int = 3) -> DataNode:
    """``Geometry.apply`` in DALI: the crop of the first ``axes``, copied to the GPU if ``gpu``, turned and mirrored."""
    start, size, turned, rows, columns = geometry
    patch = fn.slice(volume, start=start[:axes], shape=size[:axes], axes=[1, 2, 3][:axes],
                     out_of_bounds_policy="pad", fill_values=fill)
    if gpu:
        patch = patch.gpu()
    if turned:
        patch = fn.transpose(patch, perm=(0, 2, 1, 3), transpose_layout=False)
    return fn.flip(patch, depthwise=rows, vertical=columns, horizontal=0)
