// How slices are cleaned on their way; apart from the arithmetic, as launchers take it too.
#pragma once

#include <cstdint>

namespace spss {

struct PostSettings {
  int opening, closing, far_distance, far_iterations;
};

// Widths past the slice's own do no more than that one, and an int holds the rest.
inline PostSettings post_settings(
    int64_t height, int64_t width, int64_t depth, int64_t opening, int64_t closing, int64_t far_distance,
    int64_t far_iterations) {
  const int64_t widest = 2 * (height > width ? height : width) + 1;
  const auto at_most = [](int64_t value, int64_t most) { return static_cast<int>(value < most ? value : most); };
  return {
      at_most(opening, widest), at_most(closing, widest), at_most(far_distance, depth),
      at_most(far_iterations, widest)};
}

}  // namespace spss
