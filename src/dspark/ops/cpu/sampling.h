// Random numbers of a round, one slot drawn by them, and where a truncated law ends.
#pragma once

#include <tuple>
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

// One slot of a draft: tokens [R] and the laws [R, V] they were drawn from. A row that is no numbers gives the last token.
std::tuple<Tensor, Tensor> draw_slot(const Tensor& logits, const Tensor& knobs, const Tensor& uniform,
                                     const std::optional<Tensor>& key) {
  const Tensor x = logits.contiguous(), own = knobs.contiguous(), u = uniform.contiguous(),
               keys = key ? key->contiguous() : Tensor();
  const int64_t R = x.size(0), V = x.size(1), padded = (V + LANES - 1) / LANES * LANES;
  Tensor token = at::empty({R}, at::kLong), law = at::empty({R, V}, at::kFloat);
  const Knobs* of = reinterpret_cast<const Knobs*>(own.const_data_ptr<double>());
  const double* numbers = u.const_data_ptr<double>();
  const int64_t* raced = key ? keys.const_data_ptr<int64_t>() : nullptr;
  int64_t* tokens = token.data_ptr<int64_t>();
  float* laws = law.data_ptr<float>();
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Scalar* rows = x.const_data_ptr<Scalar>();
    Team team(R * V >= 32768);
    team.run([&](int64_t id) {
      std::vector<float> weight(padded);
      for (int64_t r = id; r < R; r += team.size) {
        for (int64_t v = 0; v < V; ++v) weight[v] = widen(rows[r * V + v]);
        std::fill(weight.begin() + V, weight.end(), -INFINITY);
        const Knobs& knob = of[r];
        float* to = laws + r * V;
        if (knob.temperature == 0) {
          tokens[r] = std::min(first_of(weight.data(), V, peak_of(weight.data(), V), V), V - 1);
          std::fill(to, to + V, 0.0f), to[tokens[r]] = 1.0f;
          continue;
        }
        double total = weights_of(V, float(knob.temperature), weight);
        if (knob.truncate(V)) total = truncate(weight.data(), V, knob, total);
        int64_t found = V - 1;
        if (total > 0)
          found = raced && raced[r] ? race(weight.data(), uint64_t(raced[r]), 0, V).token
                                    : draw_from(weight.data(), V, total, numbers[r]);
        tokens[r] = std::min(found, V - 1);
        const float share = float(1.0 / total);
        for (int64_t v = 0; v < V; ++v) to[v] = weight[v] * share;
      }
    });
  };
  if (x.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {token, law};
}

}  // namespace
