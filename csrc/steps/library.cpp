// The operators as torch.library sees them: schemas and CPU implementations. Fake implementations and autograd formulas
// are registered from Python (mobilenet_fast/ops.py).
#include <torch/library.h>

#include "steps/common.h"

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

}  // namespace

TORCH_LIBRARY(mobilenet_fast, m) {
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
}

}  // namespace mobilenet_fast
