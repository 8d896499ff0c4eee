// Random numbers of a round, and where a truncated law ends.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "chain.h"

namespace {

// out[r][i] in (0, 1): a function of seed r, counter r + offset i and stream i.
Tensor uniforms(at::IntArrayRef seeds, at::IntArrayRef counters, at::IntArrayRef offsets, at::IntArrayRef streams) {
  Tensor out = at::empty({int64_t(seeds.size()), int64_t(offsets.size())}, at::kDouble);
  double* to = out.data_ptr<double>();
  for (size_t r = 0; r < seeds.size(); ++r)
    for (size_t i = 0; i < offsets.size(); ++i) {
      const uint64_t bits = hashed(uint64_t(seeds[r]), uint64_t(counters[r] + offsets[i]), uint64_t(streams[i])) >> 12;
      *to++ = (double(bits) + 0.5) * 0x1p-52;
    }
  return out;
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

// Thresholds [B, 1] of top-p [B, 1]; 0 for rows without.
Tensor nucleus(const Tensor& probability, const Tensor& top_p) {
  const Tensor p = probability.contiguous(), mass = top_p.contiguous();
  const int64_t B = p.size(0), V = p.size(1);
  Tensor out = at::empty({B, 1}, p.options());
  const float* rows = p.const_data_ptr<float>();
  const double* wanted = mass.const_data_ptr<double>();
  float* to = out.data_ptr<float>();
  Team team;
  team.run([&](int64_t id) {
    std::vector<float> kept;
    for (int64_t b = id; b < B; b += team.size) to[b] = wanted[b] > 0 ? nucleus_of(rows + b * V, V, wanted[b], kept) : 0.0f;
  });
  return out;
}

}  // namespace
