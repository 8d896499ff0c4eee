// How a request's law is made of logits, and where it ends: temperature, top-k, top-p, min-p.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "ranks.h"

namespace {

struct Knobs {  // one row of float64 [R, 4]
  double temperature;  // 0 for the largest logit
  double top_k;        // at least the vocabulary for all tokens
  double top_p, min_p;  // 0 for all
  bool truncate(int64_t V) const { return top_k < V || top_p > 0 || min_p > 0; }
};

// exp((logit - peak) / temperature) of one row of floats, in place; returns the sum.
inline double weights_of(int64_t V, float temperature, std::vector<float>& weight) {
  const float peak = peak_of(weight.data(), V);
  double total = 0;
  for (int64_t v = 0; v < V; v += LANES) {
    put(&weight[v], weights_below(load(&weight[v]), peak, temperature));
    total += block_sum(&weight[v]);
  }
  return total;
}

// The last of the fewest largest values whose sum, from the largest down, reaches `mass`; 0 if all do not reach it.
float nucleus_of(const float* p, int64_t V, double mass, std::vector<float>& kept) {
  constexpr int BUCKETS = 4096, SHIFT = 20;
  double sums[BUCKETS] = {};
  for (int64_t v = 0; v < V; ++v) sums[rank_of(p[v]) >> SHIFT] += p[v];
  int bucket = BUCKETS - 1;
  // one bucket more than its rounded sum asks for: only the sum in order decides
  for (double sum = sums[bucket]; bucket > 0 && sum < mass * (1 + 1e-9); sum += sums[--bucket]) {}
  const uint32_t lowest = uint32_t(bucket) << SHIFT;
  kept.clear();
  for (int64_t v = 0; v < V; ++v)
    if (rank_of(p[v]) >= lowest) kept.push_back(p[v]);
  std::sort(kept.begin(), kept.end(), std::greater<float>());
  double seen = 0;
  for (const float value : kept)
    if ((seen += value) >= mass) return value;
  return 0.0f;
}

// Weights of softmax, the largest 1: those below where the knobs end the law become 0. Returns the sum of the rest.
// `weight` is zero-padded to a multiple of 16.
inline double truncate(float* weight, int64_t V, const Knobs& knobs, double total) {
  thread_local std::vector<int32_t> chosen;
  thread_local std::vector<float> kept;
  float least = float(knobs.min_p);
  if (knobs.top_k < V) {
    largest(weight, V, int64_t(knobs.top_k), chosen);
    float last = INFINITY;
    for (const int32_t v : chosen) last = std::min(last, weight[v]);
    kept.clear(), total = 0;
    for (int64_t v = 0; v < V; ++v)  // as likely as the last one is kept as well
      if (weight[v] >= last) kept.push_back(weight[v]), total += weight[v];
    least = std::max(least, last);
  } else if (knobs.top_p > 0) {
    kept.assign(weight, weight + V);
  }
  if (knobs.top_p > 0) {
    thread_local std::vector<float> sorted;
    least = std::max(least, nucleus_of(kept.data(), kept.size(), knobs.top_p * total, sorted));
  }
  const Vec limit = Vec{} + std::nextafter(least, -INFINITY);
  double left = 0;
  for (int64_t v = 0; v < V; v += LANES) {
    put(weight + v, above(load(weight + v), limit, load(weight + v), Vec{}));
    left += block_sum(weight + v);
  }
  return left;
}

}  // namespace
