// The walk of ops/walk.py, bit for bit.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include <ATen/ATen.h>

namespace {

using at::Tensor;

// to[i] = from[i] · factor. A function of its own: in its caller a product could be fused with the sum it goes into.
__attribute__((noinline)) void scale(const double* from, int64_t count, double factor, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

// The largest values of some falling lists, one by one.
struct Merge {
  std::vector<const double*> at, end;
  void add(const double* first, int64_t count) {
    if (count) at.push_back(first), end.push_back(first + count);
  }
  double next() {
    size_t best = 0;
    for (size_t i = 1; i < at.size(); ++i)
      if (*at[i] > *at[best]) best = i;
    const double value = *at[best]++;
    if (at[best] == end[best]) {
      at[best] = at.back(), end[best] = end.back();
      at.pop_back(), end.pop_back();
    }
    return value;
  }
};

struct Walk {
  const double *value, *ahead, *seconds;
  int64_t requests, slots, most;  // `most` rows have a price
  at::IntArrayRef limit, asked;
  double committed;
  std::optional<double> rate;
  std::vector<int64_t> alive;
  std::vector<double> falling, price;
  double gain = 0;
  int64_t admitted = 0;

  double now(int64_t r, int64_t k) const { return value[r * slots + k]; }

  // What n more rows are worth, with values of `sum`.
  double worth(double sum, int64_t n) const {
    return rate ? (gain + sum) - price[admitted + n] : (committed + (gain + sum)) / seconds[admitted + n];
  }

  // The values of the best rows from slot k on, falling; empty if none are worth it.
  void choose(int64_t k) {
    std::vector<int64_t> order(alive);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return now(a, k) > now(b, k); });
    std::vector<double> lists(order.size() * (slots - k)), own;
    Merge merge;
    int64_t total = 0;
    for (int64_t j = k; j < slots; ++j) {
      own.clear();
      for (const int64_t r : order)
        if (asked[r] > j) own.push_back(now(r, k));
      scale(own.data(), own.size(), ahead[k * slots + j], lists.data() + total);
      merge.add(lists.data() + total, own.size());
      total += own.size();
    }
    TORCH_CHECK(admitted + total < most, "walk: seconds end at ", most - 1, " rows of ", admitted + total);
    falling.clear();
    size_t best = 0;
    double sum = 0, highest = worth(sum, 0);
    for (int64_t n = 1; n <= total; ++n) {
      falling.push_back(merge.next());
      sum += falling.back();
      if (const double here = worth(sum, n); here > highest) highest = here, best = n;
    }
    falling.resize(best);
  }

  // Those whose present slot is among the chosen values stay.
  void admit(int64_t k, int64_t* length) {
    const double bound = falling.back();
    int64_t ties = std::count(falling.begin(), falling.end(), bound);
    std::vector<int64_t> stay;
    double sum = 0;
    for (const int64_t r : alive)
      if (now(r, k) > bound || (now(r, k) == bound && ties-- > 0)) {
        stay.push_back(r);
        sum += now(r, k);
        length[r] = k + 1;
      }
    alive = stay, gain += sum, admitted += stay.size();
  }

  void run(int64_t* length) {
    if (rate) price.resize(most), scale(seconds, most, *rate, price.data());
    alive.resize(requests);
    std::iota(alive.begin(), alive.end(), 0);
    for (int64_t k = 0; k < slots; ++k) {
      std::erase_if(alive, [&](int64_t r) { return limit[r] <= k; });
      if (alive.empty()) return;
      choose(k);
      if (falling.empty()) return;
      admit(k, length);
    }
  }
};

Tensor walk(const Tensor& value, const Tensor& ahead, const Tensor& seconds, at::IntArrayRef limit,
            at::IntArrayRef asked, double committed, std::optional<double> rate) {
  const Tensor v = value.contiguous(), a = ahead.contiguous(), s = seconds.contiguous();
  const int64_t R = v.size(0), K = v.size(1);
  TORCH_CHECK(int64_t(limit.size()) == R && int64_t(asked.size()) == R && a.size(0) == K, "walk: shapes differ");
  Tensor length = at::zeros({R}, at::kLong);
  Walk{v.const_data_ptr<double>(), a.const_data_ptr<double>(), s.const_data_ptr<double>(), R, K, s.size(0), limit, asked,
       committed, rate}.run(length.data_ptr<int64_t>());
  return length;
}

}  // namespace
