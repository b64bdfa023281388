// Batch norm and activation in training, where no convolution does it on its way: statistics, the normalised image, and
// gradients. Passes over whole images, bound by memory.
#include "steps/training.h"

namespace mobilenet_fast {
namespace {

// Pixels a block: what is read twice stays in the L1 cache.
constexpr int64_t kBlockValues = 8 * 1024;

PixelBlocks blocks_of(const at::Tensor& x) {
  const int64_t most = std::max<int64_t>(16, kBlockValues / x.size(1));
  return {x.size(0), x.size(2) * x.size(3), most};
}

// A pass over blocks of pixels. Body: see run().
template <class Body>
class Pass final : public Step {
 public:
  Pass(PixelBlocks blocks, int64_t groups, int64_t channels, const char* name, Body body)
      : blocks_(blocks), groups_(groups), channels_(channels), name_(name), body_(std::move(body)) {}

  // body(group, block, whether it is the group's first)
  void run(const Work& work) const override {
    const Range groups = work.team.share(groups_);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Range range = share(blocks_.count(), groups_, g);
      for (int64_t b = range.begin; b < range.end; ++b) body_(g, b, b == range.begin);
    }
  }
  int64_t threads_worth() const override { return elementwise_threads(blocks_.images * blocks_.pixels * channels_); }
  std::string describe() const override { return name_; }

 private:
  PixelBlocks blocks_;
  int64_t groups_, channels_;
  const char* name_;
  Body body_;
};

template <class Body>
void run_pass(const PixelBlocks& blocks, int64_t groups, int64_t channels, const char* name, Body body) {
  run_step(Pass<Body>(blocks, groups, channels, name, std::move(body)), {});
}

// The blocks of an image belong to one group, so that its sums are one's own.
int64_t groups_of_images(const PixelBlocks& blocks) { return blocks.parts > 1 ? blocks.images : blocks.count(); }

}  // namespace

bool is_dense_channels_last(const at::Tensor& image) { return image.is_contiguous(at::MemoryFormat::ChannelsLast); }

namespace {

void check_image(const char* operation, const char* name, const at::Tensor& image, const at::Tensor& like) {
  check_tensor(operation, name, image, like.scalar_type(), 4);
  TORCH_CHECK_VALUE(image.sizes() == like.sizes(), operation, ": ", name, " must be ", shape_string(like.sizes()),
                    ", got ", shape_string(image.sizes()));
  TORCH_CHECK_VALUE(is_dense_channels_last(image), operation, ": ", name,
                    " must be channels_last and dense, got strides ", shape_string(image.strides()));
}

void check_rows(const char* operation, const char* name, const OptionalTensor& rows, const at::Tensor& x,
                int64_t count) {
  if (!rows.has_value()) return;
  check_tensor(operation, name, *rows, x.scalar_type(), 2);
  TORCH_CHECK_VALUE(rows->size(0) == count && rows->size(1) == x.size(1) && rows->is_contiguous(), operation, ": ",
                    name, " must be contiguous ", shape_string({count, x.size(1)}), ", got ",
                    shape_string(rows->sizes()));
}

}  // namespace

void check_read_as(const char* operation, const at::Tensor& x, const ReadAs& read) {
  check_input(operation, x);
  TORCH_CHECK_VALUE(x.size(0) > 0, operation, ": input must have N of at least 1, got ", shape_string(x.sizes()));
  check_image(operation, "input", x, x);
  check_rows(operation, "folded", read.folded, x, 2);
  check_rows(operation, "gate", read.gate, x, x.size(0));
  TORCH_CHECK_VALUE(read.folded.has_value() || (read.activation == Activation::kNone && !read.gate.has_value()),
                    operation, ": activation and gate need folded");
}

void check_gradient(const char* operation, const GradientAt& gradient) {
  const at::Tensor& grad = gradient.grad;
  check_input(operation, grad);
  check_image(operation, "grad", grad, grad);
  if (gradient.y.has_value()) check_image(operation, "y", *gradient.y, grad);
  check_rows(operation, "folded", gradient.folded, grad, 2);
  check_rows(operation, "gate", gradient.gate, grad, grad.size(0));
  check_rows(operation, "pooled", gradient.pooled, grad, grad.size(0));
  check_rows(operation, "coefficients", gradient.coefficients, grad, 4);
  TORCH_CHECK_VALUE(gradient.gate.has_value() == gradient.pooled.has_value(), operation,
                    ": gate and pooled come together");
  const bool reads_y = gradient.activation != Activation::kNone || gradient.coefficients.has_value();
  TORCH_CHECK_VALUE(!reads_y || gradient.y.has_value(), operation, ": y is needed for its norm and activation");
  TORCH_CHECK_VALUE(gradient.activation == Activation::kNone || gradient.folded.has_value(), operation,
                    ": folded is needed for the activation");
}

at::Tensor batch_norm_statistics(const at::Tensor& x) {
  constexpr const char* kName = "batch_norm_statistics";
  check_read_as(kName, x, {});
  const int64_t c = x.size(1);
  const PixelBlocks blocks = blocks_of(x);
  const int64_t groups = std::min(blocks.count(), kGroups);
  at::Tensor statistics = at::empty({2, c}, x.options()), sums = at::zeros({groups, 3, c}, x.options());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& k = kernels<T>(current_isa());
    std::vector<int64_t> counts(groups);
    for (int64_t g = 0; g < groups; ++g) {
      const Range range = share(blocks.count(), groups, g);
      counts[g] = blocks.block(range.end - 1).end - blocks.block(range.begin).begin;
    }
    const T* data = x.const_data_ptr<T>();
    T* all = sums.data_ptr<T>();
    run_pass(blocks, groups, c, "statistics", [&](int64_t g, int64_t b, bool first) {
      const Range rows = blocks.block(b);
      T* of_group = all + g * 3 * c;
      if (first) std::copy_n(data + rows.begin * c, c, of_group);
      k.statistics({data + rows.begin * c, c, rows.size(), c, of_group, of_group + c});
    });
    merge_statistics(all, counts, c, {0, c}, statistics.data_ptr<T>());
  });
  return statistics;
}

namespace {

void check_statistics(const char* operation, const char* name, const at::Tensor& rows) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kDouble, operation, ": ", name,
                   " must be float32 or float64, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == 2 && rows.is_contiguous(), operation, ": ", name,
                    " must be contiguous (2, C), got ", shape_string(rows.sizes()));
}

// An operand of each channel as the kernels read it: side by side.
OptionalTensor each_channel(const char* operation, const char* name, const OptionalTensor& operand,
                            const at::Tensor& like) {
  check_vector(operation, name, operand, like.scalar_type(), like.size(-1));
  return operand.has_value() ? OptionalTensor(operand->contiguous()) : std::nullopt;
}

// Moves a running statistic towards `batch` · `factor`.
template <class T>
void track(const OptionalTensor& running, const T* batch, double factor, double momentum) {
  if (!running.has_value()) return;
  T* value = static_cast<T*>(running->data_ptr());
  for (int64_t c = 0; c < running->size(0); ++c, value += running->stride(0)) {
    *value = static_cast<T>(momentum * (factor * batch[c]) + (1 - momentum) * *value);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> batch_norm_fold(const at::Tensor& statistics, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, double momentum, int64_t count,
                                                   double eps) {
  constexpr const char* kName = "batch_norm_fold";
  check_statistics(kName, "statistics", statistics);
  const int64_t c = statistics.size(1);
  const OptionalTensor gamma = each_channel(kName, "weight", weight, statistics);
  const OptionalTensor beta = each_channel(kName, "bias", bias, statistics);
  check_vector(kName, "running_mean", running_mean, statistics.scalar_type(), c);
  check_vector(kName, "running_var", running_var, statistics.scalar_type(), c);
  at::Tensor inverse = at::empty({c}, statistics.options()), folded = at::empty({2, c}, statistics.options());
  dispatch(statistics.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *mean = statistics.const_data_ptr<T>(), *var = mean + c;
    const T *g = data_or_null<T>(gamma), *b = data_or_null<T>(beta);
    T *of_deviation = inverse.data_ptr<T>(), *scale = folded.data_ptr<T>(), *shift = scale + c;
    const T epsilon = static_cast<T>(eps);
    for (int64_t i = 0; i < c; ++i) of_deviation[i] = 1 / std::sqrt(var[i] + epsilon);
    for (int64_t i = 0; i < c; ++i) scale[i] = g == nullptr ? of_deviation[i] : of_deviation[i] * g[i];
    for (int64_t i = 0; i < c; ++i) shift[i] = (b == nullptr ? T(0) : b[i]) - mean[i] * scale[i];
    track(running_mean, mean, 1.0, momentum);
    track(running_var, var, static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1)),
          momentum);
  });
  return {inverse, folded};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_coefficients(const at::Tensor& mean, const at::Tensor& inverse_deviation,
                                                           const OptionalTensor& weight, const at::Tensor& sums,
                                                           int64_t count, bool by_batch) {
  constexpr const char* kName = "batch_norm_coefficients";
  check_statistics(kName, "sums", sums);
  const int64_t c = sums.size(1);
  const OptionalTensor centre = each_channel(kName, "mean", mean, sums);
  const OptionalTensor inverse = each_channel(kName, "inverse_deviation", inverse_deviation, sums);
  const OptionalTensor gamma = each_channel(kName, "weight", weight, sums);
  at::Tensor rows = at::empty({4, c}, sums.options()), of_weight = at::empty({c}, sums.options());
  dispatch(sums.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *sum = sums.const_data_ptr<T>(), *product = sum + c, *d = data_or_null<T>(inverse);
    const T* g = data_or_null<T>(gamma);
    T *found = of_weight.data_ptr<T>(), *row = rows.data_ptr<T>();
    T *factor = row + c, *slope = factor + c, *offset = slope + c;
    const T share = by_batch ? static_cast<T>(-1.0 / static_cast<double>(count)) : T(0);
    std::copy_n(data_or_null<T>(centre), c, row);
    for (int64_t i = 0; i < c; ++i) {
      found[i] = product[i] * d[i];
      factor[i] = g == nullptr ? d[i] : d[i] * g[i];
      const T a_value = factor[i] * share;
      slope[i] = by_batch ? a_value * found[i] * d[i] : T(0);
      offset[i] = by_batch ? a_value * sum[i] : T(0);
    }
  });
  return {rows, of_weight};
}

at::Tensor batch_norm_apply(const at::Tensor& x, const ReadAs& read, const OptionalTensor& residual) {
  constexpr const char* kName = "batch_norm_apply";
  check_read_as(kName, x, read);
  if (residual.has_value()) check_image(kName, "residual", *residual, x);
  const int64_t c = x.size(1);
  at::Tensor y = empty_channels_last(x.sizes(), x);
  const PixelBlocks blocks = blocks_of(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& k = kernels<T>(current_isa());
    const T *data = x.const_data_ptr<T>(), *added = residual.has_value() ? residual->const_data_ptr<T>() : nullptr;
    T* out = y.data_ptr<T>();
    run_pass(blocks, blocks.count(), c, "batch norm", [&](int64_t, int64_t b, bool) {
      blocks.for_each_image(b, [&](int64_t image, Range part, int64_t) {
        const int64_t from = part.begin * c;
        read_pixels(k, read, data + from, c, image, part.size(), 0, c, out + from);
        if (added != nullptr) k.add_act(out + from, added + from, out + from, part.size() * c, Activation::kNone);
      });
    });
  });
  return y;
}

at::Tensor batch_norm_pixel_sums(const at::Tensor& x, const ReadAs& read, const OptionalTensor& grad) {
  constexpr const char* kName = "batch_norm_pixel_sums";
  check_read_as(kName, x, read);
  TORCH_CHECK_VALUE(read.folded.has_value(), kName, ": folded is needed");
  if (grad.has_value()) check_image(kName, "grad", *grad, x);
  const int64_t n = x.size(0), c = x.size(1);
  at::Tensor sums = at::zeros({n, c}, x.options().requires_grad(false));
  const PixelBlocks blocks = blocks_of(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& k = kernels<T>(current_isa());
    const T *data = x.const_data_ptr<T>(), *of_z = grad.has_value() ? grad->const_data_ptr<T>() : nullptr;
    T* out = sums.data_ptr<T>();
    run_pass(blocks, groups_of_images(blocks), c, "sums of pixels", [&](int64_t, int64_t b, bool) {
      blocks.for_each_image(b, [&](int64_t image, Range part, int64_t) {
        const int64_t from = part.begin * c;
        k.gate_gradient({of_z == nullptr ? nullptr : of_z + from, c, data + from, c, part.size(), c,
                         row_or_null<T>(read.folded, 0), row_or_null<T>(read.folded, 1), out + image * c,
                         read.activation});
      });
    });
  });
  return sums;
}

at::Tensor batch_norm_gradient_sums(const GradientAt& gradient, const at::Tensor& mean, const OptionalTensor& out) {
  constexpr const char* kName = "batch_norm_gradient_sums";
  check_gradient(kName, gradient);
  TORCH_CHECK_VALUE(gradient.y.has_value(), kName, ": y is needed");
  const at::Tensor& grad = gradient.grad;
  const int64_t c = grad.size(1);
  check_vector(kName, "mean", mean, grad.scalar_type(), c);
  const PixelBlocks blocks = blocks_of(grad);
  const int64_t groups = std::min(blocks.count(), kGroups);
  at::Tensor sums = at::zeros({std::max<int64_t>(groups, 1), 2, c}, grad.options().requires_grad(false));
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& k = kernels<T>(current_isa());
    const T *of_z = grad.const_data_ptr<T>(), *y = gradient.y->const_data_ptr<T>();
    T* all = sums.data_ptr<T>();
    run_pass(blocks, groups, c, "sums for batch norm", [&](int64_t g, int64_t b, bool) {
      blocks.for_each_image(b, [&](int64_t image, Range part, int64_t) {
        const int64_t from = part.begin * c;
        NormGradientArgs<T> args = gradient_args<T>(gradient, of_z + from, y + from, c, image, part.size(), 0, c);
        args.mean = mean.const_data_ptr<T>();
        args.sums = all + g * 2 * c;
        args.out = out.has_value() ? out->data_ptr<T>() + from : nullptr;
        args.out_stride = c;
        k.norm_gradient(args);
      });
    });
    merge_sums(all, groups, 2 * c, {0, 2 * c}, all);
  });
  return sums.select(0, 0).clone();  // the rest goes
}

at::Tensor batch_norm_gradient(const GradientAt& gradient) {
  constexpr const char* kName = "batch_norm_gradient";
  check_gradient(kName, gradient);
  const at::Tensor& grad = gradient.grad;
  const int64_t c = grad.size(1);
  at::Tensor result = empty_channels_last(grad.sizes(), grad);
  const PixelBlocks blocks = blocks_of(grad);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& k = kernels<T>(current_isa());
    const T *of_z = grad.const_data_ptr<T>(), *y = gradient.y.has_value() ? gradient.y->const_data_ptr<T>() : nullptr;
    T* out = result.data_ptr<T>();
    run_pass(blocks, blocks.count(), c, "gradient of batch norm", [&](int64_t, int64_t b, bool) {
      blocks.for_each_image(b, [&](int64_t image, Range part, int64_t) {
        const int64_t from = part.begin * c;
        NormGradientArgs<T> args =
            gradient_args<T>(gradient, of_z + from, y == nullptr ? nullptr : y + from, c, image, part.size(), 0, c);
        args.out = out + from;
        args.out_stride = c;
        k.norm_gradient(args);
      });
    });
  });
  return result;
}

}  // namespace mobilenet_fast
