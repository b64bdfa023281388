// The table of this instruction set's kernels; the last thing that an instruction-set file includes.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {

template <class T>
static Kernels<T> table(Isa isa) {
  return {isa,
          Vec<T>::kLanes,
          Vec<HalfOf<T>>::kLanes > 0 ? Vec<HalfOf<T>>::kLanes : Vec<T>::kLanes,
          GemmShape<T>::kPanelVectors,
          GemmShape<T>::rows(GemmShape<T>::kPanelVectors),
          gemm<T>,
          gemm_transposed<T>,
          depthwise_conv2d<T>,
          depthwise_conv2d_gradients<T>,
          pool2d<T>,
          max_pool2d_grad<T>,
          winograd_input<T>,
          winograd_output<T>,
          scale_shift_act<T>,
          scale_shift_act_plane<T>,
          statistics<T>,
          norm_gradient<T>,
          gate_gradient<T>,
          add_act<T>,
          sum_rows<T>,
          sum_plane<T>,
          fully_connected<T>,
          pack_columns<T>,
          multiply_add<T>,
          PeakLoop<T>::kFlops,
          fold_batch_norm<T>};
}

}  // namespace MF_ISA
}  // namespace mobilenet_fast
