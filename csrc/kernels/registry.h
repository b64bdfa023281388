// operation × element type × instruction set → kernel.
#pragma once

#include "kernels/kernels.h"

namespace mobilenet_fast {

// One pair a file of its own (avx512.cpp …); only those of this architecture are defined.
Kernels<float> avx512_kernels_float();
Kernels<double> avx512_kernels_double();
Kernels<float> avx2_kernels_float();
Kernels<double> avx2_kernels_double();
Kernels<float> neon_kernels_float();
Kernels<double> neon_kernels_double();
Kernels<float> scalar_kernels_float();
Kernels<double> scalar_kernels_double();

// The kernels of an available instruction set (see available_isas).
template <class T>
const Kernels<T>& kernels(Isa isa);

}  // namespace mobilenet_fast
