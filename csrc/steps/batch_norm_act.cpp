#include "steps/common.h"

namespace mobilenet_fast {
namespace {

template <class T>
class ScaleShiftAct final : public Step {
 public:
  ScaleShiftAct(Isa isa, ImageShape shape, const OptionalTensor& folded, int gate, Activation activation, int x, int y)
      : kernels_(kernels<T>(isa)), shape_(shape), folded_(folded), gate_(gate), x_(x), y_(y), activation_(activation) {}

  void run(const Work& work) const override {
    const T* scale = folded_.has_value() ? folded_->const_data_ptr<T>() : nullptr;
    const T* shift = folded_.has_value() ? scale + shape_.c : nullptr;
    Range range = work.team.share(shape_.n * shape_.pixels());
    while (range.begin < range.end) {
      int64_t end = range.end;
      if (gate_ >= 0) {  // one image at a time
        const int64_t image = range.begin / shape_.pixels();
        end = std::min(end, (image + 1) * shape_.pixels());
        scale = work.buffer<T>(gate_) + image * shape_.c;
      }
      const int64_t x_stride = pixel_stride(work.buffers[x_], shape_.c);
      const int64_t y_stride = pixel_stride(work.buffers[y_], shape_.c);
      kernels_.scale_shift_act({work.buffer<T>(x_) + range.begin * x_stride, x_stride,
                                work.buffer<T>(y_) + range.begin * y_stride, y_stride, end - range.begin, shape_.c,
                                scale, shift, activation_});
      range.begin = end;
    }
  }

  int64_t threads_worth() const override { return elementwise_threads(shape_.n * shape_.pixels() * shape_.c); }
  std::string describe() const override { return gate_ < 0 ? "elementwise" : "elementwise, gated"; }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  OptionalTensor folded_;
  int gate_, x_, y_;
  Activation activation_;
};

// A contiguous (N, C, H, W) tensor: one plane a channel.
template <class T>
class ScaleShiftActPlanes final : public Step {
 public:
  ScaleShiftActPlanes(Isa isa, ImageShape shape, const at::Tensor& folded, Activation activation)
      : kernels_(kernels<T>(isa)), shape_(shape), folded_(folded), activation_(activation) {}

  void run(const Work& work) const override {
    const T *x = work.buffer<T>(0), *scale = folded_.const_data_ptr<T>(), *shift = scale + shape_.c;
    T* y = work.buffer<T>(1);
    const int64_t pixels = shape_.pixels();
    Range range = work.team.share(shape_.n * shape_.c * pixels);
    while (range.begin < range.end) {
      const int64_t plane = range.begin / pixels, channel = plane % shape_.c;
      const int64_t end = std::min(range.end, (plane + 1) * pixels);
      kernels_.scale_shift_act_plane(x + range.begin, y + range.begin, end - range.begin, scale[channel],
                                     shift[channel], activation_);
      range.begin = end;
    }
  }

  int64_t threads_worth() const override { return elementwise_threads(shape_.n * shape_.pixels() * shape_.c); }
  std::string describe() const override { return "elementwise, by planes"; }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  at::Tensor folded_;
  Activation activation_;
};

template <class T>
class AddAct final : public Step {
 public:
  AddAct(Isa isa, int64_t elements, Activation activation, int a, int b, int y)
      : kernels_(kernels<T>(isa)), elements_(elements), activation_(activation), a_(a), b_(b), y_(y) {}

  void run(const Work& work) const override {
    const Range range = work.team.share(elements_);
    kernels_.add_act(work.buffer<T>(a_) + range.begin, work.buffer<T>(b_) + range.begin,
                     work.buffer<T>(y_) + range.begin, range.size(), activation_);
  }

  std::string describe() const override { return "elementwise"; }

 private:
  const Kernels<T>& kernels_;
  int64_t elements_;
  Activation activation_;
  int a_, b_, y_;
};

}  // namespace

std::unique_ptr<Step> make_scale_shift_act(Isa isa, at::ScalarType dtype, ImageShape shape,
                                           const OptionalTensor& folded, int gate, Activation activation, int x,
                                           int y) {
  return dispatch(dtype, [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<ScaleShiftAct<decltype(zero)>>(isa, shape, folded, gate, activation, x, y);
  });
}

std::unique_ptr<Step> make_add_act(Isa isa, at::ScalarType dtype, int64_t elements, Activation activation, int a, int b,
                                   int y) {
  return dispatch(dtype, [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<AddAct<decltype(zero)>>(isa, elements, activation, a, b, y);
  });
}

at::Tensor batch_norm_act(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                          const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                          const std::string& activation, const std::optional<std::string>& isa) {
  constexpr const char* kName = "batch_norm_act";
  const Activation act = parse_activation(kName, activation);
  const Isa chosen = choose_isa(kName, isa);
  check_input(kName, input);
  const auto dtype = input.scalar_type();
  const int64_t c = input.size(1);
  check_vector(kName, "running_mean", running_mean, dtype, c);
  check_vector(kName, "running_var", running_var, dtype, c);
  check_vector(kName, "weight", weight, dtype, c);
  check_vector(kName, "bias", bias, dtype, c);
  // Every layout fits an empty tensor, so that torch keeps its strides.
  if (input.numel() == 0) return at::empty_like(input, input.options().requires_grad(false));

  const at::Tensor folded = fold_batch_norm(running_mean, running_var, weight, bias, eps, chosen);
  const at::MemoryFormat format = input.is_contiguous() ? at::MemoryFormat::Contiguous : input.suggest_memory_format();
  const at::Tensor x = input.contiguous(format);
  at::Tensor y = empty_image(input.sizes(), input.options(), format);
  const ImageShape shape{input.size(0), input.size(2), input.size(3), c};
  const std::vector<Buffer> buffers = {buffer_of(x), buffer_of(y)};
  if (format == at::MemoryFormat::ChannelsLast) {
    run_step(*make_scale_shift_act(chosen, dtype, shape, folded, -1, act, 0, 1), buffers);
  } else {
    dispatch(dtype,
             [&](auto zero) { run_step(ScaleShiftActPlanes<decltype(zero)>(chosen, shape, folded, act), buffers); });
  }
  return y;
}

}  // namespace mobilenet_fast
