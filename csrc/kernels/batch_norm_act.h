// Elementwise passes: scale, shift and activation; the sum of two tensors and activation. Bound by memory, so the
// activation is chosen once a call and not once a vector.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

// In the order of memory, which is what prefetching wants. Rows of up to four vectors keep scale and shift in
// registers.
template <class T, Activation kActivation, bool kShift, int kVectors>
void scale_shift_act_narrow(const ScaleShiftArgs<T>& s) {
  using V = Vec<T>;
  const T *x = s.x, *end = s.x + s.rows * s.x_stride;
  const int64_t x_stride = s.x_stride, y_stride = s.y_stride;
  T* y = s.y;
  const int last = static_cast<int>(s.channels - (kVectors - 1) * V::kLanes);
  typename V::Reg scale[kVectors], shift[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int n = v + 1 < kVectors ? V::kLanes : last;
    scale[v] = s.scale == nullptr ? V::set1(1) : V::load_n(s.scale + v * V::kLanes, n);
    shift[v] = kShift ? V::load_n(s.shift + v * V::kLanes, n) : V::set1(static_cast<T>(-0.0));
  }
  const bool whole = last == V::kLanes;
  for (; x < end; x += x_stride, y += y_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const T* from = x + v * V::kLanes;
      T* to = y + v * V::kLanes;
      if (v + 1 < kVectors || whole) {
        V::store(to, activate<T>(kActivation, V::fma(V::load(from), scale[v], shift[v])));
      } else {
        V::store_n(to, activate<T>(kActivation, V::fma(V::load_n(from, last), scale[v], shift[v])), last);
      }
    }
  }
}

template <class T, Activation kActivation, bool kShift, bool kTail>
inline void scale_shift_act_vector(const T* x, const T* scale, const T* shift, T* y, int64_t c, int n) {
  using V = Vec<T>;
  const auto factor = scale == nullptr ? V::set1(1) : load<T, kTail>(scale + c, n);
  const auto term = kShift ? load<T, kTail>(shift + c, n) : V::set1(static_cast<T>(-0.0));
  store<T, kTail>(y + c, activate<T>(kActivation, V::fma(load<T, kTail>(x + c, n), factor, term)), n);
}

template <class T, Activation kActivation, bool kShift>
void scale_shift_act_wide(const ScaleShiftArgs<T>& s) {
  constexpr int kLanes = Vec<T>::kLanes;
  const T *x = s.x, *scale = s.scale, *shift = s.shift;
  T* y = s.y;
  const int64_t rows = s.rows, channels = s.channels, x_stride = s.x_stride, y_stride = s.y_stride;
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += y_stride) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      scale_shift_act_vector<T, kActivation, kShift, false>(x, scale, shift, y, c, kLanes);
    }
    if (c < channels) {
      scale_shift_act_vector<T, kActivation, kShift, true>(x, scale, shift, y, c, static_cast<int>(channels - c));
    }
  }
}

template <class T, Activation kActivation, bool kShift>
void scale_shift_act_any(const ScaleShiftArgs<T>& s) {
  switch ((s.channels + Vec<T>::kLanes - 1) / Vec<T>::kLanes) {
    case 1:
      return scale_shift_act_narrow<T, kActivation, kShift, 1>(s);
    case 2:
      return scale_shift_act_narrow<T, kActivation, kShift, 2>(s);
    case 3:
      return scale_shift_act_narrow<T, kActivation, kShift, 3>(s);
    case 4:
      return scale_shift_act_narrow<T, kActivation, kShift, 4>(s);
    default:
      return scale_shift_act_wide<T, kActivation, kShift>(s);
  }
}

template <class T, Activation kActivation>
void scale_shift_act_rows(const ScaleShiftArgs<T>& s) {
  return s.shift == nullptr ? scale_shift_act_any<T, kActivation, false>(s)
                            : scale_shift_act_any<T, kActivation, true>(s);
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

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
