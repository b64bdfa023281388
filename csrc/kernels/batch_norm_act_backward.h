// What training adds to batch norm and activation: the statistics, and the gradients (see StatisticsArgs,
// NormGradientArgs and GateGradientArgs). The activation's input is computed again from the batch norm's, so that
// nothing else has to be kept.
//
// A tile is some rows of one or two vectors of channels, whose coefficients and sums stay in registers: few enough rows
// that whole pixels are read one after another, as memory likes it.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

constexpr int64_t kTileRows = 16;
template <class T>
constexpr int kTileVectors = Vec<T>::kRegisters == 32 ? 2 : 1;

// The gradient at an activation's input x from that at its output, as torch has it where the slope jumps.
template <class T, Activation kActivation>
inline typename Vec<T>::Reg activation_gradient(typename Vec<T>::Reg grad, typename Vec<T>::Reg x) {
  using V = Vec<T>;
  const auto zero = V::set1(0);
  if constexpr (kActivation == Activation::kRelu) {
    return V::select_le(x, zero, zero, grad);
  } else if constexpr (kActivation == Activation::kRelu6) {
    return V::select_le(x, zero, zero, V::select_le(V::set1(6), x, zero, grad));
  } else if constexpr (kActivation == Activation::kHardswish) {
    const auto inner = V::mul(grad, V::fma(x, V::set1(static_cast<T>(1.0 / 3)), V::set1(static_cast<T>(0.5))));
    return V::select_le(x, V::set1(-3), zero, V::select_le(V::set1(3), x, grad, inner));
  } else if constexpr (kActivation == Activation::kHardsigmoid) {
    const auto inner = V::mul(grad, V::set1(1.0f / 6));  // PyTorch's is a float32's sixth in every dtype
    return V::select_le(x, V::set1(-3), zero, V::select_le(V::set1(3), x, zero, inner));
  } else if constexpr (kActivation == Activation::kSilu || kActivation == Activation::kSigmoid) {
    const auto one = V::set1(1), sigmoid = V::div(one, sigmoid_denominator<T>(x));
    const auto rest = V::sub(one, sigmoid);
    const auto slope = kActivation == Activation::kSilu ? V::fma(x, rest, one) : rest;
    return V::mul(grad, V::mul(sigmoid, slope));
  } else {
    return grad;
  }
}

// Calls tile<kVectors, kTail>(row, rows, channel, lanes of the last vector) over rows × channels.
#define MF_FOR_TILES(T, all_rows, channels, tile)                                                     \
  for (int64_t row = 0; row < (all_rows); row += kTileRows) {                                         \
    const int64_t rows = (all_rows) - row < kTileRows ? (all_rows) - row : kTileRows;                 \
    constexpr int kLanes = Vec<T>::kLanes, kWidth = kTileVectors<T> * kLanes;                         \
    int64_t c = 0;                                                                                    \
    for (; c + kWidth <= (channels); c += kWidth) tile(kTileVectors<T>, false, row, rows, c, kLanes); \
    for (; c + kLanes <= (channels); c += kLanes) tile(1, false, row, rows, c, kLanes);               \
    if (c < (channels)) tile(1, true, row, rows, c, static_cast<int>((channels) - c));                \
  }

template <class T, int kVectors, bool kTail>
inline void statistics_tile(const StatisticsArgs<T>& s, int64_t row, int64_t rows, int64_t channel, int n) {
  using V = Vec<T>;
  typename V::Reg pivot[kVectors], sum[kVectors], squares[kVectors];
  T *sums = s.sums + channel, *square_sums = sums + s.channels;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    pivot[v] = load<T, kTail>(s.pivot + channel + v * V::kLanes, n);
    sum[v] = squares[v] = V::set1(0);
  }
  const T* x = s.x + row * s.x_stride + channel;
  for (int64_t i = 0; i < rows; ++i, x += s.x_stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const auto value = V::sub(load<T, kTail>(x + v * V::kLanes, n), pivot[v]);
      sum[v] = V::add(sum[v], value);
      squares[v] = V::fma(value, value, squares[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = v * V::kLanes;
    store<T, kTail>(sums + at, V::add(load<T, kTail>(sums + at, n), sum[v]), n);
    store<T, kTail>(square_sums + at, V::add(load<T, kTail>(square_sums + at, n), squares[v]), n);
  }
}

template <class T>
void statistics(const StatisticsArgs<T>& s) {
#define MF_TILE(kVectors, kTail, row, rows, c, n) statistics_tile<T, kVectors, kTail>(s, row, rows, c, n)
  MF_FOR_TILES(T, s.rows, s.channels, MF_TILE)
#undef MF_TILE
}

// What becomes of d: sums of it, or the gradient at the batch norm's input, or itself.
enum class NormGradient { kSums, kInput, kActivation };

template <class T, Activation kActivation, bool kGate, NormGradient kWhat, int kVectors, bool kTail>
inline void norm_gradient_tile(const NormGradientArgs<T>& a, int64_t row, int64_t rows, int64_t channel, int n) {
  using V = Vec<T>;
  constexpr bool kActs = kActivation != Activation::kNone, kMean = kWhat != NormGradient::kActivation;
  constexpr bool kReadsX = kActs || kMean;
  typename V::Reg scale[kVectors], shift[kVectors], gate[kVectors], pooled[kVectors], mean[kVectors], factor[kVectors],
      slope[kVectors], offset[kVectors], sum[kVectors], products[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = channel + v * V::kLanes;
    if constexpr (kActs) {
      scale[v] = load<T, kTail>(a.scale + at, n);
      shift[v] = load<T, kTail>(a.shift + at, n);
    }
    if constexpr (kGate) {
      gate[v] = load<T, kTail>(a.gate + at, n);
      pooled[v] = load<T, kTail>(a.pooled + at, n);
    }
    if constexpr (kMean) mean[v] = load<T, kTail>(a.mean + at, n);
    if constexpr (kWhat == NormGradient::kInput) {
      factor[v] = load<T, kTail>(a.factor + at, n);
      slope[v] = load<T, kTail>(a.slope + at, n);
      offset[v] = load<T, kTail>(a.offset + at, n);
    }
    sum[v] = products[v] = V::set1(0);
  }
  const T *grad = a.grad + row * a.grad_stride + channel, *x = a.x + row * a.x_stride + channel;
  T* out = a.out == nullptr ? nullptr : a.out + row * a.out_stride + channel;
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * V::kLanes;
      auto d = load<T, kTail>(grad + at, n);
      if constexpr (kGate) d = V::fma(d, gate[v], pooled[v]);
      typename V::Reg value;
      if constexpr (kReadsX) value = load<T, kTail>(x + at, n);
      if constexpr (kActs) d = activation_gradient<T, kActivation>(d, V::fma(value, scale[v], shift[v]));
      if constexpr (kWhat == NormGradient::kSums) {
        sum[v] = V::add(sum[v], d);
        products[v] = V::fma(d, V::sub(value, mean[v]), products[v]);
      } else if constexpr (kWhat == NormGradient::kInput) {
        d = V::fma(d, factor[v], V::fma(V::sub(value, mean[v]), slope[v], offset[v]));
      }
      if (kWhat == NormGradient::kSums && out == nullptr) continue;
      if (!kTail && a.past_caches) {
        V::stream(out + at, d);
      } else {
        store<T, kTail>(out + at, d, n);
      }
    }
    grad += a.grad_stride;
    if constexpr (kReadsX) x += a.x_stride;
    if (kWhat != NormGradient::kSums || out != nullptr) out += a.out_stride;
  }
  if constexpr (kWhat == NormGradient::kSums) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T *sums = a.sums + channel + v * V::kLanes, *product_sums = sums + a.channels;
      store<T, kTail>(sums, V::add(load<T, kTail>(sums, n), sum[v]), n);
      store<T, kTail>(product_sums, V::add(load<T, kTail>(product_sums, n), products[v]), n);
    }
  }
}

template <class T, Activation kActivation, bool kGate, NormGradient kWhat>
void norm_gradient_rows(const NormGradientArgs<T>& a) {
#define MF_TILE(kVectors, kTail, row, rows, c, n) \
  norm_gradient_tile<T, kActivation, kGate, kWhat, kVectors, kTail>(a, row, rows, c, n)
  MF_FOR_TILES(T, a.rows, a.channels, MF_TILE)
#undef MF_TILE
}

template <class T, Activation kActivation>
void norm_gradient_of(const NormGradientArgs<T>& a) {
  if (a.sums != nullptr) {
    return a.gate == nullptr ? norm_gradient_rows<T, kActivation, false, NormGradient::kSums>(a)
                             : norm_gradient_rows<T, kActivation, true, NormGradient::kSums>(a);
  }
  if (a.factor != nullptr) {
    return a.gate == nullptr ? norm_gradient_rows<T, kActivation, false, NormGradient::kInput>(a)
                             : norm_gradient_rows<T, kActivation, true, NormGradient::kInput>(a);
  }
  return a.gate == nullptr ? norm_gradient_rows<T, kActivation, false, NormGradient::kActivation>(a)
                           : norm_gradient_rows<T, kActivation, true, NormGradient::kActivation>(a);
}

template <class T, Activation kActivation, bool kGrad, int kVectors, bool kTail>
inline void gate_gradient_tile(const GateGradientArgs<T>& a, int64_t row, int64_t rows, int64_t channel, int n) {
  using V = Vec<T>;
  typename V::Reg scale[kVectors], shift[kVectors], sum[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = load<T, kTail>(a.scale + channel + v * V::kLanes, n);
    shift[v] = load<T, kTail>(a.shift + channel + v * V::kLanes, n);
    sum[v] = V::set1(0);
  }
  const T *grad = kGrad ? a.grad + row * a.grad_stride + channel : nullptr, *x = a.x + row * a.x_stride + channel;
  for (int64_t i = 0; i < rows; ++i, x += a.x_stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const auto value = load<T, kTail>(x + v * V::kLanes, n);
      const auto z = activate<T>(kActivation, V::fma(value, scale[v], shift[v]));
      if constexpr (kGrad) {
        sum[v] = V::fma(load<T, kTail>(grad + v * V::kLanes, n), z, sum[v]);
      } else {
        sum[v] = V::add(sum[v], z);
      }
    }
    if constexpr (kGrad) grad += a.grad_stride;
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    T* sums = a.sums + channel + v * V::kLanes;
    store<T, kTail>(sums, V::add(load<T, kTail>(sums, n), sum[v]), n);
  }
}

template <class T, Activation kActivation, bool kGrad>
void gate_gradient_rows(const GateGradientArgs<T>& a) {
#define MF_TILE(kVectors, kTail, row, rows, c, n) \
  gate_gradient_tile<T, kActivation, kGrad, kVectors, kTail>(a, row, rows, c, n)
  MF_FOR_TILES(T, a.rows, a.channels, MF_TILE)
#undef MF_TILE
}

#undef MF_FOR_TILES

template <class T, Activation kActivation>
void gate_gradient_of(const GateGradientArgs<T>& a) {
  return a.grad == nullptr ? gate_gradient_rows<T, kActivation, false>(a) : gate_gradient_rows<T, kActivation, true>(a);
}

template <class T>
void norm_gradient(const NormGradientArgs<T>& a) {
  MF_WITH_ACTIVATION(norm_gradient_of, a.activation, a)
  if (a.past_caches) Vec<T>::fence();
}

template <class T>
void gate_gradient(const GateGradientArgs<T>& a) {
  MF_WITH_ACTIVATION(gate_gradient_of, a.activation, a)
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
