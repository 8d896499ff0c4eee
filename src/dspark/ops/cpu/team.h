// The threads of one parallel region, kept in step by a barrier of their own: entering a region costs more than a phase.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads of our own regions. While a graph of few rows runs, OpenMP's number is 1: its elementwise loops are shorter
// than the barriers between them (measured: 15 % of a step), and ours keep the number that was set before.
thread_local int kept_threads = 0;
inline int thread_count() { return kept_threads ? kept_threads : at::get_num_threads(); }

class Team {
 public:
  // OpenMP must give as many threads as are waited for: one where it might give fewer.
  Team() : size(omp_in_parallel() || omp_get_dynamic() ? 1 : std::min(thread_count(), omp_get_thread_limit())) {}

  // Every thread of a parallel region does `work` with its number.
  template <typename Work>
  void run(const Work& work) {
#pragma omp parallel num_threads(size)
    work(int64_t(omp_get_thread_num()));
  }

  // Returns once every thread of the team has come here.
  void meet() {
    if (size == 1) return;
    const int64_t now = turn.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      return;
    }
    // on a busy machine the one who is missing may need this very core
    for (int64_t spins = 0; turn.load(std::memory_order_acquire) == now; ++spins)
      if (spins < PATIENCE) breathe();
      else sched_yield();
  }

  const int64_t size;

 private:
  static constexpr int64_t PATIENCE = 4096;
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> turn{0};
};

// The part [begin, end) of `count` things that falls to thread `id` of `size`.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int64_t id, int64_t size) : begin(count * id / size), end(count * (id + 1) / size) {}
};

}  // namespace
