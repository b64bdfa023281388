#include "steps/common.h"

#include <array>
#include <sstream>

namespace mobilenet_fast {

Activation parse_activation(const char* operation, const std::string& name) {
  static constexpr std::array names = {"none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, operation,
                    ": activation must be one of none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid, got '", name,
                    "'");
}

Isa choose_isa(const char* operation, const std::optional<std::string>& name) {
  if (!name.has_value()) return current_isa();
  try {
    return parse_isa(*name, std::string(operation) + ": isa");
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

std::string shape_string(at::IntArrayRef sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

void check_tensor(const char* operation, const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                  int64_t dim) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && tensor.device().is_cpu(), operation, ": ", name,
                   " must be a dense CPU tensor, got ", tensor.layout(), " on ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, operation, ": ", name, " must have the input's dtype ", dtype,
                   ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim, operation, ": ", name, " must have ", dim, " dimensions, got shape ",
                    shape_string(tensor.sizes()));
}

void check_input(const char* operation, const at::Tensor& input) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble, operation,
                   ": input must be float32 or float64, got ", input.scalar_type());
  TORCH_CHECK_TYPE(input.layout() == at::kStrided && input.device().is_cpu(), operation,
                   ": input must be a dense CPU tensor, got ", input.layout(), " on ", input.device());
  TORCH_CHECK_VALUE(input.dim() == 4, operation, ": input must be (N, C, H, W), got ", shape_string(input.sizes()));
  TORCH_CHECK_VALUE(input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, operation,
                    ": input must have C, H and W of at least 1, got ", shape_string(input.sizes()));
}

void check_vector(const char* operation, const char* name, const OptionalTensor& tensor, at::ScalarType dtype,
                  int64_t size) {
  if (!tensor.has_value()) return;
  check_tensor(operation, name, *tensor, dtype, 1);
  TORCH_CHECK_VALUE(tensor->size(0) == size, operation, ": ", name, " must have ", size, " elements, got ",
                    tensor->size(0));
}

at::MemoryFormat conv_memory_format(const at::Tensor& input, const at::Tensor& weight) {
  const bool last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Output::Output(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format)
    : result_(at::empty(sizes, options.requires_grad(false), format)) {
  const bool same = result_.is_contiguous(at::MemoryFormat::ChannelsLast);
  dense_ = same ? result_ : at::empty(sizes, result_.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor Output::finish() {
  if (!dense_.is_same(result_)) result_.copy_(dense_);
  return result_;
}

at::Tensor as_channels_last(const at::Tensor& input) { return input.contiguous(at::MemoryFormat::ChannelsLast); }

Buffer buffer_with_strides(const at::Tensor& tensor) {
  Buffer buffer = buffer_of(tensor);
  for (int64_t i = 0; i < tensor.dim() && i < 4; ++i) buffer.strides[i] = tensor.stride(i);
  return buffer;
}

namespace {

template <class T>
at::Tensor pack_conv2d_as(const at::Tensor& weight, const OptionalTensor& bias, Isa isa) {
  const Kernels<T>& k = kernels<T>(isa);
  const int64_t columns = weight.size(0), channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t vectors = (columns + k.lanes - 1) / k.lanes, panels = panel_count(vectors, k.panel_vectors);
  const int64_t padded = vectors * k.lanes, depth = taps * channels;
  at::Tensor packed = at::zeros({padded * (1 + depth)}, weight.options().requires_grad(false));
  T* out = packed.data_ptr<T>();
  if (bias.has_value()) {
    const at::Tensor b = bias->contiguous();
    std::copy_n(b.data_ptr<T>(), columns, out);
  }
  const at::Tensor w = weight.contiguous();
  const T* source = w.data_ptr<T>();
  at::parallel_for(0, panels, std::max<int64_t>(1, (1 << 16) / (1 + depth * k.panel_vectors * k.lanes)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p) {
                       const int64_t column = panel_first_vector(p, panels, vectors) * k.lanes;
                       const int64_t width = panel_first_vector(p + 1, panels, vectors) * k.lanes - column;
                       const int64_t filled = std::min(width, columns - column);
                       T* panel = out + padded + column * depth;
                       for (int64_t tap = 0; tap < taps; ++tap) {
                         for (int64_t c = 0; c < channels; ++c, panel += width) {
                           const T* from = source + (column * channels + c) * taps + tap;
                           for (int64_t j = 0; j < filled; ++j) panel[j] = from[j * depth];
                         }
                       }
                     }
                   });
  return packed;
}

template <class T>
at::Tensor pack_depthwise_conv2d_as(const at::Tensor& weight, const OptionalTensor& bias, Isa isa) {
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  const int64_t padded = round_up(channels, kernels<T>(isa).lanes);
  at::Tensor packed = at::zeros({padded * (1 + taps)}, weight.options().requires_grad(false));
  T* out = packed.data_ptr<T>();
  if (bias.has_value()) {
    const at::Tensor b = bias->contiguous();
    std::copy_n(b.data_ptr<T>(), channels, out);
  }
  const at::Tensor w = weight.contiguous();
  const T* source = w.data_ptr<T>();
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) out[(1 + tap) * padded + c] = source[c * taps + tap];
  }
  return packed;
}

}  // namespace

at::Tensor pack_conv2d(const at::Tensor& weight, const OptionalTensor& bias, Isa isa) {
  return dispatch(weight.scalar_type(), [&](auto zero) { return pack_conv2d_as<decltype(zero)>(weight, bias, isa); });
}

at::Tensor pack_depthwise_conv2d(const at::Tensor& weight, const OptionalTensor& bias, Isa isa) {
  return dispatch(weight.scalar_type(),
                  [&](auto zero) { return pack_depthwise_conv2d_as<decltype(zero)>(weight, bias, isa); });
}

}  // namespace mobilenet_fast
