// The threads of one parallel region, kept in step by a barrier of their own: entering a region costs more than a phase.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "crowd.h"

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
  // One thread where more are not `worth` it, or where OpenMP might give fewer than are waited for.
  explicit Team(bool worth = true)
      : size(!worth || omp_in_parallel() || omp_get_dynamic()
                 ? 1
                 : crowd.size(std::min<int64_t>(thread_count(), omp_get_thread_limit()))) {}

  // Every thread of a parallel region does `work` with its number.
  template <typename Work>
  void run(const Work& work) {
    if (size == 1) return work(0);
    const int64_t started = nanoseconds();
#pragma omp parallel num_threads(size)
    {
      work(int64_t(omp_get_thread_num()));
      meet();
    }
    crowd.tell(size, nanoseconds() - started, waited / (size - 1));
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
    for (int64_t spins = 0; spins < PATIENCE; ++spins) {
      if (turn.load(std::memory_order_acquire) != now) return;
      breathe();
    }
    const int64_t since = nanoseconds();
    while (turn.load(std::memory_order_acquire) == now) sched_yield();  // the one who is missing may need this very core
    waited.fetch_add(nanoseconds() - since, std::memory_order_relaxed);
  }

  const int64_t size;

 private:
  static constexpr int64_t PATIENCE = 4096;
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> turn{0};
  alignas(64) std::atomic<int64_t> waited{0};  // ns, of all threads, beyond their patience
};

// The part [begin, end) of `count` things that falls to thread `id` of `size`.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int64_t id, int64_t size) : begin(count * id / size), end(count * (id + 1) / size) {}
};

}  // namespace
