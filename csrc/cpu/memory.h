// A large fresh output costs more in page faults than in arithmetic; asking for huge pages takes most of that away.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spss {

// Call before the first write. A hint: where it is not heeded nothing else changes.
inline at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t(1) << 21;
  const auto begin = (reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) + kPage - 1) & ~(kPage - 1);
  const auto end = (reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace spss
