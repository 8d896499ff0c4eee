// Whether other threads are worth waiting for: on a busy machine they may not run when they are needed.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace {

inline int64_t nanoseconds() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// What the regions of one calling thread went through. Beside three busy processes a step of two threads took eight times
// as long: every meeting waits for the scheduler's next slice. Where n threads stand still for w of their time t, because
// one of them does not run, they do in t what one does in n (t - w): where that is less than t, one is sooner.
class Crowd {
 public:
  // Threads of the next region.
  int64_t size(int64_t most) {
    if (most == 1 || left == 0) return most;
    --left;
    return 1;
  }

  // A region of `threads` took so long, and stood still for so much of it.
  void tell(int64_t threads, int64_t took, int64_t stood) {
    total += took - total / MEMORY, lost += stood - lost / MEMORY;
    ++seen;
    if (seen < (span > FIRST ? AGAIN : ENOUGH)) return;
    if (total > threads * (total - lost)) {
      left = span, span = std::min(2 * span, LONGEST);
      total = lost = seen = 0;
    } else if (seen >= CALM) {
      span = FIRST;
    }
  }

  int64_t alone() const { return left; }

 private:
  static constexpr int64_t MEMORY = 32;  // regions that count
  static constexpr int64_t ENOUGH = 16;  // regions to judge by, at first
  static constexpr int64_t AGAIN = 4;    // ... and when several threads are tried again
  static constexpr int64_t FIRST = 64, LONGEST = 8192;  // regions by one thread before that
  static constexpr int64_t CALM = 256;   // regions after which a crowd is forgotten
  int64_t left = 0, span = FIRST, total = 0, lost = 0, seen = 0;
};

thread_local Crowd crowd;

}  // namespace
