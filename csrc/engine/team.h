// The threads that run a plan together: one OpenMP region, barriers of our own, and ways to share work out.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mobilenet_fast {

// A barrier for threads that arrive within microseconds of each other: it spins for a bounded time, then gives way, so
// that more threads than cores make progress.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // 20 microseconds where a pause takes 25 cycles, 110 where it takes 140 (Intel's since Skylake): longer than the
    // imbalance of a step, shorter than a time slice.
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 2000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `units` shared out as evenly as they go.
inline Range share(int64_t units, int64_t parts, int64_t index) {
  return {units * index / parts, units * (index + 1) / parts};
}

struct Team {
  int index, size;
  Barrier* barrier;

  void sync() const { barrier->wait(size); }
  Range share(int64_t units) const { return mobilenet_fast::share(units, size, index); }

  // This thread's rectangle of a rows × columns grid of work. The team is arranged as the rectangle whose largest share
  // is smallest; on a tie rows are cut, which keeps a thread's inputs together. A thread may get an empty rectangle.
  void share(int64_t rows, int64_t columns, Range* row_range, Range* column_range) const {
    int best_columns = 1;
    int64_t best = INT64_MAX;
    for (int c = 1; c <= size && c <= columns; ++c) {
      const int64_t r = size / c;
      const int64_t largest = ((rows + r - 1) / r) * ((columns + c - 1) / c);
      if (largest < best) {
        best = largest;
        best_columns = c;
      }
    }
    const int row_parts = size / best_columns;
    if (index >= row_parts * best_columns) {
      *row_range = *column_range = {0, 0};
      return;
    }
    *row_range = mobilenet_fast::share(rows, row_parts, index / best_columns);
    *column_range = mobilenet_fast::share(columns, best_columns, index % best_columns);
  }
};

// Calls body(team, index of the team, part) for each of `parts` pieces of work. Each thread takes pieces of its own,
// which needs no barriers and keeps a piece in one core's cache; where fewer are left than there are threads, several
// share one. Teams number at most min(threads, parts), each with one of `barriers`. Teams with the same index never
// overlap.
template <class Body>
void for_each_part(const Team& all, int64_t parts, Barrier* barriers, const Body& body) {
  for (int64_t done = 0; done < parts;) {
    if (done > 0) all.sync();
    const int64_t left = parts - done;
    const int64_t teams = all.size / ((all.size + left - 1) / left), each = left / teams;
    const int64_t index = ((all.index + 1) * teams - 1) / all.size;  // whose share() has this thread
    const Range members = share(all.size, teams, index);
    const Team team{static_cast<int>(all.index - members.begin), static_cast<int>(members.size()), &barriers[index]};
    for (int64_t i = 0; i < each; ++i) {
      if (i > 0) team.sync();
      body(team, index, done + index * each + i);
    }
    done += teams * each;
  }
}

// The threads a region started now would get: torch's setting, or one inside somebody else's region.
inline int team_size() { return omp_in_parallel() ? 1 : std::max(1, at::get_num_threads()); }

// Runs body(team) on up to `threads` threads. The runtime may give fewer; the team says how many there are.
template <class Body>
void run_team(int threads, const Body& body) {
  Barrier barrier;
  if (threads == 1) {
    body(Team{0, 1, &barrier});
    return;
  }
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

}  // namespace mobilenet_fast
