#include <ATen/core/grad_mode.h>

#include "steps/common.h"

namespace mobilenet_fast {
namespace {

template <class T>
class PointwiseConv2d final : public Step {
 public:
  PointwiseConv2d(Isa isa, ImageShape x_shape, int64_t out_channels, const at::Tensor& packed, Activation activation,
                  int x, int y, int gate, int residual)
      : kernels_(kernels<T>(isa)),
        shape_(x_shape),
        columns_(out_channels),
        packed_(packed),
        activation_(activation),
        x_(x),
        y_(y),
        gate_(gate),
        residual_(residual) {
    panels_ = panel_count((columns_ + kernels_.lanes - 1) / kernels_.lanes, kernels_.panel_vectors);
    // A panel, the inputs of the rows that pass all panels together, and what they give for one panel take three
    // quarters of the L2 cache: the more rows, the less often all the weights come from beyond it.
    const int64_t values = l2_cache_bytes() * 3 / 4 / static_cast<int64_t>(sizeof(T));
    const int64_t width = kernels_.panel_vectors * kernels_.lanes;
    rows_per_block_ = std::max<int64_t>(kernels_.panel_rows, (values - width * shape_.c) / (shape_.c + width));
  }

  // Where activations are larger than the weights, or are multiplied by a gate first, each thread takes some of the
  // rows, and finds most of them in its cache. Else the product's tiles are dealt panel by panel, so that each thread
  // reads a part of the weights: it may share its first and its last panel with others, and computes some of the rows
  // of those.
  void run(const Work& work) const override {
    const int64_t rows = shape_.n * shape_.pixels();
    if (rows == 0) return;
    if (gate_ >= 0 || rows * (shape_.c + columns_) >= shape_.c * columns_) {
      multiply(work, work.team.share(rows), {0, panels_});
      return;
    }
    const int64_t tiles = (rows + kernels_.panel_rows - 1) / kernels_.panel_rows;
    const Range range = work.team.share(tiles * panels_);
    for (int64_t tile = range.begin; tile < range.end;) {
      const int64_t panel = tile / tiles, first = tile % tiles;
      const int64_t whole = first == 0 ? (range.end - tile) / tiles : 0;
      const int64_t last = whole > 0 ? tiles : std::min(tiles, first + range.end - tile);
      multiply(work, {rows * first / tiles, rows * last / tiles}, {panel, panel + std::max<int64_t>(whole, 1)});
      tile += whole > 0 ? whole * tiles : last - first;
    }
  }

  size_t thread_scratch_bytes() const override {
    const int64_t rows = std::min(rows_per_block_, shape_.n * shape_.pixels());
    return gate_ < 0 ? 0 : static_cast<size_t>(rows * shape_.c) * sizeof(T);
  }

  std::string describe() const override {
    return "gemm " + std::to_string(shape_.n * shape_.pixels()) + "×" + std::to_string(shape_.c) + "×" +
           std::to_string(columns_) + ", " + std::to_string(panels_) + (panels_ == 1 ? " panel" : " panels");
  }

 private:
  void multiply(const Work& work, Range row_range, Range panel_range) const {
    if (row_range.size() == 0) return;
    const T* x = work.buffer<T>(x_);
    const T* residual = work.buffer<T>(residual_);
    T* y = work.buffer<T>(y_);
    GemmArgs<T> args = product(kernels_, x, row_range.size(), shape_.c, packed_, columns_, activation_, y);
    args.panel_begin = panel_range.begin;
    args.panel_end = panel_range.end;
    args.out_stride = pixel_stride(work.buffers[y_], columns_);
    const int64_t x_stride = pixel_stride(work.buffers[x_], shape_.c);
    args.rows_per_block = rows_per_block_;
    if (gate_ < 0) {
      args.a = x + row_range.begin * x_stride;
      args.a_stride = x_stride;
      args.residual = residual == nullptr ? nullptr : residual + row_range.begin * columns_;
      args.out = y + row_range.begin * args.out_stride;
      kernels_.gemm(args);
      return;
    }
    // With a gate the block's inputs are multiplied by it on their way into scratch memory, from where the panels read.
    const T* gate = work.buffer<T>(gate_);
    T* gated = reinterpret_cast<T*>(work.thread_scratch);
    for (int64_t row = row_range.begin; row < row_range.end; row += rows_per_block_) {
      const int64_t end = std::min(row + rows_per_block_, row_range.end);
      for (int64_t first = row; first < end;) {
        const int64_t image = first / shape_.pixels();
        const int64_t last = std::min(end, (image + 1) * shape_.pixels());
        kernels_.scale_shift_act({x + first * x_stride, x_stride, gated + (first - row) * shape_.c, shape_.c,
                                  last - first, shape_.c, gate + image * shape_.c, nullptr, Activation::kNone});
        first = last;
      }
      args.a = gated;
      args.residual = residual == nullptr ? nullptr : residual + row * columns_;
      args.out = y + row * args.out_stride;
      args.rows = end - row;
      kernels_.gemm(args);
    }
  }

  const Kernels<T>& kernels_;
  ImageShape shape_;
  int64_t columns_, panels_, rows_per_block_;
  at::Tensor packed_;
  Activation activation_;
  int x_, y_, gate_, residual_;
};

// The same for few rows, on weights as torch keeps them: packing would take longer than the product.
constexpr int64_t kFewRows = 4;

template <class T>
class PointwiseFewRows final : public Step {
 public:
  PointwiseFewRows(Isa isa, int64_t rows, const at::Tensor& weight, const OptionalTensor& scale,
                   const OptionalTensor& bias, Activation activation)
      : kernels_(kernels<T>(isa)), rows_(rows), weight_(weight), scale_(scale), bias_(bias), activation_(activation) {}

  void run(const Work& work) const override {
    const auto data = [](const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr<T>() : nullptr; };
    const int64_t columns = weight_.size(0);
    const Range range = work.team.share(columns);
    kernels_.fully_connected(work.buffer<T>(0), rows_, weight_.size(1), weight_.const_data_ptr<T>(), data(scale_),
                             data(bias_), range.begin, range.end, columns, activation_, work.buffer<T>(1));
  }

  std::string describe() const override { return "dot products, " + std::to_string(rows_) + " rows"; }

 private:
  const Kernels<T>& kernels_;
  int64_t rows_;
  at::Tensor weight_;
  OptionalTensor scale_, bias_;
  Activation activation_;
};

}  // namespace

std::unique_ptr<Step> make_pointwise_conv2d(Isa isa, ImageShape x_shape, int64_t out_channels, const at::Tensor& packed,
                                            Activation activation, int x, int y, int gate, int residual) {
  return dispatch(packed.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<PointwiseConv2d<decltype(zero)>>(isa, x_shape, out_channels, packed, activation, x, y, gate,
                                                             residual);
  });
}

at::Tensor pointwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            const std::string& activation, const OptionalTensor& gate, const OptionalTensor& residual,
                            const OptionalTensor& scale, const std::optional<std::string>& isa) {
  constexpr const char* kName = "pointwise_conv2d";
  const Activation act = parse_activation(kName, activation);
  const Isa chosen = choose_isa(kName, isa);
  check_input(kName, input);
  const auto dtype = input.scalar_type();
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  check_tensor(kName, "weight", weight, dtype, 4);
  const int64_t k = weight.size(0);
  TORCH_CHECK_VALUE(k > 0 && weight.size(1) == c && weight.size(2) == 1 && weight.size(3) == 1, kName,
                    ": weight must be (K, C, 1, 1) with C=", c, ", got ", shape_string(weight.sizes()));
  check_vector(kName, "bias", bias, dtype, k);
  check_vector(kName, "scale", scale, dtype, k);
  if (gate.has_value()) {
    check_tensor(kName, "gate", *gate, dtype, 4);
    TORCH_CHECK_VALUE(gate->sizes() == at::IntArrayRef({n, c, 1, 1}), kName,
                      ": gate must be (N, C, 1, 1) = ", shape_string({n, c, 1, 1}), ", got ",
                      shape_string(gate->sizes()));
  }
  if (residual.has_value()) {
    check_tensor(kName, "residual", *residual, dtype, 4);
    TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef({n, k, h, w}), kName,
                      ": residual must be (N, K, H, W) = ", shape_string({n, k, h, w}), ", got ",
                      shape_string(residual->sizes()));
  }

  Output y({n, k, h, w}, input.options(), conv_memory_format(input, weight));
  const at::Tensor x = as_channels_last(input);
  if (n * h * w <= kFewRows && !residual.has_value()) {
    const at::NoGradGuard no_grad;
    const at::Tensor gated = gate.has_value() ? as_channels_last(x * *gate) : x;
    const auto dense = [](const OptionalTensor& t) {
      return t.has_value() ? OptionalTensor(t->contiguous()) : std::nullopt;
    };
    dispatch(dtype, [&](auto zero) {
      run_step(PointwiseFewRows<decltype(zero)>(chosen, n * h * w, weight.contiguous(), dense(scale), dense(bias), act),
               {buffer_of(gated), buffer_of(y.dense())});
    });
    return y.finish();
  }
  const at::Tensor packed = pack_conv2d(weight, bias, scale, chosen, call_weights());
  std::vector<Buffer> buffers = {buffer_of(x), buffer_of(y.dense())};
  at::Tensor gate_dense, residual_dense;
  int gate_index = -1, residual_index = -1;
  if (gate.has_value()) {
    gate_dense = gate->contiguous();
    gate_index = static_cast<int>(buffers.size());
    buffers.push_back(buffer_of(gate_dense));
  }
  if (residual.has_value()) {
    residual_dense = as_channels_last(*residual);
    residual_index = static_cast<int>(buffers.size());
    buffers.push_back(buffer_of(residual_dense));
  }
  run_step(*make_pointwise_conv2d(chosen, {n, h, w, c}, k, packed, act, 0, 1, gate_index, residual_index), buffers);
  return y.finish();
}

}  // namespace mobilenet_fast
