// Prints the single-precision multiply-adds that this CPU reaches from registers, in GFLOP/s: peak THREADS SECONDS.
#include <omp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

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

// Twelve independent chains cover the latency of two multiply-add units. The empty asm keeps the compiler from folding them.
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

int main(int argc, char** argv) {
  if (argc != 3) return 1;
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  constexpr long kIterations = 100000;
  double flops = 0;
#pragma omp parallel num_threads(threads) reduction(+ : flops)
  {
    using Clock = std::chrono::steady_clock;
    const auto elapsed = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
    multiply_add(kIterations, Vec{} + 0.5f);
#pragma omp barrier
    const auto start = Clock::now();
    long rounds = 0;
    do {
      multiply_add(kIterations, Vec{} + 0.5f);
      ++rounds;
    } while (elapsed(start) < seconds);
    flops += 2.0 * 12 * (kBytes / sizeof(float)) * kIterations * rounds / elapsed(start);
  }
  std::printf("%.1f\n", flops / 1e9);
}
