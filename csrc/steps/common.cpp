#include "steps/common.h"

#include <unistd.h>

#include <array>
#include <sstream>

namespace mobilenet_fast {

int64_t l2_cache_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 512 * 1024;
}

Activation parse_activation(const char* operation, const std::string& name, const char* argument) {
  static constexpr std::array names = {"none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, operation, ": ", argument,
                    " must be one of none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid, got '", name, "'");
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
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), operation, ": ", name, " must be on cpu as input is, got ",
                    tensor.device());
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, operation, ": ", name, " must be strided, got ", tensor.layout());
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

Output::Output(const at::Tensor& result) : result_(result) {
  const bool same = result_.is_contiguous(at::MemoryFormat::ChannelsLast);
  dense_ = same ? result_ : empty_channels_last(result_.sizes(), result_);
}

at::Tensor Output::finish() {
  if (!dense_.is_same(result_)) result_.copy_(dense_);
  return result_;
}

at::Tensor as_channels_last(const at::Tensor& input) {
  return input.resolve_neg().contiguous(at::MemoryFormat::ChannelsLast);
}

Buffer buffer_with_strides(const at::Tensor& tensor) {
  Buffer buffer = buffer_of(tensor);
  for (int64_t i = 0; i < tensor.dim() && i < 4; ++i) buffer.strides[i] = tensor.stride(i);
  return buffer;
}

namespace {

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

class CallWeights final : public WeightMemory {
 public:
  at::Tensor take(int64_t elements, const at::Tensor& like) override {
    char* memory = scratch_.at_least(static_cast<size_t>(elements) * like.element_size());
    return at::from_blob(memory, {elements}, like.options().requires_grad(false));
  }

 private:
  Scratch scratch_;
};

template <class T>
void pack_bias(const OptionalTensor& bias, int64_t columns, int64_t padded, T* out) {
  if (bias.has_value()) std::copy_n(bias->contiguous().template const_data_ptr<T>(), columns, out);
  std::fill(out + (bias.has_value() ? columns : 0), out + padded, T(0));
}

template <class T>
at::Tensor pack_conv2d_as(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale, Isa isa,
                          WeightMemory& memory) {
  const Kernels<T>& k = kernels<T>(isa);
  const int64_t columns = weight.size(0), depth = weight.numel() / columns;
  const int64_t vectors = (columns + k.lanes - 1) / k.lanes, panels = panel_count(vectors, k.panel_vectors);
  const int64_t padded = vectors * k.lanes;
  const int64_t taps = weight.size(2) * weight.size(3);
  const bool planes = packs_planes(weight.size(1), taps);
  const int64_t packed_columns = round_up(columns, k.column_unit);
  at::Tensor packed = memory.take(padded + packed_columns * depth * (planes ? 2 : 1), weight);
  T* out = packed.data_ptr<T>();
  pack_bias(bias, columns, padded, out);
  const OptionalTensor factors = dense(scale);
  const T* factor = data_or_null<T>(factors);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (depth * k.panel_vectors * k.lanes));
  // The transpose of a matrix: a panel's rows are pieces of its rows.
  if (taps == 1 && depth > 1 && weight.stride(0) == 1 && weight.stride(1) >= columns && !scale.has_value()) {
    const T* source = weight.const_data_ptr<T>();
    at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t column = panel_first_vector(p, panels, vectors) * k.lanes;
        const int64_t width = std::min(panel_first_vector(p + 1, panels, vectors) * k.lanes, packed_columns) - column;
        const int64_t filled = std::min(width, columns - column);
        T* row = out + padded + column * depth;
        for (int64_t i = 0; i < depth; ++i, row += width) {
          std::copy_n(source + i * weight.stride(1) + column, filled, row);
          std::fill_n(row + filled, width - filled, T(0));
        }
      }
    });
    return packed;
  }
  const auto pack = [&](const at::Tensor& rows, T* target) {
    const T* source = rows.const_data_ptr<T>();
    at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t column = panel_first_vector(p, panels, vectors) * k.lanes;
        const int64_t width = std::min(panel_first_vector(p + 1, panels, vectors) * k.lanes, packed_columns) - column;
        k.pack_columns(source + column * depth, std::min(width, columns - column), depth,
                       factor == nullptr ? nullptr : factor + column, target + column * depth, width);
      }
    });
  };
  pack((taps == 1 ? weight : weight.permute({0, 2, 3, 1})).contiguous(), out + padded);
  if (planes) pack(weight.contiguous(), out + padded + packed_columns * depth);
  return packed;
}

template <class T>
at::Tensor pack_depthwise_conv2d_as(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                    Isa isa, WeightMemory& memory) {
  const Kernels<T>& k = kernels<T>(isa);
  const int64_t channels = weight.size(0), taps = weight.numel() / channels;
  at::Tensor packed = memory.take(round_up(channels, k.lanes) * (1 + taps), weight);
  T* out = packed.data_ptr<T>();
  const at::Tensor source = weight.contiguous();
  const OptionalTensor shifts = dense(bias), factors = dense(scale);
  const T* shift = data_or_null<T>(shifts);
  const T* factor = data_or_null<T>(factors);
  for (int64_t c = 0; c < channels; c += k.lanes, out += (1 + taps) * k.lanes) {
    const int64_t count = std::min<int64_t>(k.lanes, channels - c);
    std::fill_n(out, k.lanes, T(0));
    if (shift != nullptr) std::copy_n(shift + c, count, out);
    k.pack_columns(source.const_data_ptr<T>() + c * taps, count, taps, factor == nullptr ? nullptr : factor + c,
                   out + k.lanes, k.lanes);
  }
  return packed;
}

template <class T>
at::Tensor fold_batch_norm_as(const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps, Isa isa) {
  const int64_t channels = mean.size(0);
  at::Tensor folded = at::empty({2, channels}, mean.options().requires_grad(false));
  T* scale = folded.data_ptr<T>();
  const at::Tensor dense_mean = mean.contiguous(), dense_var = var.contiguous();
  const OptionalTensor dense_weight = dense(weight), dense_bias = dense(bias);
  kernels<T>(isa).fold_batch_norm(dense_mean.const_data_ptr<T>(), dense_var.const_data_ptr<T>(),
                                  data_or_null<T>(dense_weight), data_or_null<T>(dense_bias), static_cast<T>(eps),
                                  channels, scale, scale + channels);
  return folded;
}

}  // namespace

at::Tensor NetworkWeights::take(int64_t elements, const at::Tensor& like) {
  constexpr size_t kChunk = size_t{8} << 20;
  const size_t bytes = static_cast<size_t>(round_up(elements * static_cast<int64_t>(like.element_size()), 64));
  if (used_ + bytes > size_) {
    size_ = std::max(bytes, kChunk);
    chunk_ = std::shared_ptr<char>(allocate(size_).release(), FreeDeleter());
    used_ = 0;
  }
  char* data = chunk_.get() + used_;
  used_ += bytes;
  const auto keep = [chunk = chunk_](void*) {};
  return at::from_blob(data, {elements}, keep, like.options().requires_grad(false));
}

WeightMemory& call_weights() {
  thread_local CallWeights weights;
  return weights;
}

at::Tensor pack_conv2d(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale, Isa isa,
                       WeightMemory& memory) {
  return dispatch(weight.scalar_type(),
                  [&](auto zero) { return pack_conv2d_as<decltype(zero)>(weight, bias, scale, isa, memory); });
}

at::Tensor pack_depthwise_conv2d(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                 Isa isa, WeightMemory& memory) {
  return dispatch(weight.scalar_type(), [&](auto zero) {
    return pack_depthwise_conv2d_as<decltype(zero)>(weight, bias, scale, isa, memory);
  });
}

at::Tensor fold_batch_norm(const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, Isa isa) {
  return dispatch(mean.scalar_type(),
                  [&](auto zero) { return fold_batch_norm_as<decltype(zero)>(mean, var, weight, bias, eps, isa); });
}

}  // namespace mobilenet_fast
