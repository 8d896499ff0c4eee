// The calibration of ops/calibrated.py.
#pragma once

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

namespace {

using at::Tensor;

inline double logit_of(double confidence, double least) {
  const double c = std::fmin(std::fmax(confidence, least), 1.0 - least);  // of a number and none, fmax takes the number
  return std::log(c / (1.0 - c));
}

inline double sigmoid_of(double z) { return 1.0 / (1.0 + std::exp(-z)); }

// The curve at a product from 0 to 1, linear between its points.
inline double along(const double* curve, int64_t points, double product) {
  const double place = product * double(points - 1);
  const int64_t cell = std::min(int64_t(place), points - 2);
  return curve[cell] + (curve[cell + 1] - curve[cell]) * (place - double(cell));
}

// Logits whose product of confidences at every slot becomes the curve of what it was, in place.
inline void bend(double* z, int64_t slots, const double* curve, int64_t points, double least) {
  for (int64_t k = 0; k < slots; ++k) z[k] = sigmoid_of(z[k]);
  double product = 1, before = 1;
  for (int64_t k = 0; k < slots; ++k) {
    product *= z[k];
    const double survival = std::min(along(curve + k * points, points, product), before);
    z[k] = survival / std::max(before, least);
    before = survival;
  }
  for (int64_t k = 0; k < slots; ++k) z[k] = logit_of(z[k], least);
}

std::tuple<Tensor, Tensor> calibrated(const Tensor& raw, at::IntArrayRef place, const Tensor& first, const Tensor& then,
                                      at::IntArrayRef curved, at::TensorList curves, double least) {
  const Tensor x = raw.contiguous(), f = first.contiguous(), t = then.contiguous();
  const int64_t R = x.size(0), K = x.size(1), width = f.size(2);
  TORCH_CHECK(int64_t(place.size()) == R && K <= width, "calibrated: shapes differ");
  Tensor z = at::empty({R, K}, x.options()), said = at::empty({R, K}, x.options());
  const double *from = x.const_data_ptr<double>(), *fits = f.const_data_ptr<double>(), *live = t.const_data_ptr<double>();
  double *to_z = z.data_ptr<double>(), *to_said = said.data_ptr<double>();
  for (int64_t r = 0; r < R; ++r, from += K, to_z += K, to_said += K) {
    const double *fit = fits + place[r] * 2 * width, *now = live + place[r] * 2 * width;
    for (int64_t k = 0; k < K; ++k) to_z[k] = logit_of(from[k], least) * fit[k] + fit[width + k];
    if (const int64_t which = curved[place[r]]; which >= 0)
      bend(to_z, K, curves[which].const_data_ptr<double>(), curves[which].size(1), least);
    for (int64_t k = 0; k < K; ++k) to_said[k] = sigmoid_of(to_z[k] * now[k] + now[width + k]);
  }
  return {z, said};
}

}  // namespace
