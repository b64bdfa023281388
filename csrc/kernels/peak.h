// Multiply-adds on registers alone: what the units of an instruction set can do.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T>
struct PeakLoop {
  static constexpr int kChains = Vec<T>::kRegisters == 32 ? 24 : 12;
  static constexpr int kFlops = 2 * kChains * Vec<T>::kLanes;  // a round
};

// See Kernels::multiply_add. The sum is returned so that none of it can be left out.
template <class T>
T multiply_add(int64_t rounds, T a, T b) {
  using V = Vec<T>;
  constexpr int kChains = PeakLoop<T>::kChains;
  const auto factor = V::set1(a), term = V::set1(b);
  typename V::Reg acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = V::set1(static_cast<T>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = V::fma(acc[i], factor, term);
  }
  T sum = 0;
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum += V::sum(acc[i]);
  return sum;
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
