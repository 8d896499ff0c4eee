// How weights lie for matrix products, and what one step over them does: tiles of 16 outputs, one stream of memory each.
//
// A kind of weights says how rows and weights are held and how sums are kept. Where the CPU multiplies float16 four times
// as fast as bfloat16 pairs (AVX512-FP16: 380 against 87 GFLOP/s a core), bfloat16 weights and rows become float16, which
// keeps their 8 bits: a power of two brings every row and every output's weights into range. Sums over CHAIN pairs are
// float16, what follows is float32; that adds half of the error that rounding the result to bfloat16 does.
#pragma once

#include <algorithm>
#include <memory>

#include "vectors.h"

namespace {

// One step of a product: STEP inputs of 16 outputs, against rows of type Row.
template <typename Scalar>
struct Packed;

template <>
struct Packed<float> {
  using Row = float;
  static constexpr int64_t STEP = 1;
  static inline void multiply(Vec& acc, Vec weight, const float* x) { acc += weight * x[0]; }
  static inline Vec weights(const float* p) { return built<Vec>([=](int64_t at) { return keep<Register>(p + at); }); }
};

#if defined(__AVX512BF16__)
template <>
struct Packed<at::BFloat16> {
  using Row = at::BFloat16;
  static constexpr int64_t STEP = 2;
  static inline __m512i weights(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
  static inline void multiply(Vec& acc, __m512i weight, const at::BFloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#else
template <>
struct Packed<at::BFloat16> {
  using Row = float;  // widened once, not at every product
  static constexpr int64_t STEP = 2;
  struct Two {
    Vec even, odd;
  };
  static inline Two weights(const at::BFloat16* p) {
    const auto pairs = [=](int64_t at) { return keep<Bits>(p + 2 * at); };
    return {built<Vec>([=](int64_t at) { return (Register)(pairs(at) << 16); }),
            built<Vec>([=](int64_t at) { return (Register)(pairs(at) & 0xffff0000u); })};
  }
  static inline void multiply(Vec& acc, const Two& weight, const float* x) {
    acc += weight.even * x[0];
    acc += weight.odd * x[1];
  }
};
#endif

// Weights as they are: [N/16][K/STEP][16][STEP].
template <typename Scalar>
struct Kind : Packed<Scalar> {
  using Sums = Vec;
  static constexpr int64_t CHAIN = int64_t(1) << 40;  // inputs of one sum
  static inline Vec total(Sums sums) { return sums; }
  static inline int64_t tile(int64_t K) { return K * LANES; }  // values of a tile
  static inline Vec scaled(Vec sums, const Scalar*, float) { return sums; }

  static void fill(const Scalar* rows, int64_t count, int64_t K, Scalar* tile) {
    constexpr int64_t STEP = Packed<Scalar>::STEP;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < LANES; ++n)
        tile[(k / STEP * LANES + n) * STEP + k % STEP] = n < count ? rows[n * K + k] : Scalar(0);
  }
};

// `size` values as another type.
inline void convert(const float* from, float* to, int64_t size) { std::copy_n(from, size, to); }
template <typename Scalar>
inline void convert(const Scalar* from, float* to, int64_t size) {
  int64_t j = 0;
  if constexpr (std::is_same_v<Scalar, at::BFloat16>)
    for (; j + LANES <= size; j += LANES) put(to + j, wide(from + j));
  for (; j < size; ++j) to[j] = widen(from[j]);
}
inline void convert(const at::BFloat16* from, at::BFloat16* to, int64_t size) { std::copy_n(from, size, to); }

// The rows of a product, as its kind of weights wants them.
template <typename Scalar>
struct Operand {
  using Row = typename Kind<Scalar>::Row;
  Operand(const Scalar* x, int64_t T, int64_t K) : T(T), K(K) {
    if constexpr (std::is_same_v<Scalar, Row>) rows = x;
    else made.reset(new Row[T * K]), convert(x, made.get(), T * K), rows = made.get();
  }
  const Row* row(int64_t t) const { return rows + t * K; }
  float scale(int64_t) const { return 1.0f; }
  const int64_t T, K;

 private:
  const Row* rows;
  std::unique_ptr<Row[]> made;
};

#if defined(__AVX512FP16__)
// A power of two that brings values of this largest magnitude below 2^top and, but for zeros and what is not finite,
// to half of it at least; its inverse.
struct Power {
  Power(uint32_t largest, int top) {  // bits of a bfloat16 without its sign
    const int exponent = largest >> 7, by = exponent == 0 || exponent == 255 ? 0 : std::clamp(top + 126 - exponent, -126, 126);
    const uint32_t bits[2] = {uint32_t(127 + by) << 23, uint32_t(127 - by) << 23};
    std::memcpy(&factor, bits, 4), std::memcpy(&inverse, bits + 1, 4);
  }
  float factor, inverse;
};

inline void to_halves(at::BFloat16* to, Vec x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtxps_ph((__m512)x)); }

// The largest of the magnitudes, as a bfloat16's bits.
inline uint32_t magnitude(const at::BFloat16* x, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  const __m512i sign = _mm512_set1_epi16(0x7fff);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + i), sign));
  if (i < count) {
    const __mmask32 left = (1u << (count - i)) - 1;
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(left, x + i), sign));
  }
  const __m512i pairs = _mm512_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(most, 16));
  return _mm512_reduce_max_epu32(pairs);
}

// [N/16][K/2 · 16 pairs of float16, then 16 floats that undo the outputs' powers].
template <>
struct Kind<at::BFloat16> {
  using Value = at::BFloat16;  // where weights and rows lie in; the bits are float16
  using Row = Value;
  using Sums = __m512h;        // of the even and of the odd inputs
  static constexpr int64_t STEP = 2, CHAIN = 64, TAIL = 2 * LANES;
  static constexpr int ROW_TOP = 8, WEIGHT_TOP = 1;  // 32 products and their sum stay below 2^15
  static inline int64_t tile(int64_t K) { return K * LANES + TAIL; }
  static inline __m512i weights(const Value* p) { return _mm512_loadu_si512(p); }
  static inline void multiply(Sums& acc, __m512i weight, const Value* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    acc = _mm512_fmadd_ph((__m512h)weight, (__m512h)_mm512_set1_epi32(pair), acc);
  }
  static inline Vec total(Sums sums) {
    const __m512h both = _mm512_add_ph(sums, (__m512h)_mm512_rol_epi32((__m512i)sums, 16));
    return (Vec)_mm512_cvtxph_ps((__m256h)_mm512_cvtepi32_epi16((__m512i)both));
  }
  static inline Vec scaled(Vec sums, const Value* tail, float row) {
    return sums * (load(reinterpret_cast<const float*>(tail)) * row);
  }

  static void fill(const at::BFloat16* rows, int64_t count, int64_t K, Value* tile) {
    _Float16* halves = reinterpret_cast<_Float16*>(tile);
    float* tail = reinterpret_cast<float*>(tile + K * LANES);
    for (int64_t n = 0; n < LANES; ++n) {
      const Power power(n < count ? magnitude(rows + n * K, K) : 0, WEIGHT_TOP);
      tail[n] = power.inverse;
      for (int64_t k = 0; k < K; ++k)
        halves[(k / 2 * LANES + n) * 2 + k % 2] = n < count ? _Float16(widen(rows[n * K + k]) * power.factor) : _Float16(0);
    }
  }
};

template <>
struct Operand<at::BFloat16> {
  Operand(const at::BFloat16* x, int64_t T, int64_t K)
      : T(T), K(K), halves(new at::BFloat16[T * K]), scales(new float[T]) {
    for (int64_t t = 0; t < T; ++t) {
      const Power power(magnitude(x + t * K, K), Kind<at::BFloat16>::ROW_TOP);
      scales[t] = power.inverse;
      at::BFloat16* to = halves.get() + t * K;
      int64_t k = 0;
      for (; k + LANES <= K; k += LANES) to_halves(to + k, wide(x + t * K + k) * power.factor);
      for (; k < K; ++k) {
        const _Float16 half = _Float16(widen(x[t * K + k]) * power.factor);
        std::memcpy(to + k, &half, 2);
      }
    }
  }
  const at::BFloat16* row(int64_t t) const { return halves.get() + t * K; }
  float scale(int64_t t) const { return scales[t]; }
  const int64_t T, K;

 private:
  std::unique_ptr<at::BFloat16[]> halves;
  std::unique_ptr<float[]> scales;
};
#endif

}  // namespace
