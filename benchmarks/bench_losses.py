"""The segmentation losses, forward and backward, beside the same formulas in plain PyTorch, eager and compiled."""

import pytest
import torch

from spss_fast.ops import masked_ce_dice, weighted_ce_dice
from spss_fast.ops.losses import reference_masked_ce_dice, reference_weighted_ce_dice

BATCH, CLASSES, SIDES = 4, 2, (112, 112, 80)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROWTH = {f"1/{2**i}": (SIDES[0] // 2**i, *SIDES[1:]) for i in (3, 2, 1, 0)}
FUSED = {"masked_ce_dice": masked_ce_dice, "weighted_ce_dice": weighted_ce_dice}
PLAIN = {"masked_ce_dice": reference_masked_ce_dice, "weighted_ce_dice": reference_weighted_ce_dice}
PROVIDERS = {
    "spss_fast": FUSED, "eager": PLAIN, "compiled": {name: torch.compile(loss) for name, loss in PLAIN.items()},
}


def make(sides, loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, CLASSES, *sides, generator=generator).to(DEVICE).requires_grad_()
    target = torch.randint(0, CLASSES, (BATCH, *sides), generator=generator).to(DEVICE)
    weight = torch.rand(BATCH, *sides, generator=generator).to(DEVICE)
    return logits, target, weight < 0.1 if loss == "masked_ce_dice" else weight


def step(function, logits, *rest):
    return torch.autograd.grad(sum(function(logits, *rest)), logits)


def moved(logits, target, weight):
    """Bytes that must move: logits, labels and weights read forward and again backward, the gradient written."""
    return 2 * (logits.nbytes + target.nbytes + weight.nbytes) + logits.nbytes


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("loss", FUSED)
def test_losses(measure, loss, provider):
    inputs = make(SIDES, loss)
    measure(loss, provider, "forward + backward", lambda: step(PROVIDERS[provider][loss], *inputs),
            bytes_moved=moved(*inputs))


@pytest.mark.parametrize("size", GROWTH)
def test_losses_growth(measure, size):
    inputs = make(GROWTH[size], "masked_ce_dice")
    measure("masked_ce_dice growth", "spss_fast", size, lambda: step(masked_ce_dice, *inputs),
            bytes_moved=moved(*inputs), voxels=inputs[1].numel())
