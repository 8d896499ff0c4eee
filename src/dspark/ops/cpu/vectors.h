// Sixteen floats and what every kernel does with them.
//
// They are GCC's own vectors, so that one source serves AVX2, AVX-512 and NEON; bfloat16 uses the CPU's instructions where
// it has them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;
constexpr int64_t LANES = 16;

// Floats of one register; sums of 16 floats that stay in registers beside what is added to them.
#if defined(__AVX512F__)
constexpr int64_t NATIVE = 16, HELD = 24;
#elif defined(__AVX__)
constexpr int64_t NATIVE = 8, HELD = 5;
#elif defined(__aarch64__)
constexpr int64_t NATIVE = 4, HELD = 5;
#else
constexpr int64_t NATIVE = 4, HELD = 2;
#endif
constexpr int64_t ROWS = std::min<int64_t>(8, HELD);  // rows that share one pass over a weight tile
typedef float Register __attribute__((vector_size(4 * NATIVE)));
typedef int32_t Ints __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t Bits __attribute__((vector_size(4 * NATIVE)));
typedef uint16_t Shorts __attribute__((vector_size(2 * NATIVE)));

// A vector of more floats than a register has. (GCC keeps its own of that kind in memory: products ran 20 times slower.)
template <typename Half>
struct Pair {
  Half low, high;
  float operator[](int64_t i) const { return reinterpret_cast<const float*>(this)[i]; }
  float& operator[](int64_t i) { return reinterpret_cast<float*>(this)[i]; }
  Pair operator-() const { return {-low, -high}; }
  Pair& operator+=(Pair b) { return low += b.low, high += b.high, *this; }
  friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
  friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
  friend Pair operator/(Pair a, Pair b) { return {a.low / b.low, a.high / b.high}; }
  friend Pair operator+(Pair a, float b) { return {a.low + b, a.high + b}; }
  friend Pair operator-(Pair a, float b) { return {a.low - b, a.high - b}; }
  friend Pair operator*(Pair a, float b) { return {a.low * b, a.high * b}; }
  friend Pair operator/(Pair a, float b) { return {a.low / b, a.high / b}; }
};
using Vec = std::conditional_t<NATIVE == 16, Register, std::conditional_t<NATIVE == 8, Pair<Register>, Pair<Pair<Register>>>>;

inline float widen(at::BFloat16 x) { return static_cast<float>(x); }
inline float widen(at::Half x) { return static_cast<float>(x); }
inline float widen(float x) { return x; }

// A vector whose registers `made(place of the first float)` makes; `done(register, place)` for each of a vector's.
template <typename V, typename Made>
inline V built(const Made& made, int64_t at = 0) {
  if constexpr (std::is_same_v<V, Register>) return made(at);
  else return {built<decltype(V::low)>(made, at), built<decltype(V::low)>(made, at + int64_t(sizeof(V::low) / 4))};
}
template <typename Done>
inline void each(Register v, const Done& done, int64_t at = 0) { done(v, at); }
template <typename Half, typename Done>
inline void each(Pair<Half> v, const Done& done, int64_t at = 0) {
  each(v.low, done, at), each(v.high, done, at + int64_t(sizeof(Half) / 4));
}

// One register from memory, and to it. `keep` reads what several sums take in: GCC would rather read it for each.
template <typename R, typename Scalar>
inline R read(const Scalar* p) { R r; std::memcpy(&r, p, sizeof r); return r; }
template <typename R, typename Scalar>
inline R keep(const Scalar* p) {
  R r = read<R>(p);
#if defined(__AVX__) && !defined(__AVX512F__)
  asm("" : "+x"(r));
#endif
  return r;
}
template <typename R, typename Scalar>
inline void write(Scalar* p, R r) { std::memcpy(p, &r, sizeof r); }

inline Vec load(const float* p) { return built<Vec>([=](int64_t at) { return read<Register>(p + at); }); }
inline void put(float* p, Vec v) { each(v, [=](Register r, int64_t at) { write(p + at, r); }); }
inline void put(at::Half* p, Vec v) {
  for (int64_t i = 0; i < LANES; ++i) p[i] = static_cast<at::Half>(v[i]);
}

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
  return built<Vec>([=](int64_t at) { return (Register)(__builtin_convertvector(read<Shorts>(p + at), Bits) << 16); });
}
inline Bits nearest(Register x) {  // in the upper halves: the nearest bfloat16, to even between two; NaN stays one
  const Bits bits = (Bits)x, near = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? near : (bits | 0x400000u);
}
inline void put(at::BFloat16* p, Vec v) {
  each(v, [=](Register r, int64_t at) { write(p + at, __builtin_convertvector(nearest(r) >> 16, Shorts)); });
}
inline Register to_nearest(Register r) { return (Register)(nearest(r) & 0xffff0000u); }
template <typename Half>
inline Pair<Half> to_nearest(Pair<Half> v) { return {to_nearest(v.low), to_nearest(v.high)}; }
inline Vec rounded(const at::BFloat16*, Vec v) { return to_nearest(v); }
#endif

// The first `count` of 16 values.
template <typename Scalar>
inline void put(Scalar* p, Vec v, int64_t count) {
  if (count >= LANES) return put(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Scalar>(v[i]);
}

// Lane by lane: a where x > limit, else b.
inline Register above(Register x, Register limit, Register a, Register b) { return x > limit ? a : b; }
template <typename Half>
inline Pair<Half> above(Pair<Half> x, Pair<Half> limit, Pair<Half> a, Pair<Half> b) {
  return {above(x.low, limit.low, a.low, b.low), above(x.high, limit.high, a.high, b.high)};
}
inline Vec larger(Vec a, Vec b) { return above(a, b, a, b); }

inline Register exponential(Register x) {  // e^x for x <= 0, relative error about 1e-7
  const Register low = Register{} - 87.0f;
  x = x > low ? x : low;
  const Register n_real = x * 1.44269504089f;
  const Ints n = __builtin_convertvector(n_real - 0.5f, Ints);
  const Register nf = __builtin_convertvector(n, Register);
  const Register r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  Register p = Register{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Register)((n + 127) << 23);
}
template <typename Half>
inline Pair<Half> exponential(Pair<Half> x) { return {exponential(x.low), exponential(x.high)}; }

inline Vec weights_below(Vec x, float peak, float heat = 1.0f) {  // e^((x - peak) / heat), 0 for -infinity
  return above(x, Vec{} - INFINITY, exponential((x - peak) / heat), Vec{});
}

inline float block_sum(const float* x) {  // of 16 values, in an order that vectors like
  float half[LANES / 2];
  for (int64_t i = 0; i < LANES / 2; ++i) half[i] = x[i] + x[i + LANES / 2];
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}
inline float block_sum(Vec x) { return block_sum(reinterpret_cast<const float*>(&x)); }

inline float peak_of(Vec x) {
  float peak = x[0];
  for (int64_t lane = 1; lane < LANES; ++lane) peak = std::max(peak, x[lane]);
  return peak;
}

}  // namespace
