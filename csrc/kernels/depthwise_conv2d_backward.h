// The gradients of a depthwise convolution, channels last: see DepthwiseGradArgs for what one call computes.
//
// A tile is some inputs of one row and one vector of channels, which stay in registers with their gradients. Each
// gradient at an output that reads any of them is loaded once and serves both gradients: its multiples by the taps are
// added to the inputs', its products with the inputs to the weight's. The sums of a row of taps are in registers while
// a row of outputs is passed.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// A row of inputs and what meets it: the rows of taps that any output reads it by, from `first_tap` on, of which the
// first belongs to the row of outputs that begins at `grad`, and each next one to the row of outputs above.
template <class T>
struct GradRow {
  const T* x;
  T* x_grad;
  const T* grad;
  int64_t first_tap, tap_rows;
};

// Inputs [column, column + kInputs) of a vector of channels, from `channel` on; kPhase is (column + pad_left) %
// kStride.
template <class T, int kKernel, int kStride, int kPhase, int kInputs, bool kBorder, bool kTail>
[[gnu::always_inline]] inline void grad_vector(const DepthwiseGradArgs<T>& d, const GradRow<T>& row, int64_t column,
                                               int64_t channel, int n) {
  using V = Vec<T>;
  constexpr int kFirst = -((kKernel - 1 - kPhase) / kStride), kLast = (kPhase + kInputs - 1) / kStride;
  const T* input = row.x + column * d.x_pixel_stride + channel;
  typename V::Reg x[kInputs], x_grad[kInputs];
#pragma GCC unroll 16
  for (int t = 0; t < kInputs; ++t, input += d.x_pixel_stride) {
    x[t] = load<T, kTail>(input, n);
    x_grad[t] = V::set1(0);
    __builtin_prefetch(input + d.x_ahead, 0, 2);
  }
  const int64_t output = (column + d.pad_left) / kStride;
  const T* grads = row.grad + output * d.grad_pixel_stride + channel;
  if (kStride == 1 || row.first_tap != 1) {
#pragma GCC unroll 16
    for (int o = 0; o < kInputs; o += kStride) {
      __builtin_prefetch(grads + o / kStride * d.grad_pixel_stride + d.grad_ahead, 0, 2);
    }
  }
  grads += kFirst * d.grad_pixel_stride;
  const int64_t tap = row.first_tap * kKernel * V::kLanes;
  const T* weight = d.weight + channel * (1 + kKernel * kKernel) + V::kLanes + tap;
  T* weight_grad = d.weight_grad + channel * kKernel * kKernel + tap;
  for (int64_t r = 0; r < row.tap_rows; ++r) {
    typename V::Reg w[kKernel], sums[kKernel];
#pragma GCC unroll 16
    for (int k = 0; k < kKernel; ++k) {
      w[k] = V::load(weight + k * V::kLanes);
      sums[k] = V::load(weight_grad + k * V::kLanes);
    }
    const T* at = grads;
#pragma GCC unroll 16
    for (int o = kFirst; o <= kLast; ++o, at += d.grad_pixel_stride) {
      // Skipped, for a zero in its place would make NaN of infinite weights and inputs.
      if (kBorder && static_cast<uint64_t>(output + o) >= static_cast<uint64_t>(d.out_width)) continue;
      const auto grad = load<T, kTail>(at, n);
#pragma GCC unroll 16
      for (int k = 0; k < kKernel; ++k) {
        const int t = o * kStride + k - kPhase;
        if (t >= 0 && t < kInputs) {
          x_grad[t] = V::fma(grad, w[k], x_grad[t]);
          sums[k] = V::fma(grad, x[t], sums[k]);
        }
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < kKernel; ++k) V::store(weight_grad + k * V::kLanes, sums[k]);
    grads -= d.grad_row_stride;
    weight += kStride * kKernel * V::kLanes;
    weight_grad += kStride * kKernel * V::kLanes;
  }
  T* out = row.x_grad + column * d.x_grad_pixel_stride + channel;
#pragma GCC unroll 16
  for (int t = 0; t < kInputs; ++t, out += d.x_grad_pixel_stride) {
    if (!kTail && d.past_caches) {
      V::stream(out, x_grad[t]);
    } else {
      store<T, kTail>(out, x_grad[t], n);
    }
  }
}

template <class T, int kKernel, int kStride, int kPhase, int kInputs, bool kBorder>
void grad_tile(const DepthwiseGradArgs<T>& d, const GradRow<T>& row, int64_t column) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= d.channels; c += kLanes) {
    grad_vector<T, kKernel, kStride, kPhase, kInputs, kBorder, false>(d, row, column, c, kLanes);
  }
  if (c < d.channels) {
    grad_vector<T, kKernel, kStride, kPhase, kInputs, kBorder, true>(d, row, column, c,
                                                                     static_cast<int>(d.channels - c));
  }
}

template <class T, int kKernel, int kStride, int kPhase, int kInputs>
void grad_columns(const DepthwiseGradArgs<T>& d, const GradRow<T>& row, int64_t column) {
  const int64_t begin = column + d.pad_left - (kKernel - 1), end = column + d.pad_left + kInputs - 1;
  if (begin < 0 || end >= kStride * d.out_width) {
    grad_tile<T, kKernel, kStride, kPhase, kInputs, true>(d, row, column);
  } else {
    grad_tile<T, kKernel, kStride, kPhase, kInputs, false>(d, row, column);
  }
}

// Rows are cut evenly into tiles of at most kMost times kStride inputs, and a last input where they are odd.
template <class T, int kKernel, int kStride, int kPhase>
void gradients_square(const DepthwiseGradArgs<T>& d) {
  constexpr bool kManyRegisters = Vec<T>::kRegisters == 32;
  // float64 is here to check float32's code.
  constexpr int kMost = sizeof(T) == 8 ? 2 : kStride == 2 ? (kManyRegisters ? 4 : 2) : kManyRegisters ? 7 : 4;
  const int64_t units = d.width / kStride, tiles = units <= kMost / 2 ? units : (units + kMost - 1) / kMost;
  for (int64_t y = d.row_begin; y < d.row_end; ++y) {
    // Tap row k reads y for output row (y + pad_top - k) / kStride, where that is one.
    const int64_t padded = y + d.pad_top, beyond = padded - kStride * d.out_height;
    int64_t first = padded % kStride;
    while (first <= beyond) first += kStride;
    const int64_t last = padded < kKernel - 1 ? padded : kKernel - 1;
    const GradRow<T> row{d.x + y * d.x_row_stride, d.x_grad + y * d.x_grad_row_stride,
                         d.grad + (padded - first) / kStride * d.grad_row_stride, first,
                         first <= last ? (last - first) / kStride + 1 : 0};
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = i * units / tiles, count = (i + 1) * units / tiles - begin, column = begin * kStride;
#define MF_COLUMNS(units) \
  if (units <= kMost && count == units) grad_columns<T, kKernel, kStride, kPhase, units * kStride>(d, row, column)
      MF_COLUMNS(1);
      MF_COLUMNS(2);
      MF_COLUMNS(3);
      MF_COLUMNS(4);
      MF_COLUMNS(5);
      MF_COLUMNS(6);
      MF_COLUMNS(7);
#undef MF_COLUMNS
    }
    if (units * kStride < d.width) grad_columns<T, kKernel, kStride, kPhase, 1>(d, row, d.width - 1);
  }
  if (d.past_caches) Vec<T>::fence();
}

// Any kernel size, stride and dilation: an input at a time.
template <class T>
void gradients_any(const DepthwiseGradArgs<T>& d) {
  using V = Vec<T>;
  const int64_t taps = d.kernel_h * d.kernel_w;
  for (int64_t y = d.row_begin; y < d.row_end; ++y) {
    for (int64_t x = 0; x < d.width; ++x) {
      for (int64_t c = 0; c < d.channels; c += V::kLanes) {
        const int n = d.channels - c < V::kLanes ? static_cast<int>(d.channels - c) : V::kLanes;
        const T* weight = d.weight + c * (1 + taps) + V::kLanes;
        const auto value = V::load_n(d.x + y * d.x_row_stride + x * d.x_pixel_stride + c, n);
        auto x_grad = V::set1(0);
        for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
          const int64_t from_y = y + d.pad_top - ky * d.dilation_h, oy = from_y / d.stride_h;
          if (from_y < 0 || from_y % d.stride_h != 0 || oy >= d.out_height) continue;
          for (int64_t kx = 0; kx < d.kernel_w; ++kx) {
            const int64_t from_x = x + d.pad_left - kx * d.dilation_w, ox = from_x / d.stride_w;
            if (from_x < 0 || from_x % d.stride_w != 0 || ox >= d.out_width) continue;
            const int64_t tap = (ky * d.kernel_w + kx) * V::kLanes;
            const auto grad = V::load_n(d.grad + oy * d.grad_row_stride + ox * d.grad_pixel_stride + c, n);
            x_grad = V::fma(grad, V::load(weight + tap), x_grad);
            T* sum = d.weight_grad + c * taps + tap;
            V::store(sum, V::fma(grad, value, V::load(sum)));
          }
        }
        V::store_n(d.x_grad + y * d.x_grad_row_stride + x * d.x_grad_pixel_stride + c, x_grad, n);
      }
    }
  }
}

template <class T>
void depthwise_conv2d_gradients(const DepthwiseGradArgs<T>& d) {
  const bool is_square =
      d.kernel_h == d.kernel_w && d.stride_h == d.stride_w && d.dilation_h == 1 && d.dilation_w == 1 && d.stride_w <= 2;
  switch (is_square ? 4 * d.kernel_w + 2 * (d.stride_w - 1) + d.pad_left % d.stride_w : 0) {
    case 4 * 3:
      return gradients_square<T, 3, 1, 0>(d);
    case 4 * 3 + 2:
      return gradients_square<T, 3, 2, 0>(d);
    case 4 * 3 + 3:
      return gradients_square<T, 3, 2, 1>(d);
    case 4 * 5:
      return gradients_square<T, 5, 1, 0>(d);
    case 4 * 5 + 2:
      return gradients_square<T, 5, 2, 0>(d);
    case 4 * 5 + 3:
      return gradients_square<T, 5, 2, 1>(d);
    case 4 * 7:
      return gradients_square<T, 7, 1, 0>(d);
    case 4 * 7 + 2:
      return gradients_square<T, 7, 2, 0>(d);
    case 4 * 7 + 3:
      return gradients_square<T, 7, 2, 1>(d);
    default:
      return gradients_any(d);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
