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

// Tiles of a pass over M rows: as many as there are sums to hold.
constexpr int64_t tiles_of(int64_t M) { return std::clamp<int64_t>(HELD / M, 1, 3); }
constexpr int64_t LONE_TILES = std::min<int64_t>(HELD, NATIVE == LANES ? 6 : 3);  // of a pass over one row: streams of memory

// sums[M][TILES][16]: rows x[M][K] times the TILES tiles of outputs that begin with `weight`.
template <typename Scalar, int M, int TILES>
void product(const typename Kind<Scalar>::Row* x, const Scalar* weight, int64_t K, float* sums) {
  using P = Kind<Scalar>;
  const int64_t tile = P::tile(K);
  const Scalar* ahead = weight + PREFETCH / sizeof(Scalar);
  const int64_t turn = K - PREFETCH / int64_t(LANES * sizeof(Scalar));  // from here on, the start of the next tiles
  constexpr bool whole = P::CHAIN > (int64_t(1) << 32);  // one sum over all inputs
  if constexpr (!whole) std::fill_n(sums, M * TILES * LANES, 0.0f);
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
        if constexpr (whole) put(to, P::total(acc[m][t]));
        else put(to, load(to) + P::total(acc[m][t]));
      }
  }
}

// `tiles` tiles of M rows, tiles <= tiles_of(M).
template <typename Scalar, int M>
void row_block(const typename Kind<Scalar>::Row* x, const Scalar* w, int64_t K, int64_t tiles, float* sums) {
  if constexpr (tiles_of(M) >= 3)
    if (tiles == 3) return product<Scalar, M, 3>(x, w, K, sums);
  if constexpr (tiles_of(M) >= 2)
    if (tiles == 2) return product<Scalar, M, 2>(x, w, K, sums);
  product<Scalar, M, 1>(x, w, K, sums);
}

template <typename Scalar, int M = 1>
void rows(int64_t count, const typename Kind<Scalar>::Row* x, const Scalar* w, int64_t K, int64_t tiles, float* sums) {
  if constexpr (M < ROWS)
    if (count > M) return rows<Scalar, M + 1>(count, x, w, K, tiles, sums);
  row_block<Scalar, M>(x, w, K, tiles, sums);
}

// Tiles [begin, end) of the rows x times w; `finish(t, n, sums)` takes the 16 outputs of row t that begin with n.
template <typename Scalar, typename Finish>
void multiply(const Operand<Scalar>& x, const Scalar* w, int64_t begin, int64_t end, const Finish& finish) {
  using P = Kind<Scalar>;
  alignas(64) float sums[HELD * LANES];
  const int64_t K = x.K, blocks = (x.T + ROWS - 1) / ROWS, most = x.T > 0 ? tiles_of((x.T + blocks - 1) / blocks) : 1;
  for (int64_t tile = begin; tile < end;) {
    const int64_t left = end - tile, lone = x.T == 1 && left >= LONE_TILES;
    const int64_t step = lone ? LONE_TILES : left == 4 ? std::min<int64_t>(2, most) : std::min(most, left);
    const Scalar* weight = w + tile * P::tile(K);
    for (int64_t block = 0; block < blocks; ++block) {
      const Share rows_here(x.T, block, blocks);
      const int64_t t = rows_here.begin, M = rows_here.end - t;
      if (lone) product<Scalar, 1, LONE_TILES>(x.row(t), weight, K, sums);
      else rows<Scalar>(M, x.row(t), weight, K, step, sums);
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
  Team team(tiles > 1 && outputs * K >= 16384);
  team.run([&](int64_t id) {
    const Share mine(tiles, id, team.size);
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
  });
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
