"""A V-Net whose answer is known: its weights let the image through and compare it with thresholds."""

from pathlib import Path

import torch
from torch import Tensor, nn

from spss_fast.config import to_dict
from spss_fast.nets.vnet import VNet
from spss_fast.settings import Config


def thresholding_weights(*levels: float, filters: int = 2, steepness: float = 8.0) -> dict[str, Tensor]:
    """A state dict that calls a voxel class c where its z-scored intensity lies between ``levels[c - 1]`` (of at least
    0: the first ReLU takes away the rest) and ``levels[c]``."""
    network = VNet(classes=len(levels) + 1, filters=filters)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                module.weight.zero_()
                module.bias.zero_()
        for block in (network.block_one, network.block_nine):
            block.conv[0].weight[0, 0, 1, 1, 1] = 1
        # class c gains on class c - 1 what the intensity exceeds its level by
        for c, level in enumerate(levels, 1):
            network.out_conv.weight[c, 0] = steepness * c
            network.out_conv.bias[c] = network.out_conv.bias[c - 1] - steepness * level
    return network.state_dict()


def write_run(folder: Path, config: Config, weights: dict[str, Tensor], iteration: int | None = None) -> Path:
    """The folder of a run that ended with ``weights``, or stopped with them, as far as inference reads it."""
    (folder / "checkpoints").mkdir(parents=True)
    done = config.training.iterations if iteration is None else iteration
    content = {"student": weights, "config": to_dict(config), "iteration": done}
    torch.save(content, folder / "checkpoints" / "last.pt")
    return folder
