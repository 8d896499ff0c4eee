// Both acceptance rules over a round, for laws that temperature and truncation alone shape.
#pragma once

#include <utility>

#include "chain.h"

namespace {

// One row as floats; whether it holds no NaN and no +infinity: a maximum passes over a NaN, and integers find both fast.
template <typename Scalar>
bool read_row(const Scalar* logit, int64_t V, std::vector<float>& value) {
  int32_t magnitude = 0, highest = 0;
  for (int64_t v = 0; v < V; ++v) {
    value[v] = widen(logit[v]);
    int32_t bits;
    std::memcpy(&bits, &value[v], sizeof bits);
    magnitude = std::max(magnitude, bits & 0x7fffffff);
    highest = std::max(highest, bits);  // of floats that are not negative their bits have the order
  }
  return magnitude <= 0x7f800000 && highest < 0x7f800000;
}

template <typename Scalar>
std::pair<int64_t, int64_t> judge(const Scalar* logits, int64_t V, int64_t plan, const int64_t* token, const float* q,
                                  const Knobs& knobs, const double* accept, double final_u, const int64_t* key) {
  std::vector<float> weight((V + LANES - 1) / LANES * LANES, -INFINITY);
  for (int64_t k = 0;; ++k, std::fill(weight.begin() + V, weight.end(), -INFINITY)) {
    if (!read_row(logits + k * V, V, weight)) return {k, V};
    if (knobs.temperature == 0) {
      const float peak = peak_of(weight.data(), V);
      if (peak == -INFINITY) return {k, V};
      const int64_t best = first_of(weight.data(), V, peak, V);
      if (k == plan || token[k] != best) return {k, best};
      continue;
    }
    double total = weights_of(V, float(knobs.temperature), weight);
    if (!(total > 0) || std::isinf(total)) return {k, V};  // a temperature that is next to nothing
    if (knobs.truncate(V)) total = truncate(weight.data(), V, knobs, total);
    if (key && key[k]) {  // the coupled rule: what the noise chooses stands, and drafts for as long as they agree
      const int64_t best = race(weight.data(), uint64_t(key[k]), 0, V).token;
      if (k == plan || token[k] != best) return {k, best};
      continue;
    }
    if (k == plan) return {k, draw_from(weight.data(), V, total, final_u)};
    const float* law = q + k * V;
    if (accept[k] * law[token[k]] < weight[token[k]] / total) continue;
    double mass = 0, left = 0;
    std::vector<float> excess(weight.size(), 0.0f);
    for (int64_t v = 0; v < V; ++v) {
      excess[v] = std::max(0.0f, float(weight[v] / total) - law[v]);
      mass += excess[v];
    }
    left = draw_from(excess.data(), V, mass, final_u);
    return {k, mass > 0 ? int64_t(left) : draw_from(weight.data(), V, total, final_u)};
  }
}

std::tuple<Tensor, Tensor> verdict(const Tensor& logits, at::IntArrayRef plan, const Tensor& token, const Tensor& q,
                                   const Tensor& knobs, const Tensor& accept, const Tensor& final_u,
                                   const std::optional<Tensor>& key) {
  const int64_t R = plan.size(), V = logits.size(1), K = token.size(1);
  Tensor accepted = at::empty({R}, token.options()), last = at::empty({R}, token.options());
  std::vector<int64_t> start(R, 0);
  for (int64_t r = 1; r < R; ++r) start[r] = start[r - 1] + plan[r - 1] + 1;
  const Tensor x = logits.contiguous(), t = token.contiguous(), law = q.contiguous(), own = knobs.contiguous(),
               u = accept.contiguous(), f = final_u.contiguous(), keys = key ? key->contiguous() : Tensor();
  const int threads = thread_count();
  const int64_t* drafted = t.const_data_ptr<int64_t>();
  const float* laws = law.const_data_ptr<float>();
  const Knobs* of = reinterpret_cast<const Knobs*>(own.const_data_ptr<double>());
  const double *accepts = u.const_data_ptr<double>(),
               *finals = f.const_data_ptr<double>();
  const int64_t *raced = key ? keys.const_data_ptr<int64_t>() : nullptr, width = key ? keys.size(1) : 0;
  int64_t *counts = accepted.data_ptr<int64_t>(), *lasts = last.data_ptr<int64_t>();
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Scalar* rows_x = x.const_data_ptr<Scalar>();
#pragma omp parallel for num_threads(threads) if (threads > 1 && R > 1)
    for (int64_t r = 0; r < R; ++r)
      std::tie(counts[r], lasts[r]) = judge(rows_x + start[r] * V, V, plan[r], drafted + r * K, laws + r * K * V, of[r],
                                            accepts + r * K, finals[r], raced ? raced + r * width : nullptr);
  };
  if (logits.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {accepted, last};
}

}  // namespace
