// Prints what this CPU can do at most, all threads together: peak WHAT THREADS SECONDS, where WHAT is
//   fma     single-precision multiply-adds from registers, in GFLOP/s, of the instruction set that it is compiled for;
//   l2      copying within half of each core's second-level cache, in GB/s read and written;
//   memory  copying between buffers four times the last-level cache;
//   trip    a cache line from the first thread to the second and back, in ns.
#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__aarch64__)
#define REGISTER(v) "+w"(v)
#else
#define REGISTER(v) "+v"(v)  // x86-64: one of the vector registers
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));

// Twelve independent chains cover the latency of two multiply-add units. The empty asm keeps the compiler from folding
// them.
static void multiply_add(long iterations, Vec factor) {
  Vec a[12] = {};
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      a[j] = a[j] * factor + factor;
      asm volatile("" : REGISTER(a[j]));
    }
  }
}

// Every thread repeats its work for as long; returns the sum of what each did per second.
template <class Work>
static double rate(int threads, double seconds, double amount, const Work& prepare) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    using Clock = std::chrono::steady_clock;
    const auto elapsed = [](Clock::time_point since) {
      return std::chrono::duration<double>(Clock::now() - since).count();
    };
    auto work = prepare();
    work();
#pragma omp barrier
    const auto start = Clock::now();
    long rounds = 0;
    do {
      work();
      ++rounds;
    } while (elapsed(start) < seconds);
    sum += amount * rounds / elapsed(start);
  }
  return sum / 1e9;
}

static double copy_rate(int threads, double seconds, size_t bytes) {
  return rate(threads, seconds, 2.0 * bytes, [=] {
    return [from = std::vector<char>(bytes, 1), to = std::vector<char>(bytes, 2)]() mutable {
      std::memcpy(to.data(), from.data(), from.size());
      asm volatile("" : : "r"(to.data()) : "memory");
    };
  });
}

static size_t cache_size(int level, size_t unknown) {
  const long bytes = sysconf(level);
  return bytes > 0 ? bytes : unknown;
}

static double round_trip(double seconds) {
  alignas(64) static std::atomic<long> ball{0};  // odd: with the second thread; negative: over
  double result = 0;
#pragma omp parallel num_threads(2)
  {
    using Clock = std::chrono::steady_clock;
    const auto await = [](auto arrived) {
      for (long spins = 0; !arrived(ball.load()); ++spins) {
        if (spins > 100000) sched_yield();
      }
    };
    if (omp_get_thread_num() == 1) {
      while (true) {
        await([](long b) { return b % 2 != 0 || b < 0; });
        if (ball.load() < 0) break;
        ball.fetch_add(1);
      }
    } else if (omp_get_num_threads() > 1) {
      const auto start = Clock::now();
      long trips = 0;
      double elapsed;
      do {
        for (int i = 0; i < 100; ++i, ++trips) {
          ball.store(2 * trips + 1);
          await([=](long b) { return b == 2 * trips + 2; });
        }
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      ball.store(-2);
      result = 1e9 * elapsed / static_cast<double>(trips);
    }
  }
  return result;
}

int main(int argc, char** argv) {
  if (argc != 4) return 1;
  const std::string what = argv[1];
  const int threads = std::atoi(argv[2]);
  const double seconds = std::atof(argv[3]);
  constexpr long kIterations = 100000;
  if (what == "fma") {
    const double flops = 2.0 * 12 * (kBytes / sizeof(float)) * kIterations;
    std::printf("%.1f\n",
                rate(threads, seconds, flops, [] { return [] { multiply_add(kIterations, Vec{} + 0.5f); }; }));
  } else if (what == "l2") {
    std::printf("%.1f\n", copy_rate(threads, seconds, cache_size(_SC_LEVEL2_CACHE_SIZE, 1 << 20) / 4));
  } else if (what == "memory") {
    std::printf("%.1f\n", copy_rate(threads, seconds, 4 * cache_size(_SC_LEVEL3_CACHE_SIZE, 32 << 20)));
  } else if (what == "trip") {
    std::printf("%.1f\n", round_trip(seconds));
  } else {
    return 1;
  }
}
