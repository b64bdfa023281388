// A depthwise convolution as a block in training runs it: its input is read through the norm and activation before it,
// and its output's statistics are taken while it is in cache; and the gradients of that.
//
// Channels do not meet, so a piece of work is some channels of some rows of an image, as many as stay in cache: of
// small maps whole images.
#include "steps/training.h"

namespace mobilenet_fast {
namespace {

template <class T>
class DepthwiseForward final : public Step {
 public:
  DepthwiseForward(Isa isa, ImageShape x, ImageShape y, Window window, const at::Tensor& packed, const ReadAs& read,
                   at::Tensor sums, at::Tensor statistics)
      : kernels_(kernels<T>(isa)),
        bands_(Bands::of(kernels_, x, y, window, read.folded.has_value(), 1)),
        packed_(packed),
        read_(read),
        groups_(std::min(bands_.units(), kGroups)),
        counts_(groups_),
        sums_(std::move(sums)),
        statistics_(std::move(statistics)) {
    for (int64_t g = 0; g < groups_; ++g) {
      const Range range = share(bands_.units(), groups_, g);
      for (int64_t u = range.begin; u < range.end; ++u) {
        counts_[g] += bands_.outputs(u % bands_.bands).size() * y.w;
      }
    }
  }

  void run(const Work& work) const override {
    const int64_t channels = bands_.y.c;
    const Range items = work.team.share(groups_ * bands_.slices);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t g = item / bands_.slices, channel = item % bands_.slices * bands_.slice;
      const int64_t slice = std::min(bands_.slice, channels - channel);
      T* sums = sums_.data_ptr<T>() + g * 3 * channels + channel;
      for (int64_t i = 0; i < 3; ++i) std::fill_n(sums + i * channels, slice, T(0));
      const Range range = share(bands_.units(), groups_, g);
      for (int64_t u = range.begin; u < range.end; ++u) run_band(work, u, channel, slice, sums, u == range.begin);
    }
    work.team.sync();
    merge_statistics(sums_.const_data_ptr<T>(), counts_, channels, work.team.share(channels),
                     statistics_.data_ptr<T>());
  }

  size_t thread_scratch_bytes() const override {
    const int64_t pixels = read_.folded.has_value() ? bands_.input_rows(bands_.rows) * bands_.x.w : 0;
    return static_cast<size_t>((pixels + 2) * std::min(bands_.slice, bands_.y.c)) * sizeof(T);
  }
  std::string describe() const override { return "depthwise, statistics"; }

 private:
  void run_band(const Work& work, int64_t unit, int64_t channel, int64_t slice, T* sums, bool first) const {
    const ImageShape &xs = bands_.x, &ys = bands_.y;
    const int64_t image = unit / bands_.bands;
    const Range rows = bands_.outputs(unit % bands_.bands), inputs = bands_.inputs(rows);
    const T* x = work.buffer<T>(0) + image * xs.pixels() * xs.c + channel;
    T* y = work.buffer<T>(1) + image * ys.pixels() * ys.c + channel;
    T* scratch = reinterpret_cast<T*>(work.thread_scratch);
    DepthwiseArgs<T> args{};
    args.x = x;
    args.x_pixel_stride = xs.c;
    if (read_.folded.has_value()) {
      read_pixels(kernels_, read_, x + inputs.begin * xs.w * xs.c, xs.c, image, inputs.size() * xs.w, channel, slice,
                  scratch);
      args.x = scratch - inputs.begin * xs.w * slice;
      args.x_pixel_stride = slice;
    }
    args.x_row_stride = xs.w * args.x_pixel_stride;
    args.height = xs.h;
    args.width = xs.w;
    args.weight = packed_.const_data_ptr<T>() + channel * (1 + bands_.window.kernel_h * bands_.window.kernel_w);
    args.y_pixel_stride = ys.c;
    args.y_row_stride = ys.w * ys.c;
    args.y = y;
    args.row_begin = rows.begin;
    args.row_end = rows.end;
    args.out_width = ys.w;
    args.channels = slice;
    args.activation = Activation::kNone;
    args.fetches = !read_.folded.has_value() && exceeds_l2<T>(xs);
    set_window(args, bands_.window);
    kernels_.depthwise_conv2d(args);
    const T* out = y + rows.begin * args.y_row_stride;
    if (first) std::copy_n(out, slice, sums);
    // The kernel wants both sums beside each other.
    T* both = scratch + (read_.folded.has_value() ? bands_.input_rows(bands_.rows) * xs.w * slice : 0);
    std::fill_n(both, 2 * slice, T(0));
    kernels_.statistics({out, ys.c, rows.size() * ys.w, slice, sums, both});
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t c = 0; c < slice; ++c) sums[(i + 1) * ys.c + c] += both[i * slice + c];
    }
  }

  const Kernels<T>& kernels_;
  Bands bands_;
  at::Tensor packed_;
  ReadAs read_;
  int64_t groups_;
  std::vector<int64_t> counts_;
  mutable at::Tensor sums_, statistics_;
};

template <class T>
class DepthwiseBackward final : public Step {
 public:
  DepthwiseBackward(Isa isa, ImageShape x, ImageShape y, Window window, const at::Tensor& packed,
                    const GradientAt& gradient, const ReadAs& read, const OptionalTensor& mean, bool need_input,
                    bool need_weight)
      : kernels_(kernels<T>(isa)),
        bands_(Bands::of(kernels_, x, y, window, 1, 1)),
        packed_(packed),
        gradient_(gradient),
        read_(read),
        mean_(mean),
        need_input_(need_input),
        need_weight_(need_weight),
        groups_(std::min(bands_.units(), kGroups)) {}

  int64_t groups() const { return groups_; }
  int64_t weight_elements() const {
    return round_up(bands_.y.c, kernels_.lanes) * bands_.window.kernel_h * bands_.window.kernel_w;
  }
  // Partial sums of the groups, undefined where they are not wanted: (groups, weight_elements()) and (groups, 2, C).
  void set_sums(at::Tensor weight, at::Tensor norm) {
    weight_sums_ = std::move(weight);
    norm_sums_ = std::move(norm);
  }

  // Buffers: the gradient, y (or null), x, the input's gradient, and the weight's.
  void run(const Work& work) const override {
    const int64_t channels = bands_.y.c, taps = bands_.window.kernel_h * bands_.window.kernel_w;
    const Range items = work.team.share(groups_ * bands_.slices);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t g = item / bands_.slices, channel = item % bands_.slices * bands_.slice;
      const int64_t slice = std::min(bands_.slice, channels - channel);
      T *weight = reinterpret_cast<T*>(work.thread_scratch) + of_x() + of_y() + 2 * this->slice(), *norm = nullptr;
      if (need_weight_) weight = weight_sums_.data_ptr<T>() + g * weight_elements() + channel * taps;
      std::fill_n(weight, round_up(slice, kernels_.lanes) * taps, T(0));
      if (norm_sums_.defined()) {
        norm = norm_sums_.data_ptr<T>() + g * 2 * channels + channel;
        for (int64_t i = 0; i < 2; ++i) std::fill_n(norm + i * channels, slice, T(0));
      }
      const Range range = share(bands_.units(), groups_, g);
      for (int64_t u = range.begin; u < range.end; ++u) run_band(work, u, channel, slice, weight, norm);
    }
    work.team.sync();
    if (need_weight_) unpack_weight(work);
    if (norm_sums_.defined()) {
      T* sums = norm_sums_.data_ptr<T>();
      merge_sums(sums, groups_, 2 * channels, work.team.share(2 * channels), sums);
    }
  }

  size_t thread_scratch_bytes() const override {
    return static_cast<size_t>(of_x() + of_y() + 2 * slice() + of_weight()) * sizeof(T);
  }
  std::string describe() const override { return "depthwise gradients"; }

 private:
  int64_t slice() const { return std::min(bands_.slice, bands_.y.c); }
  // Elements of scratch: of a band's inputs, of the gradients that meet them, and of a weight's that nobody wants.
  int64_t of_x() const { return bands_.input_rows(bands_.rows) * bands_.x.w * slice(); }
  int64_t of_y() const { return bands_.grad_rows(bands_.rows) * bands_.y.w * slice(); }
  int64_t of_weight() const {
    return need_weight_ ? 0 : round_up(slice(), kernels_.lanes) * bands_.window.kernel_h * bands_.window.kernel_w;
  }

  void unpack_weight(const Work& work) const {
    const int64_t channels = bands_.y.c, taps = bands_.window.kernel_h * bands_.window.kernel_w;
    const int64_t lanes = kernels_.lanes, elements = weight_elements();
    T *sums = weight_sums_.data_ptr<T>(), *out = work.buffer<T>(4);
    const Range vectors = work.team.share((channels + lanes - 1) / lanes);
    merge_sums(sums, groups_, elements, {vectors.begin * lanes * taps, vectors.end * lanes * taps}, sums);
    for (int64_t c = vectors.begin * lanes; c < std::min(channels, vectors.end * lanes); ++c) {
      const T* from = sums + c / lanes * lanes * taps + c % lanes;
      for (int64_t t = 0; t < taps; ++t) out[c * taps + t] = from[t * lanes];
    }
  }

  void run_band(const Work& work, int64_t unit, int64_t channel, int64_t slice, T* weight, T* norm) const {
    const ImageShape &xs = bands_.x, &ys = bands_.y;
    const int64_t image = unit / bands_.bands;
    const Range inputs = bands_.own_inputs(unit % bands_.bands), outputs = bands_.readers(inputs);
    if (inputs.size() == 0) return;
    const int64_t from = image * xs.pixels() * xs.c + inputs.begin * xs.w * xs.c + channel;
    const T* x = work.buffer<T>(2) + from;
    T* out = need_input_ ? work.buffer<T>(3) + from : nullptr;
    T *z = reinterpret_cast<T*>(work.thread_scratch), *at_y = z + of_x(), *both = at_y + of_y();

    const int64_t from_y = (image * ys.h + outputs.begin) * ys.w * ys.c + channel;
    const T *grad = work.buffer<T>(0) + from_y,
            *y = work.buffer<T>(1) == nullptr ? nullptr : work.buffer<T>(1) + from_y;
    const bool reads_at_y = gradient_.coefficients.has_value() || gradient_.activation != Activation::kNone;
    if (reads_at_y) {
      NormGradientArgs<T> norm_gradient =
          gradient_args<T>(gradient_, grad, y, ys.c, image, outputs.size() * ys.w, channel, slice);
      norm_gradient.out = at_y;
      norm_gradient.out_stride = slice;
      kernels_.norm_gradient(norm_gradient);
    }

    DepthwiseGradArgs<T> args{};
    // What is computed of z takes its place.
    const bool reads_z = read_.folded.has_value(),
               writes_z = !need_input_ || norm != nullptr || read_.activation != Activation::kNone;
    if (reads_z) read_pixels(kernels_, read_, x, xs.c, image, inputs.size() * xs.w, channel, slice, z);
    args.x_pixel_stride = reads_z ? slice : xs.c;
    args.x_row_stride = xs.w * args.x_pixel_stride;
    args.x = (reads_z ? z : x) - inputs.begin * args.x_row_stride;
    args.x_grad_pixel_stride = writes_z ? slice : xs.c;
    args.x_grad_row_stride = xs.w * args.x_grad_pixel_stride;
    args.x_grad = (writes_z ? z : out) - inputs.begin * args.x_grad_row_stride;
    args.width = xs.w;
    args.grad_pixel_stride = reads_at_y ? slice : ys.c;
    args.grad_row_stride = ys.w * args.grad_pixel_stride;
    args.grad = (reads_at_y ? at_y : grad) - outputs.begin * args.grad_row_stride;
    args.out_height = ys.h;
    args.out_width = ys.w;
    args.row_begin = inputs.begin;
    args.row_end = inputs.end;
    args.channels = slice;
    set_window(args, bands_.window);
    args.weight = packed_.const_data_ptr<T>() + channel * (1 + bands_.window.kernel_h * bands_.window.kernel_w);
    args.weight_grad = weight;
    // What the next row reads; after an image's last one that is the next image's first.
    args.x_ahead = reads_z ? 0 : args.x_row_stride;
    args.grad_ahead = reads_at_y ? 0 : args.grad_row_stride;
    args.past_caches = !writes_z && goes_past_caches(out, xs);
    kernels_.depthwise_conv2d_gradients(args);
    if (!need_input_ || !writes_z) return;
    gradient_before_norm(kernels_, read_, mean_, z, x, out, inputs.size() * xs.w, xs, channel, slice, both, norm);
  }

  const Kernels<T>& kernels_;
  Bands bands_;
  at::Tensor packed_;
  GradientAt gradient_;
  ReadAs read_;
  OptionalTensor mean_;
  bool need_input_, need_weight_;
  int64_t groups_;
  mutable at::Tensor weight_sums_, norm_sums_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> depthwise_conv2d_forward(const at::Tensor& x, const ReadAs& read,
                                                            const at::Tensor& weight, at::IntArrayRef stride,
                                                            at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr const char* kName = "depthwise_conv2d_forward";
  check_read_as(kName, x, read);
  const DepthwiseGeometry geometry = depthwise_geometry(kName, x, weight, stride, padding, dilation);
  TORCH_CHECK_NOT_IMPLEMENTED(weight.size(0) == x.size(1), kName, ": a channel multiplier is not supported, got ",
                              weight.size(0) / x.size(1));
  const Isa isa = current_isa();
  const int64_t n = x.size(0), c = x.size(1);
  at::Tensor y = empty_channels_last({n, c, geometry.out_h, geometry.out_w}, x);
  at::Tensor statistics = at::empty({2, c}, x.options());
  const at::Tensor packed = pack_depthwise_conv2d(weight, std::nullopt, std::nullopt, isa, call_weights());
  dispatch(x.scalar_type(), [&](auto zero) {
    run_step(DepthwiseForward<decltype(zero)>(isa, {n, x.size(2), x.size(3), c}, {n, geometry.out_h, geometry.out_w, c},
                                              geometry.window, packed, read, at::empty({kGroups, 3, c}, x.options()),
                                              statistics),
             {buffer_of(x), buffer_of(y)});
  });
  return {y, statistics};
}

ConvGradients depthwise_conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                                         const OptionalTensor& mean, const at::Tensor& weight, at::IntArrayRef stride,
                                         at::IntArrayRef padding, at::IntArrayRef dilation, bool need_input,
                                         bool need_weight) {
  constexpr const char* kName = "depthwise_conv2d_gradients";
  check_read_as(kName, x, read);
  check_gradient(kName, gradient);
  const DepthwiseGeometry geometry = depthwise_geometry(kName, x, weight, stride, padding, dilation);
  TORCH_CHECK_NOT_IMPLEMENTED(weight.size(0) == x.size(1), kName, ": a channel multiplier is not supported, got ",
                              weight.size(0) / x.size(1));
  const Isa isa = current_isa();
  const int64_t n = x.size(0), c = x.size(1);
  check_vector(kName, "mean", mean, x.scalar_type(), c);
  const std::vector<int64_t> out_sizes = {n, c, geometry.out_h, geometry.out_w};
  TORCH_CHECK_VALUE(gradient.grad.sizes() == at::IntArrayRef(out_sizes), kName, ": grad must be the output's ",
                    shape_string(out_sizes), ", got ", shape_string(gradient.grad.sizes()));
  ConvGradients result;
  if (need_input) result.input = empty_channels_last(x.sizes(), x);
  if (need_weight) result.weight = at::empty(weight.sizes(), weight.options().requires_grad(false));
  const at::Tensor packed = pack_depthwise_conv2d(weight, std::nullopt, std::nullopt, isa, call_weights());
  dispatch(x.scalar_type(), [&](auto zero) {
    DepthwiseBackward<decltype(zero)> step(isa, {n, x.size(2), x.size(3), c}, {n, geometry.out_h, geometry.out_w, c},
                                           geometry.window, packed, gradient, read, mean, need_input, need_weight);
    at::Tensor weight_sums, norm_sums;
    if (need_weight) weight_sums = at::empty({step.groups(), step.weight_elements()}, x.options());
    if (need_input && mean.has_value()) norm_sums = at::empty({step.groups(), 2, c}, x.options());
    step.set_sums(weight_sums, norm_sums);
    run_step(step,
             {buffer_of(gradient.grad), gradient.y.has_value() ? buffer_of(*gradient.y) : Buffer{}, buffer_of(x),
              need_input ? buffer_of(result.input) : Buffer{}, need_weight ? buffer_of(result.weight) : Buffer{}});
    if (norm_sums.defined()) result.sums = norm_sums.select(0, 0).clone();
  });
  return result;
}

}  // namespace mobilenet_fast
