// The kernels for any processor.
#if 1
#include "kernels/kernels.h"
#include "kernels/registry.h"

#define MF_ISA scalar
#define MF_SCALAR
#include "kernels/vec.h"
// vec.h first: the kernels are written on it.
#include "kernels/activation.h"
#include "kernels/batch_norm_act.h"
#include "kernels/batch_norm_act_backward.h"
#include "kernels/depthwise_conv2d.h"
#include "kernels/depthwise_conv2d_backward.h"
#include "kernels/gemm.h"
#include "kernels/gemm_transposed.h"
#include "kernels/pack.h"
#include "kernels/peak.h"
#include "kernels/pool.h"
#include "kernels/squeeze_excite.h"
#include "kernels/winograd.h"
// The table last: it lists them all.
#include "kernels/table.h"

namespace mobilenet_fast {
Kernels<float> scalar_kernels_float() { return scalar::table<float>(Isa::kScalar); }
Kernels<double> scalar_kernels_double() { return scalar::table<double>(Isa::kScalar); }
}  // namespace mobilenet_fast
#endif
