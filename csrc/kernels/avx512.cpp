// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/registry.h"
// GCC 12 warns of its own intrinsics, which begin from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define MF_ISA avx512
#define MF_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
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
Kernels<float> avx512_kernels_float() { return avx512::table<float>(Isa::kAvx512); }
Kernels<double> avx512_kernels_double() { return avx512::table<double>(Isa::kAvx512); }
}  // namespace mobilenet_fast
#endif
