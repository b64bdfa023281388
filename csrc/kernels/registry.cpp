#include "kernels/registry.h"

#include <array>

namespace mobilenet_fast {
namespace {

template <class T>
Kernels<T> make(Isa isa);

#if defined(__x86_64__)
#define MF_CASES(type)              \
  case Isa::kAvx512:                \
    return avx512_kernels_##type(); \
  case Isa::kAvx2:                  \
    return avx2_kernels_##type();
#elif defined(__aarch64__)
#define MF_CASES(type) \
  case Isa::kNeon:     \
    return neon_kernels_##type();
#else
#define MF_CASES(type)
#endif

template <>
Kernels<float> make(Isa isa) {
  switch (isa) {
    MF_CASES(float)
    default:
      return scalar_kernels_float();
  }
}

template <>
Kernels<double> make(Isa isa) {
  switch (isa) {
    MF_CASES(double)
    default:
      return scalar_kernels_double();
  }
}

}  // namespace

template <class T>
const Kernels<T>& kernels(Isa isa) {
  static const std::array<Kernels<T>, 4> tables = [] {
    std::array<Kernels<T>, 4> all{};
    for (Isa each : available_isas()) all[static_cast<int>(each)] = make<T>(each);
    return all;
  }();
  return tables[static_cast<int>(isa)];
}

template const Kernels<float>& kernels(Isa);
template const Kernels<double>& kernels(Isa);

}  // namespace mobilenet_fast
