// Sums over pixels: the squeeze of squeeze-and-excitation, and global average pooling.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// Four accumulators a vector of channels: they hide the latency of the additions and shorten the chains of roundings.
template <class T, bool kTail>
inline typename Vec<T>::Reg sum_column(const T* x, int64_t stride, int64_t rows, int n) {
  using V = Vec<T>;
  typename V::Reg acc[4] = {V::set1(0), V::set1(0), V::set1(0), V::set1(0)};
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * stride) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] = V::add(acc[i], load<T, kTail>(x + i * stride, n));
  }
  for (; row < rows; ++row, x += stride) acc[0] = V::add(acc[0], load<T, kTail>(x, n));
  return V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3]));
}

template <class T>
void sum_rows(const T* x, int64_t stride, int64_t rows, int64_t channels, T* sums) {
  using V = Vec<T>;
  int64_t c = 0;
  for (; c + V::kLanes <= channels; c += V::kLanes) {
    V::store(sums + c, sum_column<T, false>(x + c, stride, rows, V::kLanes));
  }
  if (c < channels) {
    const int n = static_cast<int>(channels - c);
    V::store_n(sums + c, sum_column<T, true>(x + c, stride, rows, n), n);
  }
}

template <class T>
T sum_plane(const T* x, int64_t count) {
  using V = Vec<T>;
  const int64_t vectors = count / V::kLanes;
  auto acc = sum_column<T, false>(x, V::kLanes, vectors, V::kLanes);
  const int n = static_cast<int>(count - vectors * V::kLanes);
  if (n > 0) acc = V::add(acc, V::load_n(x + vectors * V::kLanes, n));
  return V::sum(acc);
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
