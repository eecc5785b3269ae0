// One slice of the label chain: bit-packed morphology and the largest 8-connected component, once for host and device.
//
// A slice is `height` rows of `words` 32-bit words, bit x % 32 of word x / 32 being voxel x; bits past `width` are 0.
// Every function is run by all members of a team (one thread on the host, a block on the device), each taking every
// team.size-th word, and ends synchronised. Only the rows of a band are visited: outside it all buffers are 0.
#pragma once

#include "math/common.h"
#include "math/propagate_settings.h"
#include "math/union_find.h"
#include "math/warp.h"

namespace spss {

using Word = uint32_t;
constexpr int kWordBits = 32;

struct Plane {
  int height, width, words;

  SPSS_HD Plane(int height_, int width_)
      : height(height_), width(width_), words((width_ + kWordBits - 1) / kWordBits) {}
  SPSS_HD int size() const { return height * words; }
  // Run starts of a row are at least two voxels apart, so half the width names them all, in raster order.
  SPSS_HD int names_a_row() const { return (width + 1) / 2; }
  SPSS_HD int names() const { return height * names_a_row(); }
  SPSS_HD Word valid(int word) const {
    const int left = width - word * kWordBits;
    return left >= kWordBits ? ~Word(0) : (Word(1) << left) - 1;
  }
};

struct Band {
  int begin, end;

  SPSS_HD Band grown(const Plane& plane, int reach) const {
    return {begin > reach ? begin - reach : 0, end + reach < plane.height ? end + reach : plane.height};
  }
};

#if defined(__CUDA_ARCH__)
SPSS_HD int lowest_bit(Word word) { return __ffs(static_cast<int>(word)) - 1; }
SPSS_HD int highest_bit(Word word) { return 31 - __clz(static_cast<int>(word)); }
#else
SPSS_HD int lowest_bit(Word word) { return __builtin_ctz(word); }
SPSS_HD int highest_bit(Word word) { return 31 - __builtin_clz(word); }
#endif

// Erosion is dilation with "and" for "or" and ones for zeros; what lies outside the slice counts as set for erosion and
// as unset for dilation, so neither sees the edge.
template <bool erode>
struct Morphology {
  static constexpr Word kOutside = erode ? ~Word(0) : Word(0);

  static SPSS_HD Word join(Word a, Word b) { return erode ? a & b : a | b; }

  static SPSS_HD Word at(const Word* bits, const Plane& plane, int y, int word) {
    if (y < 0 || y >= plane.height || word < 0 || word >= plane.words) return kOutside;
    return bits[y * plane.words + word] | (kOutside & ~plane.valid(word));
  }

  // The word whose first bit is `shift` voxels to the right of that of `word`; |shift| may exceed a word.
  static SPSS_HD Word shifted(const Word* bits, const Plane& plane, int y, int word, int shift) {
    const int start = word * kWordBits + shift;
    const int from = start >= 0 ? start / kWordBits : -((kWordBits - 1 - start) / kWordBits);
    const int by = start - from * kWordBits;
    const Word low = at(bits, plane, y, from);
    return by == 0 ? low : low >> by | at(bits, plane, y, from + 1) << (kWordBits - by);
  }

  static SPSS_HD Word along_row(const Word* bits, const Plane& plane, int y, int word, int reach) {
    const Word here = at(bits, plane, y, word);
    Word result = here;
    if (reach < kWordBits) {
      const Word left = at(bits, plane, y, word - 1), right = at(bits, plane, y, word + 1);
      for (int shift = 1; shift <= reach; ++shift)
        result = join(
            result, join(here >> shift | right << (kWordBits - shift), here << shift | left >> (kWordBits - shift)));
    } else {
      for (int shift = 1; shift <= reach; ++shift)
        result = join(result, join(shifted(bits, plane, y, word, shift), shifted(bits, plane, y, word, -shift)));
    }
    return result;
  }

  static SPSS_HD Word along_column(const Word* bits, const Plane& plane, int y, int word, int reach) {
    Word result = at(bits, plane, y, word);
    for (int shift = 1; shift <= reach; ++shift)
      result = join(result, join(at(bits, plane, y + shift, word), at(bits, plane, y - shift, word)));
    return result;
  }

  // By a cross of width 2 * reach + 1; from `in` to `out`.
  template <typename Team>
  static SPSS_HD void cross(
      const Team& team, const Plane& plane, const Band& band, const Word* in, Word* out, int reach) {
    for (int i = band.begin * plane.words + team.rank; i < band.end * plane.words; i += team.size) {
      const int y = i / plane.words, word = i % plane.words;
      Word result = 0;
      if (!erode || in[i] != 0)  // most of a slice is empty, and what is unset stays so under erosion
        result = join(along_row(in, plane, y, word, reach), along_column(in, plane, y, word, reach));
      out[i] = result & plane.valid(word);
    }
    team.sync();
  }

  // By a square of width 2 * reach + 1, in place; `spare` holds the half-way result.
  template <typename Team>
  static SPSS_HD void square(
      const Team& team, const Plane& plane, const Band& band, Word* bits, Word* spare, int reach) {
    for (int i = band.begin * plane.words + team.rank; i < band.end * plane.words; i += team.size)
      spare[i] = along_row(bits, plane, i / plane.words, i % plane.words, reach) & plane.valid(i % plane.words);
    team.sync();
    for (int i = band.begin * plane.words + team.rank; i < band.end * plane.words; i += team.size)
      bits[i] = along_column(spare, plane, i / plane.words, i % plane.words, reach) & plane.valid(i % plane.words);
    team.sync();
  }
};

// Bits of `word` at which a run of set voxels starts.
SPSS_HD Word run_starts(const Word* row, int word) {
  const Word before = word > 0 ? row[word - 1] >> (kWordBits - 1) : 0;
  return row[word] & ~(row[word] << 1 | before);
}

// First voxel of the run that holds the set voxel x.
SPSS_HD int run_start(const Word* row, int x) {
  int word = x / kWordBits;
  Word gaps = ~row[word] & ((Word(1) << x % kWordBits) - 1);
  while (gaps == 0 && word > 0) gaps = ~row[--word];
  return gaps == 0 ? 0 : word * kWordBits + highest_bit(gaps) + 1;
}

// One past the last voxel of the run that holds the set voxel x.
SPSS_HD int run_end(const Word* row, const Plane& plane, int x) {
  int word = x / kWordBits;
  Word gaps = ~row[word] & ~((Word(1) << x % kWordBits) - 1);
  while (gaps == 0 && word + 1 < plane.words) gaps = ~row[++word];
  return gaps == 0 ? plane.width : word * kWordBits + lowest_bit(gaps);
}

// Copies the largest 8-connected component of `in` to `out`; of equally large ones the first in raster order. `parent`
// and `count` have plane.names() entries, of which only those of run starts are used.
template <typename Team>
SPSS_HD void largest_component(
    const Team& team, const Plane& plane, const Band& band, const Word* in, Word* out, int* parent, int* count,
    unsigned long long* best) {
  const int begin = band.begin * plane.words, end = band.end * plane.words;
  const int names = plane.names_a_row();
  if (team.rank == 0) *best = 0;
  for (int i = begin + team.rank; i < end; i += team.size) {
    const int y = i / plane.words, word = i % plane.words;
    for (Word starts = run_starts(in + y * plane.words, word); starts != 0; starts &= starts - 1) {
      const int name = y * names + (word * kWordBits + lowest_bit(starts)) / 2;
      parent[name] = name;
      count[name] = 0;
    }
  }
  team.sync();
  for (int i = begin + plane.words + team.rank; i < end; i += team.size) {
    const int y = i / plane.words, word = i % plane.words;
    const Word* row = in + y * plane.words;
    const Word* above = row - plane.words;
    for (Word starts = run_starts(row, word); starts != 0; starts &= starts - 1) {
      const int x = word * kWordBits + lowest_bit(starts);
      const int name = y * names + x / 2;
      // Voxels first..last of the row above touch this run; every run among them is united with it.
      const int first = x > 0 ? x - 1 : 0, after = run_end(row, plane, x);
      const int last = after < plane.width ? after : plane.width - 1;
      for (int at = first; at <= last;) {
        const int in_word = at / kWordBits;
        const Word rest = above[in_word] & ~((Word(1) << at % kWordBits) - 1);
        if (rest == 0) {
          at = (in_word + 1) * kWordBits;
          continue;
        }
        at = in_word * kWordBits + lowest_bit(rest);
        if (at > last) break;
        unite(team, parent, name, (y - 1) * names + run_start(above, at) / 2);
        at = run_end(above, plane, at);
      }
    }
  }
  team.sync();
  for (int i = begin + team.rank; i < end; i += team.size) {
    const int y = i / plane.words, word = i % plane.words;
    const Word* row = in + y * plane.words;
    for (Word starts = run_starts(row, word); starts != 0; starts &= starts - 1) {
      const int x = word * kWordBits + lowest_bit(starts);
      team.add(count + find_root(parent, y * names + x / 2), run_end(row, plane, x) - x);
    }
  }
  team.sync();
  for (int i = begin + team.rank; i < end; i += team.size) {
    const int y = i / plane.words, word = i % plane.words;
    for (Word starts = run_starts(in + y * plane.words, word); starts != 0; starts &= starts - 1) {
      const int name = y * names + (word * kWordBits + lowest_bit(starts)) / 2;
      if (parent[name] == name)  // the larger first, then the lower name
        team.maximum(best, static_cast<unsigned long long>(count[name]) << 32 | static_cast<uint32_t>(~name));
    }
  }
  team.sync();
  const int chosen = static_cast<int>(~static_cast<uint32_t>(*best));
  for (int i = begin + team.rank; i < end; i += team.size) {
    const int y = i / plane.words, word = i % plane.words;
    const Word* row = in + y * plane.words;
    Word kept = 0;
    for (Word rest = row[word]; rest != 0;) {
      const int bit = lowest_bit(rest);
      const Word gaps = ~rest & ~((Word(1) << bit) - 1);
      const Word from = ~((Word(1) << bit) - 1);
      const Word run = gaps == 0 ? from : from & ((Word(1) << lowest_bit(gaps)) - 1);
      if (find_root(parent, y * names + run_start(row, word * kWordBits + bit) / 2) == chosen) kept |= run;
      rest &= ~run;
    }
    out[i] = kept;
  }
  team.sync();
}

// Buffers of one chain, plane.size() words or plane.names() numbers each; the slice is in `bits` before and after.
struct Workspace {
  Word *bits, *spare;
  int *parent, *count;
  unsigned long long* best;
};

SPSS_HD void exchange(Workspace& work) {
  Word* const bits = work.bits;
  work.bits = work.spare;
  work.spare = bits;
}

// METHOD, stage 2, step 2: the largest component, opened with a cross; far away repeatedly, then closed with a square.
// Outside the band both buffers must be 0 before.
template <typename Team>
SPSS_HD void post(
    const Team& team, const Plane& plane, Band band, Workspace& work, int distance, const PostSettings& settings) {
  largest_component(team, plane, band, work.bits, work.spare, work.parent, work.count, work.best);
  exchange(work);
  const bool far = distance > settings.far_distance;
  const int times = far ? settings.far_iterations : 1, opening = settings.opening / 2, closing = settings.closing / 2;
  for (int i = 0; i < 2 * times && opening > 0; ++i) {
    if (i < times) {
      Morphology<true>::cross(team, plane, band, work.bits, work.spare, opening);
    } else {
      band = band.grown(plane, opening);
      Morphology<false>::cross(team, plane, band, work.bits, work.spare, opening);
    }
    exchange(work);
  }
  if (far && closing > 0) {
    band = band.grown(plane, closing);
    Morphology<false>::square(team, plane, band, work.bits, work.spare, closing);
    Morphology<true>::square(team, plane, band, work.bits, work.spare, closing);
  }
}

// Whether the voxel at position (y, x) of the nearest warp is set.
template <typename T>
SPSS_HD Word nearest_bit(
    const Word* bits, const Plane& plane, const Axis<T, int>& rows, const Axis<T, int>& columns, T y, T x) {
  int inside = 1;
  const int row = nearest_offset<false>(y, rows, inside), column = nearest_offset<false>(x, columns, inside);
  return bits[row * plane.words + column / kWordBits] >> column % kWordBits & static_cast<Word>(inside);
}

}  // namespace spss
