// Matrix products at the speed of memory, over packed weights.
//
// Each output has one accumulator that runs over the inner dimension in order, so its bits depend on no neighbour.
#pragma once

#include <omp.h>

#include <tuple>
#include <vector>

#include "packed.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t PREFETCH = 4096;  // bytes ahead: keeps memory busy while 8 rows compute
constexpr int64_t STEP_TILES = 3;   // tiles of a pass: with 8 rows as many accumulators as there are registers

// sums[M][TILES][16]: rows x[M][K] times the TILES tiles of outputs that begin with `weight`.
template <typename Scalar, int M, int TILES>
void product(const Scalar* x, const Scalar* weight, int64_t K, float* sums) {
  using P = Kind<Scalar>;
  const int64_t tile = P::tile(K);
  const Scalar* ahead = weight + PREFETCH / sizeof(Scalar);
  const int64_t turn = K - PREFETCH / int64_t(LANES * sizeof(Scalar));  // from here on, the start of the next tiles
  std::fill_n(sums, M * TILES * LANES, 0.0f);
  for (int64_t begin = 0; begin < K; begin += P::CHAIN) {
    typename P::Sums acc[M][TILES] = {};
    for (int64_t k = begin; k < std::min(K, begin + P::CHAIN); k += P::STEP) {
      decltype(P::weights(weight)) lanes[TILES];
      if (k == turn) ahead += (TILES - 1) * tile;
#pragma GCC unroll 8
      for (int t = 0; t < TILES; ++t) {
        lanes[t] = P::weights(weight + t * tile + k * LANES);
        __builtin_prefetch(ahead + t * tile + k * LANES);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) P::multiply(acc[m][t], lanes[t], x + m * K + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int t = 0; t < TILES; ++t) {
        float* to = sums + (m * TILES + t) * LANES;
        put(to, load(to) + P::total(acc[m][t]));
      }
  }
}

template <typename Scalar, int TILES>
void rows(int64_t M, const Scalar* x, const Scalar* w, int64_t K, float* sums) {
  switch (M) {
    case 1: return product<Scalar, 1, TILES>(x, w, K, sums);
    case 2: return product<Scalar, 2, TILES>(x, w, K, sums);
    case 3: return product<Scalar, 3, TILES>(x, w, K, sums);
    case 4: return product<Scalar, 4, TILES>(x, w, K, sums);
    case 5: return product<Scalar, 5, TILES>(x, w, K, sums);
    case 6: return product<Scalar, 6, TILES>(x, w, K, sums);
    case 7: return product<Scalar, 7, TILES>(x, w, K, sums);
    default: return product<Scalar, 8, TILES>(x, w, K, sums);
  }
}

// Tiles [begin, end) of the rows x times w; `finish(t, n, sums)` takes the 16 outputs of row t that begin with n.
template <typename Scalar, typename Finish>
void multiply(const Operand<Scalar>& x, const Scalar* w, int64_t begin, int64_t end, const Finish& finish) {
  using P = Kind<Scalar>;
  alignas(64) float sums[ROWS * STEP_TILES * LANES];
  const int64_t K = x.K;
  for (int64_t tile = begin; tile < end;) {
    const int64_t left = end - tile, step = x.T == 1 && left >= 6 ? 6 : left == 4 ? 2 : std::min(STEP_TILES, left);
    const Scalar* weight = w + tile * P::tile(K);
    for (int64_t t = 0; t < x.T; t += ROWS) {
      const int64_t M = std::min(ROWS, x.T - t);
      if (step == 6) product<Scalar, 1, 6>(x.row(t), weight, K, sums);
      else if (step == 3) rows<Scalar, 3>(M, x.row(t), weight, K, sums);
      else if (step == 2) rows<Scalar, 2>(M, x.row(t), weight, K, sums);
      else rows<Scalar, 1>(M, x.row(t), weight, K, sums);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t s = 0; s < step; ++s)
          finish(t + m, (tile + s) * LANES,
                 P::scaled(load(sums + (m * step + s) * LANES), weight + s * P::tile(K) + K * LANES, x.scale(t + m)));
    }
    tile += step;
  }
}

// ---- as tensor functions -------------------------------------------------------------------------------------------

// The kernels' layout of weight[N][K]: [N/16][values of a tile].
Tensor pack(const Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), tiles = (N + LANES - 1) / LANES;
  const Tensor rows = weight.contiguous();
  Tensor packed;
  auto fill = [&]<typename Scalar>(Scalar) {
    using P = Kind<Scalar>;
    TORCH_CHECK(K % P::STEP == 0, K, " inputs do not divide by ", P::STEP);
    packed = at::empty({tiles, P::tile(K)}, weight.options());
    const Scalar* from = rows.const_data_ptr<Scalar>();
    Scalar* to = packed.data_ptr<Scalar>();
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        P::fill(from + i * LANES * K, std::min(LANES, N - i * LANES), K, to + i * P::tile(K));
    });
  };
  if (weight.scalar_type() == at::kFloat) fill(float{});
  else fill(at::BFloat16{});
  return packed;
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
    const Share mine(tiles, omp_get_thread_num(), omp_get_num_threads());
    const Operand<Scalar> operand(x, T, K);
    int64_t offset = 0;
    for (Product& p : products) {
      const int64_t own = (p.n + LANES - 1) / LANES, n = p.n;
      const int64_t begin = std::clamp<int64_t>(mine.begin - offset, 0, own);
      const int64_t end = std::clamp<int64_t>(mine.end - offset, 0, own);
      offset += own;
      const float* b = p.bias.defined() ? p.bias.const_data_ptr<float>() : nullptr;
      Scalar* out = p.out.data_ptr<Scalar>();
      multiply(operand, static_cast<const Scalar*>(p.weight), begin, end, [=](int64_t t, int64_t first, Vec sums) {
        const int64_t count = std::min(LANES, n - first);
        if (b)
          for (int64_t i = 0; i < count; ++i) sums[i] += b[first + i];
        put(out + t * n + first, sums, count);
      });
    }
  }
}

Product prepare(const Tensor& x, const Tensor& packed, const Bias& bias, int64_t n) {
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

}  // namespace
