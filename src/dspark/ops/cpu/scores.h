// Scores of a few queries against sixteen keys, which are turned so that a lane is a key.
#pragma once

#include "packed.h"

namespace {

template <int S>
inline void exchange(Register* row) {  // one stage of a transpose: swaps lanes and rows whose index has bit S
  if constexpr (S < NATIVE) {
    Ints low, high;
    for (int lane = 0; lane < NATIVE; ++lane) {
      low[lane] = lane & S ? NATIVE + lane - S : lane;
      high[lane] = lane & S ? NATIVE + lane : lane + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < NATIVE; ++i)
      if (!(i & S)) {
        const Register a = row[i], b = row[i | S];
        row[i] = __builtin_shuffle(a, b, low);
        row[i | S] = __builtin_shuffle(a, b, high);
      }
  }
}

// Sixteen rows of `size` values side by side: columns[size/STEP][16][STEP], the layout of a tile of weights. In squares
// of as many rows as a register has lanes.
template <typename Scalar>
inline void transpose(const Scalar* const* rows, Scalar* columns, int64_t size) {
  constexpr int64_t WIDE = NATIVE * Packed<Scalar>::STEP;  // values in a register
  for (int64_t j = 0; j < size; j += WIDE)
    for (int64_t first = 0; first < LANES; first += NATIVE) {
      Register square[NATIVE];
#pragma GCC unroll 16
      for (int i = 0; i < NATIVE; ++i) std::memcpy(&square[i], rows[first + i] + j, sizeof square[i]);
      exchange<8>(square), exchange<4>(square), exchange<2>(square), exchange<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < NATIVE; ++i)
        std::memcpy(columns + j * LANES + (i * LANES + first) * Packed<Scalar>::STEP, &square[i], sizeof square[i]);
    }
}

// How scores are summed: by pairs as the weights' kind does, keys and queries as they are.
template <typename Kept>
struct Scoring : Packed<Kept> {
  using Sums = Vec;
  using Row = typename Packed<Kept>::Row;
  static inline float queries(Row*, int64_t) { return 1.0f; }
  static inline float keys(Kept*, int64_t) { return 1.0f; }
  static inline Vec total(Vec even, Vec odd) { return even + odd; }
};

#if defined(__AVX512FP16__)
// In float16, as products are (packed.h): a query row and the sixteen keys of a block are brought into range by a power
// of two each, which the float they return undoes.
template <>
struct Scoring<at::BFloat16> : Kind<at::BFloat16> {
  static inline float queries(at::BFloat16* row, int64_t size) {
    const Power power(magnitude(row, size), ROW_TOP);
    for (int64_t j = 0; j < size; j += LANES) to_halves(row + j, wide(row + j) * power.factor);
    return power.inverse;
  }

  // Exponents are lowered where they stand: a key 2^15 below the largest of its block becomes zero.
  static inline float keys(at::BFloat16* columns, int64_t size) {
    const uint32_t largest = magnitude(columns, size * LANES), top = std::max<uint32_t>(largest >> 7, 15);
    const __m512i sign = _mm512_set1_epi16(int16_t(0x8000)), lowered = _mm512_set1_epi16(int16_t((top - 15) << 7));
    for (int64_t j = 0; j < size * LANES; j += 2 * LANES) {
      const __m512i value = _mm512_loadu_si512(columns + j);
      const __m512i low = _mm512_slli_epi16(_mm512_subs_epu16(_mm512_andnot_si512(sign, value), lowered), 3);
      _mm512_storeu_si512(columns + j, _mm512_or_si512(low, _mm512_and_si512(sign, value)));
    }
    return top == 255 ? NAN : std::ldexp(1.0f, int(top) - 127);
  }

  static inline Vec total(Sums even, Sums odd) { return Kind<at::BFloat16>::total(_mm512_add_ph(even, odd)); }
};
#endif

constexpr int SCORED = std::min<int64_t>(8, HELD / 2);  // rows at once, for each has two sums

// score[N] rows against 16 keys, which lie as columns; `scale` is by row.
template <int N, typename Kept>
inline void score_rows(const typename Scoring<Kept>::Row* query, const Kept* columns, int64_t size, const float* scale,
                       float common, float* score, int64_t stride) {
  using P = Scoring<Kept>;
  typename P::Sums even[N] = {}, odd[N] = {};  // two sums, for one alone would wait for itself
  for (int64_t j = 0; j < size; j += 2 * P::STEP) {
    const auto keys = P::weights(columns + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) P::multiply(even[r], keys, query + r * size + j);
    const auto more = P::weights(columns + (j + P::STEP) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) P::multiply(odd[r], more, query + r * size + j + P::STEP);
  }
  for (int r = 0; r < N; ++r) put(score + r * stride, P::total(even[r], odd[r]) * (scale[r] * common));
}

}  // namespace
