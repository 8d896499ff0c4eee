// Numbers that depend on a seed and a place alone, and races against them: the coupled rule. (common/rng.py)
#pragma once

#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

inline uint64_t mixed(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline uint64_t hashed(uint64_t seed, uint64_t counter, uint64_t stream) {
  return mixed(mixed(seed + stream * GOLDEN) + counter * GOLDEN);
}

inline Register logarithm(Register x) {  // of normal x > 0, relative error about 1e-7
  const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;
  const Register m = (Register)((Ints)x - (exponent << 23)) - 1.0f;  // from the root of a half to that of two, less 1
  const Register n = __builtin_convertvector(exponent, Register);
  Register p = Register{} + 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Register square = m * m;
  return m + (p * m * square - n * 2.12194440e-4f - square * 0.5f) + n * 0.693359375f;
}

// -log(1 - u) for u = the low 31 bits, the last one set, over 2^31.
inline Register exponential_of(Bits bits) {
  const Register u = __builtin_convertvector((Ints)((bits & 0x7fffffffu) | 1u), Register) * 0x1.fffffep-32f;
  const Register left = 1.0f - u;
  return (u - (1.0f - left)) / left - logarithm(left);  // what rounding took from `left` is put back
}

// Unit exponentials of tokens v..v+15 under a key: -log(1 - u) of 31 bits of murmur3's finaliser.
inline Vec exponentials_of(uint64_t key, int64_t v) {
  return built<Vec>([=](int64_t at) {
    Bits x;
    for (int64_t i = 0; i < NATIVE; ++i) x[i] = uint32_t(v + at + i);
    x = (x * 0x9E3779B1u) ^ uint32_t(key);
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu + uint32_t(key >> 32);
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return exponential_of(x ^ (x >> 16));
  });
}

// The winner of weight / exponential among tokens begin..end - 1, which hold whole vectors; `ratio` is written. -inf and
// no winner where nothing has weight.
struct Winner {
  float ratio = -INFINITY;
  int64_t token = -1;
};
inline Winner race(const float* weight, uint64_t key, int64_t begin, int64_t end) {
  Vec best = Vec{} - INFINITY, place = Vec{} - 1.0f;
  for (int64_t v = begin; v < end; v += LANES) {
    const Vec ratio = load(weight + v) / exponentials_of(key, v);
    place = above(ratio, best, Vec{} + float((v - begin) / LANES), place);
    best = larger(ratio, best);
  }
  Winner winner;
  for (int64_t i = 0; i < LANES; ++i) {
    const int64_t token = begin + int64_t(place[i]) * LANES + i;
    if (place[i] >= 0 && token < end && (best[i] > winner.ratio || (best[i] == winner.ratio && token < winner.token)))
      winner = {best[i], token};
  }
  return winner;
}

// Keys [R, width] of races at counters[r] + i in a stream; 0, which no key is, for the requests that have none.
Tensor race_keys(at::IntArrayRef seeds, at::IntArrayRef counters, at::IntArrayRef raced, int64_t width, int64_t stream) {
  Tensor out = at::zeros({int64_t(seeds.size()), width}, at::kLong);
  int64_t* to = out.data_ptr<int64_t>();
  for (const int64_t r : raced)
    for (int64_t i = 0; i < width; ++i) {
      const uint64_t key = hashed(uint64_t(seeds[r]), uint64_t(counters[r] + i), uint64_t(stream));
      to[r * width + i] = key ? int64_t(key) : 1;
    }
  return out;
}

// Unit exponentials [B, V] of the keys of B rows.
Tensor exponentials(const Tensor& key, int64_t V) {
  const Tensor keys = key.contiguous();
  const int64_t B = keys.numel();
  Tensor out = at::empty({B, V}, at::kFloat);
  const int64_t* of = keys.const_data_ptr<int64_t>();
  float* to = out.data_ptr<float>();
  const int threads = thread_count();
#pragma omp parallel for num_threads(threads) if (threads > 1 && B > 1)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t v = 0; v < V; v += LANES) put(to + b * V + v, exponentials_of(uint64_t(of[b]), v), std::min(LANES, V - v));
  return out;
}

}  // namespace
