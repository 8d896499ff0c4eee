// Random numbers of a round, and where a truncated law ends.
#pragma once

#include <vector>

#include "race.h"
#include "team.h"
#include "truncation.h"

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
