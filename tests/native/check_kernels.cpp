// Holds every kernel of every instruction set of this processor to plain loops in double, without Python or torch, so
// that it also runs where only a cross compiler and an emulator are at hand. Prints one line a set; exits with 1 on a
// difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "kernels/registry.h"

using namespace mobilenet_fast;

namespace {

int failures = 0;
std::mt19937 engine(0);

template <class T>
std::vector<T> random(int64_t n) {
  std::uniform_real_distribution<double> uniform(-2.0, 2.0);
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(uniform(engine));
  return values;
}

double activate(Activation activation, double x) {
  const auto relu6 = [](double v) { return std::min(6.0, std::max(0.0, v)); };
  switch (activation) {
    case Activation::kRelu:
      return std::max(0.0, x);
    case Activation::kRelu6:
      return relu6(x);
    case Activation::kHardswish:
      return x * relu6(x + 3) / 6;
    case Activation::kHardsigmoid:
      return relu6(x + 3) / 6;
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    default:
      return x;
  }
}

// `terms` products of size up to 4 were added: their roundings, and those of the activation.
template <class T>
void expect(const char* what, double got, double wanted, int64_t terms) {
  const double tolerance = 4.0 * std::numeric_limits<T>::epsilon() * (4.0 * terms + 8.0);
  if (std::abs(got - wanted) <= tolerance) return;
  if (++failures <= 10) std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
}

const Activation kActivations[] = {Activation::kNone,       Activation::kRelu, Activation::kRelu6,
                                   Activation::kHardswish,  Activation::kSilu, Activation::kSigmoid,
                                   Activation::kHardsigmoid};

// The depth in chunks one after another in memory.
template <class T>
void check_gemm(const Kernels<T>& k, int64_t rows, int64_t chunks, int64_t chunk_length, int64_t columns,
                int64_t rows_per_block, Activation activation) {
  const int64_t depth = chunks * chunk_length;
  const int64_t vectors = (columns + k.lanes - 1) / k.lanes, panels = panel_count(vectors, k.panel_vectors);
  const auto a = random<T>(rows * depth), w = random<T>(columns * depth), r = random<T>(rows * columns);
  auto bias = random<T>(vectors * k.lanes);
  const auto scale = random<T>(columns);
  const int64_t packed_columns = (columns + k.column_unit - 1) / k.column_unit * k.column_unit;
  std::vector<T> packed(packed_columns * depth), y(rows * columns + 1, T(77));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t column = panel_first_vector(p, panels, vectors) * k.lanes;
    const int64_t width = std::min(panel_first_vector(p + 1, panels, vectors) * k.lanes, packed_columns) - column;
    k.pack_columns(w.data() + column * depth, std::min(width, columns - column), depth, scale.data() + column,
                   packed.data() + column * depth, width);
  }
  std::vector<int64_t> offsets;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) offsets.push_back(chunk * chunk_length);
  k.gemm({a.data(), depth, rows, offsets.data(), chunks, chunk_length, packed.data(), bias.data(), 0, 0, columns, 0,
          panels, r.data(), columns, y.data(), columns, rows_per_block, activation});
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      double sum = bias[n] + static_cast<double>(r[m * columns + n]);
      for (int64_t c = 0; c < depth; ++c) sum += 1.0 * a[m * depth + c] * w[n * depth + c] * scale[n];
      expect<T>("gemm", y[m * columns + n], activate(activation, sum), 2 * depth);
    }
  }
  expect<T>("gemm past the end", y[rows * columns], 77, 0);
}

double slope(Activation activation, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (activation) {
    case Activation::kRelu:
      return x > 0;
    case Activation::kRelu6:
      return x > 0 && x < 6;
    case Activation::kHardswish:
      return x <= -3 ? 0 : x < 3 ? x / 3 + 0.5 : 1;
    case Activation::kHardsigmoid:
      return x > -3 && x < 3 ? 1.0f / 6 : 0;  // as PyTorch, in every dtype
    case Activation::kSilu:
      return sigmoid * (1 + x * (1 - sigmoid));
    case Activation::kSigmoid:
      return sigmoid * (1 - sigmoid);
    default:
      return 1;
  }
}

// Both gradients of a depthwise convolution, added to what is there for the weight.
template <class T>
void check_depthwise_gradients(const Kernels<T>& k, int64_t size, int64_t channels, int64_t kernel, int64_t stride,
                               int64_t dilation) {
  const int64_t pad = kernel / 2, reach = (kernel - 1) * dilation + 1, taps = kernel * kernel;
  if (size + 2 * pad < reach) return;
  const int64_t out = (size + 2 * pad - reach) / stride + 1, vectors = (channels + k.lanes - 1) / k.lanes;
  auto x = random<T>(size * size * channels);
  std::vector<T> x_grad(x.size());
  const auto grad = random<T>(out * out * channels), w = random<T>(taps * channels);
  std::vector<T> packed(vectors * k.lanes * (1 + taps), T(0)), weight_grad(vectors * k.lanes * taps, T(1));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      packed[(c / k.lanes * (1 + taps) + 1 + tap) * k.lanes + c % k.lanes] = w[tap * channels + c];
    }
  }
  DepthwiseGradArgs<T> args{};
  args.x = x.data();
  args.x_grad = x_grad.data();
  args.x_row_stride = args.x_grad_row_stride = size * channels;
  args.x_pixel_stride = args.x_grad_pixel_stride = args.grad_pixel_stride = args.channels = channels;
  args.width = args.row_end = size;
  args.grad = grad.data();
  args.grad_row_stride = out * channels;
  args.out_height = args.out_width = out;
  args.kernel_h = args.kernel_w = kernel;
  args.stride_h = args.stride_w = stride;
  args.pad_top = args.pad_left = pad;
  args.dilation_h = args.dilation_w = dilation;
  args.weight = packed.data();
  args.weight_grad = weight_grad.data();
  k.depthwise_conv2d_gradients(args);
  std::vector<double> of_weight(taps * channels, 1.0), of_x(size * size * channels, 0.0);
  for (int64_t o = 0; o < out * out; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t iy = o / out * stride - pad + tap / kernel * dilation;
      const int64_t ix = o % out * stride - pad + tap % kernel * dilation;
      if (iy < 0 || iy >= size || ix < 0 || ix >= size) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const double g = grad[o * channels + c];
        of_weight[tap * channels + c] += g * x[(iy * size + ix) * channels + c];
        of_x[(iy * size + ix) * channels + c] += g * w[tap * channels + c];
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      expect<T>("depthwise weight gradient", weight_grad[(c / k.lanes * taps + tap) * k.lanes + c % k.lanes],
                of_weight[tap * channels + c], out * out);
    }
  }
  for (size_t i = 0; i < x.size(); ++i) expect<T>("depthwise input gradient", x_grad[i], of_x[i], taps);
  args.x_grad = x.data();  // in the inputs' own place
  k.depthwise_conv2d_gradients(args);
  for (size_t i = 0; i < x.size(); ++i) expect<T>("depthwise input gradient in place", x[i], of_x[i], taps);
}

template <class T>
void check_gemm_transposed(const Kernels<T>& k, int64_t rows, int64_t columns_a, int64_t columns_b) {
  const auto a = random<T>(rows * columns_a), b = random<T>(rows * columns_b);
  std::vector<T> out(columns_a * columns_b + 1, T(1)), panel(rows * k.panel_vectors * k.lanes);
  GemmTransposedArgs<T> args{};
  args.a = a.data();
  args.a_stride = args.columns_a = columns_a;
  args.b = b.data();
  args.b_stride = args.columns_b = args.out_stride = columns_b;
  args.rows = rows;
  args.out = out.data();
  args.panel = panel.data();
  args.fetch[1] = a.data();
  args.fetch_bytes[1] = 4 * rows;
  k.gemm_transposed(args);
  for (int64_t i = 0; i < columns_a; ++i) {
    for (int64_t j = 0; j < columns_b; ++j) {
      double sum = 1;
      for (int64_t row = 0; row < rows; ++row) sum += 1.0 * a[row * columns_a + i] * b[row * columns_b + j];
      expect<T>("transposed gemm", out[i * columns_b + j], sum, rows);
    }
  }
  expect<T>("transposed gemm past the end", out.back(), 1, 0);
}

// Statistics, and the gradients of batch norm, activation and gate.
template <class T>
void check_norm_gradients(const Kernels<T>& k, int64_t rows, int64_t channels, Activation activation) {
  const auto x = random<T>(rows * channels), grad = random<T>(rows * channels), scale = random<T>(channels);
  const auto shift = random<T>(channels), gate = random<T>(channels), pooled = random<T>(channels);
  const auto mean = random<T>(channels), factor = random<T>(channels), lean = random<T>(channels);
  const auto offset = random<T>(channels);
  std::vector<T> sums(2 * channels, T(0)), gate_sums(channels, T(0)), sums_of_d(2 * channels, T(0));
  std::vector<T> out(rows * channels + 1, T(77)), d_out(rows * channels + 1, T(77));
  k.statistics({x.data(), channels, rows, channels, mean.data(), sums.data()});
  k.gate_gradient({grad.data(), channels, x.data(), channels, rows, channels, scale.data(), shift.data(),
                   gate_sums.data(), activation});
  NormGradientArgs<T> args{grad.data(),   channels,      x.data(),    channels,      out.data(),
                           channels,      rows,          channels,    scale.data(),  shift.data(),
                           gate.data(),   pooled.data(), mean.data(), factor.data(), lean.data(),
                           offset.data(), nullptr,       activation,  false};
  k.norm_gradient(args);
  args.out = d_out.data();
  args.gate = args.pooled = args.factor = nullptr;
  args.sums = sums_of_d.data();
  k.norm_gradient(args);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0, gates = 0, ds = 0, products = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = row * channels + c;
      const double u = 1.0 * x[i] * scale[c] + shift[c], away = 1.0 * x[i] - mean[c];
      sum += away;
      squares += away * away;
      gates += grad[i] * activate(activation, u);
      const double d = grad[i] * slope(activation, u);
      ds += d;
      products += d * away;
      // Where the slope jumps, either side is right.
      const auto near = [&](double edge) { return std::abs(u - edge) < 1e-5; };
      if (near(-3) || near(0) || near(3) || near(6)) continue;
      expect<T>("activation gradient", d_out[i], d, 2);
      const double gated = (1.0 * grad[i] * gate[c] + pooled[c]) * slope(activation, u);
      expect<T>("norm gradient", out[i], gated * factor[c] + away * lean[c] + offset[c], 8);
    }
    expect<T>("sum for statistics", sums[c], sum, 2 * rows);
    expect<T>("squares for statistics", sums[channels + c], squares, 6 * rows);
    expect<T>("gate gradient", gate_sums[c], gates, 6 * rows);
    expect<T>("sum of gradients", sums_of_d[c], ds, 4 * rows);
    expect<T>("products of gradients", sums_of_d[channels + c], products, 12 * rows);
  }
  expect<T>("norm gradient past the end", out.back(), 77, 0);
}

template <class T>
void check_depthwise(const Kernels<T>& k, int64_t size, int64_t channels, int64_t kernel, int64_t stride,
                     int64_t dilation, Activation activation) {
  const int64_t pad = kernel / 2, reach = (kernel - 1) * dilation + 1;
  if (size + 2 * pad < reach) return;
  const int64_t out = (size + 2 * pad - reach) / stride + 1;
  const auto x = random<T>(size * size * channels), w = random<T>(kernel * kernel * channels), b = random<T>(channels);
  std::vector<T> y(out * out * channels + 1, T(77)), sums(out * channels, T(0)), packed;
  for (int64_t first = 0; first < channels; first += k.lanes) {
    for (int64_t tap = -1; tap < kernel * kernel; ++tap) {
      for (int64_t c = first; c < first + k.lanes; ++c) {
        packed.push_back(c >= channels ? T(0) : tap < 0 ? b[c] : w[tap * channels + c]);
      }
    }
  }
  k.depthwise_conv2d({x.data(),       size * channels, channels,   size, size, packed.data(), y.data(),
                      out * channels, channels,        0,          out,  out,  channels,      kernel,
                      kernel,         stride,          stride,     pad,  pad,  dilation,      dilation,
                      sums.data(),    channels,        activation, true});
  std::vector<double> totals(out * channels, 0.0);
  for (int64_t oy = 0; oy < out; ++oy) {
    for (int64_t ox = 0; ox < out; ++ox) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = b[c];
        for (int64_t ky = 0; ky < kernel; ++ky) {
          for (int64_t kx = 0; kx < kernel; ++kx) {
            const int64_t iy = oy * stride - pad + ky * dilation, ix = ox * stride - pad + kx * dilation;
            if (iy < 0 || iy >= size || ix < 0 || ix >= size) continue;
            sum += 1.0 * x[(iy * size + ix) * channels + c] * w[(ky * kernel + kx) * channels + c];
          }
        }
        const double value = activate(activation, sum);
        totals[oy * channels + c] += value;
        expect<T>("depthwise", y[(oy * out + ox) * channels + c], value, kernel * kernel);
      }
    }
  }
  for (int64_t i = 0; i < out * channels; ++i) {
    expect<T>("depthwise sums", sums[i], totals[i], kernel * kernel * out);
  }
  expect<T>("depthwise past the end", y[out * out * channels], 77, 0);
}

// Windows over an image that holds a NaN: a maximum or mean is NaN where its window meets it, and only there.
template <class T>
void check_pool(const Kernels<T>& k, int64_t size, int64_t channels, int64_t kernel, int64_t stride, int64_t dilation,
                bool mean, bool count_padding, int64_t divisor) {
  const int64_t pad = kernel / 2, reach = (kernel - 1) * dilation + 1;
  if (size + 2 * pad < reach) return;
  const int64_t out = (size + 2 * pad - reach) / stride + 1;
  auto x = random<T>(size * size * channels);
  x[x.size() / 2] = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> y(out * out * channels + 1, T(77));
  PoolArgs<T> args{};
  args.x = x.data();
  args.x_row_stride = size * channels;
  args.x_pixel_stride = args.y_pixel_stride = args.channels = channels;
  args.height = args.width = size;
  args.y = y.data();
  args.y_row_stride = out * channels;
  args.row_end = args.out_width = out;
  args.kernel_h = args.kernel_w = kernel;
  args.stride_h = args.stride_w = stride;
  args.pad_top = args.pad_left = pad;
  args.dilation_h = args.dilation_w = dilation;
  args.mean = mean;
  args.count_padding = count_padding;
  args.divisor = divisor;
  k.pool2d(args);
  for (int64_t i = 0; i < out * out * channels; ++i) {
    const int64_t c = i % channels, ox = i / channels % out, oy = i / channels / out;
    double sum = 0, largest = -std::numeric_limits<double>::infinity();
    int64_t inside = 0, padded = 0;
    bool nan = false;
    for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const int64_t iy = oy * stride - pad + tap / kernel * dilation, ix = ox * stride - pad + tap % kernel * dilation;
      padded += iy < size + pad && ix < size + pad;
      if (iy < 0 || iy >= size || ix < 0 || ix >= size) continue;
      const double value = x[(iy * size + ix) * channels + c];
      ++inside;
      nan |= std::isnan(value);
      sum += value;
      largest = std::max(largest, value);
    }
    const double wanted = mean ? sum / (divisor > 0 ? divisor : count_padding ? padded : inside) : largest;
    if (inside > 0 && nan != std::isnan(y[i])) expect<T>("NaN in a window", std::isnan(y[i]), nan, 0);
    if (inside > 0 && !nan) expect<T>(mean ? "mean" : "maximum", y[i], wanted, inside);
  }
  expect<T>("pool past the end", y[out * out * channels], 77, 0);
  if (mean) return;

  const auto grad = random<T>(out * out * channels);
  std::vector<T> found(size * size * channels, T(0));
  std::vector<double> wanted(found.size());
  MaxPoolGradArgs<T> back{};
  back.x = x.data();
  back.x_grad = found.data();
  back.x_row_stride = size * channels;
  back.x_pixel_stride = back.grad_pixel_stride = back.channels = channels;
  back.height = back.width = size;
  back.grad = grad.data();
  back.grad_row_stride = out * channels;
  back.row_end = back.out_width = out;
  back.kernel_h = back.kernel_w = kernel;
  back.stride_h = back.stride_w = stride;
  back.pad_top = back.pad_left = pad;
  back.dilation_h = back.dilation_w = dilation;
  k.max_pool2d_grad(back);
  for (int64_t i = 0; i < out * out * channels; ++i) {
    const int64_t c = i % channels, ox = i / channels % out, oy = i / channels / out;
    int64_t best = -1;
    for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const int64_t iy = oy * stride - pad + tap / kernel * dilation, ix = ox * stride - pad + tap % kernel * dilation;
      if (iy < 0 || iy >= size || ix < 0 || ix >= size) continue;
      const int64_t at = (iy * size + ix) * channels + c;
      if (best < 0 || x[at] > x[best] || (std::isnan(x[at]) && !std::isnan(x[best]))) best = at;
    }
    if (best >= 0) wanted[best] += grad[i];
  }
  for (size_t i = 0; i < found.size(); ++i) {
    expect<T>("gradient of the maximum", found[i], wanted[i], static_cast<double>(kernel * kernel));
  }
}

// A 3×3 convolution by the two transforms, with plain loops in between. The transforms round about ten times as much.
template <class T>
void check_winograd(const Kernels<T>& k, int64_t size, int64_t depth, int64_t channels, Activation activation) {
  constexpr double kG[6][3] = {{1. / 4, 0, 0},
                               {-1. / 6, -1. / 6, -1. / 6},
                               {-1. / 6, 1. / 6, -1. / 6},
                               {1. / 24, 1. / 12, 1. / 6},
                               {1. / 24, -1. / 12, 1. / 6},
                               {0, 0, 1}};
  const int64_t across = (size + 3) / 4, tiles = across * across;
  const auto x = random<T>(size * size * depth), w = random<T>(9 * depth * channels), bias = random<T>(channels);
  const auto residual = random<T>(size * size * channels);
  const bool adds = depth % 2 == 0;
  std::vector<T> inputs(36 * tiles * depth), outputs(36 * tiles * channels), y(size * size * channels + 1, T(77));
  WinogradArgs<T> args{};
  args.image = x.data();
  args.image_row_stride = size * depth;
  args.image_pixel_stride = args.channels = args.tile_stride = depth;
  args.image_height = args.image_width = size;
  args.pad_top = args.pad_left = 1;
  args.tiles = inputs.data();
  args.tile_end = tiles;
  args.tiles_across = across;
  args.plane_stride = tiles * depth;
  k.winograd_input(args);
  for (int64_t plane = 0; plane < 36; ++plane) {
    for (int64_t c = 0; c < channels; ++c) {
      std::vector<double> transformed(depth, 0.0);
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          transformed[d] += kG[plane / 6][tap / 3] * kG[plane % 6][tap % 3] * w[(tap * depth + d) * channels + c];
        }
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        double sum = 0;
        for (int64_t d = 0; d < depth; ++d) sum += transformed[d] * inputs[(plane * tiles + tile) * depth + d];
        outputs[(plane * tiles + tile) * channels + c] = static_cast<T>(sum);
      }
    }
  }
  args.output = y.data();
  args.image_row_stride = size * channels;
  args.image_pixel_stride = args.channels = args.tile_stride = channels;
  args.tiles = outputs.data();
  args.plane_stride = tiles * channels;
  args.bias = bias.data();
  args.residual = adds ? residual.data() : nullptr;
  args.residual_stride = channels;
  args.activation = activation;
  k.winograd_output(args);
  for (int64_t i = 0; i < size * size * channels; ++i) {
    const int64_t c = i % channels, ox = i / channels % size, oy = i / channels / size;
    double sum = bias[c] + (adds ? residual[i] : 0);
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t iy = oy + tap / 3 - 1, ix = ox + tap % 3 - 1;
      if (iy < 0 || iy >= size || ix < 0 || ix >= size) continue;
      for (int64_t d = 0; d < depth; ++d) {
        sum += 1.0 * x[(iy * size + ix) * depth + d] * w[(tap * depth + d) * channels + c];
      }
    }
    expect<T>("winograd", y[i], activate(activation, sum), 10 * 9 * depth);
  }
  expect<T>("winograd past the end", y[size * size * channels], 77, 0);
}

template <class T>
void check_elementwise(const Kernels<T>& k, int64_t rows, int64_t channels, Activation activation) {
  const auto x = random<T>(rows * channels), other = random<T>(rows * channels), scale = random<T>(channels),
             shift = random<T>(channels), w = random<T>(channels * channels);
  std::vector<T> y(rows * channels), plane(rows * channels), sum(rows * channels), sums(channels),
      layer(rows * channels);
  k.scale_shift_act({x.data(), channels, y.data(), channels, rows, channels, scale.data(), shift.data(), activation});
  k.scale_shift_act_plane(x.data(), plane.data(), rows * channels, scale[0], shift[0], activation);
  k.add_act(x.data(), other.data(), sum.data(), rows * channels, activation);
  k.sum_rows(x.data(), channels, rows, channels, sums.data());
  k.fully_connected(x.data(), rows, channels, w.data(), scale.data(), shift.data(), 0, channels, channels, activation,
                    layer.data());
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) {
    double column = 0;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t i = m * channels + c;
      expect<T>("scale_shift_act", y[i], activate(activation, 1.0 * x[i] * scale[c] + shift[c]), 1);
      expect<T>("plane", plane[i], activate(activation, 1.0 * x[i] * scale[0] + shift[0]), 1);
      expect<T>("add_act", sum[i], activate(activation, 1.0 * x[i] + other[i]), 1);
      double dot = 0;
      for (int64_t j = 0; j < channels; ++j) dot += 1.0 * x[m * channels + j] * w[c * channels + j];
      expect<T>("fully_connected", layer[i], activate(activation, dot * scale[c] + shift[c]), 2 * channels);
      column += x[i];
    }
    expect<T>("sum_rows", sums[c], column, rows);
    total += column;
  }
  expect<T>("sum_plane", k.sum_plane(x.data(), rows * channels), total, rows * channels);

  std::vector<T> var(channels), folded(2 * channels);
  for (T& v : var) v = std::abs(random<T>(1)[0]) + T(0.5);
  k.fold_batch_norm(x.data(), var.data(), scale.data(), shift.data(), T(1e-3), channels, folded.data(),
                    folded.data() + channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double s = scale[c] / std::sqrt(var[c] + double(T(1e-3)));
    expect<T>("fold scale", folded[c], s, 2);
    expect<T>("fold shift", folded[channels + c], shift[c] - x[c] * s, 2);
  }
}

template <class T>
void check_all(Isa isa) {
  const Kernels<T>& k = kernels<T>(isa);
  int turn = 0;
  const auto next = [&] { return kActivations[turn++ % 7]; };
  const int64_t lanes = k.lanes;
  for (int64_t rows : {1, 2, 5, 6, 7, 13, 24, 49}) {
    for (int64_t columns : {int64_t(1), lanes / 2, lanes - 1, lanes, lanes + 1, 3 * lanes / 2, 2 * lanes, 3 * lanes - 1,
                            4 * lanes, 9 * lanes + 3}) {
      if (columns <= 0) continue;
      check_gemm(k, rows, 1, 1 + rows % 19 + columns % 5, columns, 16, next());
      check_gemm(k, rows, 1 + rows % 5, 1 + columns % 3, columns, 16, next());
      check_gemm(k, rows, 3 + columns % 5, 1, columns, rows, next());
      check_gemm(k, 3 * rows, 1, 70, columns, 3 * rows, next());  // deep enough to fetch what follows
    }
  }
  for (int64_t channels : {int64_t(1), lanes - 1, lanes, 2 * lanes + 3}) {
    for (int64_t size : {1, 2, 5, 7, 9, 17}) {
      for (int64_t kernel : {1, 2, 3, 5, 7}) {
        for (int64_t stride : {1, 2, 3}) {
          if (channels <= 0) continue;
          check_depthwise(k, size, channels, kernel, stride, 1 + (size + kernel) % 2, next());
          check_depthwise_gradients(k, size, channels, kernel, stride, 1 + (size + kernel + stride) % 2);
        }
      }
    }
    for (int64_t rows : {1, 3, 4, 9}) {
      if (channels <= 0) continue;
      check_elementwise(k, rows, channels, next());
      check_norm_gradients(k, 7 * rows, channels, next());
      check_gemm_transposed(k, 30 * rows, 5 * rows, channels);
      check_gemm_transposed(k, rows, 3, 4 * channels + 1);
    }
    for (int64_t size : {1, 3, 4, 6, 9}) {
      if (channels > 0) check_winograd(k, size, 1 + size % 4, channels, next());
      for (int64_t kernel : {1, 2, 3, 5}) {
        for (int64_t stride : {1, 2}) {
          if (channels <= 0) continue;
          // Dilated by two, a window of three has its middle inside; means have no dilation.
          check_pool(k, size, channels, kernel, stride, kernel == 3 ? 1 + size % 2 : 1, false, false, 0);
          check_pool(k, size, channels, kernel, stride, 1, true, stride == 1, kernel == 2 ? 3 : 0);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (Isa isa : available_isas()) {
    const int before = failures;
    check_all<float>(isa);
    check_all<double>(isa);
    std::printf("%s: %s\n", isa_name(isa), failures == before ? "as the reference" : "DIFFERENT");
  }
  return failures == 0 ? 0 : 1;
}
