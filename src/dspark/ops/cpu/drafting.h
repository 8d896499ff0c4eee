// The two forwards of a block drafter (DSpark, DFlash): its context's keys and values, and one block over that context.
#pragma once

#include "decoder.h"

namespace {

// Projects rows of taps to the context's keys and values of every layer and stores them. (DFlash, §3)
template <typename Scalar>
class Context {
 public:
  Context(const Sizes& s, const Weights<Scalar>& w, const Rows<Scalar>& in, const Scalar* taps, int64_t width,
          const Scalar* fc, Team& team)
      : s(s), w(w), in(in), taps(taps), width(width), fc(fc), team(team) {
    memory.reset(new Scalar[in.T * (s.D * (1 + team.size) + 2 * s.layers * s.G * s.d)]);
    projected = memory.get(), normed = projected + in.T * s.D, pairs = normed + team.size * in.T * s.D;
  }

  // Every thread calls this with its number.
  void run(int64_t id) {
    const Share outputs(s.D / LANES, id, team.size);
    multiply(taps, in.T, width, fc, outputs.begin, outputs.end,
             [&](int64_t t, int64_t n, Vec sums) { put(projected + t * s.D + n, sums); });
    team.meet();
    Scalar* rows = normed + id * in.T * s.D;
    for (int64_t t = 0; t < in.T; ++t) rms_norm(projected + t * s.D, w.norm, rows + t * s.D, s.D, s.eps);
    const int64_t tiles = s.G * s.d / LANES;
    const Share mine(2 * s.layers * tiles, id, team.size);
    for (int64_t i = 0; i < 2 * s.layers; ++i) {  // keys of layer 0, values of layer 0, keys of layer 1, ...
      const int64_t begin = std::clamp<int64_t>(mine.begin - i * tiles, 0, tiles);
      const int64_t end = std::clamp<int64_t>(mine.end - i * tiles, 0, tiles);
      const float* bias = w.template of<float>(i / 2, i % 2 ? V_BIAS : K_BIAS);
      multiply(rows, in.T, s.D, w.of(i / 2, i % 2 ? V : K), begin, end, [&](int64_t t, int64_t n, Vec sums) {
        put(pairs + (t * 2 * s.layers + i) * tiles * LANES + n, bias ? sums + load(bias + n) : sums);
      });
    }
    team.meet();
    const Share own(in.T * s.layers * s.G, id, team.size);
    for (int64_t i = own.begin; i < own.end; ++i) place(i / (s.layers * s.G), i / s.G % s.layers, i % s.G);
  }

 private:
  const Sizes& s;
  const Weights<Scalar>& w;
  const Rows<Scalar>& in;
  const Scalar* taps;
  const int64_t width;
  const Scalar* fc;
  Team& team;
  std::unique_ptr<Scalar[]> memory;
  Scalar *projected, *normed, *pairs;

  void place(int64_t t, int64_t layer, int64_t g) {
    Scalar* key = pairs + ((t * s.layers + layer) * 2 * s.G + g) * s.d;
    const int64_t angle = in.position[t] * s.d, at = (in.slot[t] * s.G + g) * s.d;
    turn(key, w.of(layer, K_NORM), w.cos + angle, w.sin + angle, s.d, s.eps);
    std::copy_n(key, s.d, w.pool_k[layer] + at);
    std::copy_n(key + s.G * s.d, s.d, w.pool_v[layer] + at);
  }
};

void draft_context(const Tensor& taps, const Tensor& position, const Tensor& slot, const Tensor& fc, at::TensorList pools,
                   const Tensor& parts, at::TensorList shared, at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  const Sizes s = sizes_of(sizes, numbers, false);
  const int64_t T = position.size(0);
  const Tensor rows = taps.contiguous();
  check_positions(position.const_data_ptr<int64_t>(), T, shared[3]);
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Weights<Scalar> w = weights_of<Scalar>(pools, parts, shared);
    const Rows<Scalar> in{T, 0, 0, nullptr, position.const_data_ptr<int64_t>(), slot.const_data_ptr<int64_t>(),
                          nullptr, nullptr, nullptr};
    Team team;
    Context<Scalar> context(s, w, in, rows.const_data_ptr<Scalar>(), rows.size(1), fc.const_data_ptr<Scalar>(), team);
    team.run([&](int64_t id) { context.run(id); });
  };
  if (rows.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
}

// Final hidden states [R, W, D] and base logits [R, W, V] of a block of W inputs a request: its anchor, then masks.
std::tuple<Tensor, Tensor> draft_block(const Tensor& anchor, const Tensor& position, const Tensor& table, int64_t width,
                                       int64_t mask, at::TensorList pools, const Tensor& parts, at::TensorList shared,
                                       at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  const Sizes s = sizes_of(sizes, numbers, false);
  const int64_t R = anchor.size(0), T = R * width;
  Tensor hidden = at::empty({R, width, s.D}, pools[0].options()), base = at::empty({R, width, s.V}, pools[0].options());
  const Tensor pages = table.contiguous();
  const int64_t *anchors = anchor.const_data_ptr<int64_t>(), *positions = position.const_data_ptr<int64_t>();
  std::vector<int64_t> tokens(T, mask), places(T);
  std::vector<int32_t> cu(R + 1), context(R);
  for (int64_t r = 0; r < R; ++r) {
    tokens[r * width] = anchors[r];
    for (int64_t i = 0; i < width; ++i) places[r * width + i] = positions[r] + i;
    cu[r + 1] = (r + 1) * width, context[r] = positions[r];
  }
  check_positions(places.data(), T, shared[3]);
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Weights<Scalar> w = weights_of<Scalar>(pools, parts, shared);
    const Rows<Scalar> in{T, R, table.size(1), tokens.data(), places.data(), nullptr,
                          pages.const_data_ptr<int32_t>(), cu.data(), context.data()};
    Team team;
    Decoder<Scalar> decoder(s, w, in, team);
    team.run([&](int64_t id) {
      decoder.run(id, {}, nullptr);
      decoder.finish(id, nullptr, T, hidden.data_ptr<Scalar>(), base.data_ptr<Scalar>());
    });
  };
  if (hidden.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {hidden, base};
}

}  // namespace
