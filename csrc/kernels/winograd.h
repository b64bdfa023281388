// Winograd's F(4×4, 3×3): a 3×3 convolution of stride 1 by 36 products a 4×4 tile of outputs instead of 144 (Lavin &
// Gray, "Fast algorithms for convolutional neural networks", 2015). Here are the transforms of inputs and outputs; what
// is between them are 36 matrix products, a row a tile, by the GEMM. The transforms' sums cancel a little: rounding is
// about ten times that of the direct sum, a few units in 10^6 of the largest output.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T>
[[gnu::always_inline]] inline void winograd_transform_six(const typename Vec<T>::Reg (&d)[6],
                                                          typename Vec<T>::Reg (&t)[6]) {
  using V = Vec<T>;
  const auto four = V::set1(4), five = V::set1(-5), minus_four = V::set1(-4), two = V::set1(2);
  t[0] = V::fma(four, d[0], V::fma(five, d[2], d[4]));
  const auto even = V::fma(minus_four, d[2], d[4]), odd = V::fma(minus_four, d[1], d[3]);
  t[1] = V::add(even, odd);
  t[2] = V::sub(even, odd);
  const auto near = V::sub(d[4], d[2]), far = V::mul(two, V::sub(d[3], d[1]));
  t[3] = V::add(near, far);
  t[4] = V::sub(near, far);
  t[5] = V::fma(four, d[1], V::fma(five, d[3], d[5]));
}

template <class T>
[[gnu::always_inline]] inline void winograd_transform_four(const typename Vec<T>::Reg (&m)[6],
                                                           typename Vec<T>::Reg (&o)[4]) {
  using V = Vec<T>;
  const auto s1 = V::add(m[1], m[2]), d1 = V::sub(m[1], m[2]), s2 = V::add(m[3], m[4]), d2 = V::sub(m[3], m[4]);
  o[0] = V::add(V::add(m[0], s1), s2);
  o[1] = V::fma(V::set1(2), d2, d1);
  o[2] = V::fma(V::set1(4), s2, s1);
  o[3] = V::add(V::fma(V::set1(8), d2, d1), m[5]);
}

// One tile and vector of channels: input rows and columns [0, 6) from x on, of which [y0, y1) × [x0, x1) are inside.
template <class T, bool kTail>
void winograd_input_vector(const WinogradArgs<T>& w, const T* x, int y0, int y1, int x0, int x1, T* out, int n) {
  using V = Vec<T>;
  typename V::Reg rows[6][6];  // column by column, its rows transformed
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    typename V::Reg d[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      const bool inside = i >= y0 && i < y1 && j >= x0 && j < x1;
      d[i] = inside ? load<T, kTail>(x + i * w.image_row_stride + j * w.image_pixel_stride, n) : V::set1(0);
    }
    winograd_transform_six<T>(d, rows[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    typename V::Reg d[6], t[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) d[j] = rows[j][i];
    winograd_transform_six<T>(d, t);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) store<T, kTail>(out + (i * 6 + j) * w.plane_stride, t[j], n);
  }
}

template <class T>
int clip(T value, T low, T high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

template <class T>
void winograd_input(const WinogradArgs<T>& w) {
  constexpr int kLanes = Vec<T>::kLanes;
  constexpr int64_t kNone = 0, kAll = 6;
  T* out = w.tiles;
  for (int64_t tile = w.tile_begin; tile < w.tile_end; ++tile, out += w.tile_stride) {
    const int64_t top = tile / w.tiles_across * 4 - w.pad_top, left = tile % w.tiles_across * 4 - w.pad_left;
    const int y0 = clip(-top, kNone, kAll), y1 = clip(w.image_height - top, kNone, kAll);
    const int x0 = clip(-left, kNone, kAll), x1 = clip(w.image_width - left, kNone, kAll);
    const T* x = w.image + top * w.image_row_stride + left * w.image_pixel_stride;
    int64_t c = 0;
    for (; c + kLanes <= w.channels; c += kLanes) {
      winograd_input_vector<T, false>(w, x + c, y0, y1, x0, x1, out + c, kLanes);
    }
    if (c < w.channels) {
      winograd_input_vector<T, true>(w, x + c, y0, y1, x0, x1, out + c, static_cast<int>(w.channels - c));
    }
  }
}

template <class T, bool kTail>
void winograd_output_vector(const WinogradArgs<T>& w, const T* tile, int64_t channel, int rows, int columns, T* y,
                            const T* residual, int n) {
  using V = Vec<T>;
  typename V::Reg half[6][4];  // column by column, its rows transformed
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    typename V::Reg m[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) m[i] = load<T, kTail>(tile + (i * 6 + j) * w.plane_stride, n);
    winograd_transform_four<T>(m, half[j]);
  }
  const auto bias = load<T, kTail>(w.bias + channel, n);
  typename V::Reg out[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    typename V::Reg m[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) m[j] = half[j][i];
    winograd_transform_four<T>(m, out[i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[i][j] = V::add(out[i][j], bias);
  }
  if (residual != nullptr) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (i >= rows || j >= columns) continue;
        const T* r = residual + (i * w.image_width + j) * w.residual_stride;
        out[i][j] = V::add(out[i][j], load<T, kTail>(r, n));
      }
    }
  }
  activate_accumulators<T>(w.activation, out);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i >= rows) continue;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j < columns) store<T, kTail>(y + i * w.image_row_stride + j * w.image_pixel_stride, out[i][j], n);
    }
  }
  if (is_cheap(w.activation)) return;
  for (int i = 0; i < rows; ++i) {
    activate_tile(w.activation, y + i * w.image_row_stride, w.image_pixel_stride, columns, n);
  }
}

template <class T>
void winograd_output(const WinogradArgs<T>& w) {
  constexpr int kLanes = Vec<T>::kLanes;
  constexpr int64_t kNone = 0, kAll = 4;
  const T* tile = w.tiles;
  for (int64_t t = w.tile_begin; t < w.tile_end; ++t, tile += w.tile_stride) {
    const int64_t top = t / w.tiles_across * 4, left = t % w.tiles_across * 4;
    const int rows = clip(w.image_height - top, kNone, kAll), columns = clip(w.image_width - left, kNone, kAll);
    T* y = w.output + top * w.image_row_stride + left * w.image_pixel_stride;
    const T* residual = w.residual == nullptr ? nullptr : w.residual + (top * w.image_width + left) * w.residual_stride;
    for (int64_t c = 0; c < w.channels; c += kLanes) {
      const T* r = residual == nullptr ? nullptr : residual + c;
      if (c + kLanes <= w.channels) {
        winograd_output_vector<T, false>(w, tile + c, c, rows, columns, y + c, r, kLanes);
      } else {
        winograd_output_vector<T, true>(w, tile + c, c, rows, columns, y + c, r, static_cast<int>(w.channels - c));
      }
    }
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
