#include "steps/common.h"

namespace mobilenet_fast {
namespace {

// Writes the means over H and W of this thread's share of the (image, channel) pairs: from sums already gathered, (N,
// parts, C), where given, else from the N × H × W × C tensor x.
template <class T>
void channel_means(const Kernels<T>& kernels, const Team& team, ImageShape shape, const T* x, const T* sums,
                   int64_t parts, T* means) {
  const int64_t vectors = (shape.c + kernels.lanes - 1) / kernels.lanes;
  Range images, range;
  team.share(shape.n, vectors, &images, &range);
  const int64_t channel = range.begin * kernels.lanes;
  const int64_t channels = std::min(range.end * kernels.lanes, shape.c) - channel;
  if (channels <= 0) return;
  const T scale = T(1) / static_cast<T>(shape.pixels());
  for (int64_t image = images.begin; image < images.end; ++image) {
    T* mean = means + image * shape.c + channel;
    if (sums != nullptr) {
      kernels.sum_rows(sums + image * parts * shape.c + channel, shape.c, parts, channels, mean);
    } else {
      kernels.sum_rows(x + image * shape.pixels() * shape.c + channel, shape.c, shape.pixels(), channels, mean);
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] *= scale;
  }
}

// One row an image through a fully connected layer: this thread's share of the outputs.
template <class T>
void run_layer(const Kernels<T>& kernels, const Team& team, const T* x, int64_t images, const Layer& layer, T* y) {
  const int64_t out_channels = layer.out_channels, channels = layer.channels;
  if (layer.packed) {
    GemmArgs<T> args = product(kernels, x, images, channels, layer.weight, out_channels, layer.activation, y);
    const Range panels = team.share(args.panel_end);
    args.panel_begin = panels.begin;
    args.panel_end = panels.end;
    if (images > 0) kernels.gemm(args);
    return;
  }
  const Range range = team.share(out_channels);
  kernels.fully_connected(x, images, channels, layer.weight.const_data_ptr<T>(), nullptr,
                          layer.bias.has_value() ? layer.bias->const_data_ptr<T>() : nullptr, range.begin, range.end,
                          out_channels, layer.activation, y);
}

template <class T>
class SqueezeExcite final : public Step {
 public:
  SqueezeExcite(Isa isa, ImageShape x_shape, Layer squeeze, Layer excite, int x, int sums, int64_t parts, int gate)
      : kernels_(kernels<T>(isa)),
        shape_(x_shape),
        squeeze_(std::move(squeeze)),
        excite_(std::move(excite)),
        parts_(parts),
        x_(x),
        sums_(sums),
        gate_(gate) {}

  void run(const Work& work) const override {
    T* means = reinterpret_cast<T*>(work.shared_scratch);
    T* squeezed = means + shape_.n * shape_.c;
    channel_means(kernels_, work.team, shape_, work.buffer<T>(x_), work.buffer<T>(sums_), parts_, means);
    work.team.sync();
    run_layer(kernels_, work.team, means, shape_.n, squeeze_, squeezed);
    work.team.sync();
    run_layer(kernels_, work.team, squeezed, shape_.n, excite_, work.buffer<T>(gate_));
  }

  size_t shared_scratch_bytes() const override {
    return static_cast<size_t>(shape_.n * (shape_.c + squeeze_.out_channels)) * sizeof(T);
  }

  std::string describe() const override {
    return "gate from " + std::string(sums_ < 0 ? "its own pass" : "the sums of the step before");
  }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  Layer squeeze_, excite_;
  int64_t parts_;
  int x_, sums_, gate_;
};

template <class T>
class GlobalAvgPool final : public Step {
 public:
  GlobalAvgPool(Isa isa, ImageShape x_shape, int x, int sums, int64_t parts, int y)
      : kernels_(kernels<T>(isa)), shape_(x_shape), parts_(parts), x_(x), sums_(sums), y_(y) {}

  void run(const Work& work) const override {
    channel_means(kernels_, work.team, shape_, work.buffer<T>(x_), work.buffer<T>(sums_), parts_, work.buffer<T>(y_));
  }

  std::string describe() const override {
    return "mean from " + std::string(sums_ < 0 ? "its own pass" : "the sums of the step before");
  }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  int64_t parts_;
  int x_, sums_, y_;
};

// The whole operator on a contiguous (N, C, H, W) tensor: means, gate and product by planes.
template <class T>
class SqueezeExcitePlanes final : public Step {
 public:
  SqueezeExcitePlanes(Isa isa, ImageShape shape, std::unique_ptr<Step> gate)
      : kernels_(kernels<T>(isa)), shape_(shape), gate_(std::move(gate)) {}

  void run(const Work& work) const override {
    const int64_t planes = shape_.n * shape_.c, pixels = shape_.pixels();
    const T* x = work.buffer<T>(0);
    T *y = work.buffer<T>(1), *gate = work.buffer<T>(2), *sums = work.buffer<T>(3);
    const Range range = work.team.share(planes);
    for (int64_t p = range.begin; p < range.end; ++p) sums[p] = kernels_.sum_plane(x + p * pixels, pixels);
    work.team.sync();
    gate_->run(work);
    work.team.sync();
    for (int64_t p = range.begin; p < range.end; ++p) {
      kernels_.scale_shift_act_plane(x + p * pixels, y + p * pixels, pixels, gate[p], T(-0.0), Activation::kNone);
    }
  }

  size_t shared_scratch_bytes() const override { return gate_->shared_scratch_bytes(); }
  std::string describe() const override { return "by planes"; }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  std::unique_ptr<Step> gate_;
};

// A step for one image, run for each of several: the second reading of an image's maps finds them in cache.
class EachImage final : public Step {
 public:
  EachImage(std::unique_ptr<Step> step, int64_t images, std::vector<int64_t> image_bytes)
      : step_(std::move(step)), images_(images), image_bytes_(std::move(image_bytes)), barriers_(teams()) {}

  void run(const Work& work) const override {
    std::vector<Buffer> own(image_bytes_.size());
    const size_t scratch_bytes = team_scratch_bytes();
    for_each_part(work.team, images_, barriers_.data(), [&](const Team& team, int64_t index, int64_t image) {
      for (size_t i = 0; i < own.size(); ++i) {
        own[i].data = static_cast<char*>(work.buffers[i].data) + image * image_bytes_[i];
      }
      step_->run({team, own.data(), work.shared_scratch + index * scratch_bytes, work.thread_scratch});
    });
  }

  size_t shared_scratch_bytes() const override { return teams() * team_scratch_bytes(); }
  size_t thread_scratch_bytes() const override { return step_->thread_scratch_bytes(); }
  std::string describe() const override { return "image by image, " + step_->describe(); }

 private:
  size_t team_scratch_bytes() const { return round_up(static_cast<int64_t>(step_->shared_scratch_bytes()), 64); }
  int64_t teams() const { return std::min<int64_t>(images_, team_size()); }

  std::unique_ptr<Step> step_;
  int64_t images_;
  std::vector<int64_t> image_bytes_;  // of each buffer, all dense
  mutable std::vector<Barrier> barriers_;
};

// Two steps one after another, in one region of threads.
class Pair final : public Step {
 public:
  Pair(std::unique_ptr<Step> first, std::unique_ptr<Step> second)
      : first_(std::move(first)), second_(std::move(second)) {}

  void run(const Work& work) const override {
    first_->run(work);
    work.team.sync();
    second_->run(work);
  }

  size_t shared_scratch_bytes() const override { return first_->shared_scratch_bytes(); }
  std::string describe() const override { return first_->describe() + ", " + second_->describe(); }

 private:
  std::unique_ptr<Step> first_, second_;
};

}  // namespace

std::unique_ptr<Step> make_squeeze_excite(Isa isa, ImageShape x_shape, Layer squeeze, Layer excite, int x, int sums,
                                          int64_t parts, int gate) {
  return dispatch(squeeze.weight.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<SqueezeExcite<decltype(zero)>>(isa, x_shape, std::move(squeeze), std::move(excite), x, sums,
                                                           parts, gate);
  });
}

std::unique_ptr<Step> make_global_avg_pool(Isa isa, at::ScalarType dtype, ImageShape x_shape, int x, int sums,
                                           int64_t parts, int y) {
  return dispatch(dtype, [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<GlobalAvgPool<decltype(zero)>>(isa, x_shape, x, sums, parts, y);
  });
}

at::Tensor squeeze_excite(const at::Tensor& input, const at::Tensor& weight1, const OptionalTensor& bias1,
                          const at::Tensor& weight2, const OptionalTensor& bias2, const std::string& squeeze_activation,
                          const std::string& gate_activation, const std::optional<std::string>& isa) {
  constexpr const char* kName = "squeeze_excite";
  const Activation squeeze_act = parse_activation(kName, squeeze_activation, "squeeze_activation");
  const Activation gate_act = parse_activation(kName, gate_activation, "gate_activation");
  const Isa chosen = choose_isa(kName, isa);
  check_input(kName, input);
  const auto dtype = input.scalar_type();
  const int64_t c = input.size(1);
  check_tensor(kName, "weight1", weight1, dtype, 4);
  const int64_t s = weight1.size(0);
  TORCH_CHECK_VALUE(s > 0 && weight1.sizes() == at::IntArrayRef({s, c, 1, 1}), kName,
                    ": weight1 must be (S, C, 1, 1) with C=", c, ", got ", shape_string(weight1.sizes()));
  check_tensor(kName, "weight2", weight2, dtype, 4);
  TORCH_CHECK_VALUE(weight2.sizes() == at::IntArrayRef({c, s, 1, 1}), kName,
                    ": weight2 must be (C, S, 1, 1) = ", shape_string({c, s, 1, 1}), ", got ",
                    shape_string(weight2.sizes()));
  check_vector(kName, "bias1", bias1, dtype, s);
  check_vector(kName, "bias2", bias2, dtype, c);

  // The layout that input * gate has; planes where it is contiguous, else N × H × W × C.
  const bool planes = input.is_contiguous();
  const at::TensorOptions options = input.options().requires_grad(false);
  const at::Tensor result =
      planes ? empty_image(input.sizes(), options, at::MemoryFormat::Contiguous) : at::empty_like(input, options);
  const at::Tensor x = planes ? input.resolve_neg() : as_channels_last(input);
  std::optional<Output> y;
  if (!planes) y.emplace(result);
  const ImageShape batch{input.size(0), input.size(2), input.size(3), c};
  const at::Tensor gate = at::empty({batch.n, c}, options);
  const at::Tensor sums = planes ? at::empty({batch.n, c}, options) : gate;
  const auto layer = [](const at::Tensor& weight, const OptionalTensor& bias, Activation activation) {
    const OptionalTensor dense_bias = bias.has_value() ? OptionalTensor(bias->contiguous()) : std::nullopt;
    return Layer{weight.contiguous(), dense_bias, activation, weight.size(1), weight.size(0), false};
  };
  // Weights larger than an image are read for all images at once instead.
  const bool by_image = batch.n > 1 && batch.pixels() >= 2 * s;
  const ImageShape shape{by_image ? 1 : batch.n, batch.h, batch.w, c};
  auto step = make_squeeze_excite(chosen, shape, layer(weight1, bias1, squeeze_act), layer(weight2, bias2, gate_act),
                                  planes ? -1 : 0, planes ? 3 : -1, 1, 2);
  if (planes) {
    step = dispatch(dtype, [&](auto zero) -> std::unique_ptr<Step> {
      return std::make_unique<SqueezeExcitePlanes<decltype(zero)>>(chosen, shape, std::move(step));
    });
  } else {
    step = std::make_unique<Pair>(std::move(step),
                                  make_scale_shift_act(chosen, dtype, shape, std::nullopt, 2, Activation::kNone, 0, 1));
  }
  if (by_image) {
    const int64_t map_bytes = batch.pixels() * c * static_cast<int64_t>(input.element_size());
    const int64_t row_bytes = c * static_cast<int64_t>(input.element_size());
    step = std::make_unique<EachImage>(std::move(step), batch.n,
                                       std::vector<int64_t>{map_bytes, map_bytes, row_bytes, row_bytes});
  }
  run_step(*step, {buffer_of(x), buffer_of(planes ? result : y->dense()), buffer_of(gate), buffer_of(sums)});
  return planes ? result : y->finish();
}

}  // namespace mobilenet_fast
