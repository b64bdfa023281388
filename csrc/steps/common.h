// What the steps share: checks with one voice, packed weights, views of tensors as buffers.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "engine/step.h"
#include "kernels/registry.h"

namespace mobilenet_fast {

using OptionalTensor = std::optional<at::Tensor>;

Activation parse_activation(const char* operation, const std::string& name, const char* argument = "activation");
// The instruction set asked for by name, or the current one.
Isa choose_isa(const char* operation, const std::optional<std::string>& name);

// ValueError unless `tensor` is on the CPU and has `dim` dimensions, TypeError unless it is strided and of `dtype`.
void check_tensor(const char* operation, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t dim);
void check_input(const char* operation, const at::Tensor& input);
// A vector of `size` elements of `dtype`, where given.
void check_vector(const char* operation, const char* name, const OptionalTensor& tensor, at::ScalarType dtype,
                  int64_t size);
std::string shape_string(at::IntArrayRef sizes);
template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// An image, not initialised. Large ones lie in memory that is kept when they are dropped, since the next call and the
// next step of a training make the same ones anew, and pages that the system has to clear first cost as much as a pass
// over them. It is no more than the most that was in use at once, and what lies between blocks that are.
at::Tensor empty_image(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);
at::Tensor empty_channels_last(at::IntArrayRef sizes, const at::Tensor& like);
// Elements in such memory.
at::Tensor empty_for_now(int64_t elements, const at::Tensor& like);
// A copy of the image in another dtype, in such memory.
at::Tensor converted(const at::Tensor& image, at::ScalarType dtype);
// Gives the memory that is kept back to the system.
void release_images();

// The format that F.conv2d gives its output.
at::MemoryFormat conv_memory_format(const at::Tensor& input, const at::Tensor& weight);
// The output of an operator that computes in N × H × W × C order: `dense` is what it writes, finish() gives the tensor
// in the layout asked for.
class Output {
 public:
  explicit Output(const at::Tensor& result);
  Output(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format)
      : Output(empty_image(sizes, options, format)) {}
  const at::Tensor& dense() const { return dense_; }
  at::Tensor finish();

 private:
  at::Tensor result_, dense_;
};

// `input` dense in N × H × W × C order: itself where it is so already.
at::Tensor as_channels_last(const at::Tensor& input);
inline Buffer buffer_of(const at::Tensor& tensor) { return Buffer{tensor.data_ptr(), {0, 0, 0, 0}}; }
Buffer buffer_with_strides(const at::Tensor& tensor);
// From one pixel to the next of a tensor that may be a slice of the channels of a larger one.
inline int64_t pixel_stride(const Buffer& buffer, int64_t channels) {
  return buffer.strides[3] > 0 ? buffer.strides[3] : channels;
}

// Calls body(T{}) for float or double.
template <class Body>
auto dispatch(at::ScalarType dtype, const Body& body) {
  return dtype == at::kDouble ? body(double{}) : body(float{});
}

// Threads that an elementwise pass over so many elements is worth.
inline int64_t elementwise_threads(int64_t elements) { return elements / (16 * 1024); }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where packed weights lie.
class WeightMemory {
 public:
  virtual ~WeightMemory() = default;
  // `elements` elements of the dtype of `like`, not initialised.
  virtual at::Tensor take(int64_t elements, const at::Tensor& like) = 0;
};

// Those of a network, in the order in which they are packed, which is about that in which they are read: one after
// another in huge pages, a network streams them from memory 1.5 to 2.3 times as fast as from small pages. A chunk of
// memory goes with the last tensor in it.
class NetworkWeights final : public WeightMemory {
 public:
  at::Tensor take(int64_t elements, const at::Tensor& like) override;

 private:
  std::shared_ptr<char> chunk_;
  size_t used_ = 0, size_ = 0;
};

// Those of one call of an eager operator, good until its thread's next: memory that stays mapped, and in cache.
WeightMemory& call_weights();

// A convolution's weight and bias as the GEMM kernel reads them (see GemmArgs): the bias padded to whole vectors, then
// the panels. `weight` is (K, C, kH, kW); the depth runs over kH, kW, C. One layout serves every input shape. Output
// channels are multiplied by `scale`, where given. Where packs_planes(C, taps), the panels follow once more with a
// depth over C, kH, kW.
at::Tensor pack_conv2d(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale, Isa isa,
                       WeightMemory& memory);
// Whether a convolution reads a contiguous image plane by plane: few channels and more than one tap.
constexpr bool packs_planes(int64_t channels, int64_t taps) { return channels <= 4 && taps > 1; }
// The weights of a 3×3 convolution transformed for make_winograd: the bias and a panel of zeros, then panel by panel 36
// matrices as above.
at::Tensor pack_winograd(const at::Tensor& weight, const OptionalTensor& bias, Isa isa, WeightMemory& memory);
// A depthwise convolution's as its kernel reads it (see DepthwiseArgs). `weight` is (C, 1, kH, kW).
at::Tensor pack_depthwise_conv2d(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                                 Isa isa, WeightMemory& memory);
// Batch norm as a scale and a shift, (2, C).
at::Tensor fold_batch_norm(const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, Isa isa);

// out = activation(a · packed): `a` dense (rows, channels), `out` dense (rows, columns), all panels.
template <class T>
GemmArgs<T> product(const Kernels<T>& kernels, const T* a, int64_t rows, int64_t channels, const at::Tensor& packed,
                    int64_t columns, Activation activation, T* out) {
  static constexpr int64_t kNoOffset = 0;
  const int64_t vectors = (columns + kernels.lanes - 1) / kernels.lanes;
  GemmArgs<T> args{};
  args.a = a;
  args.a_stride = args.chunk_length = channels;
  args.rows = args.rows_per_block = rows;
  args.chunk_offset = &kNoOffset;
  args.chunks = 1;
  args.bias = packed.const_data_ptr<T>();
  args.weight = args.bias + vectors * kernels.lanes;
  args.columns = args.out_stride = args.residual_stride = columns;
  args.panel_end = panel_count(vectors, kernels.panel_vectors);
  args.out = out;
  args.activation = activation;
  return args;
}

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// What a depthwise convolution's (or any window's) arguments say, checked. Padding of four values is top, bottom, left,
// right.
struct DepthwiseGeometry {
  Window window;
  int64_t out_h, out_w;
};
DepthwiseGeometry window_geometry(const char* operation, const at::Tensor& input, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);
DepthwiseGeometry depthwise_geometry(const char* operation, const at::Tensor& input, const at::Tensor& weight,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

struct ImageShape {  // N × H × W × C
  int64_t n, h, w, c;
  int64_t pixels() const { return h * w; }
};

// The steps. Buffers are indices into Work::buffers, -1 for none; all are dense N × H × W × C unless said otherwise.
// The outputs y of make_pointwise_conv2d, make_conv2d, make_depthwise_conv2d, make_winograd, make_pool2d and
// make_scale_shift_act may be slices of the channels of a larger tensor, and so may their inputs x but Winograd's.

// y = activation(conv1x1(x · gate) + residual); `gate` is (N, C).
std::unique_ptr<Step> make_pointwise_conv2d(Isa isa, ImageShape x_shape, int64_t out_channels, const at::Tensor& packed,
                                            Activation activation, int x, int y, int gate, int residual);
// A dense convolution. Reads any strides of x, which must be set in its buffer.
std::unique_ptr<Step> make_conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                  Window window, Activation activation, int x, int y, int residual);
// `sums`, where given, is (N, H, C): sums of the outputs of each row, which so do not depend on who computes them.
std::unique_ptr<Step> make_depthwise_conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                            Window window, Activation activation, int x, int y, int sums);
// A dense 3×3 convolution of stride 1 from weights that pack_winograd gives.
std::unique_ptr<Step> make_winograd(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                    int64_t pad_top, int64_t pad_left, Activation activation, int x, int y,
                                    int residual);
// The L2 cache of this CPU, or a cautious guess where the system does not tell.
int64_t l2_cache_bytes();
template <class T>
bool exceeds_l2(ImageShape image) {
  return image.n * image.pixels() * image.c * static_cast<int64_t>(sizeof(T)) > l2_cache_bytes();
}
// y = project(depthwise(expand(x))) + residual, or without `expand` or `project` where that is undefined; `sums` as for
// make_depthwise_conv2d, without `project`.
struct InvertedResidualSpec {
  ImageShape x_shape, y_shape;
  int64_t hidden_channels;
  at::Tensor expand, depthwise, project;  // packed
  Activation expand_activation, depthwise_activation, project_activation;
  Window window;
  int x, y, sums, residual;
};
std::unique_ptr<Step> make_inverted_residual(Isa isa, const InvertedResidualSpec& spec);
// gate = gate_activation(fc2(squeeze_activation(fc1(mean of x)))), (N, C). The mean is taken from `sums`, (N, parts,
// C), where sums >= 0, and else from x.
struct Layer {
  at::Tensor weight;    // as pack_conv2d gives it, or torch's own: dense (out_channels, channels, 1, 1)
  OptionalTensor bias;  // of torch's own
  Activation activation;
  int64_t channels, out_channels;
  bool packed;
};
std::unique_ptr<Step> make_squeeze_excite(Isa isa, ImageShape x_shape, Layer squeeze, Layer excite, int x, int sums,
                                          int64_t parts, int gate);
// y = activation(x · scale + shift). Scale and shift are the rows of `folded`, (2, C), where given; else the scale is
// the value `gate`, (N, C), where >= 0; what is missing is 1 and 0.
std::unique_ptr<Step> make_scale_shift_act(Isa isa, at::ScalarType dtype, ImageShape shape,
                                           const OptionalTensor& folded, int gate, Activation activation, int x, int y);
// y = activation(a + b), elementwise.
std::unique_ptr<Step> make_add_act(Isa isa, at::ScalarType dtype, int64_t elements, Activation activation, int a, int b,
                                   int y);
// y = mean of x over H and W, (N, C); sums as for make_squeeze_excite.
std::unique_ptr<Step> make_global_avg_pool(Isa isa, at::ScalarType dtype, ImageShape x_shape, int x, int sums,
                                           int64_t parts, int y);

struct PoolKind {  // as in PoolArgs
  bool mean, count_padding;
  int64_t divisor;
};
std::unique_ptr<Step> make_pool2d(Isa isa, at::ScalarType dtype, ImageShape x_shape, ImageShape y_shape, Window window,
                                  PoolKind kind, int x, int y);

// The eager operators, as bound to Python and registered with torch.library.
at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            const std::string& activation, const OptionalTensor& scale,
                            const std::optional<std::string>& isa);
at::Tensor pointwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            const std::string& activation, const OptionalTensor& gate, const OptionalTensor& residual,
                            const OptionalTensor& scale, const std::optional<std::string>& isa);
at::Tensor batch_norm_act(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                          const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                          const std::string& activation, const std::optional<std::string>& isa);
at::Tensor squeeze_excite(const at::Tensor& input, const at::Tensor& weight1, const OptionalTensor& bias1,
                          const at::Tensor& weight2, const OptionalTensor& bias2, const std::string& squeeze_activation,
                          const std::string& gate_activation, const std::optional<std::string>& isa);

}  // namespace mobilenet_fast
