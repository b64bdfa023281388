// Depthwise convolution, channels last: see DepthwiseArgs for what one call computes.
//
// A tile is up to kTileColumns output columns of one row and one vector of channels, all accumulators in registers. For
// each kernel row, its weights are loaded, then each input vector once; it serves every output column that it touches.
// A 3×3 tile of 8 columns so loads 3 × (3 + 10) vectors for 72 multiply-adds. Rows outside the image are skipped;
// columns outside are skipped in the tiles at the borders (kBorder), so padding costs no arithmetic and brings in no
// NaN. Vectors of channels are innermost, which reads whole pixels one after another: walking one vector down a row
// instead would meet the same few L1 sets whenever the number of channels is a large power of two.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

constexpr int kTileColumns = 8;

// What a tile needs besides the shape of the call: where it lies.
template <class T>
struct DepthwiseTile {
  const T* const* rows;  // per kernel row: column 0 of the input row at this tile's first channel, null outside
  int64_t column;        // input column of the first tap of the first output
  int64_t channel;
  T* y;
  int lanes;
};

template <class T, int kKernelH, int kKernelW, int kStride, int kColumns, bool kBorder, bool kTail>
void depthwise_tile(const DepthwiseArgs<T>& d, const DepthwiseTile<T>& tile) {
  using V = Vec<T>;
  constexpr int kInputs = (kColumns - 1) * kStride + kKernelW;
  const int n = tile.lanes;
  typename V::Reg acc[kColumns];
  {
    const auto bias = load<T, kTail>(d.bias + tile.channel, n);
#pragma GCC unroll 8
    for (int o = 0; o < kColumns; ++o) acc[o] = bias;
  }
  const T* weight = d.weight + tile.channel;
#pragma GCC unroll 7
  for (int ky = 0; ky < kKernelH; ++ky, weight += kKernelW * d.tap_stride) {
    if (tile.rows[ky] == nullptr) continue;
    const T* x = tile.rows[ky] + tile.channel + tile.column * d.x_pixel_stride;
    typename V::Reg w[kKernelW];
#pragma GCC unroll 7
    for (int kx = 0; kx < kKernelW; ++kx) w[kx] = load<T, kTail>(weight + kx * d.tap_stride, n);
#pragma GCC unroll 24
    for (int i = 0; i < kInputs; ++i, x += d.x_pixel_stride) {
      if (kBorder && static_cast<uint64_t>(tile.column + i) >= static_cast<uint64_t>(d.width)) continue;
      const auto value = load<T, kTail>(x, n);
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) {
        const int kx = i - o * kStride;
        if (kx >= 0 && kx < kKernelW) acc[o] = V::fma(value, w[kx], acc[o]);
      }
    }
  }
  switch (d.activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) acc[o] = activate_cheap<T>(Activation::kRelu, acc[o]);
      break;
    case Activation::kRelu6:
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) acc[o] = activate_cheap<T>(Activation::kRelu6, acc[o]);
      break;
    case Activation::kHardswish:
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) acc[o] = activate_cheap<T>(Activation::kHardswish, acc[o]);
      break;
    default:
      for (int o = 0; o < kColumns; ++o) acc[o] = activate<T>(d.activation, acc[o]);
  }
#pragma GCC unroll 8
  for (int o = 0; o < kColumns; ++o) store<T, kTail>(tile.y + o * d.y_pixel_stride, acc[o], n);
  if (d.sums != nullptr) {
    auto sum = acc[0];
#pragma GCC unroll 8
    for (int o = 1; o < kColumns; ++o) sum = V::add(sum, acc[o]);
    T* s = d.sums + tile.channel;
    store<T, kTail>(s, V::add(load<T, kTail>(s, n), sum), n);
  }
}

// Any kernel size, stride and dilation: the taps of output row `oy` one after another.
template <class T, bool kTail>
void depthwise_tile_any(const DepthwiseArgs<T>& d, const DepthwiseTile<T>& tile, int64_t oy, int columns) {
  using V = Vec<T>;
  const int n = tile.lanes;
  typename V::Reg sum = V::set1(0);
  for (int o = 0; o < columns; ++o) {
    auto acc = load<T, kTail>(d.bias + tile.channel, n);
    const int64_t column = tile.column + o * d.stride_w;
    const T* weight = d.weight + tile.channel;
    for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
      const int64_t iy = oy * d.stride_h - d.pad_top + ky * d.dilation_h;
      for (int64_t kx = 0; kx < d.kernel_w; ++kx, weight += d.tap_stride) {
        const int64_t ix = column + kx * d.dilation_w;
        if (iy < 0 || iy >= d.height || ix < 0 || ix >= d.width) continue;
        const auto value = load<T, kTail>(d.x + iy * d.x_row_stride + ix * d.x_pixel_stride + tile.channel, n);
        acc = V::fma(value, load<T, kTail>(weight, n), acc);
      }
    }
    acc = activate<T>(d.activation, acc);
    store<T, kTail>(tile.y + o * d.y_pixel_stride, acc, n);
    sum = V::add(sum, acc);
  }
  if (d.sums != nullptr) {
    T* s = d.sums + tile.channel;
    store<T, kTail>(s, V::add(load<T, kTail>(s, n), sum), n);
  }
}

template <class T>
using DepthwiseTileFn = void (*)(const DepthwiseArgs<T>&, const DepthwiseTile<T>&);

template <class T, int kKernel, int kStride, bool kBorder, bool kTail, int kColumns = kTileColumns>
DepthwiseTileFn<T> select_depthwise_columns(int columns) {
  if constexpr (kColumns == 1) {
    return depthwise_tile<T, kKernel, kKernel, kStride, 1, kBorder, kTail>;
  } else {
    return columns == kColumns ? depthwise_tile<T, kKernel, kKernel, kStride, kColumns, kBorder, kTail>
                               : select_depthwise_columns<T, kKernel, kStride, kBorder, kTail, kColumns - 1>(columns);
  }
}

// The tile for this call's kernel and stride; null where only depthwise_tile_any serves.
template <class T, bool kBorder, bool kTail>
DepthwiseTileFn<T> select_depthwise_tile(const DepthwiseArgs<T>& d, int columns) {
  if (d.kernel_h != d.kernel_w || d.stride_h != d.stride_w || d.dilation_w != 1) return nullptr;
  if (d.kernel_w == 3 && d.stride_w == 1) return select_depthwise_columns<T, 3, 1, kBorder, kTail>(columns);
  if (d.kernel_w == 3 && d.stride_w == 2) return select_depthwise_columns<T, 3, 2, kBorder, kTail>(columns);
  if (d.kernel_w == 5 && d.stride_w == 1) return select_depthwise_columns<T, 5, 1, kBorder, kTail>(columns);
  if (d.kernel_w == 5 && d.stride_w == 2) return select_depthwise_columns<T, 5, 2, kBorder, kTail>(columns);
  return nullptr;
}

template <class T>
void depthwise_conv2d(const DepthwiseArgs<T>& d) {
  constexpr int kLanes = Vec<T>::kLanes;
  constexpr int kMaxKernelRows = 8;  // of the kernels that have a tile of their own
  const T* rows[kMaxKernelRows] = {};
  const int64_t tiles = (d.out_width + kTileColumns - 1) / kTileColumns;
  for (int64_t oy = d.row_begin; oy < d.row_end; ++oy) {
    for (int64_t ky = 0; ky < d.kernel_h && ky < kMaxKernelRows; ++ky) {
      const int64_t iy = oy * d.stride_h - d.pad_top + ky * d.dilation_h;
      rows[ky] = iy >= 0 && iy < d.height ? d.x + iy * d.x_row_stride : nullptr;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t ox = t * d.out_width / tiles;
      const int columns = static_cast<int>((t + 1) * d.out_width / tiles - ox);
      const int64_t first = ox * d.stride_w - d.pad_left;
      const int64_t last = first + (columns - 1) * d.stride_w + (d.kernel_w - 1) * d.dilation_w;
      const bool border = first < 0 || last >= d.width;
      DepthwiseTile<T> tile{rows, first, 0, d.y + oy * d.y_row_stride + ox * d.y_pixel_stride, kLanes};
      const DepthwiseTileFn<T> body = border ? select_depthwise_tile<T, true, Vec<T>::kMaskIsFree>(d, columns)
                                             : select_depthwise_tile<T, false, Vec<T>::kMaskIsFree>(d, columns);
      for (; tile.channel + kLanes <= d.channels; tile.channel += kLanes, tile.y += kLanes) {
        if (body != nullptr) {
          body(d, tile);
        } else {
          depthwise_tile_any<T, Vec<T>::kMaskIsFree>(d, tile, oy, columns);
        }
      }
      if (tile.channel == d.channels) continue;
      tile.lanes = static_cast<int>(d.channels - tile.channel);
      const DepthwiseTileFn<T> tail =
          border ? select_depthwise_tile<T, true, true>(d, columns) : select_depthwise_tile<T, false, true>(d, columns);
      if (tail != nullptr) {
        tail(d, tile);
      } else {
        depthwise_tile_any<T, true>(d, tile, oy, columns);
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
