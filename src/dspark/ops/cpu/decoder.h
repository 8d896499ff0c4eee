// A stack of plain decoder layers (norm, attention, norm, SwiGLU) as one parallel region: Llama, Mistral, Qwen2, Qwen3
// and the drafters made of their blocks.
//
// A layer is five products and what lies between them; every phase is dealt to the threads, which meet after it. Values
// round to the weights' type wherever the Hugging Face models round. A row's bits depend on no neighbour and no thread.
// T rows, D hidden size, H query heads, G key/value heads, d head size, I inner size of the MLP, V vocabulary.
#pragma once

#include <omp.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "attention.h"
#include "products.h"
#include "team.h"

namespace {

constexpr int64_t FEW = 16;  // rows that every thread normalises for itself: shorter than meeting

// A layer's weights by address, in the order of models/native.py; 0 for one that the family does not have.
enum Part { INPUT_NORM, POST_NORM, Q_NORM, K_NORM, Q, K, V, O, GATE, UP, DOWN, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, WINDOW, PARTS };

struct Sizes {
  int64_t layers, D, H, G, d, I, V, page_size;
  float eps, scale;
  bool causal;
};

template <typename Scalar>
struct Rows {  // what the stack runs on
  int64_t T, R, table_width;
  const int64_t *token, *position, *slot;  // no slots: keys and values are not kept
  const int32_t *table, *cu, *context;
};

template <typename Scalar>
struct Weights {
  const int64_t* parts;  // [layers][PARTS]
  const Scalar *embedding, *norm, *head, *cos, *sin;
  std::vector<Scalar*> pool_k, pool_v;

  template <typename Kind = Scalar>
  const Kind* of(int64_t layer, Part part) const { return reinterpret_cast<const Kind*>(parts[layer * PARTS + part]); }
};

// out = weight · x / √(mean x² + ε), rounded before and after the weight.
template <typename Scalar>
inline void rms_norm(const Scalar* x, const Scalar* weight, Scalar* out, int64_t size, float eps) {
  Vec squares = Vec{};
  for (int64_t j = 0; j < size; j += LANES) { const Vec v = wide(x + j); squares += v * v; }
  const float share = 1.0f / std::sqrt(block_sum(squares) / float(size) + eps);
  for (int64_t j = 0; j < size; j += LANES) put(out + j, wide(weight + j) * rounded(x, wide(x + j) * share));
}

// Turns a head by the angles of its position; cosines and sines repeat in both halves.
template <typename Scalar>
inline void rotate(Scalar* x, const Scalar* cos, const Scalar* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t j = 0; j < half; j += LANES) {
    const Vec a = wide(x + j), b = wide(x + half + j);
    put(x + j, rounded(x, a * wide(cos + j)) + rounded(x, -b * wide(sin + j)));
    put(x + half + j, rounded(x, b * wide(cos + half + j)) + rounded(x, a * wide(sin + half + j)));
  }
}

// A head of queries or keys through its norm, if it has one, and its rotation.
template <typename Scalar>
inline void turn(Scalar* head, const Scalar* weight, const Scalar* cos, const Scalar* sin, int64_t size, float eps) {
  if (weight) rms_norm(head, weight, head, size, eps);
  rotate(head, cos, sin, size);
}

inline Vec silu(Vec x) {
  const Vec zero = Vec{}, falling = exponential(above(x, zero, -x, x));
  return x * (above(x, zero, zero + 1.0f, falling) / (falling + 1.0f));
}

template <typename Scalar>
class Decoder {
 public:
  Decoder(const Sizes& s, const Weights<Scalar>& w, const Rows<Scalar>& in, Team& team)
      : s(s), w(w), in(in), team(team), claimed(new std::atomic<int64_t>[s.layers]()) {
    const int64_t T = in.T, copies = T <= FEW ? team.size : 1;
    memory.reset(new Scalar[T * (s.D * (1 + copies) + (2 * s.H + 2 * s.G) * s.d + s.I)]);
    x = memory.get(), normed = x + T * s.D, q = normed + copies * T * s.D, k = q + T * s.H * s.d, v = k + T * s.G * s.d;
    mixed = v + T * s.G * s.d, act = mixed + T * s.H * s.d;
    for (int64_t r = 0; r < in.R; ++r)
      for (int64_t first = 0, own = in.cu[r + 1] - in.cu[r]; first < own; first += TOKENS)
        for (int64_t g = 0; g < s.G; ++g) pieces.push_back({r, g, first, std::min(own, first + TOKENS)});
  }

  // Every thread calls this with its number. taps[T][count·D] are the outputs of the layers in `wanted`, -1 the embedding.
  void run(int64_t id, at::IntArrayRef wanted, Scalar* taps) {
    for (int64_t t = Share(in.T, id, team.size).begin; t < Share(in.T, id, team.size).end; ++t)
      std::copy_n(w.embedding + in.token[t] * s.D, s.D, x + t * s.D);
    team.meet();
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      keep(id, layer - 1, wanted, taps);
      run_layer(id, layer);
    }
    keep(id, s.layers - 1, wanted, taps);
  }

  // LM head over the last norm of the wanted rows; `hidden`, if any, gets the norm's output.
  void finish(int64_t id, const int64_t* rows, int64_t B, Scalar* hidden, Scalar* logits) {
    Scalar* own = normed;  // as many rows as fit a copy: B <= T
    if (in.T <= FEW) own += id * in.T * s.D;
    const Share mine = in.T <= FEW ? Share(B, 0, 1) : Share(B, id, team.size);
    for (int64_t b = mine.begin; b < mine.end; ++b)
      rms_norm(x + (rows ? rows[b] : b) * s.D, w.norm, own + b * s.D, s.D, s.eps);
    if (in.T > FEW) team.meet();
    if (hidden && id == 0) std::copy_n(own, B * s.D, hidden);
    const Share tiles((s.V + LANES - 1) / LANES, id, team.size);
    multiply(Operand<Scalar>(own, B, s.D), w.head, tiles.begin, tiles.end, [&](int64_t b, int64_t n, Vec sums) {
      put(logits + b * s.V + n, sums, s.V - n);
    });
  }

 private:
  const Sizes& s;
  const Weights<Scalar>& w;
  const Rows<Scalar>& in;
  Team& team;
  std::unique_ptr<std::atomic<int64_t>[]> claimed;  // pieces of each layer's attention that a thread has taken
  std::unique_ptr<Scalar[]> memory;
  Scalar *x, *normed, *q, *k, *v, *mixed, *act;
  std::vector<Piece> pieces;

  void keep(int64_t id, int64_t layer, at::IntArrayRef wanted, Scalar* taps) {
    const Share mine(in.T, id, team.size);
    for (size_t i = 0; i < wanted.size(); ++i)
      if (wanted[i] == layer)
        for (int64_t t = mine.begin; t < mine.end; ++t)
          std::copy_n(x + t * s.D, s.D, taps + (t * wanted.size() + i) * s.D);
  }

  const Scalar* norm(int64_t id, const Scalar* weight) {
    Scalar* own = in.T <= FEW ? normed + id * in.T * s.D : normed;
    const Share mine = in.T <= FEW ? Share(in.T, 0, 1) : Share(in.T, id, team.size);
    for (int64_t t = mine.begin; t < mine.end; ++t) rms_norm(x + t * s.D, weight, own + t * s.D, s.D, s.eps);
    if (in.T > FEW) team.meet();
    return own;
  }

  void run_layer(int64_t id, int64_t layer) {
    project(id, layer, norm(id, w.of(layer, INPUT_NORM)));
    team.meet();
    place(id, layer);
    team.meet();
    attention(layer);
    team.meet();
    add(id, mixed, s.H * s.d, w.of(layer, O), w.template of<float>(layer, O_BIAS));
    team.meet();
    gate(id, layer, norm(id, w.of(layer, POST_NORM)));
    team.meet();
    add(id, act, s.I, w.of(layer, DOWN), nullptr);
    team.meet();
  }

  void project(int64_t id, int64_t layer, const Scalar* rows) {
    const int64_t tiles[3] = {s.H * s.d / LANES, s.G * s.d / LANES, s.G * s.d / LANES};
    const Part weight[3] = {Q, K, V}, bias[3] = {Q_BIAS, K_BIAS, V_BIAS};
    Scalar* out[3] = {q, k, v};
    const Share mine(tiles[0] + tiles[1] + tiles[2], id, team.size);
    const Operand<Scalar> operand(rows, in.T, s.D);
    for (int64_t i = 0, offset = 0; i < 3; offset += tiles[i++]) {
      const int64_t begin = std::clamp<int64_t>(mine.begin - offset, 0, tiles[i]);
      const int64_t end = std::clamp<int64_t>(mine.end - offset, 0, tiles[i]), width = tiles[i] * LANES;
      const float* b = w.template of<float>(layer, bias[i]);
      multiply(operand, w.of(layer, weight[i]), begin, end, [&](int64_t t, int64_t n, Vec sums) {
        put(out[i] + t * width + n, b ? sums + load(b + n) : sums);
      });
    }
  }

  // Queries and keys through their norms and the rotation; keys and values into the pages.
  void place(int64_t id, int64_t layer) {
    const int64_t heads = s.H + s.G;
    const Share mine(in.T * heads, id, team.size);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t t = i / heads, h = i % heads, g = h - s.H;
      Scalar* head = g < 0 ? q + (t * s.H + h) * s.d : k + (t * s.G + g) * s.d;
      turn(head, w.of(layer, g < 0 ? Q_NORM : K_NORM), w.cos + in.position[t] * s.d, w.sin + in.position[t] * s.d, s.d, s.eps);
      if (g < 0 || !in.slot) continue;
      const int64_t at = (in.slot[t] * s.G + g) * s.d;
      std::copy_n(head, s.d, w.pool_k[layer] + at);
      std::copy_n(v + (t * s.G + g) * s.d, s.d, w.pool_v[layer] + at);
    }
  }

  void attention(int64_t layer) {
    const Shape shape{s.H, s.G, s.d, s.d, s.page_size, in.table_width, w.parts[layer * PARTS + WINDOW], s.scale, 0, s.causal};
    const int64_t count = pieces.size();
    for (int64_t i; (i = claimed[layer].fetch_add(1, std::memory_order_relaxed)) < count;) {
      const Piece& p = pieces[i];
      attend<Scalar>(q, k, v, w.pool_k[layer], w.pool_v[layer], in.table + p.sequence * in.table_width, mixed, shape,
                     in.cu[p.sequence], in.cu[p.sequence + 1] - in.cu[p.sequence], in.context[p.sequence], p.group, p.first,
                     p.last);
    }
  }

  // x += rows times weight.
  void add(int64_t id, const Scalar* rows, int64_t inner, const Scalar* weight, const float* bias) {
    const Share tiles(s.D / LANES, id, team.size);
    multiply(Operand<Scalar>(rows, in.T, inner), weight, tiles.begin, tiles.end, [&](int64_t t, int64_t n, Vec sums) {
      Scalar* to = x + t * s.D + n;
      put(to, wide(to) + rounded(to, bias ? sums + load(bias + n) : sums));
    });
  }

  void gate(int64_t id, int64_t layer, const Scalar* rows) {
    const Share tiles(s.I / LANES, id, team.size);
    const Operand<Scalar> operand(rows, in.T, s.D);
    multiply(operand, w.of(layer, GATE), tiles.begin, tiles.end,
             [&](int64_t t, int64_t n, Vec sums) { put(act + t * s.I + n, sums); });
    multiply(operand, w.of(layer, UP), tiles.begin, tiles.end, [&](int64_t t, int64_t n, Vec sums) {
      Scalar* to = act + t * s.I + n;
      put(to, rounded(to, silu(wide(to))) * rounded(to, sums));
    });
  }
};

// ---- as tensor functions -------------------------------------------------------------------------------------------

// What does not change between calls, as models/native.py lays it out: one tensor, for a list of them costs a step 50 µs.
struct Constants {
  enum Place { SIZES = 0, BYTES = 8, NUMBERS = 9, SHARED = 11, ANGLES = 16, POOLS = 17 };
  const int64_t* at;
  explicit Constants(const Tensor& constants) : at(constants.const_data_ptr<int64_t>()) {}

  Sizes sizes(bool causal) const {
    double numbers[2];
    std::memcpy(numbers, at + NUMBERS, sizeof numbers);
    return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], float(numbers[0]), float(numbers[1]), causal};
  }

  at::ScalarType type() const { return at[BYTES] == 4 ? at::kFloat : at::kBFloat16; }

  template <typename Scalar>
  Weights<Scalar> weights() const {
    const int64_t layers = at[SIZES];
    Weights<Scalar> w{at + POOLS + 2 * layers, nullptr, nullptr, nullptr, nullptr, nullptr, {}, {}};
    const Scalar** shared[] = {&w.embedding, &w.norm, &w.head, &w.cos, &w.sin};
    for (int i = 0; i < 5; ++i) *shared[i] = reinterpret_cast<const Scalar*>(at[SHARED + i]);
    for (int64_t i = 0; i < layers; ++i) {
      w.pool_k.push_back(reinterpret_cast<Scalar*>(at[POOLS + i]));
      w.pool_v.push_back(reinterpret_cast<Scalar*>(at[POOLS + layers + i]));
    }
    return w;
  }

  void check_positions(const int64_t* position, int64_t count) const {
    for (int64_t t = 0; t < count; ++t)
      TORCH_CHECK(position[t] >= 0 && position[t] < at[ANGLES], "position ", position[t], " has no angle");
  }

  // `work` with a value of the weights' type.
  template <typename Work>
  void typed(const Work& work) const {
    if (type() == at::kFloat) work(float{});
    else work(at::BFloat16{});
  }
};

std::tuple<Tensor, Tensor> decoder(const Tensor& token, const Tensor& position, const Tensor& slot, const Tensor& table,
                                   const Tensor& cu, const Tensor& context, const Tensor& rows, const Tensor& constants,
                                   at::IntArrayRef taps) {
  const Constants constant(constants);
  const Sizes s = constant.sizes(true);
  const int64_t T = token.size(0), B = rows.size(0), count = taps.size();
  Tensor logits = at::empty({B, s.V}, constant.type()), tapped = at::empty({T, count * s.D}, constant.type());
  const Tensor wanted = rows.contiguous(), pages = table.contiguous();
  constant.check_positions(position.const_data_ptr<int64_t>(), T);
  constant.typed([&]<typename Scalar>(Scalar) {
    const Weights<Scalar> w = constant.weights<Scalar>();
    const Rows<Scalar> in{T, cu.size(0) - 1, table.size(1), token.const_data_ptr<int64_t>(),
                          position.const_data_ptr<int64_t>(), slot.const_data_ptr<int64_t>(),
                          pages.const_data_ptr<int32_t>(), cu.const_data_ptr<int32_t>(), context.const_data_ptr<int32_t>()};
    Team team;
    Decoder<Scalar> decoder(s, w, in, team);
    team.run([&](int64_t id) {
      decoder.run(id, taps, tapped.data_ptr<Scalar>());
      decoder.finish(id, wanted.const_data_ptr<int64_t>(), B, nullptr, logits.data_ptr<Scalar>());
    });
  });
  return {logits, tapped};
}

}  // namespace
