// What the steps of training share: how a convolution reads an input that a batch norm, an activation and a gate are
// still to be applied to, how it reads the gradient at its output, and how work is cut so that sums do not depend on
// the number of threads.
#pragma once

#include "steps/common.h"

namespace mobilenet_fast {

// z = activation(x · scale + shift) · gate, with scale and shift the rows of `folded`. Nothing where it has no
// `folded`.
struct ReadAs {
  OptionalTensor folded;  // (2, C)
  Activation activation = Activation::kNone;
  OptionalTensor gate;  // (N, C)
};

// The gradient at y, where z = gate · activation(norm(y)) is known to have the gradient `grad`: see NormGradientArgs.
// `coefficients`, (4, C), are mean, factor, slope and offset. Without them it is `grad` itself.
struct GradientAt {
  at::Tensor grad;
  OptionalTensor y;
  OptionalTensor folded;
  Activation activation = Activation::kNone;
  OptionalTensor gate, pooled;  // (N, C)
  OptionalTensor coefficients;
};

// Checks: shapes, dtypes and that images are dense and channels last, which the blocks see to.
void check_read_as(const char* operation, const at::Tensor& x, const ReadAs& read);
void check_gradient(const char* operation, const GradientAt& gradient);
bool is_dense_channels_last(const at::Tensor& image);

template <class T>
const T* row_or_null(const OptionalTensor& rows, int64_t row) {
  return rows.has_value() ? rows->const_data_ptr<T>() + row * rows->size(1) : nullptr;
}

// Pixels of N images in blocks that are whole images, or parts of one.
struct PixelBlocks {
  int64_t images, pixels;    // of each
  int64_t parts, per_block;  // parts an image, or images a block: one of them is 1

  PixelBlocks(int64_t images, int64_t pixels, int64_t most)
      : images(images),
        pixels(pixels),
        parts(std::max<int64_t>(1, (pixels + most - 1) / most)),
        per_block(std::clamp<int64_t>(most / std::max<int64_t>(pixels, 1), 1, std::max<int64_t>(images, 1))) {}
  int64_t count() const { return parts > 1 ? images * parts : (images + per_block - 1) / per_block; }
  int64_t largest() const { return parts > 1 ? (pixels + parts - 1) / parts : per_block * pixels; }
  Range block(int64_t index) const {
    if (parts > 1) {
      const Range part = share(pixels, parts, index % parts);
      const int64_t first = index / parts * pixels;
      return {first + part.begin, first + part.end};
    }
    return {index * per_block * pixels, std::min(images, (index + 1) * per_block) * pixels};
  }
  // Calls body(image, pixels of it, slot) for what each image has in the block; a slot is one of images × parts.
  template <class Body>
  void for_each_image(int64_t index, const Body& body) const {
    const Range all = block(index);
    for (int64_t begin = all.begin; begin < all.end;) {
      const int64_t image = begin / pixels, end = std::min(all.end, (image + 1) * pixels);
      body(image, Range{begin, end}, image * parts + (parts > 1 ? index % parts : 0));
      begin = end;
    }
  }
};

// Sums are taken group by group, and those then in order: at most so many groups, whoever computes them.
constexpr int64_t kGroups = 32;

// The statistics of each channel from the sums of groups: (groups, 3, C), pivot and the two sums of StatisticsArgs, for
// `counts` values each. Writes mean and (biased) variance of channels in the range to the rows of `statistics`, (2, C).
template <class T>
void merge_statistics(const T* sums, const std::vector<int64_t>& counts, int64_t channels, Range range, T* statistics) {
  for (int64_t c = range.begin; c < range.end; ++c) {
    double count = 0, mean = 0, squares = 0;
    for (size_t g = 0; g < counts.size(); ++g) {
      if (counts[g] == 0) continue;
      const T* of_group = sums + static_cast<int64_t>(g) * 3 * channels + c;
      const double n = static_cast<double>(counts[g]), sum = of_group[channels];
      const double group_mean = of_group[0] + sum / n;
      const double group_squares = std::max(0.0, of_group[2 * channels] - sum * sum / n);
      const double delta = group_mean - mean, total = count + n;
      mean += delta * n / total;
      squares += group_squares + delta * delta * count * n / total;
      count = total;
    }
    statistics[c] = static_cast<T>(mean);
    statistics[channels + c] = static_cast<T>(squares / count);
  }
}

// out[i] = sum over groups of sums[g · elements + i], i in the range.
template <class T>
void merge_sums(const T* sums, int64_t groups, int64_t elements, Range range, T* out) {
  std::copy(sums + range.begin, sums + range.end, out + range.begin);
  for (int64_t g = 1; g < groups; ++g) {
    const T* of_group = sums + g * elements;
    for (int64_t i = range.begin; i < range.end; ++i) out[i] += of_group[i];
  }
}

// z of some pixels of one image, from channel `channel` on, into `out`, dense; x begins there.
template <class T>
void read_pixels(const Kernels<T>& kernels, const ReadAs& read, const T* x, int64_t x_stride, int64_t image,
                 int64_t rows, int64_t channel, int64_t channels, T* out) {
  const T *scale = row_or_null<T>(read.folded, 0) + channel, *shift = row_or_null<T>(read.folded, 1) + channel;
  kernels.scale_shift_act({x, x_stride, out, channels, rows, channels, scale, shift, read.activation});
  if (!read.gate.has_value()) return;
  const T* gate = row_or_null<T>(read.gate, image) + channel;
  kernels.scale_shift_act({out, channels, out, channels, rows, channels, gate, nullptr, Activation::kNone});
}

// The arguments for the gradient at y over rows of one image, from channel `channel` on: `grad` and y begin there.
template <class T>
NormGradientArgs<T> gradient_args(const GradientAt& gradient, const T* grad, const T* y, int64_t stride, int64_t image,
                                  int64_t rows, int64_t channel, int64_t channels) {
  const auto from = [&](const OptionalTensor& tensor, int64_t row) {
    const T* data = row_or_null<T>(tensor, row);
    return data == nullptr ? nullptr : data + channel;
  };
  NormGradientArgs<T> args{};
  args.grad = grad;
  args.x = y;
  args.grad_stride = args.x_stride = stride;
  args.rows = rows;
  args.channels = channels;
  args.scale = from(gradient.folded, 0);
  args.shift = from(gradient.folded, 1);
  args.gate = from(gradient.gate, image);
  args.pooled = from(gradient.pooled, image);
  args.mean = from(gradient.coefficients, 0);
  args.factor = from(gradient.coefficients, 1);
  args.slope = from(gradient.coefficients, 2);
  args.offset = from(gradient.coefficients, 3);
  args.activation = gradient.activation;
  return args;
}

// How an image is cut: into slices of channels, and bands of output rows with the input rows that are theirs.
struct Bands {
  ImageShape x, y;
  Window window;
  int64_t slice, slices, rows, bands;  // channels a slice, rows a band

  // `of_input` and `of_output`: how many values are held for each input and output element.
  template <class T>
  static Bands of(const Kernels<T>& kernels, ImageShape x, ImageShape y, Window window, int64_t of_input,
                  int64_t of_output) {
    Bands b{x, y, window, 0, 0, 0, 0};
    const int64_t values = l2_cache_bytes() / 2 / static_cast<int64_t>(sizeof(T)), unit = 4 * kernels.lanes;
    const int64_t whole = of_input * x.pixels() + of_output * y.pixels();
    // Slices of a kilobyte at the least: memory likes long runs better than a band saves by having no neighbours.
    const int64_t fitting = std::max<int64_t>(4, values / whole / unit), units = (y.c + unit - 1) / unit;
    b.slices = (units + fitting - 1) / fitting;
    b.slice = (units + b.slices - 1) / b.slices * unit;
    b.slices = (y.c + b.slice - 1) / b.slice;
    b.rows = y.h;
    while (b.rows > 4 && b.values(b.rows, of_input, of_output) > values) b.rows = (b.rows + 1) / 2;
    b.bands = (y.h + b.rows - 1) / b.rows;
    return b;
  }

  int64_t values(int64_t band_rows, int64_t of_input, int64_t of_output) const {
    return std::min(slice, y.c) * (of_input * input_rows(band_rows) * x.w + of_output * grad_rows(band_rows) * y.w);
  }
  int64_t reach() const { return (window.kernel_h - 1) * window.dilation_h; }
  int64_t input_rows(int64_t band_rows) const {
    return std::min(x.h, band_rows * window.stride_h + reach() + window.stride_h);
  }
  int64_t grad_rows(int64_t band_rows) const {
    return std::min(y.h, band_rows + std::max(reach(), window.pad_top) / window.stride_h + 2);
  }

  int64_t units() const { return x.n * bands; }
  Range outputs(int64_t band) const { return share(y.h, bands, band); }
  // The input rows that outputs read.
  Range inputs(Range outputs) const {
    const int64_t begin = std::clamp<int64_t>(outputs.begin * window.stride_h - window.pad_top, 0, x.h);
    return {begin, std::clamp<int64_t>((outputs.end - 1) * window.stride_h - window.pad_top + reach() + 1, begin, x.h)};
  }
  // The input rows that are the band's own: together, the bands' are all.
  Range own_inputs(int64_t band) const {
    const Range range = outputs(band);
    return {band == 0 ? 0 : std::min(x.h, range.begin * window.stride_h),
            band == bands - 1 ? x.h : std::min(x.h, range.end * window.stride_h)};
  }
  // The output rows that read any of those input rows.
  Range readers(Range inputs) const {
    if (inputs.size() == 0) return {0, 0};
    const int64_t first = inputs.begin + window.pad_top - reach();
    const int64_t begin = std::clamp<int64_t>(first <= 0 ? 0 : (first + window.stride_h - 1) / window.stride_h, 0, y.h);
    return {begin, std::clamp<int64_t>((inputs.end - 1 + window.pad_top) / window.stride_h + 1, begin, y.h)};
  }
};

template <class T>
void set_window(T& args, const Window& window) {
  args.kernel_h = window.kernel_h;
  args.kernel_w = window.kernel_w;
  args.stride_h = window.stride_h;
  args.stride_w = window.stride_w;
  args.pad_top = window.pad_top;
  args.pad_left = window.pad_left;
  args.dilation_h = window.dilation_h;
  args.dilation_w = window.dilation_w;
}

// Whether `out`, where the channels of a slice begin in an image, is best written past the caches: those have lost it
// before anybody reads it, since two images of its size are read meanwhile. A core's share of the last one is taken for
// 32 MB: what systems tell is the whole processor's.
template <class T>
bool goes_past_caches(const T* out, ImageShape image) {
  constexpr int64_t kLine = 64, kLastCache = 32 << 20;
  const int64_t pixel = image.c * static_cast<int64_t>(sizeof(T));
  return pixel % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0 &&
         3 * image.n * image.pixels() * pixel > kLastCache;
}

// Some channels of some pixels of a convolution's input: what its norm and activation make of `of_z`, (rows, slice).
// With `sums`, (2, channels), what the norm itself needs of it is added there, by way of `both`, (2, slice).
template <class T>
void gradient_before_norm(const Kernels<T>& kernels, const ReadAs& read, const OptionalTensor& mean, const T* of_z,
                          const T* x, T* out, int64_t rows, ImageShape image, int64_t channel, int64_t slice, T* both,
                          T* sums) {
  NormGradientArgs<T> args{};
  args.grad = of_z;
  args.grad_stride = slice;
  args.x = x;
  args.out = out;
  args.x_stride = args.out_stride = image.c;
  args.rows = rows;
  args.channels = slice;
  if (read.folded.has_value()) {
    args.scale = row_or_null<T>(read.folded, 0) + channel;
    args.shift = row_or_null<T>(read.folded, 1) + channel;
  }
  args.activation = read.activation;
  args.past_caches = goes_past_caches(out, image);
  if (sums != nullptr) {
    std::fill_n(both, 2 * slice, T(0));
    args.mean = mean->const_data_ptr<T>() + channel;
    args.sums = both;
  }
  kernels.norm_gradient(args);
  for (int64_t i = 0; sums != nullptr && i < 2; ++i) {
    for (int64_t c = 0; c < slice; ++c) sums[i * image.c + c] += both[i * slice + c];
  }
}

// The operations; images are dense and channels last.

// Mean and biased variance of each channel, (2, C).
at::Tensor batch_norm_statistics(const at::Tensor& x);
// What a batch norm makes of its statistics: 1 / sqrt(variance + eps), and the rows scale and shift, (2, C). Running
// statistics, where given, move by `momentum` of the way towards those of this batch, of `count` values a channel.
std::tuple<at::Tensor, at::Tensor> batch_norm_fold(const at::Tensor& statistics, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, double momentum, int64_t count,
                                                   double eps);
// From the sums of NormGradientArgs: the coefficients of GradientAt, through the statistics of `count` values a channel
// if `by_batch`; and the gradient of the norm's weight.
std::tuple<at::Tensor, at::Tensor> batch_norm_coefficients(const at::Tensor& mean, const at::Tensor& inverse_deviation,
                                                           const OptionalTensor& weight, const at::Tensor& sums,
                                                           int64_t count, bool by_batch);
// z plus `residual`, where given.
at::Tensor batch_norm_apply(const at::Tensor& x, const ReadAs& read, const OptionalTensor& residual);
// (N, C): sums over pixels of activation(x · scale + shift), times `grad` where given.
at::Tensor batch_norm_pixel_sums(const at::Tensor& x, const ReadAs& read, const OptionalTensor& grad);
// The sums that NormGradientArgs describes, (2, C); d itself goes to `out`, where given, which may be the gradient's
// own.
at::Tensor batch_norm_gradient_sums(const GradientAt& gradient, const at::Tensor& mean, const OptionalTensor& out);
// The gradient at y.
at::Tensor batch_norm_gradient(const GradientAt& gradient);
std::tuple<at::Tensor, at::Tensor> pointwise_conv2d_forward(const at::Tensor& x, const ReadAs& read,
                                                            const at::Tensor& weight);
std::tuple<at::Tensor, at::Tensor> depthwise_conv2d_forward(const at::Tensor& x, const ReadAs& read,
                                                            const at::Tensor& weight, at::IntArrayRef stride,
                                                            at::IntArrayRef padding, at::IntArrayRef dilation);
// `input` is the gradient at what the activation before the convolution was applied to, `sums` (with `mean`, that of x)
// then are its batch norm's, as NormGradientArgs describes; with a gate, `input` is the gradient at z · gate, and
// `gate` that at the gate. `added` is added to `input` where the convolution reads x itself.
struct ConvGradients {
  at::Tensor input, weight, sums, gate;
};
ConvGradients pointwise_conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                                         const OptionalTensor& mean, const at::Tensor& weight, bool need_input,
                                         bool need_weight, const OptionalTensor& added);
ConvGradients depthwise_conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                                         const OptionalTensor& mean, const at::Tensor& weight, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation, bool need_input,
                                         bool need_weight);
// A dense convolution. Without padding, one of a single tap is a 1×1 convolution of some of the pixels. Others read no
// gate.
std::tuple<at::Tensor, at::Tensor> conv2d_forward(const at::Tensor& x, const ReadAs& read, const at::Tensor& weight,
                                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                                  at::IntArrayRef dilation);
ConvGradients conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                               const OptionalTensor& mean, const at::Tensor& weight, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, bool need_input, bool need_weight);
// The largest z of each window.
at::Tensor max_pool2d_forward(const at::Tensor& x, const ReadAs& read, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);
// `input` and `sums` of that, as above, from the gradient at its output.
ConvGradients max_pool2d_gradients(const at::Tensor& grad, const at::Tensor& x, const ReadAs& read,
                                   const OptionalTensor& mean, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation);
// What is left to do where `result.input` is the gradient at z: see ConvGradients.
void gradients_before_norm(ConvGradients& result, const at::Tensor& x, const ReadAs& read, const OptionalTensor& mean);

}  // namespace mobilenet_fast
