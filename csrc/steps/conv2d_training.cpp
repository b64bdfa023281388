// A dense convolution as a block in training runs it: the stem of a network, or a shortcut's strided 1×1. Few of a
// network's multiplications are in one, so that its passes are steps that there are already, one after another; only
// the weight's gradient has one of its own.
#include <ATen/core/grad_mode.h>

#include <cstring>

#include "steps/training.h"

namespace mobilenet_fast {
namespace {

// The weight's gradient, (K, kH, kW, C), as the product of a pointwise convolution's: an output pixel's row is what its
// window holds, copied together for some pixels at a time.
template <class T>
class WeightGradient final : public Step {
 public:
  WeightGradient(Isa isa, ImageShape x, ImageShape y, Window window, const GradientAt& gradient)
      : kernels_(kernels<T>(isa)),
        x_(x),
        y_(y),
        window_(window),
        gradient_(gradient),
        depth_(window.kernel_h * window.kernel_w * x.c),
        blocks_(y.n, y.pixels(), most_pixels()) {
    // As many sums as there are groups: fewer where those are larger than what they are summed from.
    const int64_t most = (int64_t{1} << 21) / (depth_ * y.c);
    groups_ = std::min(blocks_.count(), std::clamp<int64_t>(most, 4, kGroups));
  }

  int64_t sums_elements() const { return groups_ * y_.c * depth_; }
  void set_sums(at::Tensor sums) { sums_ = std::move(sums); }

  // Buffers: the gradient, y (or null), x, and the weight's gradient.
  void run(const Work& work) const override {
    const int64_t elements = y_.c * depth_;
    const Range groups = work.team.share(groups_);
    T* windows = reinterpret_cast<T*>(work.thread_scratch);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      T* sums = sums_.data_ptr<T>() + g * elements;
      std::fill_n(sums, elements, T(0));
      const Range range = share(blocks_.count(), groups_, g);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const Range rows = blocks_.block(b);
        copy_windows(work.buffer<T>(2), rows, windows);
        T* of_y = windows + rows.size() * depth_;
        GemmTransposedArgs<T> args{};
        args.rows = rows.size();
        args.a = gradient_at_y(work, b, of_y);
        args.b = windows;
        args.a_stride = args.columns_a = y_.c;
        args.b_stride = args.columns_b = args.out_stride = depth_;
        args.out = sums;
        args.panel = of_y + rows.size() * y_.c;
        if (b + 1 < range.end) {
          const Range next = blocks_.block(b + 1);
          const T* y = work.buffer<T>(1);
          args.fetch[0] = work.buffer<T>(0) + next.begin * y_.c;
          args.fetch[1] = y == nullptr || args.a != of_y ? nullptr : y + next.begin * y_.c;
          args.fetch_bytes[0] = args.fetch_bytes[1] = next.size() * y_.c * static_cast<int64_t>(sizeof(T));
        }
        kernels_.gemm_transposed(args);
      }
    }
    work.team.sync();
    merge_sums(sums_.const_data_ptr<T>(), groups_, elements, work.team.share(elements), work.buffer<T>(3));
  }

  size_t thread_scratch_bytes() const override {
    const int64_t panel = kernels_.panel_vectors * kernels_.lanes;
    return static_cast<size_t>(blocks_.largest() * (depth_ + y_.c + panel)) * sizeof(T);
  }
  std::string describe() const override { return "weight gradient"; }

 private:
  int64_t most_pixels() const {
    return std::clamp<int64_t>(l2_cache_bytes() / 2 / static_cast<int64_t>(sizeof(T)) / (depth_ + y_.c), 48, 384);
  }

  // That of a block's pixels: in `of_y`, unless it is there already.
  const T* gradient_at_y(const Work& work, int64_t block, T* of_y) const {
    const int64_t c = y_.c, begin = blocks_.block(block).begin;
    const T *grad = work.buffer<T>(0), *y = work.buffer<T>(1);
    if (!gradient_.coefficients.has_value() && gradient_.activation == Activation::kNone) return grad + begin * c;
    blocks_.for_each_image(block, [&](int64_t image, Range part, int64_t) {
      NormGradientArgs<T> args =
          gradient_args<T>(gradient_, grad + part.begin * c, y + part.begin * c, c, image, part.size(), 0, c);
      args.out = of_y + (part.begin - begin) * c;
      args.out_stride = c;
      kernels_.norm_gradient(args);
    });
    return of_y;
  }

  void copy_windows(const T* x, Range pixels, T* out) const {
    int64_t image = pixels.begin / y_.pixels(), oy = pixels.begin / y_.w % y_.h, ox = pixels.begin % y_.w;
    for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
      out = copy_window(x + image * x_.pixels() * x_.c, oy, ox, out);
      if (++ox < y_.w) continue;
      ox = 0;
      if (++oy < y_.h) continue;
      oy = 0;
      ++image;
    }
  }

  T* copy_window(const T* x, int64_t oy, int64_t ox, T* out) const {
    const int64_t left = ox * window_.stride_w - window_.pad_left, span = window_.kernel_w * x_.c;
    for (int64_t ky = 0; ky < window_.kernel_h; ++ky) {
      const int64_t iy = oy * window_.stride_h - window_.pad_top + ky * window_.dilation_h;
      const T* row = x + iy * x_.w * x_.c;
      const bool is_inside = iy >= 0 && iy < x_.h;
      if (is_inside && window_.dilation_w == 1 && left >= 0 && left + window_.kernel_w <= x_.w) {
        if (span == kStemSpan) {  // of a size that the compiler knows: a call would take longer than the copy
          std::memcpy(out, row + left * x_.c, kStemSpan * sizeof(T));
          out += kStemSpan;
        } else {
          out = std::copy_n(row + left * x_.c, span, out);
        }
        continue;
      }
      for (int64_t kx = 0; kx < window_.kernel_w; ++kx) {
        const int64_t ix = left + kx * window_.dilation_w;
        if (is_inside && ix >= 0 && ix < x_.w) {
          out = std::copy_n(row + ix * x_.c, x_.c, out);
        } else {
          out = std::fill_n(out, x_.c, T(0));
        }
      }
    }
    return out;
  }

  static constexpr int64_t kStemSpan = 9;  // three colours of three columns

  const Kernels<T>& kernels_;
  ImageShape x_, y_;
  Window window_;
  GradientAt gradient_;
  int64_t depth_;
  PixelBlocks blocks_;
  int64_t groups_;
  mutable at::Tensor sums_;
};

ImageShape shape_of(const at::Tensor& image) { return {image.size(0), image.size(2), image.size(3), image.size(1)}; }

void check_weight(const char* operation, const at::Tensor& x, const at::Tensor& weight) {
  check_tensor(operation, "weight", weight, x.scalar_type(), 4);
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(1) == x.size(1), operation,
                    ": weight must be (K, C, kH, kW) with C=", x.size(1), ", got ", shape_string(weight.sizes()));
}

// Whether only some pixels are read, each by one output.
bool is_single_tap(const DepthwiseGeometry& g, const at::Tensor& x) {
  const Window& w = g.window;
  return w.kernel_h == 1 && w.kernel_w == 1 && w.pad_top == 0 && w.pad_left == 0 &&
         (g.out_h - 1) * w.stride_h < x.size(2) && (g.out_w - 1) * w.stride_w < x.size(3);
}

at::Tensor some_pixels(const at::Tensor& image, const DepthwiseGeometry& g) {
  return image.slice(2, 0, (g.out_h - 1) * g.window.stride_h + 1, g.window.stride_h)
      .slice(3, 0, (g.out_w - 1) * g.window.stride_w + 1, g.window.stride_w);
}

at::Tensor copy_of_pixels(const at::Tensor& image, const DepthwiseGeometry& g) {
  at::Tensor copy = empty_channels_last({image.size(0), image.size(1), g.out_h, g.out_w}, image);
  return copy.copy_(some_pixels(image, g));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> conv2d_forward(const at::Tensor& x, const ReadAs& read, const at::Tensor& weight,
                                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                                  at::IntArrayRef dilation) {
  constexpr const char* kName = "conv2d_forward";
  const at::NoGradGuard no_grad;
  check_read_as(kName, x, read);
  check_weight(kName, x, weight);
  const DepthwiseGeometry g = window_geometry(kName, x, weight.sizes().slice(2), stride, padding, dilation);
  if (is_single_tap(g, x)) return pointwise_conv2d_forward(copy_of_pixels(x, g), read, weight);
  TORCH_CHECK_VALUE(!read.gate.has_value(), kName, ": reads no gate");
  const at::Tensor z = read.folded.has_value() ? batch_norm_apply(x, read, std::nullopt) : x;
  at::Tensor y = empty_channels_last({x.size(0), weight.size(0), g.out_h, g.out_w}, x);
  const Isa isa = current_isa();
  const at::Tensor packed = pack_conv2d(weight, std::nullopt, std::nullopt, isa, call_weights());
  run_step(*make_conv2d(isa, shape_of(z), shape_of(y), packed, g.window, Activation::kNone, 0, 1, -1),
           {buffer_with_strides(z), buffer_with_strides(y)});
  return {y, batch_norm_statistics(y)};
}

ConvGradients conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                               const OptionalTensor& mean, const at::Tensor& weight, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, bool need_input, bool need_weight) {
  constexpr const char* kName = "conv2d_gradients";
  const at::NoGradGuard no_grad;
  check_read_as(kName, x, read);
  check_gradient(kName, gradient);
  check_weight(kName, x, weight);
  check_vector(kName, "mean", mean, x.scalar_type(), x.size(1));
  const int64_t n = x.size(0), k = weight.size(0);
  const DepthwiseGeometry g = window_geometry(kName, x, weight.sizes().slice(2), stride, padding, dilation);
  const std::vector<int64_t> out_sizes = {n, k, g.out_h, g.out_w};
  TORCH_CHECK_VALUE(gradient.grad.sizes() == at::IntArrayRef(out_sizes), kName, ": grad must be the output's ",
                    shape_string(out_sizes), ", got ", shape_string(gradient.grad.sizes()));
  if (is_single_tap(g, x)) {
    ConvGradients result = pointwise_conv2d_gradients(gradient, copy_of_pixels(x, g), read, mean, weight, need_input,
                                                      need_weight, std::nullopt);
    if (!need_input) return result;
    const at::Tensor of_pixels = result.input;
    result.input = empty_channels_last(x.sizes(), x).zero_();
    some_pixels(result.input, g).copy_(of_pixels);
    return result;
  }
  TORCH_CHECK_VALUE(!read.gate.has_value(), kName, ": reads no gate");
  const bool changes = gradient.coefficients.has_value() || gradient.activation != Activation::kNone;
  // The input of most stems needs no gradient: then the one at y is read once, as it is computed.
  const bool is_written = changes && need_input;
  const at::Tensor d = is_written ? batch_norm_gradient(gradient) : gradient.grad;
  const Isa isa = current_isa();
  ConvGradients result;
  if (need_weight) {
    const at::Tensor z = read.folded.has_value() ? batch_norm_apply(x, read, std::nullopt) : x;
    at::Tensor found = at::empty({k, weight.size(2), weight.size(3), x.size(1)}, weight.options().requires_grad(false));
    dispatch(x.scalar_type(), [&](auto zero) {
      const GradientAt at_y = is_written ? GradientAt{d, {}, {}, Activation::kNone, {}, {}, {}} : gradient;
      WeightGradient<decltype(zero)> step(isa, shape_of(z), shape_of(d), g.window, at_y);
      step.set_sums(empty_for_now(step.sums_elements(), x));
      run_step(step,
               {buffer_of(d), at_y.y.has_value() ? buffer_of(*at_y.y) : Buffer{}, buffer_of(z), buffer_of(found)});
    });
    result.weight = found.permute({0, 3, 1, 2}).contiguous();
  }
  if (!need_input) return result;
  // The input's is a convolution of d, with zeros between its pixels where there is a stride, by the taps in reverse.
  const Window& w = g.window;
  at::Tensor spread = d;
  if (w.stride_h > 1 || w.stride_w > 1) {
    spread = empty_channels_last({n, k, (g.out_h - 1) * w.stride_h + 1, (g.out_w - 1) * w.stride_w + 1}, d).zero_();
    some_pixels(spread, g).copy_(d);
  }
  result.input = empty_channels_last(x.sizes(), x);
  const Window back{w.kernel_h,
                    w.kernel_w,
                    1,
                    1,
                    (w.kernel_h - 1) * w.dilation_h - w.pad_top,
                    (w.kernel_w - 1) * w.dilation_w - w.pad_left,
                    w.dilation_h,
                    w.dilation_w};
  TORCH_CHECK_NOT_IMPLEMENTED(back.pad_top >= 0 && back.pad_left >= 0, kName,
                              ": padding beyond the dilated kernel is not supported, got ", shape_string(padding));
  const at::Tensor packed =
      pack_conv2d(weight.flip({2, 3}).transpose(0, 1), std::nullopt, std::nullopt, isa, call_weights());
  run_step(*make_conv2d(isa, shape_of(spread), shape_of(x), packed, back, Activation::kNone, 0, 1, -1),
           {buffer_with_strides(spread), buffer_with_strides(result.input)});
  gradients_before_norm(result, x, read, mean);
  return result;
}

}  // namespace mobilenet_fast
