// The gradients of a depthwise convolution, channels last: see DepthwiseGradArgs for what one call computes.
//
// The weight's: a tile is some outputs of one row and one vector of channels, whose gradients stay in registers while
// each input vector that they meet is loaded once for a row of taps. The sums of all taps pass through L1 once a tile,
// which costs a fifth of the multiply-adds of seven outputs, and leaves vectors of channels innermost, as in the
// convolution itself, so that whole pixels are read.
//
// The input's, where the stride is 1, is the convolution itself with the taps in reverse order. Elsewhere a tile is
// some inputs of one row: each gradient that touches them is loaded once and serves all its taps.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T, int kKernel, int kStride, int kColumns, bool kBorder, bool kTail>
[[gnu::always_inline]] inline void weight_grad_vector(const DepthwiseGradArgs<T>& d, const T* x, const T* grad,
                                                      int64_t top, int64_t column, T* sums, int n) {
  using V = Vec<T>;
  constexpr int kInputs = (kColumns - 1) * kStride + kKernel;
  typename V::Reg g[kColumns];
#pragma GCC unroll 16
  for (int o = 0; o < kColumns; ++o) g[o] = load<T, kTail>(grad + o * d.grad_pixel_stride, n);
  for (int ky = 0; ky < kKernel; ++ky, x += d.x_row_stride, sums += kKernel * V::kLanes) {
    if (static_cast<uint64_t>(top + ky) >= static_cast<uint64_t>(d.height)) continue;
    typename V::Reg acc[kKernel];
#pragma GCC unroll 16
    for (int kx = 0; kx < kKernel; ++kx) acc[kx] = V::load(sums + kx * V::kLanes);
    const T* input = x;
#pragma GCC unroll 32
    for (int i = 0; i < kInputs; ++i, input += d.x_pixel_stride) {
      if (kBorder && static_cast<uint64_t>(column + i) >= static_cast<uint64_t>(d.width)) continue;
      const auto value = load<T, kTail>(input, n);
#pragma GCC unroll 16
      for (int o = 0; o < kColumns; ++o) {
        const int kx = i - o * kStride;
        if (kx >= 0 && kx < kKernel) acc[kx] = V::fma(value, g[o], acc[kx]);
      }
    }
#pragma GCC unroll 16
    for (int kx = 0; kx < kKernel; ++kx) V::store(sums + kx * V::kLanes, acc[kx]);
  }
}

template <class T, int kKernel, int kStride, int kColumns, bool kBorder>
void weight_grad_tile(const DepthwiseGradArgs<T>& d, int64_t oy, int64_t ox) {
  constexpr int kLanes = Vec<T>::kLanes, kTaps = kKernel * kKernel;
  const int64_t top = oy * kStride - d.pad_top, column = ox * kStride - d.pad_left;
  const T* x = d.x + top * d.x_row_stride + column * d.x_pixel_stride;
  const T* grad = d.grad + oy * d.grad_row_stride + ox * d.grad_pixel_stride;
  int64_t c = 0;
  for (; c + kLanes <= d.channels; c += kLanes) {
    weight_grad_vector<T, kKernel, kStride, kColumns, kBorder, false>(d, x + c, grad + c, top, column,
                                                                      d.weight_grad + c * kTaps, kLanes);
  }
  if (c < d.channels) {
    weight_grad_vector<T, kKernel, kStride, kColumns, kBorder, true>(
        d, x + c, grad + c, top, column, d.weight_grad + c * kTaps, static_cast<int>(d.channels - c));
  }
}

template <class T, int kKernel, int kStride, int kColumns>
void weight_grad_columns(const DepthwiseGradArgs<T>& d, int64_t oy, int64_t ox) {
  const int64_t column = ox * kStride - d.pad_left;
  if (column < 0 || column + (kColumns - 1) * kStride + kKernel > d.width) {
    weight_grad_tile<T, kKernel, kStride, kColumns, true>(d, oy, ox);
  } else {
    weight_grad_tile<T, kKernel, kStride, kColumns, false>(d, oy, ox);
  }
}

// Rows are cut evenly into tiles of at most 7 columns, which then have 4 or more; rows of up to 3 into single ones.
template <class T, int kKernel, int kStride>
void weight_grad_square(const DepthwiseGradArgs<T>& d) {
  constexpr int kColumns = sizeof(T) == 8 ? 1 : 7;  // float64 is here to check float32's code
  const int64_t width = d.out_width, tiles = width <= 3 ? width : (width + kColumns - 1) / kColumns;
  for (int64_t oy = d.row_begin; oy < d.row_end; ++oy) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t ox = t * width / tiles, columns = (t + 1) * width / tiles - ox;
      if constexpr (kColumns > 1) {
        if (columns == 7) weight_grad_columns<T, kKernel, kStride, 7>(d, oy, ox);
        if (columns == 6) weight_grad_columns<T, kKernel, kStride, 6>(d, oy, ox);
        if (columns == 5) weight_grad_columns<T, kKernel, kStride, 5>(d, oy, ox);
        if (columns == 4) weight_grad_columns<T, kKernel, kStride, 4>(d, oy, ox);
      }
      if (columns == 1) weight_grad_columns<T, kKernel, kStride, 1>(d, oy, ox);
    }
  }
}

// Any kernel size, stride and dilation: row `oy` of outputs, tap after tap.
template <class T>
void weight_grad_any(const DepthwiseGradArgs<T>& d) {
  using V = Vec<T>;
  const int64_t taps = d.kernel_h * d.kernel_w;
  for (int64_t oy = d.row_begin; oy < d.row_end; ++oy) {
    for (int64_t c = 0; c < d.channels; c += V::kLanes) {
      const int n = d.channels - c < V::kLanes ? static_cast<int>(d.channels - c) : V::kLanes;
      T* sums = d.weight_grad + c * taps;
      for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
        const int64_t iy = oy * d.stride_h - d.pad_top + ky * d.dilation_h;
        for (int64_t kx = 0; kx < d.kernel_w; ++kx, sums += V::kLanes) {
          if (iy < 0 || iy >= d.height) continue;
          const T* grad = d.grad + oy * d.grad_row_stride + c;
          int64_t ix = kx * d.dilation_w - d.pad_left;
          auto acc = V::load(sums);
          for (int64_t ox = 0; ox < d.out_width; ++ox, ix += d.stride_w, grad += d.grad_pixel_stride) {
            if (ix < 0 || ix >= d.width) continue;
            const auto value = V::load_n(d.x + iy * d.x_row_stride + ix * d.x_pixel_stride + c, n);
            acc = V::fma(value, V::load_n(grad, n), acc);
          }
          V::store(sums, acc);
        }
      }
    }
  }
}

// The inputs [kStride · o - pad_left, kStride · (o + kColumns) - pad_left) of row `iy`.
template <class T, int kKernel, int kStride, int kColumns, bool kBorder, bool kTail>
[[gnu::always_inline]] inline void input_grad_vector(const DepthwiseGradArgs<T>& d, int64_t iy, int64_t o,
                                                     int64_t channel, int n) {
  using V = Vec<T>;
  constexpr int kInputs = kStride * kColumns, kBefore = (kKernel - 1) / kStride;  // gradients before o that reach in
  typename V::Reg acc[kInputs];
#pragma GCC unroll 16
  for (int t = 0; t < kInputs; ++t) acc[t] = V::set1(0);
  const T* weight = d.weight + channel * (1 + kKernel * kKernel) + V::kLanes;
  const int64_t padded = iy + d.pad_top;
  for (int64_t ky = padded % kStride; ky < kKernel; ky += kStride) {
    const int64_t oy = (padded - ky) / kStride;
    if (padded < ky || oy >= d.out_height) continue;
    typename V::Reg w[kKernel];
#pragma GCC unroll 16
    for (int kx = 0; kx < kKernel; ++kx) w[kx] = V::load(weight + (ky * kKernel + kx) * V::kLanes);
    const T* grad = d.grad + oy * d.grad_row_stride + (o - kBefore) * d.grad_pixel_stride + channel;
#pragma GCC unroll 16
    for (int i = -kBefore; i < kColumns; ++i, grad += d.grad_pixel_stride) {
      if (kBorder && static_cast<uint64_t>(o + i) >= static_cast<uint64_t>(d.out_width)) continue;
      const auto value = load<T, kTail>(grad, n);
#pragma GCC unroll 16
      for (int kx = 0; kx < kKernel; ++kx) {
        const int t = i * kStride + kx;
        if (t >= 0 && t < kInputs) acc[t] = V::fma(value, w[kx], acc[t]);
      }
    }
  }
  const int64_t ix = o * kStride - d.pad_left;
  T* x = d.x + iy * d.x_row_stride + ix * d.x_pixel_stride + channel;
#pragma GCC unroll 16
  for (int t = 0; t < kInputs; ++t, x += d.x_pixel_stride) {
    if (!kBorder || static_cast<uint64_t>(ix + t) < static_cast<uint64_t>(d.width)) store<T, kTail>(x, acc[t], n);
  }
}

template <class T, int kKernel, int kStride, int kColumns, bool kBorder>
void input_grad_tile(const DepthwiseGradArgs<T>& d, int64_t iy, int64_t o) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= d.channels; c += kLanes) {
    input_grad_vector<T, kKernel, kStride, kColumns, kBorder, false>(d, iy, o, c, kLanes);
  }
  if (c < d.channels) {
    input_grad_vector<T, kKernel, kStride, kColumns, kBorder, true>(d, iy, o, c, static_cast<int>(d.channels - c));
  }
}

template <class T, int kKernel, int kStride>
void input_grad_square(const DepthwiseGradArgs<T>& d) {
  // Of maps of 7, 14, 28, … columns as few are left over as may be; of stride 2, without padding to speak of, 8 or 15.
  constexpr bool kManyRegisters = Vec<T>::kRegisters == 32;
  constexpr int kColumns = sizeof(T) == 8 ? 2 : kStride == 1 ? 7 : !kManyRegisters ? 4 : kKernel == 3 ? 5 : 7;
  const int64_t end = (d.width + d.pad_left + kStride - 1) / kStride;
  for (int64_t iy = d.row_begin; iy < d.row_end; ++iy) {
    for (int64_t o = d.pad_left / kStride; o < end; o += kColumns) {
      const int64_t ix = o * kStride - d.pad_left;
      const bool border =
          o < (kKernel - 1) / kStride || o + kColumns > d.out_width || ix < 0 || ix + kColumns * kStride > d.width;
      if (border) {
        input_grad_tile<T, kKernel, kStride, kColumns, true>(d, iy, o);
      } else {
        input_grad_tile<T, kKernel, kStride, kColumns, false>(d, iy, o);
      }
    }
  }
}

// Any kernel size, stride and dilation: an input at a time.
template <class T>
void input_grad_any(const DepthwiseGradArgs<T>& d) {
  using V = Vec<T>;
  const int64_t taps = d.kernel_h * d.kernel_w;
  for (int64_t iy = d.row_begin; iy < d.row_end; ++iy) {
    for (int64_t ix = 0; ix < d.width; ++ix) {
      for (int64_t c = 0; c < d.channels; c += V::kLanes) {
        const int n = d.channels - c < V::kLanes ? static_cast<int>(d.channels - c) : V::kLanes;
        const T* weight = d.weight + c * (1 + taps) + V::kLanes;
        auto acc = V::set1(0);
        for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
          const int64_t y = iy + d.pad_top - ky * d.dilation_h, oy = y / d.stride_h;
          if (y < 0 || y % d.stride_h != 0 || oy >= d.out_height) continue;
          for (int64_t kx = 0; kx < d.kernel_w; ++kx) {
            const int64_t x = ix + d.pad_left - kx * d.dilation_w, ox = x / d.stride_w;
            if (x < 0 || x % d.stride_w != 0 || ox >= d.out_width) continue;
            const auto value = V::load_n(d.grad + oy * d.grad_row_stride + ox * d.grad_pixel_stride + c, n);
            acc = V::fma(value, V::load(weight + (ky * d.kernel_w + kx) * V::kLanes), acc);
          }
        }
        V::store_n(d.x + iy * d.x_row_stride + ix * d.x_pixel_stride + c, acc, n);
      }
    }
  }
}

#define MF_FOR_SQUARE(square, any)                                                                    \
  const bool is_square = d.kernel_h == d.kernel_w && d.stride_h == d.stride_w && d.dilation_h == 1 && \
                         d.dilation_w == 1 && d.stride_w <= 2;                                        \
  switch (is_square ? 2 * d.kernel_w + d.stride_w : 0) {                                              \
    case 2 * 3 + 1:                                                                                   \
      return square<T, 3, 1>(d);                                                                      \
    case 2 * 3 + 2:                                                                                   \
      return square<T, 3, 2>(d);                                                                      \
    case 2 * 5 + 1:                                                                                   \
      return square<T, 5, 1>(d);                                                                      \
    case 2 * 5 + 2:                                                                                   \
      return square<T, 5, 2>(d);                                                                      \
    case 2 * 7 + 1:                                                                                   \
      return square<T, 7, 1>(d);                                                                      \
    case 2 * 7 + 2:                                                                                   \
      return square<T, 7, 2>(d);                                                                      \
    default:                                                                                          \
      return any(d);                                                                                  \
  }

template <class T>
void depthwise_conv2d_weight_grad(const DepthwiseGradArgs<T>& d) {
  MF_FOR_SQUARE(weight_grad_square, weight_grad_any)
}

template <class T>
void depthwise_conv2d_input_grad(const DepthwiseGradArgs<T>& d) {
  MF_FOR_SQUARE(input_grad_square, input_grad_any)
}

#undef MF_FOR_SQUARE

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
