// The sequential head: blocks drawn left to right.
#pragma once

#include <omp.h>

#include <tuple>
#include <vector>

#include "products.h"
#include "race.h"
#include "ranks.h"
#include "team.h"
#include "truncation.h"

namespace {

inline float dot(const float* a, const float* b, int64_t size) {  // size is a multiple of 16, zero-padded
  Vec acc = Vec{};
  for (int64_t i = 0; i < size; i += LANES) acc += load(a + i) * load(b + i);
  return block_sum(acc);
}

// The first index whose cumulative weight reaches u of the whole and that has weight; `count` where there is none.
// `weight` is zero-padded to a multiple of 16.
inline int64_t draw_from(const float* weight, int64_t count, double total, double u) {
  const double aim = total * u;
  double seen = 0;
  int64_t last = count;
  for (int64_t base = 0; base < count; base += LANES) {
    const double block = block_sum(&weight[base]);
    if (seen + block < aim) {
      seen += block;
      if (block > 0) last = base;
      continue;
    }
    for (int64_t i = base; i < std::min(base + LANES, count); ++i) {
      if (!(weight[i] > 0)) continue;
      seen += weight[i], last = i;
      if (seen >= aim) return i;
    }
  }
  while (last < count && !(weight[last] > 0)) ++last;
  return last;
}

// One request's block, every slot among its `top` candidates.
template <typename Scalar>
void chain_of(const Scalar* base, const Scalar* w1, const Scalar* w2, int64_t anchor, int64_t K, int64_t V, int64_t rank, int64_t top,
               const Knobs& knobs, const double* uniform, const int64_t* key, const float* confidence_w, int64_t* token,
               float* q, float* confidence) {
  const int64_t padded = (rank + LANES - 1) / LANES * LANES;
  std::vector<float> wide(V), embedding(padded, 0.0f), row(padded, 0.0f), logit(V + LANES);
  std::vector<int32_t> chosen;
  int64_t previous = anchor;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t v = 0; v < V; ++v) wide[v] = widen(base[k * V + v]);
    largest(wide.data(), V, top, chosen);
    for (int64_t j = 0; j < rank; ++j) embedding[j] = widen(w1[previous * rank + j]);
    const int64_t count = chosen.size();
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < rank; ++j) row[j] = widen(w2[chosen[i] * rank + j]);
      logit[i] = wide[chosen[i]] + dot(row.data(), embedding.data(), padded);
    }
    for (int64_t i = count; i < count + LANES; ++i) logit[i] = -INFINITY;
    const float peak = peak_of(logit.data(), count);
    int64_t best = first_of(logit.data(), count, peak, count - 1);
    if (knobs.temperature == 0) {
      q[k * V + chosen[best]] = 1.0f;
    } else {
      double total = 0;
      for (int64_t i = 0; i < count; i += LANES) {
        put(&logit[i], weights_below(load(&logit[i]), peak, float(knobs.temperature)));
        total += block_sum(&logit[i]);
      }
      if (knobs.truncate(count)) total = truncate(logit.data(), count, knobs, total);
      if (key && key[k]) {
        float furthest = -INFINITY;
        for (int64_t i = 0; i < count; ++i) {
          const float ratio = logit[i] / exponentials_of(uint64_t(key[k]), chosen[i])[0];
          if (ratio > furthest) furthest = ratio, best = i;
        }
      } else {
        best = draw_from(logit.data(), count, total, uniform[k]);
      }
      const float share = float(1.0 / total);
      for (int64_t i = 0; i < count; ++i) q[k * V + chosen[i]] = logit[i] * share;
      if (best == count) best = count - 1;
    }
    token[k] = chosen[best];
    if (confidence) confidence[k] += dot(confidence_w, embedding.data(), padded);
    previous = token[k];
  }
}

// All requests' blocks over the whole vocabulary, slot by slot. The vocabulary is cut into PARTS, dealt to the threads: a
// thread's share of W2 stays in its own cache over the slots, and sums run within a part and then over parts, in order,
// so that no bit depends on the number of threads or requests. Every thread picks every token for itself.
template <typename Scalar>
struct WholeChain {
  static constexpr int64_t PARTS = 16;
  const Scalar *base, *w1, *packed;
  const int64_t* anchor;
  const Knobs* knobs;
  const double* uniform;
  const int64_t* key;  // of the races of requests that draw by one, else 0; null for none
  const float* confidence_w;
  int64_t R, K, V, rank;
  int64_t* token;
  float *q, *confidence;
  Team& team;
  int64_t apart = 1;  // distance of two requests' anchors
  int64_t stride = (V + LANES - 1) / LANES * LANES, padded = (rank + LANES - 1) / LANES * LANES;
  std::vector<float> logit = std::vector<float>(R * stride, -INFINITY), peak = std::vector<float>(R * PARTS);
  std::vector<double> total = std::vector<double>(R * PARTS);
  std::vector<Winner> winner = std::vector<Winner>(key ? R * PARTS : 0);

  int64_t tile_of(int64_t part) const { return (V + LANES - 1) / LANES * part / PARTS; }
  int64_t start_of(int64_t part) const { return std::min(V, tile_of(part) * LANES); }

  // Every thread of the team calls this with its number.
  void run(int64_t id) {
    const Share parts(PARTS, id, team.size);
    const auto draws = [&](int64_t r) { return knobs[r].temperature > 0; };
    const auto cuts = [&](int64_t r) { return draws(r) && knobs[r].truncate(V); };
    bool drawn = false, cut = false;
    for (int64_t r = 0; r < R; ++r) drawn |= draws(r), cut |= cuts(r);
    std::vector<int64_t> previous(R);
    for (int64_t r = 0; r < R; ++r) previous[r] = anchor[r * apart];
    std::vector<Scalar> embedding(R * rank);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t r = 0; r < R; ++r) std::copy_n(w1 + previous[r] * rank, rank, embedding.begin() + r * rank);
      const Operand<Scalar> operand(embedding.data(), R, rank);
      for (int64_t part = parts.begin; part < parts.end; ++part) score(part, k, operand);
      team.meet();
      for (int64_t r = 0; r < R; ++r)
        if (draws(r))
          for (int64_t part = parts.begin; part < parts.end; ++part) weigh(r, k, part);
      if (drawn) team.meet();
      for (int64_t r = id; r < R; r += team.size)
        if (cuts(r)) shorten(r, k);
      if (cut) team.meet();
      for (int64_t r = 0; r < R; ++r) {
        if (r % team.size == id) see(r, k, embedding.data() + r * rank);
        previous[r] = pick(r, k);
        if (r % team.size == id) token[r * K + k] = previous[r];
        if (draws(r)) write_law(r, k, start_of(parts.begin), start_of(parts.end));
        else if (r % team.size == id) q[(r * K + k) * V + previous[r]] = 1.0f;
      }
      team.meet();  // nobody overwrites what another still reads
    }
  }

  void score(int64_t part, int64_t k, const Operand<Scalar>& embedding) {
    const int64_t begin = start_of(part), end = start_of(part + 1);
    multiply(embedding, packed, tile_of(part), tile_of(part + 1), [&](int64_t r, int64_t v, Vec sums) {
      const Scalar* from = base + (r * K + k) * V + v;
      float* to = &logit[r * stride + v];
      if (v + LANES <= V) return put(to, wide(from) + sums);
      for (int64_t i = 0; v + i < V; ++i) to[i] = widen(from[i]) + sums[i];
    });
    for (int64_t r = 0; r < R; ++r) {
      if (end == V) std::fill(logit.begin() + r * stride + V, logit.begin() + (r + 1) * stride, -INFINITY);
      peak[r * PARTS + part] = end > begin ? peak_of(&logit[r * stride + begin], end - begin) : -INFINITY;
    }
  }

  float highest(int64_t r) const { return *std::max_element(&peak[r * PARTS], &peak[r * PARTS] + PARTS); }

  uint64_t key_of(int64_t r, int64_t k) const { return key ? uint64_t(key[r * K + k]) : 0; }

  void weigh(int64_t r, int64_t k, int64_t part) {  // logits become weights
    const float top = highest(r), heat = float(knobs[r].temperature);
    double sum = 0;
    for (int64_t v = start_of(part); v < start_of(part + 1); v += LANES) {
      float* here = &logit[r * stride + v];
      put(here, weights_below(load(here), top, heat));
      sum += block_sum(here);
    }
    total[r * PARTS + part] = sum;
    if (!knobs[r].truncate(V)) run_race(r, k, part);
  }

  void shorten(int64_t r, int64_t k) {  // a law ends where its request says
    float* row = &logit[r * stride];
    truncate(row, V, knobs[r], whole(r));
    for (int64_t part = 0; part < PARTS; ++part) {
      double sum = 0;
      for (int64_t v = start_of(part); v < start_of(part + 1); v += LANES) sum += block_sum(row + v);
      total[r * PARTS + part] = sum;
      run_race(r, k, part);
    }
  }

  void run_race(int64_t r, int64_t k, int64_t part) {
    if (const uint64_t own = key_of(r, k))
      winner[r * PARTS + part] = race(&logit[r * stride], own, start_of(part), start_of(part + 1));
  }

  int64_t pick(int64_t r, int64_t k) const {
    const float* row = &logit[r * stride];
    if (knobs[r].temperature == 0) {
      const float top = highest(r);
      for (int64_t part = 0; part < PARTS; ++part)
        if (peak[r * PARTS + part] == top) return std::min(first_of(row, start_of(part + 1), top, V, start_of(part)), V - 1);
      return V - 1;
    }
    if (key_of(r, k)) {
      Winner first;
      for (int64_t part = 0; part < PARTS; ++part)
        if (winner[r * PARTS + part].ratio > first.ratio) first = winner[r * PARTS + part];
      return first.token < 0 ? V - 1 : first.token;
    }
    double seen = 0;
    const double aim = whole(r) * uniform[r * K + k];
    for (int64_t part = 0; part < PARTS; ++part) {
      const double mass = total[r * PARTS + part];
      if (mass > 0 && (seen + mass >= aim || part == PARTS - 1)) {
        const int64_t start = start_of(part), count = start_of(part + 1) - start;
        return std::min(start + draw_from(row + start, count, mass, (aim - seen) / mass), V - 1);
      }
      seen += mass;
    }
    return last_with_weight(row);
  }

  // Rounding may leave the aim beyond the last part that has weight.
  int64_t last_with_weight(const float* row) const {
    for (int64_t v = V - 1; v > 0; --v)
      if (row[v] > 0) return v;
    return V - 1;
  }

  double whole(int64_t r) const {
    double sum = 0;
    for (int64_t part = 0; part < PARTS; ++part) sum += total[r * PARTS + part];
    return sum;
  }

  void see(int64_t r, int64_t k, const Scalar* embedding) {
    if (!confidence) return;
    std::vector<float> row(padded, 0.0f);
    for (int64_t j = 0; j < rank; ++j) row[j] = widen(embedding[j]);
    confidence[r * K + k] += dot(confidence_w, row.data(), padded);
  }

  void write_law(int64_t r, int64_t k, int64_t begin, int64_t end) {
    const float share = float(1.0 / whole(r));
    for (int64_t v = begin; v < end; ++v) q[(r * K + k) * V + v] = logit[r * stride + v] * share;
  }
};

std::tuple<Tensor, Tensor, Tensor> draft_chain(const Tensor& base, const Tensor& w1, const Tensor& w2,
                                               const Tensor& anchor, const Tensor& knobs, const Tensor& uniform,
                                               const std::optional<Tensor>& key, int64_t top, const Tensor& confidence_base, const Tensor& confidence_w,
                                               const Bias& packed) {
  const int64_t R = base.size(0), K = base.size(1), V = base.size(2), rank = w1.size(1);
  Tensor token = at::empty({R, K}, base.options().dtype(at::kLong)), confidence = confidence_base.to(at::kFloat).clone();
  Tensor q = at::zeros({R, K, V}, base.options().dtype(at::kFloat));
  const bool sees_token = confidence_w.numel() > 0;
  Tensor padded = at::zeros({(rank + LANES - 1) / LANES * LANES}, confidence.options());
  if (sees_token) padded.slice(0, 0, rank).copy_(confidence_w);
  const Tensor basec = base.contiguous(), anchorc = anchor.contiguous(), knobsc = knobs.contiguous(),
               uniformc = uniform.contiguous(), keyc = key ? key->contiguous() : Tensor();
  const int threads = thread_count();
  const int64_t* anchors = anchorc.const_data_ptr<int64_t>();
  const Knobs* of = reinterpret_cast<const Knobs*>(knobsc.const_data_ptr<double>());
  const double* uniforms = uniformc.const_data_ptr<double>();
  const int64_t* keys = key ? keyc.const_data_ptr<int64_t>() : nullptr;
  const float* seen = padded.const_data_ptr<float>();
  int64_t* tokens = token.data_ptr<int64_t>();
  float *laws = q.data_ptr<float>(), *confidences = confidence.data_ptr<float>();
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Scalar *logits = basec.const_data_ptr<Scalar>(), *first = w1.const_data_ptr<Scalar>(),
                 *second = w2.const_data_ptr<Scalar>(),
                 *tiles = packed ? packed->const_data_ptr<Scalar>() : nullptr;
    if (tiles && (top <= 0 || top >= V)) {
      Team team;
      WholeChain<Scalar> chain{logits, first, tiles, anchors, of, uniforms, keys, seen, R, K, V, rank, tokens, laws,
                               sees_token ? confidences : nullptr, team};
      return team.run([&](int64_t id) { chain.run(id); });
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && R > 1)
    for (int64_t r = 0; r < R; ++r)
      chain_of(logits + r * K * V, first, second, anchors[r], K, V, rank, top, of[r], uniforms + r * K, keys ? keys + r * K : nullptr, seen,
               tokens + r * K, laws + r * K * V, sees_token ? confidences + r * K : nullptr);
  };
  if (base.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {token, q, confidence};
}

}  // namespace
