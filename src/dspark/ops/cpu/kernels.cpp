// CPU kernels of dspark.ops: matrix products at the speed of memory and attention over pages.
//
// Every row's result is the same bits however many rows share the call: each output has one accumulator that runs over
// the inner dimension in order, and no split depends on the number of rows or threads.
// Vectors are GCC's own (16 floats), so that one source serves AVX2, AVX-512 and NEON; bfloat16 uses the CPU's dot
// product where it has one. T rows, N outputs, K inputs, L = 16 lanes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 8;  // rows that share one pass over a weight tile
constexpr int64_t PREFETCH = 4096;  // bytes ahead: keeps memory busy while 8 rows compute
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));

inline float widen(at::BFloat16 x) { return static_cast<float>(x); }
inline float widen(at::Half x) { return static_cast<float>(x); }
inline float widen(float x) { return x; }

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }

// Threads of our own regions. While a graph of few rows runs, OpenMP's number is 1: its elementwise loops are shorter
// than the barriers between them (measured: 15 % of a step), and ours keep the number that was set before.
thread_local int kept_threads = 0;
inline int thread_count() { return kept_threads ? kept_threads : at::get_num_threads(); }

// ---- packed linear: weights lie as [N/16][K/STEP][16][STEP], one stream per tile of 16 outputs -------------------

template <typename Scalar>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int64_t STEP = 1;
  static inline void multiply(Vec& acc, Vec weight, const float* x) { acc += weight * x[0]; }
  static inline Vec weights(const float* p) { return load(p); }
};

#if defined(__AVX512BF16__)
template <>
struct Packed<at::BFloat16> {
  static constexpr int64_t STEP = 2;
  static inline __m512i weights(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
  static inline void multiply(Vec& acc, __m512i weight, const at::BFloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#else
template <>
struct Packed<at::BFloat16> {
  static constexpr int64_t STEP = 2;
  static inline Bits weights(const at::BFloat16* p) { Bits v; std::memcpy(&v, p, sizeof v); return v; }
  static inline void multiply(Vec& acc, Bits weight, const at::BFloat16* x) {
    acc += (Vec)(weight << 16) * widen(x[0]);
    acc += (Vec)(weight & 0xffff0000u) * widen(x[1]);
  }
};
#endif

template <typename Scalar, int M, int TILES, typename Out = Scalar>
void product(const Scalar* x, const Scalar* weight, const float* bias, Out* out, int64_t K, int64_t N, int64_t first) {
  using P = Packed<Scalar>;
  const int64_t tile = K * LANES;
  Vec acc[M][TILES];
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < TILES; ++t) acc[m][t] = Vec{};
  const Scalar* w = weight + first * tile;
  const Scalar* ahead = w + PREFETCH / sizeof(Scalar);
  const int64_t turn = K - PREFETCH / int64_t(LANES * sizeof(Scalar));  // from here on, the start of the next tiles
  for (int64_t k = 0; k < K; k += P::STEP) {
    decltype(P::weights(w)) lanes[TILES];
    if (k == turn) ahead += (TILES - 1) * tile;
#pragma GCC unroll 8
    for (int t = 0; t < TILES; ++t) {
      lanes[t] = P::weights(w + t * tile + k * LANES);
      __builtin_prefetch(ahead + t * tile + k * LANES);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int t = 0; t < TILES; ++t) P::multiply(acc[m][t], lanes[t], x + m * K + k);
  }
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < TILES; ++t) {
      const int64_t n = (first + t) * LANES, count = std::min(LANES, N - n);
      for (int64_t i = 0; i < count; ++i) {
        const float value = acc[m][t][i] + (bias ? bias[n + i] : 0.0f);
        out[m * N + n + i] = static_cast<Out>(value);
      }
    }
}

template <typename Scalar, int TILES>
void rows(int64_t M, const Scalar* x, const Scalar* w, const float* b, Scalar* out, int64_t K, int64_t N, int64_t first) {
  switch (M) {
    case 1: return product<Scalar, 1, TILES>(x, w, b, out, K, N, first);
    case 2: return product<Scalar, 2, TILES>(x, w, b, out, K, N, first);
    case 3: return product<Scalar, 3, TILES>(x, w, b, out, K, N, first);
    case 4: return product<Scalar, 4, TILES>(x, w, b, out, K, N, first);
    case 5: return product<Scalar, 5, TILES>(x, w, b, out, K, N, first);
    case 6: return product<Scalar, 6, TILES>(x, w, b, out, K, N, first);
    case 7: return product<Scalar, 7, TILES>(x, w, b, out, K, N, first);
    default: return product<Scalar, 8, TILES>(x, w, b, out, K, N, first);
  }
}

struct Product {
  const void* weight;
  Tensor bias;
  Tensor out;
  int64_t n;
};

// Several products of the same rows in one parallel region: the tiles of all of them are dealt out together.
template <typename Scalar>
void products_into(const Tensor& rows_x, std::vector<Product>& products, int64_t T, int64_t K) {
  const Scalar* x = rows_x.const_data_ptr<Scalar>();
  int64_t tiles = 0, outputs = 0;
  for (const Product& p : products) tiles += (p.n + LANES - 1) / LANES, outputs += p.n;
  const int threads = thread_count();
#pragma omp parallel num_threads(threads) if (threads > 1 && tiles > 1 && outputs * K >= 16384)
  {
    const int64_t id = omp_get_thread_num(), of = omp_get_num_threads();
    int64_t offset = 0;
    for (Product& p : products) {
      const int64_t own = (p.n + LANES - 1) / LANES;
      const int64_t begin = std::clamp<int64_t>(tiles * id / of - offset, 0, own);
      const int64_t end = std::clamp<int64_t>(tiles * (id + 1) / of - offset, 0, own);
      offset += own;
      const Scalar* w = static_cast<const Scalar*>(p.weight);
      const float* b = p.bias.defined() ? p.bias.const_data_ptr<float>() : nullptr;
      Scalar* out = p.out.data_ptr<Scalar>();
      for (int64_t tile = begin; tile < end;) {
        const int64_t step = std::min<int64_t>(3, end - tile);
        for (int64_t t = 0; t < T; t += ROWS) {
          const int64_t M = std::min(ROWS, T - t);
          if (step == 3) rows<Scalar, 3>(M, x + t * K, w, b, out + t * p.n, K, p.n, tile);
          else if (step == 2) rows<Scalar, 2>(M, x + t * K, w, b, out + t * p.n, K, p.n, tile);
          else rows<Scalar, 1>(M, x + t * K, w, b, out + t * p.n, K, p.n, tile);
        }
        tile += step;
      }
    }
  }
}

Product prepare(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  auto shape = x.sizes().vec();
  shape.back() = n;
  return {packed.const_data_ptr(), bias ? bias->to(at::kFloat).contiguous() : Tensor(), at::empty(shape, x.options()), n};
}

void run(const Tensor& x, std::vector<Product>& products) {
  const int64_t K = x.size(-1), T = x.numel() / K;
  const Tensor rows_x = x.contiguous();
  if (x.scalar_type() == at::kFloat) products_into<float>(rows_x, products, T, K);
  else products_into<at::BFloat16>(rows_x, products, T, K);
}

using Bias = std::optional<Tensor>;

Tensor linear(const Tensor& x, const Tensor& w, const Bias& b, int64_t n) {
  std::vector<Product> products{prepare(x, w, b, n)};
  run(x, products);
  return products[0].out;
}

std::tuple<Tensor, Tensor> linear2(const Tensor& x, const Tensor& w0, const Bias& b0, int64_t n0, const Tensor& w1,
                                   const Bias& b1, int64_t n1) {
  std::vector<Product> products{prepare(x, w0, b0, n0), prepare(x, w1, b1, n1)};
  run(x, products);
  return {products[0].out, products[1].out};
}

std::tuple<Tensor, Tensor, Tensor> linear3(const Tensor& x, const Tensor& w0, const Bias& b0, int64_t n0,
                                           const Tensor& w1, const Bias& b1, int64_t n1, const Tensor& w2,
                                           const Bias& b2, int64_t n2) {
  std::vector<Product> products{prepare(x, w0, b0, n0), prepare(x, w1, b1, n1), prepare(x, w2, b2, n2)};
  run(x, products);
  return {products[0].out, products[1].out, products[2].out};
}

// ---- attention of ragged queries over pages ----------------------------------------------------------------------

inline Vec exponential(Vec x) {  // e^x for x <= 0, relative error about 1e-7
  const Vec low = Vec{} - 87.0f;
  x = x > low ? x : low;
  const Vec n_real = x * 1.44269504089f;
  typedef int32_t Whole __attribute__((vector_size(64)));
  const Whole n = __builtin_convertvector(n_real - 0.5f, Whole);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Whole bits = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

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
  std::vector<float> query(rows * dk, 0.0f), score(rows * width), result(rows * dv, 0.0f), total(rows);
  std::vector<float> block(LANES * std::max(dk, dv), 0.0f), columns(LANES * dk);
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

// ---- the sequential head: one block drawn left to right ----------------------------------------------------------------

inline float dot(const float* a, const float* b, int64_t size) {  // size is a multiple of 16, zero-padded
  Vec acc = Vec{};
  for (int64_t i = 0; i < size; i += LANES) acc += load(a + i) * load(b + i);
  float half[LANES / 2];
  for (int64_t i = 0; i < LANES / 2; ++i) half[i] = acc[i] + acc[i + LANES / 2];
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}

// The largest of x[count], which is padded with -inf to a multiple of 16; NaN is never the largest.
inline float peak_of(const float* x, int64_t count) {
  Vec peaks = Vec{} - INFINITY;
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec here = load(x + i);
    peaks = here > peaks ? here : peaks;
  }
  float peak = peaks[0];
  for (int lane = 1; lane < LANES; ++lane) peak = std::max(peak, peaks[lane]);
  return peak;
}

// Where `value` first stands in x[count]; `none` where it does not.
inline int64_t first_of(const float* x, int64_t count, float value, int64_t none, int64_t start = 0) {
  for (int64_t i = start; i < count; i += LANES) {
    if (i + LANES <= count && peak_of(x + i, LANES) != value) continue;
    for (int64_t lane = i; lane < std::min(i + LANES, count); ++lane)
      if (x[lane] == value) return lane;
  }
  return none;
}

inline uint32_t rank_of(float x) {  // orders floats as unsigned integers
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Indices of the `top` largest values, rising; among equals the lowest index wins. All of them for top 0.
void largest(const float* value, int64_t V, int64_t top, std::vector<int32_t>& chosen) {
  chosen.clear();
  if (top <= 0 || top >= V) {
    for (int64_t v = 0; v < V; ++v) chosen.push_back(v);
    return;
  }
  constexpr int BUCKETS = 4096, SHIFT = 20;
  std::vector<int32_t> count(BUCKETS, 0), border;
  for (int64_t v = 0; v < V; ++v) ++count[rank_of(value[v]) >> SHIFT];
  int64_t bucket = BUCKETS - 1, above = 0;
  while (above + count[bucket] < top) above += count[bucket--];
  for (int64_t v = 0; v < V; ++v)
    if (int64_t(rank_of(value[v]) >> SHIFT) == bucket) border.push_back(v);
  const auto before = [&](int32_t a, int32_t b) { return value[a] != value[b] ? value[a] > value[b] : a < b; };
  std::nth_element(border.begin(), border.begin() + (top - above - 1), border.end(), before);
  const int32_t last = border[top - above - 1];
  for (int64_t v = 0; v < V; ++v) {
    const int64_t mine = rank_of(value[v]) >> SHIFT;
    if (mine > bucket || (mine == bucket && !before(last, v))) chosen.push_back(v);
  }
}

inline float block_sum(const float* x) {  // of 16 values, in an order that vectors like
  float half[LANES / 2];
  for (int64_t i = 0; i < LANES / 2; ++i) half[i] = x[i] + x[i + LANES / 2];
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
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

// Adds W2 times `count` embeddings to wide[count][stride], for vocabulary tiles [first, last); W2 lies as every linear's
// weights. A row's sums do not depend on how many rows share the pass.
template <typename Scalar>
void add_bias(const Scalar* embedding, const Scalar* packed, int64_t count, int64_t rank, int64_t V, int64_t first,
              int64_t last, float* bias, float* wide, int64_t stride) {
  for (int64_t done = 0; done < count;) {
    const int64_t left = count - done;
    auto pass = [&]<int M>() {
      const Scalar* x = embedding + done * rank;
      constexpr int TILES = M > 4 ? 2 : 4;
      int64_t tile = first;
      for (; tile + TILES <= last; tile += TILES) product<Scalar, M, TILES, float>(x, packed, nullptr, bias, rank, V, tile);
      for (; tile < last; ++tile) product<Scalar, M, 1, float>(x, packed, nullptr, bias, rank, V, tile);
      const int64_t begin = first * LANES, end = std::min(V, last * LANES);
      for (int m = 0; m < M; ++m)
        for (int64_t v = begin; v < end; ++v) wide[(done + m) * stride + v] += bias[m * V + v];
      done += M;
    };
    if (left >= 8) pass.template operator()<8>();
    else if (left >= 4) pass.template operator()<4>();
    else if (left >= 2) pass.template operator()<2>();
    else pass.template operator()<1>();
  }
}

// One request's block, every slot among its `top` candidates.
template <typename Scalar>
void chain_of(const Scalar* base, const Scalar* w1, const Scalar* w2, int64_t anchor, int64_t K, int64_t V, int64_t rank, int64_t top,
               double temperature, const double* uniform, const float* confidence_w, int64_t* token, float* q,
              float* confidence) {
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
    if (temperature == 0) {
      q[k * V + chosen[best]] = 1.0f;
    } else {
      double total = 0;
      for (int64_t i = 0; i < count; i += LANES) {
        const Vec raw = load(&logit[i]);
        const Vec weight = raw > Vec{} - INFINITY ? exponential((raw - peak) / float(temperature)) : Vec{};
        std::memcpy(&logit[i], &weight, sizeof weight);
        total += block_sum(&logit[i]);
      }
      best = draw_from(logit.data(), count, total, uniform[k]);
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
// so that no bit depends on the number of threads or requests.
template <typename Scalar>
struct WholeChain {
  static constexpr int64_t PARTS = 16;
  const Scalar *base, *w1, *packed;
  const int64_t* anchor;
  const double *temperature, *uniform;
  const float* confidence_w;
  int64_t R, K, V, rank;
  int64_t* token;
  float *q, *confidence;
  int64_t stride = (V + LANES - 1) / LANES * LANES, padded = (rank + LANES - 1) / LANES * LANES;
  std::vector<float> logit = std::vector<float>(R * stride, -INFINITY), peak = std::vector<float>(R * PARTS);
  std::vector<double> total = std::vector<double>(R * PARTS);

  int64_t tile_of(int64_t part) const { return (V + LANES - 1) / LANES * part / PARTS; }
  int64_t start_of(int64_t part) const { return std::min(V, tile_of(part) * LANES); }
  int64_t previous(int64_t r, int64_t k) const { return k ? token[r * K + k - 1] : anchor[r]; }

  // Every thread of a team calls this with its number.
  void run(int64_t thread, int64_t threads) {
    const int64_t low = PARTS * thread / threads, high = PARTS * (thread + 1) / threads;
    std::vector<Scalar> embedding(R * rank);
    thread_local std::vector<float> bias;  // kept: memory of this size would come from the system anew every time
    if (int64_t(bias.size()) < std::min(R, ROWS) * V) bias.resize(std::min(R, ROWS) * V);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t r = 0; r < R; ++r) std::copy_n(w1 + previous(r, k) * rank, rank, embedding.begin() + r * rank);
      for (int64_t part = low; part < high; ++part) score(part, k, embedding.data(), bias.data());
#pragma omp barrier
      for (int64_t r = 0; r < R; ++r)
        if (temperature[r] > 0)
          for (int64_t part = low; part < high; ++part) weigh(r, part);
#pragma omp barrier
      for (int64_t r = thread; r < R; r += threads) pick(r, k);
#pragma omp barrier
      for (int64_t r = 0; r < R; ++r)
        if (temperature[r] > 0) write_law(r, k, low, high);
    }
  }

  void score(int64_t part, int64_t k, const Scalar* embedding, float* bias) {
    const int64_t begin = start_of(part), end = start_of(part + 1);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t v = begin; v < end; ++v) logit[r * stride + v] = widen(base[(r * K + k) * V + v]);
    add_bias(embedding, packed, R, rank, V, tile_of(part), tile_of(part + 1), bias, logit.data(), stride);
    for (int64_t r = 0; r < R; ++r) {
      if (end == V) std::fill(logit.begin() + r * stride + V, logit.begin() + (r + 1) * stride, -INFINITY);
      peak[r * PARTS + part] = end > begin ? peak_of(&logit[r * stride + begin], end - begin) : -INFINITY;
    }
  }

  float highest(int64_t r) const { return *std::max_element(&peak[r * PARTS], &peak[r * PARTS] + PARTS); }

  void weigh(int64_t r, int64_t part) {  // logits become weights
    const float top = highest(r), heat = float(temperature[r]);
    double sum = 0;
    for (int64_t v = start_of(part); v < start_of(part + 1); v += LANES) {
      float* here = &logit[r * stride + v];
      const Vec raw = load(here), weight = raw > Vec{} - INFINITY ? exponential((raw - top) / heat) : Vec{};
      std::memcpy(here, &weight, sizeof weight);
      sum += block_sum(here);
    }
    total[r * PARTS + part] = sum;
  }

  void pick(int64_t r, int64_t k) {
    const float* row = &logit[r * stride];
    int64_t chosen = V;
    if (temperature[r] == 0) {
      const float top = highest(r);
      for (int64_t part = 0; part < PARTS && chosen == V; ++part)
        if (peak[r * PARTS + part] == top) chosen = first_of(row, start_of(part + 1), top, V, start_of(part));
    } else {
      chosen = draw_from(row, V, whole(r), uniform[r * K + k]);
    }
    chosen = std::min(chosen, V - 1);
    if (temperature[r] == 0) q[(r * K + k) * V + chosen] = 1.0f;
    token[r * K + k] = chosen;
    if (!confidence) return;
    std::vector<float> wide(padded, 0.0f);
    for (int64_t j = 0; j < rank; ++j) wide[j] = widen(w1[previous(r, k) * rank + j]);
    confidence[r * K + k] += dot(confidence_w, wide.data(), padded);
  }

  double whole(int64_t r) const {
    double sum = 0;
    for (int64_t part = 0; part < PARTS; ++part) sum += total[r * PARTS + part];
    return sum;
  }

  void write_law(int64_t r, int64_t k, int64_t low, int64_t high) {
    const float share = float(1.0 / whole(r));
    for (int64_t v = start_of(low); v < start_of(high); ++v) q[(r * K + k) * V + v] = logit[r * stride + v] * share;
  }
};

std::tuple<Tensor, Tensor, Tensor> draft_chain(const Tensor& base, const Tensor& w1, const Tensor& w2,
                                               const Tensor& anchor, const Tensor& temperature, const Tensor& uniform,
                                               int64_t top, const Tensor& confidence_base, const Tensor& confidence_w,
                                               const Bias& packed) {
  const int64_t R = base.size(0), K = base.size(1), V = base.size(2), rank = w1.size(1);
  Tensor token = at::empty({R, K}, base.options().dtype(at::kLong)), confidence = confidence_base.to(at::kFloat).clone();
  Tensor q = at::zeros({R, K, V}, base.options().dtype(at::kFloat));
  const bool sees_token = confidence_w.numel() > 0;
  Tensor padded = at::zeros({(rank + LANES - 1) / LANES * LANES}, confidence.options());
  if (sees_token) padded.slice(0, 0, rank).copy_(confidence_w);
  const Tensor basec = base.contiguous(), anchorc = anchor.contiguous(), temperaturec = temperature.contiguous(),
               uniformc = uniform.contiguous();
  const int threads = thread_count();
  const int64_t* anchors = anchorc.const_data_ptr<int64_t>();
  const double *heats = temperaturec.const_data_ptr<double>(), *uniforms = uniformc.const_data_ptr<double>();
  const float* seen = padded.const_data_ptr<float>();
  int64_t* tokens = token.data_ptr<int64_t>();
  float *laws = q.data_ptr<float>(), *confidences = confidence.data_ptr<float>();
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Scalar *logits = basec.const_data_ptr<Scalar>(), *first = w1.const_data_ptr<Scalar>(),
                 *second = w2.const_data_ptr<Scalar>(),
                 *tiles = packed ? packed->const_data_ptr<Scalar>() : nullptr;
    if (tiles && (top <= 0 || top >= V)) {
      WholeChain<Scalar> chain{logits, first, tiles, anchors, heats, uniforms, seen, R, K, V, rank, tokens, laws,
                               sees_token ? confidences : nullptr};
#pragma omp parallel num_threads(threads)
      chain.run(omp_get_thread_num(), omp_get_num_threads());
      return;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && R > 1)
    for (int64_t r = 0; r < R; ++r)
      chain_of(logits + r * K * V, first, second, anchors[r], K, V, rank, top, heats[r], uniforms + r * K, seen,
               tokens + r * K, laws + r * K * V, sees_token ? confidences + r * K : nullptr);
  };
  if (base.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {token, q, confidence};
}

// ---- the rejection rule over a round, for laws that temperature alone shapes ----------------------------------------------

// exp((logit - peak) / temperature) of one row; returns the sum.
template <typename Scalar>
double weights_of(const Scalar* logit, int64_t V, float temperature, std::vector<float>& weight) {
  for (int64_t v = 0; v < V; ++v) weight[v] = widen(logit[v]);
  const float peak = peak_of(weight.data(), V);
  double total = 0;
  for (int64_t v = 0; v < V; v += LANES) {
    const Vec raw = load(&weight[v]), w = raw > Vec{} - INFINITY ? exponential((raw - peak) / temperature) : Vec{};
    std::memcpy(&weight[v], &w, sizeof w);
    total += block_sum(&weight[v]);
  }
  return total;
}

template <typename Scalar>
std::pair<int64_t, int64_t> judge(const Scalar* logits, int64_t V, int64_t plan, const int64_t* token, const float* q,
                                  double temperature, const double* accept, double final_u) {
  std::vector<float> weight((V + LANES - 1) / LANES * LANES, -INFINITY);
  for (int64_t k = 0;; ++k, std::fill(weight.begin() + V, weight.end(), -INFINITY)) {
    const Scalar* row = logits + k * V;
    if (temperature == 0) {
      for (int64_t v = 0; v < V; ++v) weight[v] = widen(row[v]);
      const int64_t best = first_of(weight.data(), V, peak_of(weight.data(), V), V);
      if (k == plan || token[k] != best) return {k, best};
      continue;
    }
    const double total = weights_of(row, V, float(temperature), weight);
    if (!(total > 0) || std::isinf(total)) return {k, V};
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
                                   const Tensor& temperature, const Tensor& accept, const Tensor& final_u) {
  const int64_t R = plan.size(), V = logits.size(1), K = token.size(1);
  Tensor accepted = at::empty({R}, token.options()), last = at::empty({R}, token.options());
  std::vector<int64_t> start(R, 0);
  for (int64_t r = 1; r < R; ++r) start[r] = start[r - 1] + plan[r - 1] + 1;
  const Tensor x = logits.contiguous(), t = token.contiguous(), law = q.contiguous(), heat = temperature.contiguous(),
               u = accept.contiguous(), f = final_u.contiguous();
  const int threads = thread_count();
  const int64_t* drafted = t.const_data_ptr<int64_t>();
  const float* laws = law.const_data_ptr<float>();
  const double *heats = heat.const_data_ptr<double>(), *accepts = u.const_data_ptr<double>(),
               *finals = f.const_data_ptr<double>();
  int64_t *counts = accepted.data_ptr<int64_t>(), *lasts = last.data_ptr<int64_t>();
  auto run_all = [&]<typename Scalar>(Scalar) {
    const Scalar* rows_x = x.const_data_ptr<Scalar>();
#pragma omp parallel for num_threads(threads) if (threads > 1 && R > 1)
    for (int64_t r = 0; r < R; ++r)
      std::tie(counts[r], lasts[r]) = judge(rows_x + start[r] * V, V, plan[r], drafted + r * K, laws + r * K * V, heats[r],
                                            accepts + r * K, finals[r]);
  };
  if (logits.scalar_type() == at::kFloat) run_all(float{});
  else run_all(at::BFloat16{});
  return {accepted, last};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def("linear(Tensor x, Tensor w, Tensor? b, int n) -> Tensor");
  library.def("linear2(Tensor x, Tensor w0, Tensor? b0, int n0, Tensor w1, Tensor? b1, int n1) -> (Tensor, Tensor)");
  library.def(
      "linear3(Tensor x, Tensor w0, Tensor? b0, int n0, Tensor w1, Tensor? b1, int n1, Tensor w2, Tensor? b2, int n2) "
      "-> (Tensor, Tensor, Tensor)");
  library.def("store(Tensor k, Tensor v, Tensor(a!) pool_k, Tensor(b!) pool_v, Tensor slots) -> ()");
  library.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor pool_k, Tensor pool_v, Tensor table, Tensor cu, "
      "Tensor context, int page_size, float scale, bool causal, int window, float softcap) -> Tensor");
  library.def(
      "draft_chain(Tensor base, Tensor w1, Tensor w2, Tensor anchor, Tensor temperature, Tensor uniform, int top, "
      "Tensor confidence_base, Tensor confidence_w, Tensor? packed) -> (Tensor, Tensor, Tensor)");
  library.def(
      "verdict(Tensor logits, int[] plan, Tensor token, Tensor q, Tensor temperature, Tensor accept, Tensor final_u) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) {
  library.impl("linear", linear);
  library.impl("linear2", linear2);
  library.impl("linear3", linear3);
  library.impl("store", store);
  library.impl("ragged_attention", ragged_attention);
  library.impl("draft_chain", draft_chain);
  library.impl("verdict", verdict);
}

// ---- the same ops as plain C functions, which compiled graphs call without the dispatcher ---------------------------

namespace {
const Tensor& get(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }
Bias maybe(AtenTensorHandle* handle) { return handle ? Bias(get(*handle)) : std::nullopt; }
AtenTensorHandle give(Tensor&& tensor) { return torch::aot_inductor::new_tensor_handle(std::move(tensor)); }
}  // namespace

extern "C" {
using H = AtenTensorHandle;

void dspark_serial_glue(int on) {
  if (on && !kept_threads) {
    kept_threads = at::get_num_threads();
    omp_set_num_threads(1);
  } else if (!on && kept_threads) {
    omp_set_num_threads(kept_threads);
    kept_threads = 0;
  }
}

AOTITorchError aoti_torch_cpu_linear(H x, H w, H* b, int64_t n, H* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *out = give(linear(get(x), get(w), maybe(b), n)); });
}

AOTITorchError aoti_torch_cpu_linear2(H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H* out0, H* out1) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [y0, y1] = linear2(get(x), get(w0), maybe(b0), n0, get(w1), maybe(b1), n1);
    *out0 = give(std::move(y0));
    *out1 = give(std::move(y1));
  });
}

AOTITorchError aoti_torch_cpu_linear3(H x, H w0, H* b0, int64_t n0, H w1, H* b1, int64_t n1, H w2, H* b2, int64_t n2,
                                      H* out0, H* out1, H* out2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto [y0, y1, y2] = linear3(get(x), get(w0), maybe(b0), n0, get(w1), maybe(b1), n1, get(w2), maybe(b2), n2);
    *out0 = give(std::move(y0));
    *out1 = give(std::move(y1));
    *out2 = give(std::move(y2));
  });
}

AOTITorchError aoti_torch_cpu_store(H k, H v, H pool_k, H pool_v, H slots, H*) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ store(get(k), get(v), get(pool_k), get(pool_v), get(slots)); });
}

AOTITorchError aoti_torch_cpu_ragged_attention(H q, H k, H v, H pool_k, H pool_v, H table, H cu, H context,
                                               int64_t page_size, double scale, int32_t causal, int64_t window,
                                               double softcap, H* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = give(ragged_attention(get(q), get(k), get(v), get(pool_k), get(pool_v), get(table), get(cu), get(context),
                                 page_size, scale, causal, window, softcap));
  });
}
}
