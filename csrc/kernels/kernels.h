// What a kernel is called with: plain pointers, sizes and strides (in elements). No torch headers here or below.
//
// Activations lie channels-last: an image is H × W pixels, a pixel is `channels` consecutive elements. Every pointer is
// to the first element that the call works on.
#pragma once

#include <cstdint>

#include "kernels/isa.h"

namespace mobilenet_fast {

enum class Activation : int { kNone, kRelu, kRelu6, kHardswish, kHardsigmoid, kSilu, kSigmoid };

// out[m, n] = activation(bias[n] + residual[m, n] + sum over chunks j and k of a[m * a_stride + chunk_offset[j] + k] *
// weight[j * chunk_length + k, n]): a pointwise convolution is one chunk of all input channels with a row a pixel, a
// k × k convolution has a chunk a kernel row (or a tap), with a row an output pixel.
//
// The weight is packed: output channels are cut into vectors of `lanes`, those into panels of at most `panel_vectors`
// (see panel_first_vector), and each panel is stored row by row (chunk, then k), zero-padded to a multiple of
// `column_unit`. A call computes the panels [panel_begin, panel_end) of `columns` columns in all. Where `depth` is
// given, panels have so many rows, of which the chunks are those from `first_k` on.
template <class T>
struct GemmArgs {
  const T* a;
  int64_t a_stride;
  int64_t rows;
  const int64_t* chunk_offset;
  int64_t chunks, chunk_length;
  const T* weight;         // all panels
  const T* bias;           // padded to whole vectors
  int64_t depth, first_k;  // or 0
  int64_t columns;
  int64_t panel_begin, panel_end;
  const T* residual;  // or null
  int64_t residual_stride;
  T* out;
  int64_t out_stride;
  int64_t rows_per_block;  // rows that pass all panels before the next ones: their inputs and outputs stay in cache
  Activation activation;
};

// Output rows [row_begin, row_end) of one image and one range of channels. `weight` holds the bias and then the taps of
// the first `lanes` channels, then those of the next, zero-padded to whole vectors: read once from far, it is one
// stream. Where `sums` is given, the outputs of each row from row_begin on are added up per channel into its rows,
// `sums_stride` elements apart, which hold zeros before. With `fetches`, inputs are fetched from memory a row of tiles
// before they are read; below an image's last row lies the next image.
template <class T>
struct DepthwiseArgs {
  const T* x;
  int64_t x_row_stride, x_pixel_stride, height, width;
  const T* weight;
  T* y;
  int64_t y_row_stride, y_pixel_stride, row_begin, row_end, out_width;
  int64_t channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  T* sums;
  int64_t sums_stride;
  Activation activation;
  bool fetches;
};

// The tiles [tile_begin, tile_end) of one image, in rows of `tiles_across`, in Winograd's transformed space: 36 planes,
// `plane_stride` elements apart, of a row of `channels` a tile, `tile_stride` apart. The image (the convolution's input
// or its output) has the sizes and strides given; padding is that of the input.
template <class T>
struct WinogradArgs {
  const T* image;  // to transform from
  T* output;       // to transform to
  int64_t image_row_stride, image_pixel_stride, image_height, image_width, pad_top, pad_left;
  T* tiles;
  int64_t tile_begin, tile_end, tiles_across, tile_stride, plane_stride, channels;
  const T* bias;      // of the outputs
  const T* residual;  // or null: an image like the output, its pixels residual_stride apart
  int64_t residual_stride;
  Activation activation;
};

// Output rows [row_begin, row_end) of one image: the largest, or the mean, of each window's pixels inside the image. A
// window holds at least one. A mean divides by `divisor` where that is positive, else by the number of pixels, padding
// included with count_padding.
template <class T>
struct PoolArgs {
  const T* x;
  int64_t x_row_stride, x_pixel_stride, height, width;
  T* y;
  int64_t y_row_stride, y_pixel_stride, row_begin, row_end, out_width;
  int64_t channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  bool mean, count_padding;
  int64_t divisor;
};

// The gradient of a maximum: to `x_grad`, which lies as x does, that of each output of the rows [row_begin, row_end) is
// added at the first pixel of its window that holds the largest value, or a NaN.
template <class T>
struct MaxPoolGradArgs {
  const T* x;
  T* x_grad;
  int64_t x_row_stride, x_pixel_stride, height, width;
  const T* grad;
  int64_t grad_row_stride, grad_pixel_stride, row_begin, row_end, out_width;
  int64_t channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// y[m, c] = activation(x[m, c] * scale[c] + shift[c]) over `rows` pixels. Without `scale` it is 1; without `shift` it
// is -0, which changes no number.
template <class T>
struct ScaleShiftArgs {
  const T* x;
  int64_t x_stride;
  T* y;
  int64_t y_stride;
  int64_t rows, channels;
  const T* scale;
  const T* shift;
  Activation activation;
};

// Sums for a batch norm's statistics over `rows` pixels: sums[c] += sum of x[m, c] - pivot[c], and its squares into
// sums[channels + c]. A pivot among the values keeps their squares from cancelling, wherever the mean lies.
template <class T>
struct StatisticsArgs {
  const T* x;
  int64_t x_stride;
  int64_t rows, channels;
  const T* pivot;
  T* sums;
};

// Of z = gate · activation(x · scale + shift), over `rows` pixels of one image: from `grad`, the gradient at z, that at
// the activation's input, d = (grad · gate + pooled) · activation'(x · scale + shift). Without `gate` it is 1 and
// `pooled` 0. Either `sums` get it added, the sum of d and, `channels` on, of d · (x - mean), or `out` is what the
// batch norm makes of it, d · factor + (x - mean) · slope + offset (d itself without `factor`, with sums too), or both:
// `out` then is d.
template <class T>
struct NormGradientArgs {
  const T* grad;
  int64_t grad_stride;
  const T* x;
  int64_t x_stride;
  T* out;  // or null
  int64_t out_stride;
  int64_t rows, channels;
  const T *scale, *shift;
  const T *gate, *pooled;  // or null, both
  const T* mean;           // read for sums and slope alone
  const T *factor, *slope, *offset;
  T* sums;  // or null
  Activation activation;
  bool past_caches;  // as for DepthwiseGradArgs, of `out`
};

// sums[c] += sum over `rows` pixels of grad[m, c] · activation(x[m, c] · scale[c] + shift[c]); without `grad` it is 1.
template <class T>
struct GateGradientArgs {
  const T* grad;  // or null
  int64_t grad_stride;
  const T* x;
  int64_t x_stride;
  int64_t rows, channels;
  const T *scale, *shift;
  T* sums;
  Activation activation;
};

// A depthwise convolution's gradients, from that at its output; sizes as for DepthwiseArgs. Of input rows
// [row_begin, row_end) the input's is written to `x_grad`, which may be x, and what they give to the weight's is added
// to `weight_grad`, which like packed weights has the taps of the first `lanes` channels, then those of the next,
// without a bias. Memory is fetched `x_ahead` and `grad_ahead` elements before it is read, 0 where it is in cache. With
// `past_caches` the input's gradient goes straight to memory: vectors of it are aligned to their size then.
template <class T>
struct DepthwiseGradArgs {
  const T* x;
  int64_t x_row_stride, x_pixel_stride, width;
  T* x_grad;
  int64_t x_grad_row_stride, x_grad_pixel_stride;
  const T* grad;
  int64_t grad_row_stride, grad_pixel_stride, out_height, out_width;
  int64_t row_begin, row_end;
  int64_t channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t x_ahead, grad_ahead;
  bool past_caches;
  const T* weight;  // packed, with its bias, which is not read
  T* weight_grad;
};

// out[i, j] += sum over rows of a[row, i] * b[row, j] for i < columns_a and j < columns_b. `panel` is room for `rows`
// of `panel_vectors` vectors. While it computes, it brings what is read next into L2: `fetch_bytes` from each of
// `fetch` on.
template <class T>
struct GemmTransposedArgs {
  const T* a;
  int64_t a_stride, columns_a;
  const T* b;
  int64_t b_stride, columns_b;
  int64_t rows;
  T* out;
  int64_t out_stride;
  T* panel;
  static constexpr int kFetches = 3;
  const void* fetch[kFetches];  // or null
  int64_t fetch_bytes[kFetches];
};

// The kernels of one instruction set and one element type.
template <class T>
struct Kernels {
  Isa isa;
  int lanes;
  int column_unit;    // packed weights are padded to a multiple of this: lanes, or half of them
  int panel_vectors;  // vectors in a panel of the GEMM, at most
  int panel_rows;     // rows that its micro-kernel computes together for a full panel
  void (*gemm)(const GemmArgs<T>&);
  void (*gemm_transposed)(const GemmTransposedArgs<T>&);
  void (*depthwise_conv2d)(const DepthwiseArgs<T>&);
  void (*depthwise_conv2d_gradients)(const DepthwiseGradArgs<T>&);
  void (*pool2d)(const PoolArgs<T>&);
  void (*max_pool2d_grad)(const MaxPoolGradArgs<T>&);
  void (*winograd_input)(const WinogradArgs<T>&);
  void (*winograd_output)(const WinogradArgs<T>&);
  void (*scale_shift_act)(const ScaleShiftArgs<T>&);
  // y[i] = activation(x[i] * scale + shift), i < n: one plane of a contiguous tensor.
  void (*scale_shift_act_plane)(const T* x, T* y, int64_t n, T scale, T shift, Activation activation);
  void (*statistics)(const StatisticsArgs<T>&);
  void (*norm_gradient)(const NormGradientArgs<T>&);
  void (*gate_gradient)(const GateGradientArgs<T>&);
  // y[i] = activation(a[i] + b[i]), i < n.
  void (*add_act)(const T* a, const T* b, T* y, int64_t n, Activation activation);
  // sums[c] = sum over rows of x[row * stride + c].
  void (*sum_rows)(const T* x, int64_t stride, int64_t rows, int64_t channels, T* sums);
  T (*sum_plane)(const T* x, int64_t n);
  // y[m, k] = activation(bias[k] + scale[k] * sum over c of x[m, c] * weight[k, c]) for m < rows and begin <= k < end;
  // x is (rows, channels), weight (out_channels, channels) and y (rows, out_channels), all dense; scale and bias may be
  // null.
  void (*fully_connected)(const T* x, int64_t rows, int64_t channels, const T* weight, const T* scale, const T* bias,
                          int64_t begin, int64_t end, int64_t out_channels, Activation activation, T* y);
  // out[k * width + j] = source[j * depth + k] * scale[j] for j < columns, 0 up to width; without scale it is 1.
  void (*pack_columns)(const T* source, int64_t columns, int64_t depth, const T* scale, T* out, int64_t width);
  // `rounds` rounds of multiply_add_flops operations each, acc = acc * a + b on registers: the peak to measure against.
  T (*multiply_add)(int64_t rounds, T a, T b);
  int multiply_add_flops;
  // scale = weight / sqrt(var + eps), shift = bias - mean * scale; weight and bias may be null for 1 and 0.
  void (*fold_batch_norm)(const T* mean, const T* var, const T* weight, const T* bias, T eps, int64_t channels,
                          T* scale, T* shift);
};

// The vectors before panel p of `panels`, when `vectors` are shared out as evenly as they go.
inline int64_t panel_first_vector(int64_t p, int64_t panels, int64_t vectors) { return p * vectors / panels; }
inline int64_t panel_count(int64_t vectors, int64_t panel_vectors) {
  return (vectors + panel_vectors - 1) / panel_vectors;
}

}  // namespace mobilenet_fast
