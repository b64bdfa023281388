// The two small fully connected layers of squeeze-and-excitation, on weights as torch keeps them: bound by reading the
// weights once. Four rows of weights share each load of the input and keep eight chains of multiply-adds going.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T, int kRows>
inline void dot_rows(const T* x, const T* weight, int64_t channels, T* y) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  typename V::Reg acc[kRows][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = V::set1(0);
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const auto value = V::load(x + c + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        acc[i][j] = V::fma(value, V::load(weight + i * channels + c + j * kLanes), acc[i][j]);
      }
    }
  }
  for (; c < channels; c += kLanes) {
    const int n = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
    const auto value = V::load_n(x + c, n);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) acc[i][0] = V::fma(value, V::load_n(weight + i * channels + c, n), acc[i][0]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) y[i] = V::sum(V::add(acc[i][0], acc[i][1]));
}

// See Kernels::fully_connected.
template <class T>
void fully_connected(const T* x, int64_t rows, int64_t channels, const T* weight, const T* scale, const T* bias,
                     int64_t begin, int64_t end, int64_t out_channels, Activation activation, T* y) {
  for (int64_t k = begin; k < end;) {
    const bool four = k + 4 <= end;
    for (int64_t row = 0; row < rows; ++row) {
      T* out = y + row * out_channels + k;
      if (four) {
        dot_rows<T, 4>(x + row * channels, weight + k * channels, channels, out);
      } else {
        dot_rows<T, 1>(x + row * channels, weight + k * channels, channels, out);
      }
      for (int64_t i = 0; i < (four ? 4 : 1); ++i) {
        if (scale != nullptr) out[i] *= scale[k + i];
        if (bias != nullptr) out[i] += bias[k + i];
      }
    }
    k += four ? 4 : 1;
  }
  if (begin < end) activate_tile(activation, y + begin, out_channels, rows, end - begin);
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
