// Searches in a row: the largest of it, and where they stand.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// The largest of x[count], which is padded with -inf to a multiple of 16; NaN is never the largest.
inline float peak_of(const float* x, int64_t count) {
  Vec peaks = Vec{} - INFINITY;
  for (int64_t i = 0; i < count; i += LANES) peaks = larger(load(x + i), peaks);
  return peak_of(peaks);
}

inline bool has(Vec x, float value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(value), _CMP_EQ_OQ) != 0;
#else
  Ints found{};
  each(x, [&](Register r, int64_t) { found |= r == value; });
  int32_t any = 0;
  for (int64_t i = 0; i < NATIVE; ++i) any |= found[i];
  return any != 0;
#endif
}

// Where `value` first stands in x[count]; `none` where it does not.
inline int64_t first_of(const float* x, int64_t count, float value, int64_t none, int64_t start = 0) {
  for (int64_t i = start; i < count; i += LANES) {
    if (i + LANES <= count && !has(load(x + i), value)) continue;
    for (int64_t lane = i; lane < std::min(i + LANES, count); ++lane)
      if (x[lane] == value) return lane;
  }
  return none;
}

inline uint32_t rank_of(float x) {  // orders floats as unsigned integers
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Indices of the `top` largest values, rising; among equals the lowest index wins. All of them for top 0.
void largest(const float* value, int64_t V, int64_t top, std::vector<int32_t>& chosen) {
  chosen.clear();
  if (top <= 0 || top >= V) {
    for (int64_t v = 0; v < V; ++v) chosen.push_back(v);
    return;
  }
  constexpr int BUCKETS = 4096, SHIFT = 20;
  std::vector<int32_t> count(BUCKETS, 0), border;
  for (int64_t v = 0; v < V; ++v) ++count[rank_of(value[v]) >> SHIFT];
  int64_t bucket = BUCKETS - 1, above = 0;
  while (above + count[bucket] < top) above += count[bucket--];
  for (int64_t v = 0; v < V; ++v)
    if (int64_t(rank_of(value[v]) >> SHIFT) == bucket) border.push_back(v);
  const auto before = [&](int32_t a, int32_t b) { return value[a] != value[b] ? value[a] > value[b] : a < b; };
  std::nth_element(border.begin(), border.begin() + (top - above - 1), border.end(), before);
  const int32_t last = border[top - above - 1];
  for (int64_t v = 0; v < V; ++v) {
    const int64_t mine = rank_of(value[v]) >> SHIFT;
    if (mine > bucket || (mine == bucket && !before(last, v))) chosen.push_back(v);
  }
}

}  // namespace
