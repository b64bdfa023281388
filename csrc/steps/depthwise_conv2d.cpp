#include <limits>

#include "steps/common.h"

namespace mobilenet_fast {

namespace {

template <class T>
class DepthwiseConv2d final : public Step {
 public:
  DepthwiseConv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed, Window window,
                  Activation activation, int x, int y, int sums)
      : kernels_(kernels<T>(isa)),
        x_shape_(x_shape),
        y_shape_(y_shape),
        packed_(packed),
        window_(window),
        activation_(activation),
        x_(x),
        y_(y),
        sums_(sums) {}

  void run(const Work& work) const override {
    const int64_t channels = y_shape_.c, lanes = kernels_.lanes;
    const int64_t vectors = (channels + lanes - 1) / lanes;
    Range unit_range, vector_range;
    work.team.share(y_shape_.n * y_shape_.h, vectors, &unit_range, &vector_range);
    if (unit_range.size() == 0 || vector_range.size() == 0) return;

    const int64_t channel = vector_range.begin * lanes;
    DepthwiseArgs<T> args{};
    const int64_t x_pixel = pixel_stride(work.buffers[x_], x_shape_.c);
    const int64_t y_pixel = pixel_stride(work.buffers[y_], channels);
    args.x_pixel_stride = x_pixel;
    args.x_row_stride = x_shape_.w * x_pixel;
    args.height = x_shape_.h;
    args.width = x_shape_.w;
    args.weight = packed_.const_data_ptr<T>() + channel * (1 + window_.kernel_h * window_.kernel_w);
    args.y_pixel_stride = y_pixel;
    args.y_row_stride = y_shape_.w * y_pixel;
    args.out_width = y_shape_.w;
    args.channels = std::min(vector_range.end * lanes, channels) - channel;
    args.fetches = exceeds_l2<T>(x_shape_);
    args.kernel_h = window_.kernel_h;
    args.kernel_w = window_.kernel_w;
    args.stride_h = window_.stride_h;
    args.stride_w = window_.stride_w;
    args.pad_top = window_.pad_top;
    args.pad_left = window_.pad_left;
    args.dilation_h = window_.dilation_h;
    args.dilation_w = window_.dilation_w;
    args.activation = activation_;
    const T* x = work.buffer<T>(x_) + channel;
    T* y = work.buffer<T>(y_) + channel;
    T* sums = work.buffer<T>(sums_);
    args.sums_stride = channels;
    for (int64_t unit = unit_range.begin; unit < unit_range.end;) {
      const int64_t image = unit / y_shape_.h, first = unit % y_shape_.h;
      const int64_t rows = std::min(unit_range.end - unit, y_shape_.h - first);
      args.x = x + image * x_shape_.pixels() * x_pixel;
      args.y = y + image * y_shape_.pixels() * y_pixel;
      args.row_begin = first;
      args.row_end = first + rows;
      if (sums != nullptr) {
        args.sums = sums + unit * channels + channel;
        for (int64_t row = 0; row < rows; ++row) std::fill_n(args.sums + row * channels, args.channels, T(0));
      }
      kernels_.depthwise_conv2d(args);
      unit += rows;
    }
  }

  std::string describe() const override {
    return "depthwise " + std::to_string(window_.kernel_h) + "×" + std::to_string(window_.kernel_w) + " stride " +
           std::to_string(window_.stride_h) + (sums_ < 0 ? "" : ", sums for squeeze-excite");
  }

 private:
  const Kernels<T>& kernels_;
  ImageShape x_shape_, y_shape_;
  at::Tensor packed_;
  Window window_;
  Activation activation_;
  int x_, y_, sums_;
};

}  // namespace

std::unique_ptr<Step> make_depthwise_conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                            Window window, Activation activation, int x, int y, int sums) {
  return dispatch(packed.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<DepthwiseConv2d<decltype(zero)>>(isa, x_shape, y_shape, packed, window, activation, x, y,
                                                             sums);
  });
}

DepthwiseGeometry window_geometry(const char* operation, const at::Tensor& input, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t h = input.size(2), w = input.size(3);
  // Sizes computed from such numbers stay far from where 64 bits end.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const auto pair = [&](const char* name, at::IntArrayRef values, int64_t least) {
    TORCH_CHECK_VALUE(values.size() == 1 || values.size() == 2, operation, ": ", name,
                      " must be one number or two, got ", values.size());
    const std::pair<int64_t, int64_t> both{values[0], values.back()};
    TORCH_CHECK_VALUE(std::min(both.first, both.second) >= least && std::max(both.first, both.second) <= kLargest,
                      operation, ": ", name, " must be at least ", least, " and at most ", kLargest, ", got ",
                      shape_string(values));
    return both;
  };
  const auto [kernel_h, kernel_w] = pair("kernel_size", kernel_size, 1);
  const auto [stride_h, stride_w] = pair("stride", stride, 1);
  const auto [dilation_h, dilation_w] = pair("dilation", dilation, 1);
  // Four values pad each side by its own: top, bottom, left, right.
  const bool each_side = padding.size() == 4;
  const auto [pad_top, pad_left] = pair("padding", each_side ? at::IntArrayRef{padding[0], padding[2]} : padding, 0);
  const auto [pad_bottom, pad_right] =
      pair("padding", each_side ? at::IntArrayRef{padding[1], padding[3]} : padding, 0);
  const int64_t reach_h = dilation_h * (kernel_h - 1) + 1, reach_w = dilation_w * (kernel_w - 1) + 1;
  const int64_t padded_h = pad_top + h + pad_bottom, padded_w = pad_left + w + pad_right;
  TORCH_CHECK_VALUE(reach_h <= padded_h && reach_w <= padded_w, operation,
                    ": the dilated kernel must fit into the padded input ", shape_string({padded_h, padded_w}),
                    ", got ", shape_string({reach_h, reach_w}));
  const Window window{kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w};
  return {window, (padded_h - reach_h) / stride_h + 1, (padded_w - reach_w) / stride_w + 1};
}

DepthwiseGeometry depthwise_geometry(const char* operation, const at::Tensor& input, const at::Tensor& weight,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t c = input.size(1);
  check_tensor(operation, "weight", weight, input.scalar_type(), 4);
  const int64_t k = weight.size(0);
  TORCH_CHECK_VALUE(weight.size(1) == 1 && k > 0 && k % c == 0, operation, ": weight must be (C, 1, kH, kW) with C=", c,
                    " (or a multiple), got ", shape_string(weight.sizes()));
  TORCH_CHECK_VALUE(weight.size(2) > 0 && weight.size(3) > 0, operation,
                    ": weight must have kH and kW of at least 1, got ", shape_string(weight.sizes()));
  return window_geometry(operation, input, weight.sizes().slice(2), stride, padding, dilation);
}

at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            const std::string& activation, const OptionalTensor& scale,
                            const std::optional<std::string>& isa) {
  constexpr const char* kName = "depthwise_conv2d";
  const Activation act = parse_activation(kName, activation);
  const Isa chosen = choose_isa(kName, isa);
  check_input(kName, input);
  const auto [window, out_h, out_w] = depthwise_geometry(kName, input, weight, stride, padding, dilation);
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3), k = weight.size(0);
  check_vector(kName, "bias", bias, input.scalar_type(), k);
  check_vector(kName, "scale", scale, input.scalar_type(), k);

  Output y({n, k, out_h, out_w}, input.options(), conv_memory_format(input, weight));
  // A channel multiplier repeats each input channel, so that input and output channels correspond.
  const at::Tensor x = as_channels_last(k == c ? input : input.repeat_interleave(k / c, 1));
  const at::Tensor packed = pack_depthwise_conv2d(weight, bias, scale, chosen, call_weights());
  run_step(*make_depthwise_conv2d(chosen, {n, h, w, k}, {n, out_h, out_w, k}, packed, window, act, 0, 1, -1),
           {buffer_of(x), buffer_of(y.dense())});
  return y.finish();
}

}  // namespace mobilenet_fast
