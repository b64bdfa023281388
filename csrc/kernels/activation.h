// The activations of the family, on vectors. Comparisons keep NaN as torch does (see the contract of max and min).
//
// Those with an exp divide by 1 + exp(-x). -x = k ln 2 / 2^b - r with |r| <= ln 2 / 2^(b + 1): 2^(k / 2^b) comes from a
// table of 2^b entries where they fit into registers (Vec::exp2), exp(-r) is a polynomial. For float it is the one of
// its degree whose largest relative error is smallest, 4e-8 to 1.4e-7 after its coefficients are rounded; for double
// the Taylor polynomial of degree 13, 6e-18. Largest error of silu and sigmoid measured against float64: 5e-7 of the
// value (7 units in the last place) and 2.5 units for double. The sum is Inf, and the result 0, from about x = -88.4
// (float) and -709.4 (double) on, a little before they are less than the normal numbers, which need not be right. NaN
// stays NaN.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T, int kTableBits>
struct ExpConstants;

struct FloatExpConstants {
  // At the least x, exp(-x) is 2^128 and so Inf; past the largest, 2^k would not be a normal number.
  static constexpr float kLeast = -128 * 0.693147182f, kLargest = 87.3f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added to k, it leaves k in the low bits
  // Where k ln 2 is not rounded before the sum, ln 2 in one part leaves an error of 2e-9 k, two units at k = 128.
  static constexpr bool kOnePart = true;
  static constexpr float kLn2 = 0.693147182f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};
template <>
struct ExpConstants<float, 0> : FloatExpConstants {
  static constexpr float kPolynomial[] = {1.00000012f,   -0.999999702f, 0.499988943f,
                                          -0.166675746f, 0.0419153832f, -0.00829765573f};
};
template <>
struct ExpConstants<float, 3> : FloatExpConstants {
  static constexpr float kPolynomial[] = {1.0f, -1.0f, 0.500078201f, -0.166651025f};
};
template <>
struct ExpConstants<float, 5> : FloatExpConstants {
  static constexpr float kPolynomial[] = {1.0f, -1.00001466f, 0.499996334f};
};

template <>
struct ExpConstants<double, 0> {
  static constexpr double kLeast = -1024 * 0.69314718055994530942, kLargest = 708.3;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr bool kOnePart = false;
  static constexpr double kLn2 = 0.69314718055994530942;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kPolynomial[] = {
      1.0,         -1.0,        1.0 / 2,       -1.0 / 6,      1.0 / 24,        -1.0 / 120,      1.0 / 720,
      -1.0 / 5040, 1.0 / 40320, -1.0 / 362880, 1.0 / 3628800, -1.0 / 39916800, 1.0 / 479001600, -1.0 / 6227020800};
};

// 1 + exp(-x).
template <class T>
inline typename Vec<T>::Reg sigmoid_denominator(typename Vec<T>::Reg x) {
  using V = Vec<T>;
  using C = ExpConstants<T, V::kExp2Bits>;
  constexpr T kSteps = 1 << V::kExp2Bits;
  const auto magic = V::set1(C::kMagic);
  x = V::min(V::set1(C::kLargest), V::max(V::set1(C::kLeast), x));
  const auto k = V::fma(x, V::set1(static_cast<T>(-1.44269504088896340736) * kSteps), magic);
  const auto n = V::sub(k, magic);
  constexpr bool kOnePart = C::kOnePart && V::kFmaIsFused;
  auto r = V::fma(n, V::set1((kOnePart ? C::kLn2 : C::kLn2High) / kSteps), x);
  if constexpr (!kOnePart) r = V::fma(n, V::set1(C::kLn2Low / kSteps), r);
  constexpr int kDegree = sizeof(C::kPolynomial) / sizeof(T) - 1;
  auto p = V::set1(C::kPolynomial[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = V::fma(p, r, V::set1(C::kPolynomial[i]));
  return V::fma(V::exp2(k), p, V::set1(1));
}

template <class T>
inline typename Vec<T>::Reg hardsigmoid(typename Vec<T>::Reg x) {
  using V = Vec<T>;
  const auto y = V::min(V::set1(6), V::max(V::set1(0), V::add(x, V::set1(3))));
  return V::mul(y, V::set1(1.0 / 6));
}

// The activations worth an instruction or two are applied while a result is still in registers; those with an exp run
// over the finished tile, which the L1 cache still holds, so that kernels stay small.
inline bool is_cheap(Activation activation) {
  return activation != Activation::kSilu && activation != Activation::kSigmoid;
}

template <class T>
inline typename Vec<T>::Reg activate_cheap(Activation activation, typename Vec<T>::Reg x) {
  using V = Vec<T>;
  switch (activation) {
    case Activation::kRelu:
      return V::max(V::set1(0), x);
    case Activation::kRelu6:
      return V::min(V::set1(6), V::max(V::set1(0), x));
    case Activation::kHardswish:
      return V::mul(x, hardsigmoid<T>(x));
    case Activation::kHardsigmoid:
      return hardsigmoid<T>(x);
    default:
      return x;
  }
}

template <class T>
inline typename Vec<T>::Reg activate(Activation activation, typename Vec<T>::Reg x) {
  using V = Vec<T>;
  if (is_cheap(activation)) return activate_cheap<T>(activation, x);
  return V::div(activation == Activation::kSilu ? x : V::set1(1), sigmoid_denominator<T>(x));
}

template <class T, Activation kActivation, int kRows, int kColumns>
[[gnu::always_inline]] inline void activate_accumulators_as(typename Vec<T>::Reg (&acc)[kRows][kColumns]) {
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) acc[i][j] = activate_cheap<T>(kActivation, acc[i][j]);
  }
}

// function<T, activation>(...) for an activation known at run time.
#define MF_WITH_ACTIVATION(function, activation, ...)            \
  switch (activation) {                                          \
    case Activation::kRelu:                                      \
      return function<T, Activation::kRelu>(__VA_ARGS__);        \
    case Activation::kRelu6:                                     \
      return function<T, Activation::kRelu6>(__VA_ARGS__);       \
    case Activation::kHardswish:                                 \
      return function<T, Activation::kHardswish>(__VA_ARGS__);   \
    case Activation::kHardsigmoid:                               \
      return function<T, Activation::kHardsigmoid>(__VA_ARGS__); \
    case Activation::kSilu:                                      \
      return function<T, Activation::kSilu>(__VA_ARGS__);        \
    case Activation::kSigmoid:                                   \
      return function<T, Activation::kSigmoid>(__VA_ARGS__);     \
    default:                                                     \
      return function<T, Activation::kNone>(__VA_ARGS__);        \
  }

// A tile in registers, if the activation is cheap. Loops over accumulators are unrolled whole, here and elsewhere: one
// index that is no constant, and the compiler keeps the tile in memory.
template <class T, int kRows, int kColumns>
[[gnu::always_inline]] inline void activate_accumulators(Activation activation,
                                                         typename Vec<T>::Reg (&acc)[kRows][kColumns]) {
  switch (activation) {
    case Activation::kRelu:
      return activate_accumulators_as<T, Activation::kRelu>(acc);
    case Activation::kRelu6:
      return activate_accumulators_as<T, Activation::kRelu6>(acc);
    case Activation::kHardswish:
      return activate_accumulators_as<T, Activation::kHardswish>(acc);
    case Activation::kHardsigmoid:
      return activate_accumulators_as<T, Activation::kHardsigmoid>(acc);
    default:
      return;
  }
}

// rows × columns elements at p, in place.
template <class T>
void activate_tile(Activation activation, T* p, int64_t stride, int64_t rows, int64_t columns) {
  using V = Vec<T>;
  for (int64_t row = 0; row < rows; ++row, p += stride) {
    int64_t c = 0;
    for (; c + V::kLanes <= columns; c += V::kLanes) V::store(p + c, activate<T>(activation, V::load(p + c)));
    if (c < columns) {
      const int n = static_cast<int>(columns - c);
      V::store_n(p + c, activate<T>(activation, V::load_n(p + c, n)), n);
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
