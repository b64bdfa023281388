// Maximum pooling as a block in training runs it: its input is read through the norm and activation before it, forward
// and again in the backward pass, which finds the largest values anew and keeps no places of theirs.
#include "steps/training.h"

namespace mobilenet_fast {
namespace {

// What both passes read: z of rows of one image, some channels of it, in scratch memory.
template <class T>
void read_rows(const Kernels<T>& kernels, const Bands& bands, const ReadAs& read, const T* x, int64_t image, Range rows,
               int64_t channel, int64_t slice, T* z) {
  const ImageShape& shape = bands.x;
  read_pixels(kernels, read, x + (image * shape.h + rows.begin) * shape.w * shape.c + channel, shape.c, image,
              rows.size() * shape.w, channel, slice, z);
}

template <class T>
class MaxPoolForward final : public Step {
 public:
  MaxPoolForward(Isa isa, ImageShape x, ImageShape y, Window window, const ReadAs& read)
      : kernels_(kernels<T>(isa)), bands_(Bands::of(kernels_, x, y, window, 1, 1)), read_(read) {}

  // Buffers: x and y.
  void run(const Work& work) const override {
    const ImageShape &xs = bands_.x, &ys = bands_.y;
    T* z = reinterpret_cast<T*>(work.thread_scratch);
    const Range items = work.team.share(bands_.units() * bands_.slices);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t unit = item / bands_.slices, channel = item % bands_.slices * bands_.slice;
      const int64_t slice = std::min(bands_.slice, ys.c - channel), image = unit / bands_.bands;
      const Range rows = bands_.outputs(unit % bands_.bands), inputs = bands_.inputs(rows);
      read_rows(kernels_, bands_, read_, work.buffer<T>(0), image, inputs, channel, slice, z);
      PoolArgs<T> args{};
      args.x = z - inputs.begin * xs.w * slice;
      args.x_pixel_stride = slice;
      args.x_row_stride = xs.w * slice;
      args.height = xs.h;
      args.width = xs.w;
      args.y = work.buffer<T>(1) + image * ys.pixels() * ys.c + channel;
      args.y_pixel_stride = ys.c;
      args.y_row_stride = ys.w * ys.c;
      args.row_begin = rows.begin;
      args.row_end = rows.end;
      args.out_width = ys.w;
      args.channels = slice;
      set_window(args, bands_.window);
      kernels_.pool2d(args);
    }
  }

  size_t thread_scratch_bytes() const override {
    return static_cast<size_t>(bands_.input_rows(bands_.rows) * bands_.x.w * std::min(bands_.slice, bands_.y.c)) *
           sizeof(T);
  }
  std::string describe() const override { return "maximum over windows"; }

 private:
  const Kernels<T>& kernels_;
  Bands bands_;
  ReadAs read_;
};

template <class T>
class MaxPoolBackward final : public Step {
 public:
  MaxPoolBackward(Isa isa, ImageShape x, ImageShape y, Window window, const ReadAs& read, const OptionalTensor& mean)
      : kernels_(kernels<T>(isa)),
        bands_(Bands::of(kernels_, x, y, window, 2, 0)),
        read_(read),
        mean_(mean),
        groups_(std::min(bands_.units(), kGroups)) {}

  int64_t groups() const { return groups_; }
  void set_sums(at::Tensor sums) { sums_ = std::move(sums); }  // (groups, 2, C), or undefined

  // Buffers: the gradient, x, and the input's gradient.
  void run(const Work& work) const override {
    const int64_t channels = bands_.x.c;
    const Range items = work.team.share(groups_ * bands_.slices);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t g = item / bands_.slices, channel = item % bands_.slices * bands_.slice;
      const int64_t slice = std::min(bands_.slice, channels - channel);
      T* sums = nullptr;
      if (sums_.defined()) {
        sums = sums_.data_ptr<T>() + g * 2 * channels + channel;
        for (int64_t i = 0; i < 2; ++i) std::fill_n(sums + i * channels, slice, T(0));
      }
      const Range range = share(bands_.units(), groups_, g);
      for (int64_t u = range.begin; u < range.end; ++u) run_band(work, u, channel, slice, sums);
    }
    if (!sums_.defined()) return;
    work.team.sync();
    T* sums = sums_.data_ptr<T>();
    merge_sums(sums, groups_, 2 * channels, work.team.share(2 * channels), sums);
  }

  size_t thread_scratch_bytes() const override {
    return static_cast<size_t>(2 * (read_rows_most() * bands_.x.w + 1) * std::min(bands_.slice, bands_.x.c)) *
           sizeof(T);
  }
  std::string describe() const override { return "gradient of the maximum"; }

 private:
  int64_t read_rows_most() const { return bands_.input_rows(bands_.grad_rows(bands_.rows)); }

  void run_band(const Work& work, int64_t unit, int64_t channel, int64_t slice, T* sums) const {
    const ImageShape &xs = bands_.x, &ys = bands_.y;
    const int64_t image = unit / bands_.bands, band = unit % bands_.bands;
    const Range own = bands_.own_inputs(band), readers = bands_.readers(own);
    if (own.size() == 0) return;
    // All that the windows read: what lies outside the band's own rows is computed for those alone.
    Range inputs = own;
    if (readers.size() > 0) {
      const Range read = bands_.inputs(readers);
      inputs = {std::min(own.begin, read.begin), std::max(own.end, read.end)};
    }
    T* z = reinterpret_cast<T*>(work.thread_scratch);
    T *of_z = z + read_rows_most() * xs.w * slice, *both = of_z + read_rows_most() * xs.w * slice;
    read_rows(kernels_, bands_, read_, work.buffer<T>(1), image, inputs, channel, slice, z);
    std::fill_n(of_z, inputs.size() * xs.w * slice, T(0));
    MaxPoolGradArgs<T> args{};
    args.x = z - inputs.begin * xs.w * slice;
    args.x_grad = of_z - inputs.begin * xs.w * slice;
    args.x_pixel_stride = slice;
    args.x_row_stride = xs.w * slice;
    args.height = xs.h;
    args.width = xs.w;
    args.grad = work.buffer<T>(0) + image * ys.pixels() * ys.c + channel;
    args.grad_pixel_stride = ys.c;
    args.grad_row_stride = ys.w * ys.c;
    args.row_begin = readers.begin;
    args.row_end = readers.end;
    args.out_width = ys.w;
    args.channels = slice;
    set_window(args, bands_.window);
    kernels_.max_pool2d_grad(args);

    const int64_t from = (image * xs.h + own.begin) * xs.w * xs.c + channel;
    gradient_before_norm(kernels_, read_, mean_, of_z + (own.begin - inputs.begin) * xs.w * slice,
                         work.buffer<T>(1) + from, work.buffer<T>(2) + from, own.size() * xs.w, xs, channel, slice,
                         both, sums);
  }

  const Kernels<T>& kernels_;
  Bands bands_;
  ReadAs read_;
  OptionalTensor mean_;
  int64_t groups_;
  mutable at::Tensor sums_;
};

DepthwiseGeometry pool_geometry(const char* operation, const at::Tensor& x, const ReadAs& read,
                                at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation) {
  check_read_as(operation, x, read);
  TORCH_CHECK_VALUE(!read.gate.has_value(), operation, ": reads no gate");
  const DepthwiseGeometry geometry = window_geometry(operation, x, kernel_size, stride, padding, dilation);
  const Window& w = geometry.window;
  TORCH_CHECK_VALUE(padding.size() <= 2 && 2 * w.pad_top <= w.kernel_h && 2 * w.pad_left <= w.kernel_w, operation,
                    ": padding must be at most half of the kernel, got ", shape_string(padding));
  return geometry;
}

}  // namespace

at::Tensor max_pool2d_forward(const at::Tensor& x, const ReadAs& read, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr const char* kName = "max_pool2d_forward";
  const auto [window, out_h, out_w] = pool_geometry(kName, x, read, kernel_size, stride, padding, dilation);
  const int64_t n = x.size(0), c = x.size(1);
  at::Tensor y = empty_channels_last({n, c, out_h, out_w}, x);
  const ImageShape xs{n, x.size(2), x.size(3), c}, ys{n, out_h, out_w, c};
  dispatch(x.scalar_type(), [&, &window = window](auto zero) {
    run_step(MaxPoolForward<decltype(zero)>(current_isa(), xs, ys, window, read), {buffer_of(x), buffer_of(y)});
  });
  return y;
}

ConvGradients max_pool2d_gradients(const at::Tensor& grad, const at::Tensor& x, const ReadAs& read,
                                   const OptionalTensor& mean, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr const char* kName = "max_pool2d_gradients";
  const auto [window, out_h, out_w] = pool_geometry(kName, x, read, kernel_size, stride, padding, dilation);
  const int64_t n = x.size(0), c = x.size(1);
  const std::vector<int64_t> out_sizes = {n, c, out_h, out_w};
  check_gradient(kName, {grad, {}, {}, Activation::kNone, {}, {}, {}});
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(out_sizes), kName, ": grad must be the output's ",
                    shape_string(out_sizes), ", got ", shape_string(grad.sizes()));
  check_tensor(kName, "grad", grad, x.scalar_type(), 4);
  check_vector(kName, "mean", mean, x.scalar_type(), c);
  ConvGradients result;
  result.input = empty_channels_last(x.sizes(), x);
  const ImageShape xs{n, x.size(2), x.size(3), c}, ys{n, out_h, out_w, c};
  dispatch(x.scalar_type(), [&, &window = window](auto zero) {
    MaxPoolBackward<decltype(zero)> step(current_isa(), xs, ys, window, read, mean);
    at::Tensor sums;
    if (mean.has_value()) sums = at::empty({step.groups(), 2, c}, x.options().requires_grad(false));
    step.set_sums(sums);
    run_step(step, {buffer_of(grad), buffer_of(x), buffer_of(result.input)});
    if (sums.defined()) result.sums = sums.select(0, 0).clone();
  });
  return result;
}

}  // namespace mobilenet_fast
