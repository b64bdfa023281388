// The operators as torch.library sees them: schemas and CPU implementations. Fake implementations and autograd formulas
// are registered from Python (mobilenet_fast/ops.py).
#include <torch/library.h>

#include "steps/training.h"

namespace mobilenet_fast {
namespace {

at::Tensor depthwise_conv2d_op(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                               c10::string_view activation, const OptionalTensor& scale) {
  return depthwise_conv2d(input, weight, bias, stride, padding, dilation, std::string(activation), scale, std::nullopt);
}

at::Tensor pointwise_conv2d_op(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                               c10::string_view activation, const OptionalTensor& gate, const OptionalTensor& residual,
                               const OptionalTensor& scale) {
  return pointwise_conv2d(input, weight, bias, std::string(activation), gate, residual, scale, std::nullopt);
}

at::Tensor batch_norm_act_op(const at::Tensor& input, const at::Tensor& running_mean, const at::Tensor& running_var,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             c10::string_view activation) {
  return batch_norm_act(input, running_mean, running_var, weight, bias, eps, std::string(activation), std::nullopt);
}

at::Tensor squeeze_excite_op(const at::Tensor& input, const at::Tensor& weight1, const OptionalTensor& bias1,
                             const at::Tensor& weight2, const OptionalTensor& bias2,
                             c10::string_view squeeze_activation, c10::string_view gate_activation) {
  return squeeze_excite(input, weight1, bias1, weight2, bias2, std::string(squeeze_activation),
                        std::string(gate_activation), std::nullopt);
}

// The steps of training. Activations by name; a result that is not wanted is an empty tensor.
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ReadAs read_as(const char* operation, const OptionalTensor& folded, c10::string_view activation,
               const OptionalTensor& gate) {
  return {folded, parse_activation(operation, std::string(activation)), gate};
}

GradientAt gradient_at(const char* operation, const at::Tensor& grad, const OptionalTensor& y,
                       const OptionalTensor& folded, c10::string_view activation, const OptionalTensor& gate,
                       const OptionalTensor& pooled, const OptionalTensor& coefficients) {
  return {grad, y, folded, parse_activation(operation, std::string(activation)), gate, pooled, coefficients};
}

Results results(const ConvGradients& gradients, const at::Tensor& like) {
  const auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, like.options()); };
  return {or_empty(gradients.input), or_empty(gradients.weight), or_empty(gradients.sums), or_empty(gradients.gate)};
}

std::tuple<at::Tensor, at::Tensor> pointwise_conv2d_forward_op(const at::Tensor& x, const OptionalTensor& folded,
                                                               c10::string_view activation, const OptionalTensor& gate,
                                                               const at::Tensor& weight) {
  return pointwise_conv2d_forward(x, read_as("pointwise_conv2d_forward", folded, activation, gate), weight);
}

std::tuple<at::Tensor, at::Tensor> depthwise_conv2d_forward_op(const at::Tensor& x, const OptionalTensor& folded,
                                                               c10::string_view activation, const at::Tensor& weight,
                                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                                               at::IntArrayRef dilation) {
  return depthwise_conv2d_forward(x, read_as("depthwise_conv2d_forward", folded, activation, std::nullopt), weight,
                                  stride, padding, dilation);
}

std::tuple<at::Tensor, at::Tensor> conv2d_forward_op(const at::Tensor& x, const OptionalTensor& folded,
                                                     c10::string_view activation, const OptionalTensor& gate,
                                                     const at::Tensor& weight, at::IntArrayRef stride,
                                                     at::IntArrayRef padding, at::IntArrayRef dilation) {
  return conv2d_forward(x, read_as("conv2d_forward", folded, activation, gate), weight, stride, padding, dilation);
}

at::Tensor max_pool2d_forward_op(const at::Tensor& x, const OptionalTensor& folded, c10::string_view activation,
                                 at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef dilation) {
  return max_pool2d_forward(x, read_as("max_pool2d_forward", folded, activation, std::nullopt), kernel_size, stride,
                            padding, dilation);
}

at::Tensor batch_norm_apply_op(const at::Tensor& x, const at::Tensor& folded, c10::string_view activation,
                               const OptionalTensor& gate, const OptionalTensor& residual) {
  return batch_norm_apply(x, read_as("batch_norm_apply", folded, activation, gate), residual);
}

at::Tensor batch_norm_pixel_sums_op(const at::Tensor& x, const at::Tensor& folded, c10::string_view activation,
                                    const OptionalTensor& grad) {
  return batch_norm_pixel_sums(x, read_as("batch_norm_pixel_sums", folded, activation, std::nullopt), grad);
}

at::Tensor batch_norm_gradient_sums_op(const at::Tensor& grad, const at::Tensor& y, const OptionalTensor& folded,
                                       c10::string_view activation, const OptionalTensor& gate,
                                       const OptionalTensor& pooled, const at::Tensor& mean) {
  return batch_norm_gradient_sums(
      gradient_at("batch_norm_gradient_sums", grad, y, folded, activation, gate, pooled, std::nullopt), mean,
      std::nullopt);
}

at::Tensor batch_norm_gradient_op(const at::Tensor& grad, const OptionalTensor& y, const OptionalTensor& folded,
                                  c10::string_view activation, const OptionalTensor& gate, const OptionalTensor& pooled,
                                  const OptionalTensor& coefficients) {
  return batch_norm_gradient(
      gradient_at("batch_norm_gradient", grad, y, folded, activation, gate, pooled, coefficients));
}

Results pointwise_conv2d_gradients_op(const at::Tensor& grad, const OptionalTensor& y, const OptionalTensor& y_folded,
                                      c10::string_view y_activation, const OptionalTensor& y_gate,
                                      const OptionalTensor& y_pooled, const OptionalTensor& coefficients,
                                      const at::Tensor& x, const OptionalTensor& folded, c10::string_view activation,
                                      const OptionalTensor& gate, const OptionalTensor& mean, const at::Tensor& weight,
                                      const OptionalTensor& added, bool need_input, bool need_weight) {
  constexpr const char* kName = "pointwise_conv2d_gradients";
  return results(pointwise_conv2d_gradients(
                     gradient_at(kName, grad, y, y_folded, y_activation, y_gate, y_pooled, coefficients), x,
                     read_as(kName, folded, activation, gate), mean, weight, need_input, need_weight, added),
                 x);
}

Results depthwise_conv2d_gradients_op(const at::Tensor& grad, const OptionalTensor& y, const OptionalTensor& y_folded,
                                      c10::string_view y_activation, const OptionalTensor& y_gate,
                                      const OptionalTensor& y_pooled, const OptionalTensor& coefficients,
                                      const at::Tensor& x, const OptionalTensor& folded, c10::string_view activation,
                                      const OptionalTensor& mean, const at::Tensor& weight, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation, bool need_input,
                                      bool need_weight) {
  constexpr const char* kName = "depthwise_conv2d_gradients";
  return results(
      depthwise_conv2d_gradients(gradient_at(kName, grad, y, y_folded, y_activation, y_gate, y_pooled, coefficients), x,
                                 read_as(kName, folded, activation, std::nullopt), mean, weight, stride, padding,
                                 dilation, need_input, need_weight),
      x);
}

Results conv2d_gradients_op(const at::Tensor& grad, const OptionalTensor& y, const OptionalTensor& y_folded,
                            c10::string_view y_activation, const OptionalTensor& y_gate, const OptionalTensor& y_pooled,
                            const OptionalTensor& coefficients, const at::Tensor& x, const OptionalTensor& folded,
                            c10::string_view activation, const OptionalTensor& gate, const OptionalTensor& mean,
                            const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, bool need_input, bool need_weight) {
  constexpr const char* kName = "conv2d_gradients";
  return results(conv2d_gradients(gradient_at(kName, grad, y, y_folded, y_activation, y_gate, y_pooled, coefficients),
                                  x, read_as(kName, folded, activation, gate), mean, weight, stride, padding, dilation,
                                  need_input, need_weight),
                 x);
}

std::tuple<at::Tensor, at::Tensor> max_pool2d_gradients_op(const at::Tensor& grad, const at::Tensor& x,
                                                           const OptionalTensor& folded, c10::string_view activation,
                                                           const OptionalTensor& mean, at::IntArrayRef kernel_size,
                                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                                           at::IntArrayRef dilation) {
  const Results found =
      results(max_pool2d_gradients(grad, x, read_as("max_pool2d_gradients", folded, activation, std::nullopt), mean,
                                   kernel_size, stride, padding, dilation),
              x);
  return {std::get<0>(found), std::get<2>(found)};
}

}  // namespace

TORCH_LIBRARY(mobilenet_fast, m) {
  const auto def = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };
  def("pointwise_conv2d_forward(Tensor x, Tensor? folded, str activation, Tensor? gate, Tensor weight) -> (Tensor, "
      "Tensor)");
  def("depthwise_conv2d_forward(Tensor x, Tensor? folded, str activation, Tensor weight, int[2] stride, int[2] "
      "padding, "
      "int[2] dilation) -> (Tensor, Tensor)");
  def("conv2d_forward(Tensor x, Tensor? folded, str activation, Tensor? gate, Tensor weight, int[2] stride, int[2] "
      "padding, int[2] dilation) -> (Tensor, Tensor)");
  def("max_pool2d_forward(Tensor x, Tensor? folded, str activation, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  def("converted(Tensor x, ScalarType dtype) -> Tensor");
  def("batch_norm_statistics(Tensor x) -> Tensor");
  def("batch_norm_apply(Tensor x, Tensor folded, str activation, Tensor? gate, Tensor? residual) -> Tensor");
  def("batch_norm_pixel_sums(Tensor x, Tensor folded, str activation, Tensor? grad) -> Tensor");
  def("batch_norm_gradient_sums(Tensor grad, Tensor y, Tensor? folded, str activation, Tensor? gate, Tensor? pooled, "
      "Tensor mean) -> Tensor");
  def("batch_norm_gradient(Tensor grad, Tensor? y, Tensor? folded, str activation, Tensor? gate, Tensor? pooled, "
      "Tensor? "
      "coefficients) -> Tensor");
  def("pointwise_conv2d_gradients(Tensor grad, Tensor? y, Tensor? y_folded, str y_activation, Tensor? y_gate, Tensor? "
      "y_pooled, Tensor? coefficients, Tensor x, Tensor? folded, str activation, Tensor? gate, Tensor? mean, Tensor "
      "weight, Tensor? added, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  def("depthwise_conv2d_gradients(Tensor grad, Tensor? y, Tensor? y_folded, str y_activation, Tensor? y_gate, Tensor? "
      "y_pooled, Tensor? coefficients, Tensor x, Tensor? folded, str activation, Tensor? mean, Tensor weight, int[2] "
      "stride, int[2] padding, int[2] dilation, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  def("conv2d_gradients(Tensor grad, Tensor? y, Tensor? y_folded, str y_activation, Tensor? y_gate, Tensor? y_pooled, "
      "Tensor? coefficients, Tensor x, Tensor? folded, str activation, Tensor? gate, Tensor? mean, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  def("max_pool2d_gradients(Tensor grad, Tensor x, Tensor? folded, str activation, Tensor? mean, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation) -> (Tensor, Tensor)");
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1, str activation=\"none\", Tensor? scale=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pointwise_conv2d(Tensor input, Tensor weight, Tensor? bias=None, str activation=\"none\", Tensor? gate=None, "
      "Tensor? residual=None, Tensor? scale=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_act(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, str activation=\"none\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "squeeze_excite(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str "
      "squeeze_activation=\"relu\", str gate_activation=\"hardsigmoid\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mobilenet_fast, CPU, m) {
  m.impl("depthwise_conv2d", depthwise_conv2d_op);
  m.impl("pointwise_conv2d", pointwise_conv2d_op);
  m.impl("batch_norm_act", batch_norm_act_op);
  m.impl("squeeze_excite", squeeze_excite_op);
  m.impl("pointwise_conv2d_forward", pointwise_conv2d_forward_op);
  m.impl("depthwise_conv2d_forward", depthwise_conv2d_forward_op);
  m.impl("batch_norm_statistics", batch_norm_statistics);
  m.impl("batch_norm_apply", batch_norm_apply_op);
  m.impl("batch_norm_pixel_sums", batch_norm_pixel_sums_op);
  m.impl("batch_norm_gradient_sums", batch_norm_gradient_sums_op);
  m.impl("batch_norm_gradient", batch_norm_gradient_op);
  m.impl("pointwise_conv2d_gradients", pointwise_conv2d_gradients_op);
  m.impl("depthwise_conv2d_gradients", depthwise_conv2d_gradients_op);
  m.impl("converted", converted);
  m.impl("conv2d_forward", conv2d_forward_op);
  m.impl("conv2d_gradients", conv2d_gradients_op);
  m.impl("max_pool2d_forward", max_pool2d_forward_op);
  m.impl("max_pool2d_gradients", max_pool2d_gradients_op);
}

}  // namespace mobilenet_fast
