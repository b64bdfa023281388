// Weights into the layout that the kernels read, and batch norm into a scale and a shift.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// See Kernels::pack_columns. Blocks of kLanes × kLanes elements are transposed in registers.
template <class T>
void pack_columns(const T* source, int64_t columns, int64_t depth, const T* scale, T* out, int64_t width) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  for (int64_t column = 0; column < width; column += kLanes, out += kLanes) {
    const int64_t left = columns - column;
    const int stored = width - column < kLanes ? static_cast<int>(width - column) : kLanes;
    const int filled = left < kLanes ? static_cast<int>(left > 0 ? left : 0) : kLanes;
    auto factor = V::set1(1);
    if (scale != nullptr && filled > 0) factor = V::load_n(scale + column, filled);
    const T* from = source + column * depth;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int rows = depth - k < kLanes ? static_cast<int>(depth - k) : kLanes;
      typename V::Reg block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = V::set1(0);
        if (i >= filled) continue;
        block[i] = rows == kLanes ? V::load(from + i * depth + k) : V::load_n(from + i * depth + k, rows);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < rows) V::store_n(out + (k + i) * width, V::mul(block[i], factor), stored);
      }
    }
  }
}

template <class T>
void fold_batch_norm(const T* mean, const T* var, const T* weight, const T* bias, T eps, int64_t channels, T* scale,
                     T* shift) {
  using V = Vec<T>;
  for (int64_t c = 0; c < channels; c += V::kLanes) {
    const int n = channels - c < V::kLanes ? static_cast<int>(channels - c) : V::kLanes;
    const auto gamma = weight == nullptr ? V::set1(1) : V::load_n(weight + c, n);
    const auto beta = bias == nullptr ? V::set1(0) : V::load_n(bias + c, n);
    const auto s = V::div(gamma, V::sqrt(V::add(V::load_n(var + c, n), V::set1(eps))));
    V::store_n(scale + c, s, n);
    V::store_n(shift + c, V::sub(beta, V::mul(V::load_n(mean + c, n), s)), n);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
