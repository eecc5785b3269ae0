// torch.ops.spss_fast.*: the schemas and their CPU kernels. csrc/cuda/bindings.cpp registers the CUDA ones.
#include <torch/library.h>

#include "cpu/operators.h"

TORCH_LIBRARY(spss_fast, library) {
#define SPSS_FAST_OPERATOR(schema) library.def(schema, {at::Tag::pt2_compliant_tag});
#include "schemas.inc"
#undef SPSS_FAST_OPERATOR
}

TORCH_LIBRARY_IMPL(spss_fast, CPU, library) {
  library.impl("warp", &spss::warp);
  library.impl("warp_backward", &spss::warp_backward);
  library.impl("propagate", &spss::propagate);
  library.impl("fill_holes", &spss::fill_holes);
  library.impl("accumulate_softmax", &spss::accumulate_softmax);
  library.impl("uncertainty_mask", &spss::uncertainty_mask);
  library.impl("select_prototypes", &spss::select_prototypes);
  library.impl("contrastive_loss", &spss::contrastive_loss);
  library.impl("masked_ce_dice", &spss::masked_ce_dice);
  library.impl("masked_ce_dice_backward", &spss::masked_ce_dice_backward);
  library.impl("weighted_ce_dice", &spss::weighted_ce_dice);
  library.impl("weighted_ce_dice_backward", &spss::weighted_ce_dice_backward);
  library.impl("batch_norm_relu", &spss::batch_norm_relu);
  library.impl("batch_norm_relu_backward", &spss::batch_norm_relu_backward);
  library.impl("bias_leaky_relu", &spss::bias_leaky_relu);
  library.impl("bias_leaky_relu_backward", &spss::bias_leaky_relu_backward);
#if SPSS_HAS_FMA
  library.impl("convolve", &spss::convolve);
  library.impl("convolve_backward", &spss::convolve_backward);
  library.impl("convolve_transposed", &spss::convolve_transposed);
  library.impl("convolve_moments", &spss::convolve_moments);
  library.impl("convolve_upsampled", &spss::convolve_upsampled);
  library.impl("convolve_upsampled_backward", &spss::convolve_upsampled_backward);
  library.impl("flow_head", &spss::flow_head);
  library.impl("flow_head_backward", &spss::flow_head_backward);
#endif
}
