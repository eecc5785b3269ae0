// 3 x 3 x 3 convolution of maps with as many channels out as in, by the minimal filtering F(2 x 2 x 2, 3 x 3 x 3) of
// Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016: a tile of eight outputs costs 64
// products a pair of channels in place of 216. And 3 x 3 of slices by F(2 x 2, 3 x 3): 16 for four outputs, not 36.
//
// Maps lie channels last, so that a vector holds kLanes channels of a voxel. Blocks of tiles that fit into the
// second-level cache go through data transform, a matrix product a point and inverse transform. The gradient of the
// input is the convolution with the filter reversed and its channels exchanged; that of the filter is made of the adjoint
// transforms.
//
// Transforms and sums are float32. Who includes this file says what maps hold and what is multiplied:
//   Element, load, store            a value of a map, and kLanes of them to a Vector and back
//   Factor, kGroup                  what is multiplied, and how many products one instruction adds up
//   store_group                     a Vector as Factors, or kGroup Vectors as kLanes groups with a Factor of each
//   Row, load_row, add_multiple     kLanes groups, and to a Vector the products of one group with each of them
//   kSums                           Vectors of sums that fit into registers
//   kAtOnce                         how many of four points along the third axis they belong to: of all four, products
//                                   leave two outputs in place of the sums, half as much to write and read again
//   SPSS_HOT, SPSS_HOT_INLINE       before functions compiled for certain instruction sets, or inlined into such
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/channel_sums.h"
#include "cpu/memory.h"

// Products need not be rounded before they are added.
#pragma GCC optimize("fp-contract=fast")

namespace spss {
namespace {

constexpr int kPart = 16;  // longest run of tiles that share their data transform along the last axis

// Functions are templates of P, the points along the first axis: 4, or 1 where there are but two axes, which are the
// second and the third then.
template <int P> constexpr int kPoints = 16 * P;       // of the transforms: 4 along each axis
template <int P> constexpr int kOut = P == 4 ? 2 : 1;  // outputs of a tile along the first axis
template <int P> constexpr int kTap = P == 4 ? 3 : 1;  // taps along the first axis
template <int P> constexpr int kTaps = 9 * kTap<P>;

// A transform along one axis, in place where there is room, and its adjoint.

template <class V>
SPSS_INLINE void transform_data(V& a, V& b, V& c, V& d) {
  const V old = b;
  a -= c, d = b - d, b += c, c -= old;
}

SPSS_INLINE void transform_filter(Vector& a, Vector& b, Vector& c, Vector& d) {  // three taps to four points
  const Vector even = 0.5f * (a + c), odd = 0.5f * b;
  d = c, b = even + odd, c = even - odd;
}

SPSS_INLINE void transform_filter_adjoint(Vector& a, Vector& b, Vector& c, Vector& d) {  // four points to three taps
  const Vector even = 0.5f * (b + c);
  b = 0.5f * (b - c), a += even, c = even + d;
}

SPSS_INLINE void transform_outputs(Vector& a, Vector& b, Vector& c, Vector& d) {  // four points to two outputs
  a += b + c, b = b - c - d;
}

SPSS_INLINE void transform_outputs_adjoint(Vector& a, Vector& b, Vector& c, Vector& d) {
  d = -b, c = a - b, b += a;
}

// Tiles of 2 x 2 x 2 outputs, or 2 x 2; a part is a run of them along the last axis.
struct Part {
  int64_t volume, i, j, k, count;  // of its first tile, along each axis; tiles
};

struct Tiles {
  int64_t batch, h, w, d;         // voxels
  int64_t rows, columns, length;  // tiles
  int64_t parts, most;            // along the last axis; tiles of the longest

  // Of `depth` voxels along the last axis, in parts of at most `longest` tiles.
  explicit Tiles(const at::Tensor& x, int64_t depth = 2, int64_t longest = kPart)
      : batch(x.size(0)), h(x.dim() == 5 ? x.size(2) : 1), w(x.size(-2)), d(x.size(-1)) {
    rows = (h + 1) / 2, columns = (w + 1) / 2, length = (d + depth - 1) / depth;
    parts = (length + longest - 1) / longest;
    most = (length + parts - 1) / parts;
  }

  int64_t count() const { return batch * rows * columns * parts; }

  Part operator[](int64_t i) const {
    const int64_t k = i % parts * most, row = i / parts;
    return {row / columns / rows, row / columns % rows, row % columns, k, std::min(most, length - k)};
  }

  // Where the voxels (i, j, :) of a volume begin, in voxels; -1 outside.
  int64_t line(int64_t volume, int64_t i, int64_t j) const {
    return i < 0 || i >= h || j < 0 || j >= w ? -1 : ((volume * h + i) * w + j) * d;
  }
};

// What a thread works on: a block of at most kTiles tiles, (points, tiles, channels), the points a little apart so that
// they do not fall into the same sets of a cache.
template <int C, int P> constexpr int64_t kTiles = P == 1 ? 96 : C < 32 ? 48 : 24;
constexpr int64_t kLine = 64 / sizeof(Factor);  // of a cache, in Factors
template <int C, int P> constexpr int64_t kStride = kTiles<C, P> * C + kLine;
template <int C> constexpr int64_t kMatrix = C * C + kLine;  // of a transformed filter, as far apart
constexpr int kLeft = kAtOnce == 4 ? 2 : 4;  // what products leave of the points along the third axis

at::MemoryFormat channels_last(const at::Tensor& t) {
  return t.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

at::Tensor in_order(const at::Tensor& t) { return t.contiguous(channels_last(t)); }

// Maps of x's dtype, channels last.
at::Tensor empty_maps(const at::Tensor& x, at::IntArrayRef sizes) {
  return with_huge_pages(at::empty(sizes, x.options().memory_format(channels_last(x))));
}

// Like a weight if that is contiguous or channels last, else contiguous: its taps are one axis then.
at::Tensor empty_weight(const at::Tensor& weight) {
  const at::MemoryFormat last = channels_last(weight);
  return at::empty_like(weight, weight.is_contiguous(last) && !weight.is_contiguous() ? last
                                                                                     : at::MemoryFormat::Contiguous);
}

// Aligned to the lines of a cache.
struct Free {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t(64))));
}

template <int C, int P>
struct Block {
  Buffer<Factor> data = buffer<Factor>(kPoints<P> * kStride<C, P>);
  Buffer<float> scratch = buffer<float>((2 * kPart + 4) * 4 * P * kLanes);
  std::unique_ptr<Element[]> outside;  // a line of zeros

  explicit Block(const Tiles& tiles) : outside(std::make_unique<Element[]>(tiles.d * C)) {}
};

// Tiles of whole groups.
inline int64_t in_groups(int64_t tiles) { return (tiles + kGroup - 1) / kGroup * kGroup; }

// The parts go to a block one after the other: body(part, where its first tile begins).
template <int C, class Body>
int64_t each_part(const Tiles& tiles, int64_t begin, int64_t end, Body body) {
  int64_t filled = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Part part = tiles[i];
    body(part, filled * C);
    filled += in_groups(part.count);
  }
  return filled;
}

// Where the lines begin that a column of tiles reads, (4, 4) of them or, of slices, 4.
template <int C, int P>
void lines_of(const Element* x, const Tiles& tiles, const Part& part, const Element* outside, const Element** lines) {
  for (int q = 0; q < 4 * P; ++q) {
    const int64_t line = tiles.line(part.volume, P == 4 ? 2 * part.i + q / 4 - 1 : 0, 2 * part.j + q % 4 - 1);
    lines[q] = line < 0 ? outside : x + line * C;
  }
}

// Transforms along the first two axes voxel by voxel, of which two tiles share two, then along the third. To (points,
// tiles, C), or to groups of G tiles, (points, tiles / G, C, G).
template <int C, int P, int G>
SPSS_HOT void data_of(
    const Element* x, const Tiles& tiles, const Part& part, const Element* outside, float* scratch, Factor* out) {
  constexpr int L = 4 * P;
  const Element* lines[L];
  lines_of<C, P>(x, tiles, part, outside, lines);
  for (int64_t c = 0; c < C; c += kLanes) {
    for (int64_t p = 0; p < 2 * part.count + 2; ++p) {
      const int64_t k = 2 * part.k + p - 1, place = k * C + c;
      float* to = scratch + p * L * kLanes;
      if (k < 0 || k >= tiles.d) {
        std::fill_n(to, L * kLanes, 0.f);
        continue;
      }
      Vector v[L];
      SPSS_UNROLL for (int q = 0; q < L; ++q) v[q] = load(lines[q] + place);
      // the lines that the next column of tiles will read, too short for the hardware to guess; past the end no harm is
      // done
      SPSS_UNROLL for (int q = 2; q < L; q += q % 4 == 3 ? 3 : 1)
        __builtin_prefetch(lines[q] + place + 2 * tiles.d * C);
      SPSS_UNROLL for (int i = 0; i < P; ++i) transform_data(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
      if constexpr (P == 4)
        SPSS_UNROLL for (int j = 0; j < 4; ++j) transform_data(v[j], v[4 + j], v[8 + j], v[12 + j]);
      SPSS_UNROLL for (int q = 0; q < L; ++q) store(to + q * kLanes, v[q]);
    }
    // of a tile that fills the last group
    std::fill_n(scratch + (2 * part.count + 2) * L * kLanes, 2 * (G - 1) * L * kLanes, 0.f);
    for (int64_t t = 0; t < part.count; t += G) {
      const float* from = scratch + t * 2 * L * kLanes;
      Factor* to = out + t * C + c * G;
      for (int q = 0; q < L; ++q, from += kLanes, to += 4 * kStride<C, P>) {
        Vector v[4][G];
        SPSS_UNROLL for (int g = 0; g < G; ++g) {
          SPSS_UNROLL for (int k = 0; k < 4; ++k) v[k][g] = load(from + (2 * g + k) * L * kLanes);
          transform_data(v[0][g], v[1][g], v[2][g], v[3][g]);
        }
        SPSS_UNROLL for (int k = 0; k < 4; ++k) store_group(to + k * kStride<C, P>, v[k]);
      }
    }
  }
}

// Vectors of outputs and their squares, summed up to be added to (2, `width`) sums of channels.
struct Moments {
  Vector first = {}, second = {};

  SPSS_INLINE void add(const Vector& v) { first += v, second += v * v; }

  SPSS_INLINE void add_to(float* moments, int64_t width) const {
    store(moments, load(moments) + first), store(moments + width, load(moments + width) + second);
  }
};

// `moments`, unless null, are those of (2, C) channels so far.
template <int C, int P>
SPSS_HOT void outputs_of(const float* sums, const Tiles& tiles, const Part& part, Element* y, float* moments) {
  for (int64_t t = 0; t < part.count; ++t) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const float* from = sums + t * C + c;
      Vector planes[P][4];  // points along the first axis; outputs along the second and third
      SPSS_UNROLL for (int i = 0; i < P; ++i) {
        Vector v[4][kLeft];
        SPSS_UNROLL for (int j = 0; j < 4; ++j) {
          SPSS_UNROLL for (int k = 0; k < kLeft; ++k)
            v[j][k] = load(from + ((4 * i + j) * kLeft + k) * kStride<C, P>);
          if constexpr (kLeft == 4) transform_outputs(v[j][0], v[j][1], v[j][2], v[j][3]);
        }
        SPSS_UNROLL for (int k = 0; k < 2; ++k) {
          transform_outputs(v[0][k], v[1][k], v[2][k], v[3][k]);
          planes[i][k] = v[0][k], planes[i][2 + k] = v[1][k];
        }
      }
      Moments of_tile;
      SPSS_UNROLL for (int q = 0; q < 4; ++q) {
        if constexpr (P == 4) transform_outputs(planes[0][q], planes[1][q], planes[2][q], planes[3][q]);
        const int64_t k = 2 * (part.k + t) + q % 2;
        SPSS_UNROLL for (int i = 0; i < kOut<P>; ++i) {
          const int64_t line = tiles.line(part.volume, 2 * part.i + i, 2 * part.j + q / 2);
          if (line < 0 || k >= tiles.d) continue;
          store(y + (line + k) * C + c, planes[i][q]);
          if (moments != nullptr) of_tile.add(planes[i][q]);
        }
      }
      if (moments != nullptr) of_tile.add_to(moments + c, C);
    }
  }
}

// To groups of tiles, as data_of.
template <int C, int P>
SPSS_HOT void outputs_adjoint(
    const Element* grad, const Tiles& tiles, const Part& part, const Element* outside, Factor* out) {
  constexpr int L = 4 * P, kGiven = 2 * kOut<P>;
  const Element* lines[kGiven];
  for (int q = 0; q < kGiven; ++q) {
    const int64_t line = tiles.line(part.volume, 2 * part.i + q / 2, 2 * part.j + q % 2);
    lines[q] = line < 0 ? outside : grad + line * C;
  }
  for (int64_t t = 0; t < part.count; t += kGroup) {
    for (int64_t c = 0; c < C; c += kLanes) {
      float along[2 * kGroup][L * kLanes];
      for (int p = 0; p < 2 * kGroup; ++p) {
        const int64_t k = 2 * (part.k + t) + p;
        if (k >= tiles.d || t + p / 2 >= part.count) {
          std::fill_n(along[p], L * kLanes, 0.f);
          continue;
        }
        Vector v[L];
        SPSS_UNROLL for (int q = 0; q < kGiven; ++q) v[4 * (q / 2) + q % 2] = load(lines[q] + k * C + c);
        SPSS_UNROLL for (int i = 0; i < kOut<P>; ++i)
          transform_outputs_adjoint(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
        if constexpr (P == 4)
          SPSS_UNROLL for (int j = 0; j < 4; ++j) transform_outputs_adjoint(v[j], v[4 + j], v[8 + j], v[12 + j]);
        SPSS_UNROLL for (int q = 0; q < L; ++q) store(along[p] + q * kLanes, v[q]);
      }
      Factor* to = out + t * C + c * kGroup;
      for (int q = 0; q < L; ++q, to += 4 * kStride<C, P>) {
        Vector v[4][kGroup];
        SPSS_UNROLL for (int g = 0; g < kGroup; ++g) {
          v[0][g] = load(along[2 * g] + q * kLanes), v[1][g] = load(along[2 * g + 1] + q * kLanes);
          transform_outputs_adjoint(v[0][g], v[1][g], v[2][g], v[3][g]);
        }
        SPSS_UNROLL for (int k = 0; k < 4; ++k) store_group(to + k * kStride<C, P>, v[k]);
      }
    }
  }
}

// A float32 weight (O, I, *taps) where it lies, (inputs, taps, outputs); `reversed`, as the gradient of the input has it,
// with the outputs for inputs and the taps from the last to the first.
struct Taps {
  at::Tensor flat;
  float* first;
  int64_t input, tap, output;  // how far apart they are

  explicit Taps(const at::Tensor& weight, bool reversed = false)
      : flat(weight.flatten(2)), first(static_cast<float*>(flat.data_ptr())), input(flat.stride(reversed ? 0 : 1)),
        tap(flat.stride(2)), output(flat.stride(reversed ? 1 : 0)) {
    if (reversed) first += (flat.size(2) - 1) * tap, tap = -tap;
  }

  // Of kLanes outputs from this one on.
  SPSS_INLINE Vector load(int64_t i, int64_t k, int64_t o) const {
    const float* from = first + i * input + k * tap + o * output;
    if (output == 1) return spss::load(from);
    Vector v;
    SPSS_UNROLL for (int lane = 0; lane < kLanes; ++lane) v[lane] = from[lane * output];
    return v;
  }

  SPSS_INLINE void store(int64_t i, int64_t k, int64_t o, const Vector& v) const {
    float* to = first + i * input + k * tap + o * output;
    if (output == 1) return spss::store(to, v);
    SPSS_UNROLL for (int lane = 0; lane < kLanes; ++lane) to[lane * output] = v[lane];
  }
};

// Of the inputs from `input` on, to (points, kGroup inputs of C, C, kGroup).
template <int C, int P>
SPSS_HOT void filter_of(const Taps& taps, int64_t input, Factor* out) {
  for (int64_t c = 0; c < C; c += kLanes) {
    Vector points[kPoints<P>][kGroup];
    for (int g = 0; g < kGroup; ++g) {
      Vector v[kPoints<P>];
      SPSS_UNROLL for (int i = 0; i < kTap<P>; ++i) SPSS_UNROLL for (int j = 0; j < 3; ++j) {
        Vector* line = v + 16 * i + 4 * j;
        SPSS_UNROLL for (int k = 0; k < 3; ++k) line[k] = taps.load(input + g, 9 * i + 3 * j + k, c);
        transform_filter(line[0], line[1], line[2], line[3]);
      }
      SPSS_UNROLL for (int i = 0; i < kTap<P>; ++i) SPSS_UNROLL for (int k = 0; k < 4; ++k) {
        Vector* line = v + 16 * i + k;
        transform_filter(line[0], line[4], line[8], line[12]);
      }
      if constexpr (P == 4)
        SPSS_UNROLL for (int q = 0; q < 16; ++q) transform_filter(v[q], v[16 + q], v[32 + q], v[48 + q]);
      SPSS_UNROLL for (int q = 0; q < kPoints<P>; ++q) points[q][g] = v[q];
    }
    for (int q = 0; q < kPoints<P>; ++q) store_group(out + q * kMatrix<C> + c * kGroup, points[q]);
  }
}

template <int C, int P>
SPSS_HOT void filter_adjoint(const float* points, const Taps& taps, int64_t input) {
  for (int64_t c = 0; c < C; c += kLanes) {
    Vector v[kPoints<P>];
    for (int q = 0; q < kPoints<P>; ++q) v[q] = load(points + q * kMatrix<C> + c);
    if constexpr (P == 4)
      SPSS_UNROLL for (int q = 0; q < 16; ++q) transform_filter_adjoint(v[q], v[16 + q], v[32 + q], v[48 + q]);
    SPSS_UNROLL for (int i = 0; i < kTap<P>; ++i) SPSS_UNROLL for (int k = 0; k < 4; ++k) {
      Vector* line = v + 16 * i + k;
      transform_filter_adjoint(line[0], line[4], line[8], line[12]);
    }
    SPSS_UNROLL for (int i = 0; i < kTap<P>; ++i) SPSS_UNROLL for (int j = 0; j < 3; ++j) {
      Vector* line = v + 16 * i + 4 * j;
      transform_filter_adjoint(line[0], line[1], line[2], line[3]);
      SPSS_UNROLL for (int k = 0; k < 3; ++k) taps.store(input, 9 * i + 3 * j + k, c, line[k]);
    }
  }
}

// R rows of (tiles, C) by (C / kGroup, C, kGroup), of its columns N vectors, at kAtOnce points; all of it in registers.
template <int C, int P, int R, int N>
SPSS_HOT_INLINE void product(const Factor* data, const Factor* filter, float* out) {
  Vector sums[R][N][kAtOnce] = {};
  for (int64_t c = 0; c < C; c += kGroup) {
    SPSS_UNROLL for (int k = 0; k < kAtOnce; ++k) {
      Row row[N];
      SPSS_UNROLL for (int n = 0; n < N; ++n) row[n] = load_row(filter + k * kMatrix<C> + c * C + n * kLanes * kGroup);
      SPSS_UNROLL for (int r = 0; r < R; ++r)
        SPSS_UNROLL for (int n = 0; n < N; ++n)
          add_multiple(sums[r][n][k], data + k * kStride<C, P> + r * C + c, row[n]);
    }
  }
  SPSS_UNROLL for (int r = 0; r < R; ++r)
    SPSS_UNROLL for (int n = 0; n < N; ++n) {
      Vector* v = sums[r][n];
      if constexpr (kAtOnce == 4) transform_outputs(v[0], v[1], v[2], v[3]);
      SPSS_UNROLL for (int k = 0; k < kLeft * kAtOnce / 4; ++k)
        store(out + k * kStride<C, P> + r * C + n * kLanes, v[k]);
    }
}

// Rows are done by a few: those beyond `tiles` are computed and not read.
template <int C, int P>
SPSS_HOT void products(const Factor* data, const Factor* filter, float* out, int64_t tiles) {
  constexpr int N = C == kLanes ? 1 : 2, R = kSums / kAtOnce / N;
  static_assert(kTiles<C, P> % R == 0);
  for (int q = 0; q < kPoints<P>; q += kAtOnce, data += kAtOnce * kStride<C, P>, filter += kAtOnce * kMatrix<C>) {
    for (int64_t n = 0; n < C; n += N * kLanes)
      for (int64_t t = 0; t < tiles; t += R) product<C, P, R, N>(data + t * C, filter + n * kGroup, out + t * C + n);
    out += kLeft * kAtOnce / 4 * kStride<C, P>;
  }
}

// R rows and N vectors of columns of the sum over tiles of data times gradient, both (tiles / kGroup, C, kGroup).
template <int C, int R, int N>
SPSS_HOT_INLINE void add_product(const Factor* data, const Factor* grad, int64_t tiles, float* sum) {
  Vector sums[R][N] = {};  // of the block, before they join the thread's: so fewer digits are lost
  for (int64_t t = 0; t < tiles; t += kGroup, data += C * kGroup, grad += C * kGroup) {
    Row row[N];
    SPSS_UNROLL for (int n = 0; n < N; ++n) row[n] = load_row(grad + n * kLanes * kGroup);
    SPSS_UNROLL for (int r = 0; r < R; ++r)
      SPSS_UNROLL for (int n = 0; n < N; ++n) add_multiple(sums[r][n], data + r * kGroup, row[n]);
  }
  SPSS_UNROLL for (int r = 0; r < R; ++r)
    SPSS_UNROLL for (int n = 0; n < N; ++n) {
      float* to = sum + r * C + n * kLanes;
      store(to, load(to) + sums[r][n]);
    }
}

template <int C, int P>
SPSS_HOT void add_products(const Factor* data, const Factor* grad, int64_t tiles, float* sum) {
  constexpr int N = C == kLanes ? 1 : 2, R = 8 / N;
  for (int q = 0; q < kPoints<P>; ++q, data += kStride<C, P>, grad += kStride<C, P>, sum += kMatrix<C>)
    for (int64_t n = 0; n < C; n += N * kLanes)
      for (int64_t r = 0; r < C; r += R)
        add_product<C, R, N>(data + r * kGroup, grad + n * kGroup, tiles, sum + r * C + n);
}

// Parts a block, fewer where there would be threads without one.
template <int C, int P>
int64_t parts_a_block(const Tiles& tiles) {
  const int64_t threads = at::get_num_threads();
  const int64_t fit = kTiles<C, P> / in_groups(tiles.most);
  return std::max<int64_t>(1, std::min(fit, (tiles.count() + threads - 1) / threads));
}

// (points, C / kGroup, C, kGroup).
template <int C, int P>
Buffer<Factor> transformed(const Taps& taps) {
  Buffer<Factor> out = buffer<Factor>(kPoints<P> * kMatrix<C>);
  at::parallel_for(0, C / kGroup, 8 / kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kGroup; c < end * kGroup; c += kGroup) filter_of<C, P>(taps, c, out.get() + c * C);
  });
  return out;
}

template <int C, int P>
at::Tensor filtered(const at::Tensor& x, const Factor* filter, ChannelSums* channel_sums = nullptr) {
  const at::Tensor y = empty_maps(x, x.sizes());
  const Tiles tiles(x);
  const int64_t count = tiles.count(), parts = parts_a_block<C, P>(tiles);
  const Element* from = static_cast<const Element*>(x.const_data_ptr());
  Element* to = static_cast<Element*>(y.mutable_data_ptr());
  at::parallel_for(0, (count + parts - 1) / parts, 1, [&](int64_t first, int64_t last) {
    Block<C, P> block(tiles);
    const auto sums = buffer<float>(kPoints<P> / 4 * kLeft * kStride<C, P>);
    SumsOfChunk moments(channel_sums, first);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * parts, end = std::min(begin + parts, count);
      const int64_t filled = each_part<C>(tiles, begin, end, [&](const Part& part, int64_t place) {
        data_of<C, P, 1>(from, tiles, part, block.outside.get(), block.scratch.get(), block.data.get() + place);
      });
      products<C, P>(block.data.get(), filter, sums.get(), filled);
      each_part<C>(tiles, begin, end, [&](const Part& part, int64_t place) {
        outputs_of<C, P>(sums.get() + place, tiles, part, to, moments.first());
      });
      moments.fold();
    }
  });
  return y;
}

// Every thread sums up its own tiles.
template <int C, int P>
at::Tensor filter_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  const Tiles tiles(x);
  const int64_t count = tiles.count(), parts = parts_a_block<C, P>(tiles), blocks = (count + parts - 1) / parts;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), blocks);
  const at::Tensor sums =
      at::zeros({std::max<int64_t>(threads, 1), kPoints<P> * kMatrix<C>}, x.options().dtype(at::kFloat));
  const Element* values = static_cast<const Element*>(x.const_data_ptr());
  const Element* upstream = static_cast<const Element*>(grad.const_data_ptr());
  float* of_threads = sums.data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    Block<C, P> block(tiles);
    const auto adjoint = buffer<Factor>(kPoints<P> * kStride<C, P>);
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t b = thread * blocks / threads; b < (thread + 1) * blocks / threads; ++b) {
        const int64_t begin = b * parts, end = std::min(begin + parts, count);
        const int64_t filled = each_part<C>(tiles, begin, end, [&](const Part& part, int64_t place) {
          const Element* outside = block.outside.get();
          data_of<C, P, kGroup>(values, tiles, part, outside, block.scratch.get(), block.data.get() + place);
          outputs_adjoint<C, P>(upstream, tiles, part, outside, adjoint.get() + place);
        });
        add_products<C, P>(block.data.get(), adjoint.get(), filled, of_threads + thread * kPoints<P> * kMatrix<C>);
      }
    }
  });
  const at::Tensor total = sums.sum(0), dweight = empty_weight(weight);
  const float* from = total.const_data_ptr<float>();
  const Taps taps(dweight);
  at::parallel_for(0, C, 8, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) filter_adjoint<C, P>(from + c * C, taps, c);
  });
  return dweight;
}

// body(the number of channels, of which `Fewest` are the fewest, and P), both as constants.
template <int Fewest, class Body>
auto with_constants(const at::Tensor& x, Body body) {
  const auto with_channels = [&](auto P) {
    switch (x.size(1)) {
      case 16: return body(std::integral_constant<int, 16>(), P);
      case 32: return body(std::integral_constant<int, 32>(), P);
      case 64: return body(std::integral_constant<int, 64>(), P);
      case 128: return body(std::integral_constant<int, 128>(), P);
      default: return body(std::integral_constant<int, Fewest>(), P);
    }
  };
  if (x.dim() == 5) return with_channels(std::integral_constant<int, 4>());
  return with_channels(std::integral_constant<int, 1>());
}

// x of Elements, the weight float32.
template <int Fewest>
at::Tensor convolved(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums = nullptr) {
  return with_constants<Fewest>(x, [&](auto C, auto P) {
    return filtered<C(), P()>(in_order(x), transformed<C(), P()>(Taps(weight)).get(), sums);
  });
}

template <int Fewest>
std::tuple<at::Tensor, at::Tensor> convolved_backward(
    const at::Tensor& grad_, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  const at::Tensor grad = in_order(grad_);
  at::Tensor dx = at::empty({0}, x.options()), dweight = at::empty({0}, weight.options());
  with_constants<Fewest>(x, [&](auto C, auto P) {
    if (x_grad) dx = filtered<C(), P()>(grad, transformed<C(), P()>(Taps(weight, true)).get());
    if (weight_grad) dweight = filter_gradient<C(), P()>(grad, in_order(x), weight);
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace spss
