// Vectors of 16 floats and what every kernel does with them.
//
// They are GCC's own, so that one source serves AVX2, AVX-512 and NEON; bfloat16 uses the CPU's instructions where it has
// them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;
constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 8;  // rows that share one pass over a weight tile
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));

inline float widen(at::BFloat16 x) { return static_cast<float>(x); }
inline float widen(at::Half x) { return static_cast<float>(x); }
inline float widen(float x) { return x; }

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void put(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// 16 values of the weights' type as floats, and floats rounded to it.
inline Vec wide(const float* p) { return load(p); }
inline Vec rounded(const float*, Vec v) { return v; }
#if defined(__AVX512BF16__)
inline Vec wide(const at::BFloat16* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void put(at::BFloat16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
inline Vec rounded(const at::BFloat16*, Vec v) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
}
#else
inline Vec wide(const at::BFloat16* p) {
  Vec v;
  for (int64_t i = 0; i < LANES; ++i) v[i] = widen(p[i]);
  return v;
}
inline void put(at::BFloat16* p, Vec v) {
  for (int64_t i = 0; i < LANES; ++i) p[i] = static_cast<at::BFloat16>(v[i]);
}
inline Vec rounded(const at::BFloat16*, Vec v) {
  for (int64_t i = 0; i < LANES; ++i) v[i] = widen(static_cast<at::BFloat16>(v[i]));
  return v;
}
#endif

// The first `count` of 16 values.
template <typename Scalar>
inline void put(Scalar* p, Vec v, int64_t count) {
  if (count >= LANES) return put(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Scalar>(v[i]);
}

inline Vec exponential(Vec x) {  // e^x for x <= 0, relative error about 1e-7
  const Vec low = Vec{} - 87.0f;
  x = x > low ? x : low;
  const Vec n_real = x * 1.44269504089f;
  typedef int32_t Whole __attribute__((vector_size(64)));
  const Whole n = __builtin_convertvector(n_real - 0.5f, Whole);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Whole bits = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline float block_sum(const float* x) {  // of 16 values, in an order that vectors like
  float half[LANES / 2];
  for (int64_t i = 0; i < LANES / 2; ++i) half[i] = x[i] + x[i + LANES / 2];
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}

}  // namespace
