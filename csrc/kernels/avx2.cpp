// The kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/registry.h"
#define MF_ISA avx2
#define MF_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
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
#pragma GCC pop_options
namespace mobilenet_fast {
Kernels<float> avx2_kernels_float() { return avx2::table<float>(Isa::kAvx2); }
Kernels<double> avx2_kernels_double() { return avx2::table<double>(Isa::kAvx2); }
}  // namespace mobilenet_fast
#endif
