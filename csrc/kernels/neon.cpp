// The kernels for NEON on aarch64.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/kernels.h"
#include "kernels/registry.h"
#define MF_ISA neon
#define MF_NEON
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
Kernels<float> neon_kernels_float() { return neon::table<float>(Isa::kNeon); }
Kernels<double> neon_kernels_double() { return neon::table<double>(Isa::kNeon); }
}  // namespace mobilenet_fast
#endif
