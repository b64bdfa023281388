// Depthwise convolution, channels last: see DepthwiseArgs for what one call computes.
//
// A tile is rows × columns outputs of one vector of channels, all accumulators in registers. Each input vector that the
// tile reads is loaded once and serves every output it touches: a 3×3 tile of 2 × 7 outputs takes 4 × 9 inputs and 18
// weights for 126 multiply-adds. What the tile saves is mostly traffic with L2, where the maps lie: tiles of one row
// read each input three times. Maps of this family are multiples of 7 wide. Rows and columns outside the image are
// skipped, so padding costs no arithmetic and brings in no NaN.
//
// Vectors of channels are innermost, which reads whole pixels one after another: walking one vector down a row instead
// would meet the same few L1 sets whenever the number of channels is a large power of two. (Groups of channels small
// enough for their rows to stay in L1 were measured: 2–25 % slower on every shape of the family.)
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T, int kKernel>
struct DepthwiseShape {
  static constexpr bool kManyRegisters = Vec<T>::kRegisters == 32;
  // Accumulators, the weights of `kRows` kernel rows and an input have to fit the registers.
  static constexpr int kRows = kKernel == 3 || (kKernel == 5 && kManyRegisters) ? 2 : 1;
  // Float64 is here to check float32's code: small tiles spare it a third of the build.
  static constexpr int kColumns = sizeof(T) == 8 ? 2 : kRows == 2 && !kManyRegisters ? 4 : 7;
};

template <class T>
struct DepthwiseTile {
  const T* x;      // at the first input row inside the image that the tile reads and at `column`; channel 0 of the call
  int64_t weight;  // past the bias, of the kernel row that meets that row
  // Input rows inside the image that serve the first output row alone, both, and the second alone.
  int row_count[3];
  int64_t column;  // input column of the first tap of the first output
  const T* ahead;  // what the tile below reads and this one doesn't, or null
  T* y;
  T* sums;  // or null
};

// The next `count` input rows, which serve the output rows [kFirst, kLast) of the tile.
template <class T, int kKernel, int kStride, int kFirst, int kLast, bool kBorder, bool kTail, int kRows, int kColumns>
[[gnu::always_inline]] inline void filter_rows(const DepthwiseArgs<T>& d, const T*& x, const T*& weight, int count,
                                               int64_t column, int n, typename Vec<T>::Reg (&acc)[kRows][kColumns]) {
  using V = Vec<T>;
  constexpr int kInputs = (kColumns - 1) * kStride + kKernel;
  for (; count > 0; --count, x += d.x_row_stride, weight += kKernel * V::kLanes) {
    typename V::Reg w[kRows][kKernel];
#pragma GCC unroll 16
    for (int r = kFirst; r < kLast; ++r) {
#pragma GCC unroll 16
      for (int kx = 0; kx < kKernel; ++kx) {
        w[r][kx] = V::load(weight + (kx - r * kStride * kKernel) * V::kLanes);
      }
    }
    const T* input = x;
#pragma GCC unroll 32
    for (int i = 0; i < kInputs; ++i, input += d.x_pixel_stride) {
      if (kBorder && static_cast<uint64_t>(column + i) >= static_cast<uint64_t>(d.width)) continue;
      const auto value = load<T, kTail>(input, n);
#pragma GCC unroll 16
      for (int r = kFirst; r < kLast; ++r) {
#pragma GCC unroll 16
        for (int o = 0; o < kColumns; ++o) {
          const int kx = i - o * kStride;
          if (kx >= 0 && kx < kKernel) acc[r][o] = V::fma(value, w[r][kx], acc[r][o]);
        }
      }
    }
  }
}

template <class T, int kKernel, int kStride, int kRows, int kColumns, bool kBorder, bool kTail>
[[gnu::always_inline]] inline void depthwise_vector(const DepthwiseArgs<T>& d, const DepthwiseTile<T>& tile,
                                                    int64_t channel, int n) {
  using V = Vec<T>;
  typename V::Reg acc[kRows][kColumns];
  const T* packed = d.weight + channel * (1 + kKernel * kKernel);
  const auto bias = V::load(packed);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int o = 0; o < kColumns; ++o) acc[r][o] = bias;
  }
  if (tile.ahead != nullptr) {
    for (int r = 0; r < kRows * kStride; ++r) {
      const T* row = tile.ahead + r * d.x_row_stride + channel;
#pragma GCC unroll 16
      for (int i = 0; i < kColumns * kStride; ++i) __builtin_prefetch(row + i * d.x_pixel_stride, 0, 2);
    }
  }
  const T* x = tile.x + channel;
  const T* w = packed + V::kLanes + tile.weight;
  const int* count = tile.row_count;
  filter_rows<T, kKernel, kStride, 0, 1, kBorder, kTail>(d, x, w, count[0], tile.column, n, acc);
  if constexpr (kRows == 2) {
    filter_rows<T, kKernel, kStride, 0, 2, kBorder, kTail>(d, x, w, count[1], tile.column, n, acc);
    filter_rows<T, kKernel, kStride, 1, 2, kBorder, kTail>(d, x, w, count[2], tile.column, n, acc);
  }
  activate_accumulators<T>(d.activation, acc);
  typename V::Reg sums[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    T* y = tile.y + r * d.y_row_stride + channel;
    sums[r] = V::set1(0);
#pragma GCC unroll 16
    for (int o = 0; o < kColumns; ++o) {
      store<T, kTail>(y + o * d.y_pixel_stride, acc[r][o], n);
      sums[r] = V::add(sums[r], acc[r][o]);
    }
    if (!is_cheap(d.activation)) {
      sums[r] = V::set1(0);
      for (int o = 0; o < kColumns; ++o, y += d.y_pixel_stride) {
        const auto value = activate<T>(d.activation, load<T, kTail>(y, n));
        store<T, kTail>(y, value, n);
        sums[r] = V::add(sums[r], value);
      }
    }
    if (tile.sums != nullptr) {
      T* s = tile.sums + r * d.sums_stride + channel;
      store<T, kTail>(s, V::add(load<T, kTail>(s, n), sums[r]), n);
    }
  }
}

template <class T, int kKernel, int kStride, int kRows, int kColumns, bool kBorder>
void depthwise_tile(const DepthwiseArgs<T>& d, const DepthwiseTile<T>& tile) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t channel = 0;
  for (; channel + kLanes <= d.channels; channel += kLanes) {
    depthwise_vector<T, kKernel, kStride, kRows, kColumns, kBorder, Vec<T>::kMaskIsFree>(d, tile, channel, kLanes);
  }
  if (channel < d.channels) {
    const int n = static_cast<int>(d.channels - channel);
    depthwise_vector<T, kKernel, kStride, kRows, kColumns, kBorder, true>(d, tile, channel, n);
  }
}

template <class T>
using DepthwiseTileFn = void (*)(const DepthwiseArgs<T>&, const DepthwiseTile<T>&);

template <class T, int kKernel, int kStride, int kRows, bool kBorder, int kColumns>
DepthwiseTileFn<T> select_depthwise_columns(int columns) {
  if constexpr (kColumns == 1) {
    return depthwise_tile<T, kKernel, kStride, kRows, 1, kBorder>;
  } else {
    return columns == kColumns ? depthwise_tile<T, kKernel, kStride, kRows, kColumns, kBorder>
                               : select_depthwise_columns<T, kKernel, kStride, kRows, kBorder, kColumns - 1>(columns);
  }
}

template <class T, int kKernel, int kStride, int kRows>
DepthwiseTileFn<T> select_depthwise_tile(int columns, bool border) {
  constexpr int kColumns = DepthwiseShape<T, kKernel>::kColumns;
  return border ? select_depthwise_columns<T, kKernel, kStride, kRows, true, kColumns>(columns)
                : select_depthwise_columns<T, kKernel, kStride, kRows, false, kColumns>(columns);
}

// How many of the rows [begin, end) are among [low, high).
inline int rows_inside(int64_t begin, int64_t end, int64_t low, int64_t high) {
  begin = begin > low ? begin : low;
  end = end < high ? end : high;
  return end > begin ? static_cast<int>(end - begin) : 0;
}

template <class T, int kKernel, int kStride, int kRows>
void depthwise_row_of_tiles(const DepthwiseArgs<T>& d, int64_t oy) {
  constexpr int kColumns = DepthwiseShape<T, kKernel>::kColumns, kShared = (kRows - 1) * kStride;
  // Input rows are counted from the first that the kernel touches; those inside the image are [low, high).
  const int64_t top = oy * kStride - d.pad_top, low = top < 0 ? -top : 0, high = d.height - top;
  DepthwiseTile<T> tile{};
  tile.row_count[0] = rows_inside(0, kRows == 1 ? kKernel : kShared, low, high);
  tile.row_count[1] = rows_inside(kShared, kKernel, low, high);
  tile.row_count[2] = rows_inside(kKernel, kKernel + kShared, low, high);
  tile.weight = low * kKernel * Vec<T>::kLanes;
  tile.sums = d.sums == nullptr ? nullptr : d.sums + (oy - d.row_begin) * d.sums_stride;
  const int64_t tiles = (d.out_width + kColumns - 1) / kColumns;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t ox = t * d.out_width / tiles;
    const int columns = static_cast<int>((t + 1) * d.out_width / tiles - ox);
    tile.column = ox * kStride - d.pad_left;
    const bool border = tile.column < 0 || tile.column + (columns - 1) * kStride + kKernel > d.width;
    tile.x = d.x + (top + low) * d.x_row_stride + tile.column * d.x_pixel_stride;
    if (d.fetches) {
      tile.ahead = d.x + (top + kShared + kKernel) * d.x_row_stride + ox * kStride * d.x_pixel_stride;
    }
    tile.y = d.y + oy * d.y_row_stride + ox * d.y_pixel_stride;
    select_depthwise_tile<T, kKernel, kStride, kRows>(columns, border)(d, tile);
  }
}

template <class T, int kKernel, int kStride>
void depthwise_square(const DepthwiseArgs<T>& d) {
  constexpr int kRows = DepthwiseShape<T, kKernel>::kRows;
  int64_t oy = d.row_begin;
  for (; oy + kRows <= d.row_end; oy += kRows) depthwise_row_of_tiles<T, kKernel, kStride, kRows>(d, oy);
  if (oy < d.row_end) depthwise_row_of_tiles<T, kKernel, kStride, 1>(d, oy);
}

// Any kernel size, stride and dilation: up to kColumns outputs of row `oy` from column `ox` on, tap after tap.
template <class T, int kColumns, bool kTail>
void depthwise_vector_any(const DepthwiseArgs<T>& d, int64_t oy, int64_t ox, int64_t channel, int n) {
  using V = Vec<T>;
  typename V::Reg acc[kColumns];
  const T* weight = d.weight + channel * (1 + d.kernel_h * d.kernel_w);
  const auto bias = V::load(weight);
  weight += V::kLanes;
#pragma GCC unroll 16
  for (int o = 0; o < kColumns; ++o) acc[o] = bias;
  const int64_t step = d.stride_w * d.x_pixel_stride;
  for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
    const int64_t iy = oy * d.stride_h - d.pad_top + ky * d.dilation_h;
    if (iy < 0 || iy >= d.height) {
      weight += d.kernel_w * V::kLanes;
      continue;
    }
    for (int64_t kx = 0; kx < d.kernel_w; ++kx, weight += V::kLanes) {
      const int64_t ix = ox * d.stride_w - d.pad_left + kx * d.dilation_w;
      const T* x = d.x + iy * d.x_row_stride + ix * d.x_pixel_stride + channel;
      const auto w = V::load(weight);
#pragma GCC unroll 16
      for (int o = 0; o < kColumns; ++o) {
        if (static_cast<uint64_t>(ix + o * d.stride_w) >= static_cast<uint64_t>(d.width)) continue;
        acc[o] = V::fma(load<T, kTail>(x + o * step, n), w, acc[o]);
      }
    }
  }
  T* y = d.y + oy * d.y_row_stride + ox * d.y_pixel_stride + channel;
  auto sum = V::set1(0);
#pragma GCC unroll 16
  for (int o = 0; o < kColumns; ++o) {
    const auto value = activate<T>(d.activation, acc[o]);
    store<T, kTail>(y + o * d.y_pixel_stride, value, n);
    sum = V::add(sum, value);
  }
  if (d.sums != nullptr) {
    T* s = d.sums + (oy - d.row_begin) * d.sums_stride + channel;
    store<T, kTail>(s, V::add(load<T, kTail>(s, n), sum), n);
  }
}

template <class T, int kColumns>
void depthwise_tile_any(const DepthwiseArgs<T>& d, int64_t oy, int64_t ox) {
  constexpr int kLanes = Vec<T>::kLanes;
  for (int64_t channel = 0; channel < d.channels; channel += kLanes) {
    const int64_t left = d.channels - channel;
    if (!Vec<T>::kMaskIsFree && left >= kLanes) {
      depthwise_vector_any<T, kColumns, false>(d, oy, ox, channel, kLanes);
    } else {
      depthwise_vector_any<T, kColumns, true>(d, oy, ox, channel, left < kLanes ? static_cast<int>(left) : kLanes);
    }
  }
}

template <class T>
void depthwise_any(const DepthwiseArgs<T>& d) {
  constexpr int kColumns = 6;  // enough chains of multiply-adds to hide their latency
  for (int64_t oy = d.row_begin; oy < d.row_end; ++oy) {
    int64_t ox = 0;
    for (; ox + kColumns <= d.out_width; ox += kColumns) depthwise_tile_any<T, kColumns>(d, oy, ox);
    for (; ox < d.out_width; ++ox) depthwise_tile_any<T, 1>(d, oy, ox);
  }
}

template <class T>
void depthwise_conv2d(const DepthwiseArgs<T>& d) {
  const bool square = d.kernel_h == d.kernel_w && d.stride_h == d.stride_w && d.dilation_h == 1 && d.dilation_w == 1;
  switch (square && d.stride_w <= 2 ? 2 * d.kernel_w + d.stride_w : 0) {
    case 2 * 3 + 1:
      return depthwise_square<T, 3, 1>(d);
    case 2 * 3 + 2:
      return depthwise_square<T, 3, 2>(d);
    case 2 * 5 + 1:
      return depthwise_square<T, 5, 1>(d);
    case 2 * 5 + 2:
      return depthwise_square<T, 5, 2>(d);
    case 2 * 7 + 1:
      return depthwise_square<T, 7, 1>(d);
    case 2 * 7 + 2:
      return depthwise_square<T, 7, 2>(d);
    default:
      return depthwise_any(d);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
