// Attention of ragged queries over pages.
#pragma once

#include <type_traits>
#include <vector>

#include "scores.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t TOKENS = 8;  // of one piece of work

struct Shape {
  int64_t heads, groups, key_size, value_size, page_size, table_width, window;
  float scale, softcap;
  bool causal;
};

// result[N] rows += weight[N][count] times values[count][size], 16·P of the columns at a time.
template <int N, int P>
inline void add_values(const float* weight, int64_t stride, const float* values, int64_t count, int64_t size, float* result) {
  Vec acc[N][P];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
    for (int p = 0; p < P; ++p) acc[r][p] = load(result + r * size + p * LANES);
  for (int64_t key = 0; key < count; ++key) {
    Vec value[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) value[p] = load(values + key * size + p * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[r][p] += value[p] * weight[r * stride + key];
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
    for (int p = 0; p < P; ++p) std::memcpy(result + r * size + p * LANES, &acc[r][p], sizeof acc[r][p]);
}

constexpr int WIDTH = NATIVE == LANES ? 4 : 2, HEIGHT = WIDTH;  // columns of 16 and rows whose sums are held at once

template <int N>
void add_columns(const float* weight, int64_t stride, const float* values, int64_t count, int64_t size, float* result) {
  constexpr int64_t wide = WIDTH * LANES;
  int64_t j = 0;
  for (; j + wide <= size; j += wide) add_values<N, WIDTH>(weight, stride, values + j, count, size, result + j);
  for (; j < size; j += LANES) add_values<N, 1>(weight, stride, values + j, count, size, result + j);
}

// Memory of one thread's attention, kept between calls: a call is shorter than asking for it.
struct Room {
  std::vector<float> numbers;
  std::vector<char> bytes;

  float* floats(size_t count) { return numbers.resize(std::max(numbers.size(), count)), numbers.data(); }

  template <typename Kind>
  Kind* of(size_t count) {
    bytes.resize(std::max(bytes.size(), count * sizeof(Kind) + 64));
    return reinterpret_cast<Kind*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
  }
};

// Where the rows of keys or values of one sequence and one head lie: in the pages, then beside the queries.
template <typename Scalar>
struct Rows16 {
  const Scalar *pool, *fresh;
  const int32_t* table;
  int64_t page_size, context, stride;  // of a token's row

  // The rows of keys base .. base + count, then `none`.
  void at(int64_t base, int64_t count, const Scalar* none, const Scalar** rows) const {
    if (const Scalar* strip = strip_at(base, count)) {
      for (int64_t lane = 0; lane < LANES; ++lane) rows[lane] = lane < count ? strip + lane * stride : none;
      return;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t key = base + lane;
      rows[lane] = lane >= count   ? none
                   : key < context ? pool + (int64_t(table[key / page_size]) * page_size + key % page_size) * stride
                                   : fresh + (key - context) * stride;
    }
  }

 private:
  // The first of `count` rows that lie one behind the other; null where they do not.
  const Scalar* strip_at(int64_t base, int64_t count) const {
    if (base >= context) return fresh + (base - context) * stride;
    const int64_t page = base / page_size, offset = base - page * page_size;
    if (base + count > context || offset + count > page_size) return nullptr;
    return pool + (int64_t(table[page]) * page_size + offset) * stride;
  }
};

// Pages are scattered: nobody else fetches their rows before they are read.
template <typename Scalar>
inline void fetch(const Scalar* const* rows, int64_t count, int64_t size) {
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t byte = 0; byte < size * int64_t(sizeof(Scalar)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[lane]) + byte);
}

// Queries [first, last) of one sequence against one key/value head. Keys come in blocks of 16 at absolute multiples of
// 16, transposed so that a lane is a key: every score and every sum has an order that only its own position decides.
template <typename Scalar>
void attend(const Scalar* q, const Scalar* k, const Scalar* v, const Scalar* pool_k, const Scalar* pool_v,
            const int32_t* table, Scalar* out, const Shape& s, int64_t start, int64_t own, int64_t context,
            int64_t group, int64_t first, int64_t last) {
  using Kept = std::conditional_t<std::is_same_v<Scalar, at::Half>, float, Scalar>;  // what scores are made of
  using Row = typename Scoring<Kept>::Row;
  constexpr int64_t WIDE = LANES * Packed<Kept>::STEP;
  const int64_t per = s.heads / s.groups, rows = (last - first) * per, keys = context + own;
  const int64_t dk = (s.key_size + WIDE - 1) / WIDE * WIDE, dv = (s.value_size + LANES - 1) / LANES * LANES;
  const int64_t oldest = s.window > 0 ? std::max<int64_t>(0, context + first - s.window + 1) : 0;
  const int64_t newest = s.causal ? context + last : keys;
  const int64_t from = oldest / LANES * LANES, width = (newest - from + LANES - 1) / LANES * LANES;
  const bool straight = std::is_same_v<Scalar, Kept> && dk == s.key_size;  // rows can be read where they lie
  thread_local Room room;
  float* const score = room.floats(rows * (width + dv + 2) + LANES * dv);
  float *const result = score + rows * width, *const block = result + rows * dv, *const total = block + LANES * dv;
  float* const undo = total + rows;  // what brings a query's scores back into its own scale
  Row* const query = room.of<Row>(rows * dk + (2 * LANES + 1) * dk);  // a Kept is no larger than a Row
  Kept* const columns = reinterpret_cast<Kept*>(query + rows * dk);
  Kept *const copies = columns + LANES * dk, *const none = copies + LANES * dk;
  std::fill(result, result + rows * dv, 0.0f);
  std::fill(copies, none + dk, Kept(0));
  for (int64_t i = 0; i < rows; ++i) {
    const Scalar* row = q + ((start + first + i / per) * s.heads + group * per + i % per) * s.key_size;
    convert(row, query + i * dk, s.key_size);
    std::fill(query + i * dk + s.key_size, query + (i + 1) * dk, Row(0));
    undo[i] = Scoring<Kept>::queries(query + i * dk, dk);
  }
  const auto rows_of = [&](const Scalar* pool, const Scalar* fresh, int64_t size) {
    return Rows16<Scalar>{pool + group * size, fresh + (start * s.groups + group) * size, table, s.page_size, context,
                          s.groups * size};
  };
  const Rows16<Scalar> key_rows = rows_of(pool_k, k, s.key_size), value_rows = rows_of(pool_v, v, s.value_size);
  const auto prefetch = [&](const Rows16<Scalar>& lying, int64_t base, int64_t size) {
    const Scalar* ahead[LANES];
    const int64_t count = std::min(LANES, newest - base);
    if (count > 0) lying.at(base, count, nullptr, ahead), fetch(ahead, count, size);
  };
  const Scalar* found[LANES];
  for (int64_t base = from; base < newest; base += LANES) {
    const int64_t count = std::min(LANES, newest - base);
    prefetch(key_rows, base + 2 * LANES, s.key_size);
    prefetch(value_rows, base, s.value_size);
    key_rows.at(base, count, nullptr, found);
    const Kept* side[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) {
      side[lane] = lane < count ? copies + lane * dk : none;
      if (lane >= count) continue;
      if (straight) side[lane] = reinterpret_cast<const Kept*>(found[lane]);
      else convert(found[lane], copies + lane * dk, s.key_size);
    }
    transpose(side, columns, dk);
    const float common = s.scale * Scoring<Kept>::keys(columns, dk);
    float* line = score + base - from;
    int64_t i = 0;
    for (; i + SCORED <= rows; i += SCORED)
      score_rows<SCORED, Kept>(query + i * dk, columns, dk, undo + i, common, line + i * width, width);
    for (; i + 2 <= rows; i += 2)
      score_rows<2, Kept>(query + i * dk, columns, dk, undo + i, common, line + i * width, width);
    for (; i < rows; ++i) score_rows<1, Kept>(query + i * dk, columns, dk, undo + i, common, line + i * width, width);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* line = score + i * width;
    const int64_t position = context + first + i / per, end = s.causal ? std::min(newest, position + 1) : newest;
    if (s.softcap > 0)
      for (int64_t key = 0; key < width; ++key) line[key] = s.softcap * std::tanh(line[key] / s.softcap);
    std::fill(line + (end - from), line + width, -INFINITY);
    if (s.window > 0) std::fill(line, line + std::max<int64_t>(0, position - s.window + 1 - from), -INFINITY);
    Vec peaks = load(line), sums = Vec{};
    for (int64_t key = LANES; key < width; key += LANES) peaks = larger(load(line + key), peaks);
    const float peak = peak_of(peaks);
    for (int64_t key = 0; key < width; key += LANES) {
      const Vec weight = weights_below(load(line + key), peak);
      put(line + key, weight);
      sums += weight;
    }
    total[i] = 0;
    for (int lane = 0; lane < LANES; ++lane) total[i] += sums[lane];
  }
  if (dv > s.value_size) std::fill(block, block + LANES * dv, 0.0f);
  for (int64_t base = from; base < newest; base += LANES) {
    const int64_t count = std::min(LANES, newest - base);
    prefetch(value_rows, base + LANES, s.value_size);
    value_rows.at(base, count, nullptr, found);
    for (int64_t lane = 0; lane < count; ++lane) convert(found[lane], block + lane * dv, s.value_size);
    const float* weight = score + base - from;
    int64_t i = 0;
    for (; i + HEIGHT <= rows; i += HEIGHT)
      add_columns<HEIGHT>(weight + i * width, width, block, count, dv, result + i * dv);
    for (; i + 2 <= rows; i += 2) add_columns<2>(weight + i * width, width, block, count, dv, result + i * dv);
    for (; i < rows; ++i) add_columns<1>(weight + i * width, width, block, count, dv, result + i * dv);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + first + i / per, head = group * per + i % per;
    Scalar* to = out + (token * s.heads + head) * s.value_size;
    const float share = 1.0f / total[i];
    for (int64_t j = 0; j < s.value_size; j += LANES) put(to + j, load(result + i * dv + j) * share, s.value_size - j);
  }
}

struct Piece {
  int64_t sequence, group, first, last;
};

template <typename Scalar>
void attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k, const Tensor& pool_v,
                    const Tensor& table, const Tensor& cu, const Tensor& context, Tensor& out, const Shape& s) {
  const int32_t *bounds = cu.const_data_ptr<int32_t>(), *contexts = context.const_data_ptr<int32_t>();
  std::vector<Piece> pieces;
  int64_t work = 0;
  for (int64_t r = 0; r + 1 < cu.numel(); ++r) {
    const int64_t own = bounds[r + 1] - bounds[r];
    work += own * (own + contexts[r]) * s.heads * s.key_size;
    for (int64_t first = 0; first < own; first += TOKENS)
      for (int64_t g = 0; g < s.groups; ++g) pieces.push_back({r, g, first, std::min(own, first + TOKENS)});
  }
  const int64_t count = pieces.size();
  const int threads = thread_count(), together = count >= 2 * threads * s.groups ? s.groups : 1;
#pragma omp parallel for schedule(dynamic, together) num_threads(threads) if (threads > 1 && count > 1 && work >= 32768)
  for (int64_t i = 0; i < count; ++i) {
    const Piece& p = pieces[i];
    attend(q.const_data_ptr<Scalar>(), k.const_data_ptr<Scalar>(), v.const_data_ptr<Scalar>(),
           pool_k.const_data_ptr<Scalar>(), pool_v.const_data_ptr<Scalar>(),
           table.const_data_ptr<int32_t>() + p.sequence * s.table_width, out.data_ptr<Scalar>(), s, bounds[p.sequence],
           bounds[p.sequence + 1] - bounds[p.sequence], contexts[p.sequence], p.group, p.first, p.last);
  }
}

Tensor ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k, const Tensor& pool_v,
                        const Tensor& table, const Tensor& cu, const Tensor& context, int64_t page_size, double scale,
                        bool causal, int64_t window, double softcap) {
  Tensor out = at::zeros({q.size(0), q.size(1), v.size(2)}, q.options());
  const Shape s{q.size(1), k.size(1), q.size(2), v.size(2), page_size, table.size(1),
                window,    float(scale), float(softcap), causal};
  const Tensor qc = q.contiguous(), kc = k.contiguous(), vc = v.contiguous();
  switch (q.scalar_type()) {
    case at::kFloat: attention_into<float>(qc, kc, vc, pool_k, pool_v, table, cu, context, out, s); break;
    case at::kBFloat16: attention_into<at::BFloat16>(qc, kc, vc, pool_k, pool_v, table, cu, context, out, s); break;
    case at::kHalf: attention_into<at::Half>(qc, kc, vc, pool_k, pool_v, table, cu, context, out, s); break;
    default: TORCH_CHECK(false, "no CPU attention kernel for ", q.scalar_type());
  }
  return out;
}

void store(const Tensor& k, const Tensor& v, Tensor pool_k, Tensor pool_v, const Tensor& slots) {
  const Tensor kc = k.contiguous(), vc = v.contiguous();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  auto copy = [&](const Tensor& from, Tensor& pool) {
    const size_t bytes = from[0].numel() * from.element_size();
    for (int64_t t = 0; t < from.size(0); ++t)
      std::memcpy(static_cast<char*>(pool.data_ptr()) + slot[t] * bytes,
                  static_cast<const char*>(from.const_data_ptr()) + t * bytes, bytes);
  };
  if (k.size(0) == 0) return;
  copy(kc, pool_k);
  copy(vc, pool_v);
}

}  // namespace
