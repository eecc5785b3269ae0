// The schemas of torch.ops.spss_fast.*; csrc/cpu and csrc/cuda register the kernels.
#include <torch/library.h>

TORCH_LIBRARY(spss_fast, library) {
#define SPSS_FAST_OPERATOR(schema) library.def(schema, {at::Tag::pt2_compliant_tag});
#include "schemas.inc"
#undef SPSS_FAST_OPERATOR
}
