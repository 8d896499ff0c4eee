// CPU kernels of dspark.ops: matrix products at the speed of memory and attention over pages.
//
// Every row's result is the same bits however many rows share the call: each output has one accumulator that runs over
// the inner dimension in order, and no split depends on the number of rows or threads.
// Vectors are GCC's own (16 floats), so that one source serves AVX2, AVX-512 and NEON; bfloat16 uses the CPU's dot
// product where it has one. T rows, N outputs, K inputs, L = 16 lanes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 8;  // rows that share one pass over a weight tile
constexpr int64_t PREFETCH = 1024;  // bytes ahead: keeps memory busy while 8 rows compute
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));

inline float widen(at::BFloat16 x) { return static_cast<float>(x); }
inline float widen(at::Half x) { return static_cast<float>(x); }
inline float widen(float x) { return x; }

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }

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

template <typename Scalar, int M, int TILES>
void product(const Scalar* x, const Scalar* weight, const float* bias, Scalar* out, int64_t K, int64_t N, int64_t first) {
  using P = Packed<Scalar>;
  const int64_t tile = K * LANES;
  Vec acc[M][TILES];
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < TILES; ++t) acc[m][t] = Vec{};
  const Scalar* w = weight + first * tile;
  for (int64_t k = 0; k < K; k += P::STEP) {
    decltype(P::weights(w)) lanes[TILES];
#pragma GCC unroll 8
    for (int t = 0; t < TILES; ++t) {
      lanes[t] = P::weights(w + t * tile + k * LANES);
      __builtin_prefetch(reinterpret_cast<const char*>(w + t * tile + k * LANES) + PREFETCH);
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
        out[m * N + n + i] = static_cast<Scalar>(value);
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

template <typename Scalar>
void linear_into(const Scalar* x, const Scalar* w, const float* bias, Scalar* out, int64_t T, int64_t K, int64_t N) {
  const int64_t tiles = (N + LANES - 1) / LANES;
  const int threads = at::get_num_threads();
  const bool split = threads > 1 && tiles > 1 && N * K >= 16384;
#pragma omp parallel num_threads(threads) if (split)
  {
    const int64_t id = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t end = tiles * (id + 1) / of;
    for (int64_t tile = tiles * id / of; tile < end;) {
      const int64_t step = std::min<int64_t>(3, end - tile);
      for (int64_t t = 0; t < T; t += ROWS) {
        const int64_t M = std::min(ROWS, T - t);
        if (step == 3) rows<Scalar, 3>(M, x + t * K, w, bias, out + t * N, K, N, tile);
        else if (step == 2) rows<Scalar, 2>(M, x + t * K, w, bias, out + t * N, K, N, tile);
        else rows<Scalar, 1>(M, x + t * K, w, bias, out + t * N, K, N, tile);
      }
      tile += step;
    }
  }
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N) {
  const int64_t K = x.size(-1);
  const Tensor rows_x = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = N;
  Tensor out = at::empty(shape, x.options());
  const Tensor wide = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* b = bias ? wide.const_data_ptr<float>() : nullptr;
  const int64_t T = x.numel() / K;
  if (x.scalar_type() == at::kFloat)
    linear_into(rows_x.const_data_ptr<float>(), packed.const_data_ptr<float>(), b, out.data_ptr<float>(), T, K, N);
  else
    linear_into(rows_x.const_data_ptr<at::BFloat16>(), packed.const_data_ptr<at::BFloat16>(), b,
                out.data_ptr<at::BFloat16>(), T, K, N);
  return out;
}

// ---- attention of ragged queries over pages ----------------------------------------------------------------------

inline Vec exponential(Vec x) {  // e^x for x <= 0, relative error about 1e-7
  const Vec low = Vec{} - 87.0f;
  x = x > low ? x : low;
  const Vec n_real = x * 1.44269504089f;
  typedef int32_t Ints __attribute__((vector_size(64)));
  const Ints n = __builtin_convertvector(n_real - 0.5f, Ints);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

inline float dot(const float* a, const float* b, int64_t size) {  // size is a multiple of 16, zero-padded
  Vec acc = Vec{};
  for (int64_t i = 0; i < size; i += LANES) acc += load(a + i) * load(b + i);
  typedef float Half __attribute__((vector_size(32)));
  Half h;
  std::memcpy(&h, &acc, sizeof h);
  Half g;
  std::memcpy(&g, reinterpret_cast<const char*>(&acc) + sizeof h, sizeof g);
  h += g;
  return ((h[0] + h[4]) + (h[1] + h[5])) + ((h[2] + h[6]) + (h[3] + h[7]));
}

struct Shape {
  int64_t heads, groups, key_size, value_size, page_size, table_width, window;
  float scale, softcap;
  bool causal;
};

template <typename Scalar>
void widen_row(const Scalar* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
}

// Queries [first, last) of one sequence against one key/value head.
template <typename Scalar>
void attend(const Scalar* q, const Scalar* k, const Scalar* v, const Scalar* pool_k, const Scalar* pool_v,
            const int32_t* table, Scalar* out, const Shape& s, int64_t start, int64_t own, int64_t context,
            int64_t group, int64_t first, int64_t last) {
  const int64_t per = s.heads / s.groups, rows = (last - first) * per, keys = context + own;
  const int64_t dk = (s.key_size + LANES - 1) / LANES * LANES, dv = (s.value_size + LANES - 1) / LANES * LANES;
  const int64_t width = (keys + LANES - 1) / LANES * LANES;
  std::vector<float> query(rows * dk, 0.0f), score(rows * width, -INFINITY), row(std::max(dk, dv), 0.0f);
  std::vector<float> total(rows, 0.0f), result(rows * dv, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + first + i / per, head = group * per + i % per;
    widen_row(q + (token * s.heads + head) * s.key_size, &query[i * dk], s.key_size);
    for (int64_t j = 0; j < s.key_size; ++j) query[i * dk + j] *= s.scale;
  }
  auto at_key = [&](const Scalar* pool, const Scalar* fresh, int64_t key, int64_t size) {
    if (key >= context) return fresh + ((start + key - context) * s.groups + group) * size;
    const int64_t slot = int64_t(table[key / s.page_size]) * s.page_size + key % s.page_size;
    return pool + (slot * s.groups + group) * size;
  };
  auto visible = [&](int64_t i, int64_t key) {
    const int64_t position = context + first + i / per;
    return !(s.causal && key > position) && !(s.window > 0 && key <= position - s.window);
  };
  const int64_t oldest = s.window > 0 ? std::max<int64_t>(0, context + first - s.window + 1) : 0;
  const int64_t newest = s.causal ? context + last : keys;
  for (int64_t key = oldest; key < newest; ++key) {
    widen_row(at_key(pool_k, k, key, s.key_size), row.data(), s.key_size);
    for (int64_t i = 0; i < rows; ++i) {
      if (!visible(i, key)) continue;
      const float raw = dot(&query[i * dk], row.data(), dk);
      score[i * width + key] = s.softcap > 0 ? s.softcap * std::tanh(raw / s.softcap) : raw;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* line = &score[i * width];
    const float peak = *std::max_element(line + oldest, line + newest);
    for (int64_t key = 0; key < width; key += LANES) {
      Vec weight = exponential(load(line + key) - peak);
      weight = load(line + key) > Vec{} - INFINITY ? weight : Vec{};
      std::memcpy(line + key, &weight, sizeof weight);
    }
    for (int64_t key = 0; key < width; key += LANES) total[i] += sum(load(line + key));
  }
  std::fill(row.begin(), row.end(), 0.0f);
  for (int64_t key = oldest; key < newest; ++key) {
    widen_row(at_key(pool_v, v, key, s.value_size), row.data(), s.value_size);
    for (int64_t i = 0; i < rows; ++i) {
      const float weight = score[i * width + key];
      if (weight == 0.0f) continue;
      for (int64_t j = 0; j < dv; j += LANES) {
        const Vec sum_j = load(&result[i * dv + j]) + load(row.data() + j) * weight;
        std::memcpy(&result[i * dv + j], &sum_j, sizeof sum_j);
      }
    }
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
  const int threads = at::get_num_threads();
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

TORCH_LIBRARY_FRAGMENT(dspark, library) {
  library.def("linear(Tensor x, Tensor packed, Tensor? bias, SymInt n) -> Tensor");
  library.def("store(Tensor k, Tensor v, Tensor(a!) pool_k, Tensor(b!) pool_v, Tensor slots) -> ()");
  library.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor pool_k, Tensor pool_v, Tensor table, Tensor cu, "
      "Tensor context, int page_size, float scale, bool causal, int window, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(dspark, CPU, library) {
  library.impl("linear", linear);
  library.impl("store", store);
  library.impl("ragged_attention", ragged_attention);
}
