// Elementwise passes: scale, shift and activation; the sum of two tensors and activation. Bound by memory, so the
// activation is chosen once a call and not once a vector.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T, Activation kActivation, bool kTail>
inline void scale_shift_act_vector(const ScaleShiftArgs<T>& s, const T* x, T* y, int64_t c, int n) {
  using V = Vec<T>;
  const auto scale = s.scale == nullptr ? V::set1(1) : load<T, kTail>(s.scale + c, n);
  const auto shift = s.shift == nullptr ? V::set1(static_cast<T>(-0.0)) : load<T, kTail>(s.shift + c, n);
  store<T, kTail>(y + c, activate<T>(kActivation, V::fma(load<T, kTail>(x + c, n), scale, shift)), n);
}

template <class T, Activation kActivation>
void scale_shift_act_rows(const ScaleShiftArgs<T>& s) {
  constexpr int kLanes = Vec<T>::kLanes;
  const T* x = s.x;
  T* y = s.y;
  for (int64_t row = 0; row < s.rows; ++row, x += s.x_stride, y += s.y_stride) {
    int64_t c = 0;
    for (; c + kLanes <= s.channels; c += kLanes) scale_shift_act_vector<T, kActivation, false>(s, x, y, c, kLanes);
    if (c < s.channels) {
      scale_shift_act_vector<T, kActivation, true>(s, x, y, c, static_cast<int>(s.channels - c));
    }
  }
}

template <class T, Activation kActivation>
void scale_shift_act_run(const T* x, T* y, int64_t count, T scale, T shift) {
  using V = Vec<T>;
  const auto scales = V::set1(scale), shifts = V::set1(shift);
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    V::store(y + i, activate<T>(kActivation, V::fma(V::load(x + i), scales, shifts)));
  }
  if (i < count) {
    const int n = static_cast<int>(count - i);
    V::store_n(y + i, activate<T>(kActivation, V::fma(V::load_n(x + i, n), scales, shifts)), n);
  }
}

template <class T, Activation kActivation>
void add_act_run(const T* a, const T* b, T* y, int64_t count) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    V::store(y + i, activate<T>(kActivation, V::add(V::load(a + i), V::load(b + i))));
  }
  if (i < count) {
    const int n = static_cast<int>(count - i);
    V::store_n(y + i, activate<T>(kActivation, V::add(V::load_n(a + i, n), V::load_n(b + i, n))), n);
  }
}

// function<T, activation>(...) for an activation known at run time.
#define MF_WITH_ACTIVATION(function, activation, ...)            \
  switch (activation) {                                          \
    case Activation::kRelu:                                      \
      return function<T, Activation::kRelu>(__VA_ARGS__);        \
    case Activation::kRelu6:                                     \
      return function<T, Activation::kRelu6>(__VA_ARGS__);       \
    case Activation::kHardswish:                                 \
      return function<T, Activation::kHardswish>(__VA_ARGS__);   \
    case Activation::kHardsigmoid:                               \
      return function<T, Activation::kHardsigmoid>(__VA_ARGS__); \
    case Activation::kSilu:                                      \
      return function<T, Activation::kSilu>(__VA_ARGS__);        \
    case Activation::kSigmoid:                                   \
      return function<T, Activation::kSigmoid>(__VA_ARGS__);     \
    default:                                                     \
      return function<T, Activation::kNone>(__VA_ARGS__);        \
  }

template <class T>
void scale_shift_act(const ScaleShiftArgs<T>& s) {
  MF_WITH_ACTIVATION(scale_shift_act_rows, s.activation, s)
}

template <class T>
void scale_shift_act_plane(const T* x, T* y, int64_t count, T scale, T shift, Activation activation) {
  MF_WITH_ACTIVATION(scale_shift_act_run, activation, x, y, count, scale, shift)
}

template <class T>
void add_act(const T* a, const T* b, T* y, int64_t count, Activation activation) {
  MF_WITH_ACTIVATION(add_act_run, activation, a, b, y, count)
}

#undef MF_WITH_ACTIVATION

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
