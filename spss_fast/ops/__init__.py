"""The public operators of the method: warping, uncertainty selection, contrastive loss, label propagation, losses.

Each runs the fastest backend there is for its tensors' device (see :mod:`spss_fast.ops.backends`);
``backend("reference")`` or the environment variable ``SPSS_FAST_BACKEND`` asks for another.
"""

from spss_fast.ops.activation import bias_leaky_relu
from spss_fast.ops.backends import backend
from spss_fast.ops.contrastive import contrastive_loss, select_prototypes
from spss_fast.ops.convolution import convolve, convolve_transposed
from spss_fast.ops.flow_head import flow_head
from spss_fast.ops.holes import fill_holes
from spss_fast.ops.losses import masked_ce_dice, weighted_ce_dice
from spss_fast.ops.norm import batch_norm_relu
from spss_fast.ops.propagate import propagate
from spss_fast.ops.uncertainty import accumulate_softmax, uncertainty_mask
from spss_fast.ops.upsampling import convolve_upsampled
from spss_fast.ops.warp import SpatialTransformer, integrate, warp

__all__ = [
    "SpatialTransformer", "accumulate_softmax", "backend", "batch_norm_relu", "bias_leaky_relu", "contrastive_loss",
    "convolve", "convolve_transposed", "convolve_upsampled", "fill_holes", "flow_head", "integrate", "masked_ce_dice",
    "propagate", "select_prototypes", "uncertainty_mask", "warp", "weighted_ce_dice",
]
