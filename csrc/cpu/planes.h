// How the CPU loops read (B, C, *spatial) tensors: in tiles of neighbouring voxels, one row a channel.
//
// Any memory format is read in place as long as the spatial axes merge into one (contiguous, channels_last and
// channels_last_3d all do); what does not merge is copied once.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/multiarch.h"

// Nothing here depends on products being rounded before they are added, and exp and log gain a third from not doing so.
// GCC 11 forgets the command line over this pragma, and vectorises nothing more.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#pragma GCC optimize("fp-contract=fast")
#endif
#include "math/softmax.h"

// A loop whose iterations are independent but for the sums named.
#define SPSS_PRAGMA(text) _Pragma(#text)
#define SPSS_SIMD_SUM(...) SPSS_PRAGMA(omp simd reduction(+ : __VA_ARGS__))

namespace spss {

// Half types are computed in float.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType compute_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct Planes {
  at::Tensor tensor;  // keeps the memory alive where a copy was made
  int64_t batch, channels, voxels;
  int64_t batch_stride, channel_stride, voxel_stride;

  template <class T>
  T* at_voxel(int64_t b, int64_t voxel) const {
    return tensor.data_ptr<std::remove_const_t<T>>() + b * batch_stride + voxel * voxel_stride;
  }
};

inline bool spatial_axes_merge(const at::Tensor& t) {
  int64_t expected = -1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (expected >= 0 && t.stride(d) != expected) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

inline Planes planes(const at::Tensor& input) {
  const at::Tensor t = spatial_axes_merge(input) ? input : input.contiguous();
  Planes out{t, t.size(0), t.size(1), 1, t.stride(0), t.stride(1), 1};
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (out.voxels == 1) out.voxel_stride = t.stride(d);
    out.voxels *= t.size(d);
  }
  return out;
}

// Runs body(planes of `out`), through a copy where the spatial axes of `out` do not merge.
template <class Body>
inline void write_planes(const at::Tensor& out, Body body) {
  if (spatial_axes_merge(out)) {
    body(planes(out));
  } else {
    const at::Tensor merged = out.contiguous();
    body(planes(merged));
    out.copy_(merged);
  }
}

constexpr int64_t kTile = 256;  // voxels a tile: its rows stay in L1 for the usual few classes

// Channel c of voxel i is data[c * stride + i].
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Runs body(chunk, volume, begin, end) for every chunk of every volume. Chunks do not depend on the number of threads,
// so sums added up chunk by chunk do not either.
struct Chunks {
  int64_t voxels, size, per_volume, count;

  Chunks(int64_t batch, int64_t voxels_, int64_t size_)
      : voxels(voxels_), size(size_), per_volume((voxels_ + size_ - 1) / size_), count(batch * per_volume) {}

  template <class Body>
  void run(Body body) const {
    run_in_shares([&](int64_t, auto... place) { body(place...); });
  }

  // In shares of neighbouring chunks, each by one thread: body(share, chunk, ...). What a share adds up is its own, while
  // a thread's number may be any: at::parallel_for's threads are of this file's OpenMP, torch's of the one that torch
  // came with.
  int64_t shares() const { return std::min<int64_t>(at::get_num_threads(), count); }

  template <class Body>
  void run_in_shares(Body body) const {
    const int64_t all = shares();
    at::parallel_for(0, all, 1, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share)
        for (int64_t chunk = share * count / all; chunk < (share + 1) * count / all; ++chunk) {
          const int64_t begin = chunk % per_volume * size;
          body(share, chunk, chunk / per_volume, begin, std::min(begin + size, voxels));
        }
    });
  }
};

namespace {  // one copy a file: the loader's choice of instruction set does not work across files

template <class T, class scalar_t>
SPSS_MULTIARCH void gather_rows(const scalar_t* from, int64_t channel_stride, int64_t voxel_stride, int64_t channels,
                                int64_t count, T* rows) {
  if (channels == 2 && channel_stride == 1 && voxel_stride == 2) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<T>(from[2 * i]);
      rows[kTile + i] = static_cast<T>(from[2 * i + 1]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const scalar_t* row = from + c * channel_stride;
    if (voxel_stride == 1) {
      SPSS_SIMD
      for (int64_t i = 0; i < count; ++i) rows[c * kTile + i] = static_cast<T>(row[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) rows[c * kTile + i] = static_cast<T>(row[i * voxel_stride]);
    }
  }
}

template <bool add, class T, class scalar_t>
SPSS_MULTIARCH void scatter_rows(scalar_t* to, int64_t channel_stride, int64_t voxel_stride, int64_t channels,
                                 int64_t count, const T* rows) {
  const auto put = [](scalar_t& value, T row) {
    if constexpr (add) value += row;
    else value = static_cast<scalar_t>(row);
  };
  if (channels == 2 && channel_stride == 1 && voxel_stride == 2) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      put(to[2 * i], rows[i]);
      put(to[2 * i + 1], rows[kTile + i]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    scalar_t* row = to + c * channel_stride;
    if (voxel_stride == 1) {
      SPSS_SIMD
      for (int64_t i = 0; i < count; ++i) put(row[i], rows[c * kTile + i]);
    } else {
      for (int64_t i = 0; i < count; ++i) put(row[i * voxel_stride], rows[c * kTile + i]);
    }
  }
}

// `count` voxels from `begin` on, converted to T; read in place where they are rows of T already.
template <class T, class scalar_t>
Rows<T> read_rows(const Planes& p, int64_t b, int64_t begin, int64_t count, T* scratch) {
  const scalar_t* from = p.at_voxel<const scalar_t>(b, begin);
  if constexpr (std::is_same_v<T, scalar_t>)
    if (p.voxel_stride == 1) return {from, p.channel_stride};
  gather_rows(from, p.channel_stride, p.voxel_stride, p.channels, count, scratch);
  return {scratch, kTile};
}

// p = softmax of `in` over channels; log-sum-exp is top + log(sum). `p` has rows kTile apart.
template <class T>
SPSS_MULTIARCH void softmax_rows(Rows<T> in, int64_t channels, int64_t count, T* p, T* top, T* sum) {
  if (channels == 2) {
    const T *a = in.data, *b = in.data + in.stride;
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) softmax_of_two(a[i], b[i], p[i], p[kTile + i], top[i], sum[i]);
    return;
  }
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) top[i] = in.data[i], sum[i] = 0;
  for (int64_t c = 1; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const T x = in.data[c * in.stride + i];
      top[i] = top[i] > x || top[i] != top[i] ? top[i] : x;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const T e = fast_exp(in.data[c * in.stride + i] - top[i]);
      p[c * kTile + i] = e;
      sum[i] += e;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) p[c * kTile + i] /= sum[i];
  }
}

}  // namespace
}  // namespace spss
