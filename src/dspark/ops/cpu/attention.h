// Attention of ragged queries over pages.
#pragma once

#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

struct Shape {
  int64_t heads, groups, key_size, value_size, page_size, table_width, window;
  float scale, softcap;
  bool causal;
};

typedef int32_t Ints __attribute__((vector_size(64)));

template <int S>
inline void exchange(Vec* row) {  // one stage of a 16x16 transpose: swaps lanes and rows whose index has bit S
  Ints low, high;
  for (int lane = 0; lane < LANES; ++lane) {
    low[lane] = lane & S ? LANES + lane - S : lane;
    high[lane] = lane & S ? LANES + lane : lane + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & S)) {
      const Vec a = row[i], b = row[i | S];
      row[i] = __builtin_shuffle(a, b, low);
      row[i | S] = __builtin_shuffle(a, b, high);
    }
}

// rows[16][size] -> columns[size][16]; size is a multiple of 16.
inline void transpose(const float* rows, float* columns, int64_t size) {
  for (int64_t j = 0; j < size; j += LANES) {
    Vec tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) tile[i] = load(rows + i * size + j);
    exchange<8>(tile), exchange<4>(tile), exchange<2>(tile), exchange<1>(tile);
    std::memcpy(columns + j * LANES, tile, sizeof tile);
  }
}

// score[N] rows against 16 keys: columns[size][16] are the keys, transposed.
template <int N>
inline void score_rows(const float* query, const float* columns, int64_t size, float* score, int64_t stride) {
  Vec acc[N] = {};
  for (int64_t j = 0; j < size; ++j) {
    const Vec keys = load(columns + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) acc[r] += keys * query[r * size + j];
  }
  for (int r = 0; r < N; ++r) std::memcpy(score + r * stride, &acc[r], sizeof acc[r]);
}

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

template <int N>
void add_columns(const float* weight, int64_t stride, const float* values, int64_t count, int64_t size, float* result) {
  int64_t j = 0;
  for (; j + 4 * LANES <= size; j += 4 * LANES) add_values<N, 4>(weight, stride, values + j, count, size, result + j);
  for (; j < size; j += LANES) add_values<N, 1>(weight, stride, values + j, count, size, result + j);
}

// Queries [first, last) of one sequence against one key/value head. Keys come in blocks of 16 at absolute multiples of
// 16, transposed so that a lane is a key: every score and every sum has an order that only its own position decides.
template <typename Scalar>
void attend(const Scalar* q, const Scalar* k, const Scalar* v, const Scalar* pool_k, const Scalar* pool_v,
            const int32_t* table, Scalar* out, const Shape& s, int64_t start, int64_t own, int64_t context,
            int64_t group, int64_t first, int64_t last) {
  const int64_t per = s.heads / s.groups, rows = (last - first) * per, keys = context + own;
  const int64_t dk = (s.key_size + LANES - 1) / LANES * LANES, dv = (s.value_size + LANES - 1) / LANES * LANES;
  const int64_t oldest = s.window > 0 ? std::max<int64_t>(0, context + first - s.window + 1) : 0;
  const int64_t newest = s.causal ? context + last : keys;
  const int64_t from = oldest / LANES * LANES, width = (newest - from + LANES - 1) / LANES * LANES;
  thread_local std::vector<float> query, score, result, total, block, columns;  // kept: a call is shorter than its memory
  query.assign(rows * dk, 0.0f), result.assign(rows * dv, 0.0f), block.assign(LANES * std::max(dk, dv), 0.0f);
  score.resize(rows * width), total.resize(rows), columns.resize(LANES * dk);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + first + i / per, head = group * per + i % per;
    const Scalar* row = q + (token * s.heads + head) * s.key_size;
    for (int64_t j = 0; j < s.key_size; ++j) query[i * dk + j] = widen(row[j]) * s.scale;
  }
  auto fill = [&](const Scalar* pool, const Scalar* fresh, int64_t base, int64_t count, int64_t size, int64_t padded) {
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t key = base + lane;
      const Scalar* row = fresh + ((start + key - context) * s.groups + group) * size;
      if (key < context) {
        const int64_t slot = int64_t(table[key / s.page_size]) * s.page_size + key % s.page_size;
        row = pool + (slot * s.groups + group) * size;
      }
      for (int64_t j = 0; j < size; ++j) block[lane * padded + j] = widen(row[j]);
    }
  };
  for (int64_t base = from; base < newest; base += LANES) {
    const int64_t count = std::min(LANES, newest - base);
    fill(pool_k, k, base, count, s.key_size, dk);
    transpose(block.data(), columns.data(), dk);
    float* line = score.data() + base - from;
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) score_rows<8>(&query[i * dk], columns.data(), dk, line + i * width, width);
    for (; i + 2 <= rows; i += 2) score_rows<2>(&query[i * dk], columns.data(), dk, line + i * width, width);
    for (; i < rows; ++i) score_rows<1>(&query[i * dk], columns.data(), dk, line + i * width, width);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* line = &score[i * width];
    const int64_t position = context + first + i / per, end = s.causal ? std::min(newest, position + 1) : newest;
    if (s.softcap > 0)
      for (int64_t key = 0; key < width; ++key) line[key] = s.softcap * std::tanh(line[key] / s.softcap);
    std::fill(line + (end - from), line + width, -INFINITY);
    if (s.window > 0) std::fill(line, line + std::max<int64_t>(0, position - s.window + 1 - from), -INFINITY);
    Vec peaks = load(line), sums = Vec{};
    for (int64_t key = LANES; key < width; key += LANES) {
      const Vec here = load(line + key);
      peaks = here > peaks ? here : peaks;
    }
    float peak = peaks[0];
    for (int lane = 1; lane < LANES; ++lane) peak = std::max(peak, peaks[lane]);
    for (int64_t key = 0; key < width; key += LANES) {
      const Vec raw = load(line + key), weight = raw > Vec{} - INFINITY ? exponential(raw - peak) : Vec{};
      std::memcpy(line + key, &weight, sizeof weight);
      sums += weight;
    }
    total[i] = 0;
    for (int lane = 0; lane < LANES; ++lane) total[i] += sums[lane];
  }
  std::fill(block.begin(), block.end(), 0.0f);
  for (int64_t base = from; base < newest; base += LANES) {
    const int64_t count = std::min(LANES, newest - base);
    fill(pool_v, v, base, count, s.value_size, dv);
    const float* weight = score.data() + base - from;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_columns<4>(weight + i * width, width, block.data(), count, dv, &result[i * dv]);
    for (; i + 2 <= rows; i += 2) add_columns<2>(weight + i * width, width, block.data(), count, dv, &result[i * dv]);
    for (; i < rows; ++i) add_columns<1>(weight + i * width, width, block.data(), count, dv, &result[i * dv]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + first + i / per, head = group * per + i % per;
    Scalar* to = out + (token * s.heads + head) * s.value_size;
    for (int64_t j = 0; j < s.value_size; ++j) to[j] = static_cast<Scalar>(result[i * dv + j] / total[i]);
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
    for (int64_t first = 0; first < own; first += ROWS)
      for (int64_t g = 0; g < s.groups; ++g) pieces.push_back({r, g, first, std::min(own, first + ROWS)});
  }
  const int64_t count = pieces.size();
  const int threads = thread_count();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1 && work >= 32768)
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
