// warp and warp_backward on the CPU: rows (cpu/warp_rows.h) or volumes in parallel.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <string_view>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/warp_rows.h"

namespace spss {
namespace {

// Calls `run` with the compile-time choices of one call: padding, mode, dtype, index type, dimensions.
template <typename Run>
void choose(const Tensor& image, std::string_view mode, std::string_view padding, const Run& run) {
  int64_t extent = 0;
  for (int64_t axis = 2; axis < image.dim(); ++axis)
    extent += std::max<int64_t>(image.size(axis) - 1, 0) * image.stride(axis);
  const bool wide = extent > std::numeric_limits<int32_t>::max();
  const auto dimensions = [&](auto border, auto nearest, auto zero, auto index) {
    if (image.dim() == 4)
      run(border, nearest, zero, index, std::integral_constant<int, 2>());
    else
      run(border, nearest, zero, index, std::integral_constant<int, 3>());
  };
  const auto dtype = [&](auto border, auto nearest) {
    if (image.scalar_type() == at::kDouble)
      dimensions(border, nearest, double(), int64_t());  // as wide as its indices either way
    else
      wide ? dimensions(border, nearest, float(), int64_t()) : dimensions(border, nearest, float(), int32_t());
  };
  const auto modes = [&](auto border) {
    mode == "nearest" ? dtype(border, std::true_type()) : dtype(border, std::false_type());
  };
  padding == "border" ? modes(std::true_type()) : modes(std::false_type());
}

// bf16 and fp16 are widened first: the scattered reads then convert nothing.
Tensor widened(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble || tensor.scalar_type() == at::kFloat ? tensor : tensor.to(at::kFloat);
}

constexpr int64_t kGrain = 4096;  // voxels below which a thread is not worth waking

}  // namespace

Tensor warp(const Tensor& image, const Tensor& displacement, std::string_view mode, std::string_view padding) {
  check_warp(image, displacement, mode, padding);
  const Tensor source = widened(image);
  Tensor out = with_huge_pages(at::empty(image.sizes(), source.options()));
  if (out.numel() == 0) return out.to(image.scalar_type());
  choose(source, mode, padding, [&](auto border, auto nearest, auto zero, auto index, auto dimensions) {
    using T = decltype(zero);
    constexpr int nd = decltype(dimensions)::value;
    const Grid<nd> grid(source, displacement);
    const T* values = source.const_data_ptr<T>();
    const T* shifts = displacement.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    const int64_t grain = std::max<int64_t>(kGrain / grid.row_length, 1);
    at::parallel_for(0, image.size(0) * grid.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / grid.rows, r = i % grid.rows;
        const Row<T, decltype(index), nd> row(grid, shifts + b * displacement.stride(0), r);
        forward_row<border.value, nearest.value>(
            row, values + b * source.stride(0), grid.image_channel,
            result + b * grid.channels * grid.voxels + r * grid.row_length, grid.voxels, grid.channels);
      }
    });
  });
  return out.to(image.scalar_type());
}

std::tuple<Tensor, Tensor> warp_backward(
    const Tensor& grad, const Tensor& image, const Tensor& displacement, std::string_view mode,
    std::string_view padding, bool image_grad, bool displacement_grad) {
  check_warp_backward(grad, image, displacement, mode, padding);
  const Tensor source = widened(image), upstream = widened(grad).contiguous();
  Tensor for_image = image_grad ? with_huge_pages(at::empty(image.sizes(), source.options())).zero_()
                                : at::empty({0}, source.options());
  const bool slopes = displacement_grad && mode != "nearest" && grad.numel() > 0;
  Tensor for_displacement = displacement_grad ? at::empty(displacement.sizes(), displacement.options())
                                              : at::empty({0}, displacement.options());
  if (slopes)
    with_huge_pages(for_displacement);
  else
    for_displacement.zero_();
  if (grad.numel() == 0) return {for_image.to(image.scalar_type()), for_displacement};
  if (slopes) {
    choose(source, mode, padding, [&](auto border, auto, auto zero, auto index, auto dimensions) {
      using T = decltype(zero);
      constexpr int nd = decltype(dimensions)::value;
      const Grid<nd> grid(source, displacement);
      const T* values = source.const_data_ptr<T>();
      const T* shifts = displacement.const_data_ptr<T>();
      const T* grads = upstream.const_data_ptr<T>();
      T* result = for_displacement.mutable_data_ptr<T>();
      const int64_t grain = std::max<int64_t>(kGrain / grid.row_length, 1);
      at::parallel_for(0, image.size(0) * grid.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / grid.rows, r = i % grid.rows;
          const Row<T, decltype(index), nd> row(grid, shifts + b * displacement.stride(0), r);
          const T* from = values + b * source.stride(0);
          const T* up = grads + b * grid.channels * grid.voxels + r * grid.row_length;
          T* to = result + b * nd * grid.voxels + r * grid.row_length;
          displacement_row<border.value>(row, from, grid.image_channel, up, to, grid.voxels, grid.channels);
        }
      });
    });
  }
  if (image_grad) {
    choose(for_image, mode, padding, [&](auto border, auto nearest, auto zero, auto index, auto dimensions) {
      using T = decltype(zero);
      constexpr int nd = decltype(dimensions)::value;
      const Grid<nd> grid(for_image, displacement);
      const T* shifts = displacement.const_data_ptr<T>();
      const T* grads = upstream.const_data_ptr<T>();
      T* result = for_image.mutable_data_ptr<T>();
      // Rows scatter anywhere in their volume, so a volume is one thread's: no atomics, and the sums' order is fixed.
      at::parallel_for(0, image.size(0) * grid.channels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t r = 0; r < grid.rows; ++r) {
            const Row<T, decltype(index), nd> row(grid, shifts + i / grid.channels * displacement.stride(0), r);
            const T* up = grads + i * grid.voxels + r * grid.row_length;
            image_row<border.value, nearest.value>(row, up, result + i * grid.voxels);
          }
      });
    });
  }
  return {for_image.to(image.scalar_type()), for_displacement};
}

}  // namespace spss
