// Sums over pixels: the squeeze of squeeze-and-excitation, and global average pooling. Maxima and means over windows.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// Sums over rows of kVectors vectors side by side. Four accumulators a vector hide the latency of the additions and
// shorten the chains of roundings; a vector's sum does not depend on how many are side by side.
template <class T, int kVectors, bool kTail>
inline void sum_columns(const T* x, int64_t stride, int64_t rows, int n, typename Vec<T>::Reg* sums) {
  using V = Vec<T>;
  typename V::Reg acc[4][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = V::set1(0);
  }
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * stride) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = V::add(acc[i][v], load<T, kTail>(x + i * stride + v * V::kLanes, n));
      }
    }
  }
  for (; row < rows; ++row, x += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[0][v] = V::add(acc[0][v], load<T, kTail>(x + v * V::kLanes, n));
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sums[v] = V::add(V::add(acc[0][v], acc[1][v]), V::add(acc[2][v], acc[3][v]));
}

template <class T>
void sum_rows(const T* x, int64_t stride, int64_t rows, int64_t channels, T* sums) {
  using V = Vec<T>;
  typename V::Reg columns[4];
  int64_t c = 0;
  for (; c + 4 * V::kLanes <= channels; c += 4 * V::kLanes) {
    sum_columns<T, 4, false>(x + c, stride, rows, V::kLanes, columns);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) V::store(sums + c + v * V::kLanes, columns[v]);
  }
  for (; c + V::kLanes <= channels; c += V::kLanes) {
    sum_columns<T, 1, false>(x + c, stride, rows, V::kLanes, columns);
    V::store(sums + c, columns[0]);
  }
  if (c < channels) {
    const int n = static_cast<int>(channels - c);
    sum_columns<T, 1, true>(x + c, stride, rows, n, columns);
    V::store_n(sums + c, columns[0], n);
  }
}

template <class T>
T sum_plane(const T* x, int64_t count) {
  using V = Vec<T>;
  const int64_t vectors = count / V::kLanes;
  typename V::Reg sum;
  sum_columns<T, 1, false>(x, V::kLanes, vectors, V::kLanes, &sum);
  const int n = static_cast<int>(count - vectors * V::kLanes);
  if (n > 0) sum = V::add(sum, V::load_n(x + vectors * V::kLanes, n));
  return V::sum(sum);
}

// Of a window that begins at `from`, taps [first_tap, end_of_taps) are inside the image.
inline int64_t first_tap(int64_t from, int64_t dilation) { return from < 0 ? (-from + dilation - 1) / dilation : 0; }

inline int64_t end_of_taps(int64_t from, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t inside = (size - from + dilation - 1) / dilation;
  return inside < taps ? inside : taps;
}

// One output pixel, kVectors vectors of channels at once: the window's `rows` × `columns` taps that are inside the
// image, from x on.
template <class T, bool kMean, bool kTail, int kVectors>
[[gnu::always_inline]] inline void pool_pixel(const PoolArgs<T>& p, const T* x, int64_t rows, int64_t columns, T factor,
                                              T* y, int n) {
  using V = Vec<T>;
  typename V::Reg acc[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) acc[j] = kMean ? V::set1(0) : load<T, kTail>(x + j * V::kLanes, n);
  for (int64_t row = 0; row < rows; ++row, x += p.dilation_h * p.x_row_stride) {
    const T* pixel = x;
    for (int64_t column = 0; column < columns; ++column, pixel += p.dilation_w * p.x_pixel_stride) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const auto value = load<T, kTail>(pixel + j * V::kLanes, n);
        acc[j] = kMean ? V::add(acc[j], value) : V::max_nan(acc[j], value);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    store<T, kTail>(y + j * V::kLanes, kMean ? V::mul(acc[j], V::set1(factor)) : acc[j], n);
  }
}

template <class T, bool kMean>
void pool_rows(const PoolArgs<T>& p) {
  constexpr int kLanes = Vec<T>::kLanes;
  for (int64_t oy = p.row_begin; oy < p.row_end; ++oy) {
    const int64_t top = oy * p.stride_h - p.pad_top;
    const int64_t y0 = first_tap(top, p.dilation_h), y1 = end_of_taps(top, p.dilation_h, p.kernel_h, p.height);
    for (int64_t ox = 0; ox < p.out_width; ++ox) {
      const int64_t left = ox * p.stride_w - p.pad_left;
      const int64_t x0 = first_tap(left, p.dilation_w), x1 = end_of_taps(left, p.dilation_w, p.kernel_w, p.width);
      int64_t count = (y1 - y0) * (x1 - x0);
      if (kMean && p.divisor > 0) {
        count = p.divisor;
      } else if (kMean && p.count_padding) {  // but not what ceil_mode adds past the padding
        const int64_t bottom = p.height + p.pad_top - top, right = p.width + p.pad_left - left;
        count = (bottom < p.kernel_h ? bottom : p.kernel_h) * (right < p.kernel_w ? right : p.kernel_w);
      }
      const T factor = T(1) / static_cast<T>(count);
      const T* x = p.x + (top + y0 * p.dilation_h) * p.x_row_stride + (left + x0 * p.dilation_w) * p.x_pixel_stride;
      T* y = p.y + oy * p.y_row_stride + ox * p.y_pixel_stride;
      int64_t c = 0;
      for (; c + 4 * kLanes <= p.channels; c += 4 * kLanes) {
        pool_pixel<T, kMean, false, 4>(p, x + c, y1 - y0, x1 - x0, factor, y + c, kLanes);
      }
      for (; c + kLanes <= p.channels; c += kLanes) {
        pool_pixel<T, kMean, false, 1>(p, x + c, y1 - y0, x1 - x0, factor, y + c, kLanes);
      }
      if (c < p.channels) {
        pool_pixel<T, kMean, true, 1>(p, x + c, y1 - y0, x1 - x0, factor, y + c, static_cast<int>(p.channels - c));
      }
    }
  }
}

template <class T>
void pool2d(const PoolArgs<T>& p) {
  return p.mean ? pool_rows<T, true>(p) : pool_rows<T, false>(p);
}

// One output pixel: the taps of its window that are inside the image, from x on. They are read twice, for the largest
// value, and for where it is.
template <class T, bool kTail>
inline void max_pool_grad_pixel(const MaxPoolGradArgs<T>& p, const T* x, T* x_grad, int64_t rows, int64_t columns,
                                const T* grad, int n) {
  using V = Vec<T>;
  const int64_t row_stride = p.dilation_h * p.x_row_stride, pixel_stride = p.dilation_w * p.x_pixel_stride;
  const auto zero = V::set1(0);
  auto largest = load<T, kTail>(x, n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      largest = V::max_nan(largest, load<T, kTail>(x + row * row_stride + column * pixel_stride, n));
    }
  }
  auto left = load<T, kTail>(grad, n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = row * row_stride + column * pixel_stride;
      const auto value = load<T, kTail>(x + at, n);
      // A NaN is no less or equal to itself.
      const auto here = V::select_le(largest, value, left, V::select_le(value, value, zero, left));
      left = V::select_le(largest, value, zero, V::select_le(value, value, left, zero));
      store<T, kTail>(x_grad + at, V::add(load<T, kTail>(x_grad + at, n), here), n);
    }
  }
}

template <class T>
void max_pool2d_grad(const MaxPoolGradArgs<T>& p) {
  constexpr int kLanes = Vec<T>::kLanes;
  for (int64_t oy = p.row_begin; oy < p.row_end; ++oy) {
    const int64_t top = oy * p.stride_h - p.pad_top;
    const int64_t y0 = first_tap(top, p.dilation_h), y1 = end_of_taps(top, p.dilation_h, p.kernel_h, p.height);
    for (int64_t ox = 0; ox < p.out_width; ++ox) {
      const int64_t left = ox * p.stride_w - p.pad_left;
      const int64_t x0 = first_tap(left, p.dilation_w), x1 = end_of_taps(left, p.dilation_w, p.kernel_w, p.width);
      const int64_t at = (top + y0 * p.dilation_h) * p.x_row_stride + (left + x0 * p.dilation_w) * p.x_pixel_stride;
      const T* grad = p.grad + oy * p.grad_row_stride + ox * p.grad_pixel_stride;
      int64_t c = 0;
      for (; c + kLanes <= p.channels; c += kLanes) {
        max_pool_grad_pixel<T, false>(p, p.x + at + c, p.x_grad + at + c, y1 - y0, x1 - x0, grad + c, kLanes);
      }
      if (c < p.channels) {
        max_pool_grad_pixel<T, true>(p, p.x + at + c, p.x_grad + at + c, y1 - y0, x1 - x0, grad + c,
                                     static_cast<int>(p.channels - c));
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
