// The two forwards of a block drafter (DSpark, DFlash): its context's keys and values, and one block over that context.
#pragma once

#include "chain.h"
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
    multiply(Operand<Scalar>(taps, in.T, width), fc, outputs.begin, outputs.end,
             [&](int64_t t, int64_t n, Vec sums) { put(projected + t * s.D + n, sums); });
    team.meet();
    Scalar* rows = normed + id * in.T * s.D;
    for (int64_t t = 0; t < in.T; ++t) rms_norm(projected + t * s.D, w.norm, rows + t * s.D, s.D, s.eps);
    const int64_t tiles = s.G * s.d / LANES;
    const Share mine(2 * s.layers * tiles, id, team.size);
    const Operand<Scalar> operand(rows, in.T, s.D);
    for (int64_t i = 0; i < 2 * s.layers; ++i) {  // keys of layer 0, values of layer 0, keys of layer 1, ...
      const int64_t begin = std::clamp<int64_t>(mine.begin - i * tiles, 0, tiles);
      const int64_t end = std::clamp<int64_t>(mine.end - i * tiles, 0, tiles);
      const float* bias = w.template of<float>(i / 2, i % 2 ? V_BIAS : K_BIAS);
      multiply(operand, w.of(i / 2, i % 2 ? V : K), begin, end, [&](int64_t t, int64_t n, Vec sums) {
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

void draft_context(const Tensor& taps, const Tensor& position, const Tensor& slot, const Tensor& fc, const Tensor& norm,
                   const Tensor& constants) {
  const Constants constant(constants);
  const Sizes s = constant.sizes(false);
  const int64_t T = position.size(0);
  const Tensor rows = taps.contiguous();
  constant.check_positions(position.const_data_ptr<int64_t>(), T);
  constant.typed([&]<typename Scalar>(Scalar) {
    Weights<Scalar> w = constant.weights<Scalar>();
    w.norm = norm.const_data_ptr<Scalar>();
    const Rows<Scalar> in{T, 0, 0, nullptr, position.const_data_ptr<int64_t>(), slot.const_data_ptr<int64_t>(),
                          nullptr, nullptr, nullptr};
    Team team;
    Context<Scalar> context(s, w, in, rows.const_data_ptr<Scalar>(), rows.size(1), fc.const_data_ptr<Scalar>(), team);
    team.run([&](int64_t id) { context.run(id); });
  });
}

// The inputs of one block a request: its anchor, then masks.
struct Block {
  int64_t R, width, T;
  std::vector<int64_t> tokens, places;
  std::vector<int32_t> cu, context;

  Block(const Tensor& anchor, const Tensor& position, int64_t width, int64_t mask)
      : R(anchor.size(0)), width(width), T(R * width), tokens(T, mask), places(T), cu(R + 1), context(R) {
    const int64_t *anchors = anchor.const_data_ptr<int64_t>(), *positions = position.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < R; ++r) {
      tokens[r * width] = anchors[r];
      for (int64_t i = 0; i < width; ++i) places[r * width + i] = positions[r] + i;
      cu[r + 1] = (r + 1) * width, context[r] = positions[r];
    }
  }

  template <typename Scalar>
  Rows<Scalar> rows(const Tensor& table) const {
    return {T, R, table.size(1), tokens.data(), places.data(), nullptr, table.const_data_ptr<int32_t>(), cu.data(),
            context.data()};
  }
};

// Final hidden states [R, W, D] and base logits [R, W, V] of a block of W inputs a request.
std::tuple<Tensor, Tensor> draft_block(const Tensor& anchor, const Tensor& position, const Tensor& table, int64_t width,
                                       int64_t mask, const Tensor& constants) {
  const Constants constant(constants);
  const Sizes s = constant.sizes(false);
  const Block block(anchor, position, width, mask);
  Tensor hidden = at::empty({block.R, width, s.D}, constant.type()), base = at::empty({block.R, width, s.V}, constant.type());
  const Tensor pages = table.contiguous();
  constant.check_positions(block.places.data(), block.T);
  constant.typed([&]<typename Scalar>(Scalar) {
    const Weights<Scalar> w = constant.weights<Scalar>();
    const Rows<Scalar> in = block.rows<Scalar>(pages);
    Team team;
    Decoder<Scalar> decoder(s, w, in, team);
    team.run([&](int64_t id) {
      decoder.run(id, {}, nullptr);
      decoder.finish(id, nullptr, block.T, hidden.data_ptr<Scalar>(), base.data_ptr<Scalar>());
    });
  });
  return {hidden, base};
}

// The sequential head as one round needs it; `seen` is the confidence head's row [D + r], its bias behind it.
struct Head {
  const Tensor &w1, &packed, &knobs, &uniform, &seen;
  const int64_t* key;
};

// A whole round of DSpark in one region: pending rows into the context, one block, its tokens one by one. Returns tokens
// [R, K], the laws they were drawn from [R, K, V] and confidences [R, K]. (DSpark, eqs. 4-7)
template <typename Scalar>
class DraftRound {
 public:
  DraftRound(const Sizes& s, const Weights<Scalar>& w, const Rows<Scalar>& block, const Head& head, int64_t K, Team& team)
      : s(s), K(K), R(block.R), rank(head.w1.size(1)), team(team), decoder(s, w, block, team),
        token(at::empty({R, K}, at::kLong)), q(at::zeros({R, K, s.V}, at::kFloat)), confidence(at::empty({R, K}, at::kFloat)),
        hidden(new Scalar[R * K * s.D]), base(new Scalar[R * K * s.V]), seen(head.seen.const_data_ptr<float>()),
        confidence_w((rank + LANES - 1) / LANES * LANES, 0.0f),
        chain{base.get(), head.w1.const_data_ptr<Scalar>(), head.packed.const_data_ptr<Scalar>(), block.token,
              reinterpret_cast<const Knobs*>(head.knobs.const_data_ptr<double>()), head.uniform.const_data_ptr<double>(), head.key,
              confidence_w.data(),
              R, K, s.V, rank, token.data_ptr<int64_t>(), q.data_ptr<float>(), confidence.data_ptr<float>(), team} {
    std::copy_n(seen + s.D, rank, confidence_w.begin());
    chain.apart = K;
  }

  // Every thread calls this with its number.
  void run(int64_t id) {
    decoder.run(id, {}, nullptr);
    decoder.finish(id, nullptr, R * K, hidden.get(), base.get());
    team.meet();
    float* sure = confidence.data_ptr<float>();
    const Share mine(R * K, id, team.size);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      Vec sums = Vec{};
      for (int64_t j = 0; j < s.D; j += LANES) sums += wide(hidden.get() + i * s.D + j) * load(seen + j);
      sure[i] = block_sum(sums) + seen[s.D + rank];
    }
    team.meet();
    chain.run(id);
    for (int64_t i = mine.begin; i < mine.end; ++i) sure[i] = 1.0f / (1.0f + std::exp(-sure[i]));
  }

  std::tuple<Tensor, Tensor, Tensor> result() const { return {token, q, confidence}; }

 private:
  const Sizes& s;
  const int64_t K, R, rank;
  Team& team;
  Decoder<Scalar> decoder;
  Tensor token, q, confidence;
  std::unique_ptr<Scalar[]> hidden, base;
  const float* seen;
  std::vector<float> confidence_w;
  WholeChain<Scalar> chain;
};

std::tuple<Tensor, Tensor, Tensor> draft_round(at::TensorList pending, const Tensor& fc, const Tensor& context_norm,
                                               const Tensor& anchor, const Tensor& position, const Tensor& table,
                                               int64_t mask, const Tensor& w1, const Tensor& packed,
                                               const Tensor& knobs, const Tensor& uniform,
                                               const std::optional<Tensor>& key, const Tensor& seen,
                                               const Tensor& constants) {
  const Constants constant(constants);
  const Sizes s = constant.sizes(false);
  const Tensor uniforms = uniform.contiguous(), own = knobs.contiguous(), pages = table.contiguous();
  const Tensor keys = key ? key->contiguous() : Tensor();
  const Block block(anchor, position, uniforms.size(1), mask);
  constant.check_positions(block.places.data(), block.T);
  if (!pending.empty()) constant.check_positions(pending[1].const_data_ptr<int64_t>(), pending[1].size(0));
  std::tuple<Tensor, Tensor, Tensor> result;
  constant.typed([&]<typename Scalar>(Scalar) {
    const Weights<Scalar> w = constant.weights<Scalar>();
    Weights<Scalar> of_context = w;
    of_context.norm = context_norm.const_data_ptr<Scalar>();
    const Rows<Scalar> in = block.rows<Scalar>(pages);
    Team team;
    DraftRound<Scalar> round(s, w, in, {w1, packed, own, uniforms, seen, key ? keys.const_data_ptr<int64_t>() : nullptr},
                             block.width, team);
    std::optional<Context<Scalar>> context;
    Rows<Scalar> late;
    if (!pending.empty()) {
      late = {pending[1].size(0), 0, 0, nullptr, pending[1].const_data_ptr<int64_t>(),
              pending[2].const_data_ptr<int64_t>(), nullptr, nullptr, nullptr};
      context.emplace(s, of_context, late, pending[0].const_data_ptr<Scalar>(), pending[0].size(1),
                      fc.const_data_ptr<Scalar>(), team);
    }
    team.run([&](int64_t id) {
      if (context) context->run(id), team.meet();
      round.run(id);
    });
    result = round.result();
  });
  return result;
}

}  // namespace
