// Expand → depthwise → project of an inverted residual block in one step, or the first two of them (before a
// squeeze-excite), or the last two: the expanded tensor is several times the block's input and output, and on large
// maps it would leave the L2 cache between the layers. Here a thread takes a few output rows at a time; the expanded
// rows that they read, and their depthwise outputs, stay in its scratch memory. Rows that the next ones read again are
// moved to the front, so nothing is computed twice but the rows at which two threads meet.
#include <cstring>

#include "steps/common.h"

namespace mobilenet_fast {
namespace {

template <class T>
class InvertedResidual final : public Step {
 public:
  InvertedResidual(Isa isa, const InvertedResidualSpec& spec)
      : kernels_(kernels<T>(isa)), spec_(spec), x_(spec.x_shape), y_(spec.y_shape), hidden_(spec.hidden_channels) {
    // As many rows as keep the scratch in half of the L2 cache.
    const int64_t most = l2_cache_bytes() / 2 / static_cast<int64_t>(sizeof(T));
    strip_rows_ = y_.h;
    while (strip_rows_ > 1 && scratch_elements(strip_rows_) > most) --strip_rows_;
    if (strip_rows_ > 1) strip_rows_ -= strip_rows_ % 2;  // tiles of the depthwise kernel have two rows
  }

  void run(const Work& work) const override {
    const int64_t grain = meets_within_rows(work.team.size) ? 1 : y_.w;
    const Range shared = work.team.share(y_.n * y_.pixels() / grain);
    const Range range = {shared.begin * grain, shared.end * grain};  // output positions
    T* expanded = reinterpret_cast<T*>(work.thread_scratch);
    T* filtered = expanded + expanded_elements(strip_rows_);
    int64_t held_image = -1, held_begin = 0, held_end = 0;  // expanded input rows in scratch
    for (int64_t position = range.begin; position < range.end;) {
      const int64_t image = position / y_.pixels(), row_begin = position % y_.pixels() / y_.w;
      const int64_t image_end = std::min(y_.pixels(), range.end - image * y_.pixels());
      const Range rows = {row_begin, std::min(row_begin + strip_rows_, (image_end + y_.w - 1) / y_.w)};
      const Window& w = spec_.window;
      const int64_t begin = std::clamp<int64_t>(rows.begin * w.stride_h - w.pad_top, 0, x_.h);
      const int64_t end = std::clamp<int64_t>(
          (rows.end - 1) * w.stride_h - w.pad_top + (w.kernel_h - 1) * w.dilation_h + 1, begin, x_.h);
      const T* source = work.buffer<T>(spec_.x) + image * x_.pixels() * x_.c;
      const T* hidden = source + begin * x_.w * x_.c;
      if (spec_.expand.defined()) {
        int64_t kept = 0;
        if (held_image == image && held_begin <= begin && begin < held_end) {
          kept = held_end - begin;
          std::memmove(expanded, expanded + (begin - held_begin) * x_.w * hidden_,
                       static_cast<size_t>(kept * x_.w * hidden_) * sizeof(T));
        }
        multiply(spec_.expand, spec_.expand_activation, source + (begin + kept) * x_.w * x_.c, x_.c, hidden_,
                 (end - begin - kept) * x_.w, nullptr, expanded + kept * x_.w * hidden_);
        held_image = image;
        held_begin = begin;
        held_end = end;
        hidden = expanded;
      }
      filter(hidden, rows, begin, end, spec_.project.defined() ? filtered : work.buffer<T>(spec_.y) + position * y_.c,
             spec_.sums >= 0 ? work.buffer<T>(spec_.sums) + (image * y_.h + rows.begin) * hidden_ : nullptr);
      const int64_t end_position = image * y_.pixels() + std::min(image_end, rows.end * y_.w);
      if (spec_.project.defined()) {
        const T* residual = work.buffer<T>(spec_.residual);
        if (residual != nullptr) residual += position * y_.c;
        multiply(spec_.project, spec_.project_activation, filtered + position % y_.w * hidden_, hidden_, y_.c,
                 end_position - position, residual, work.buffer<T>(spec_.y) + position * y_.c);
      }
      position = end_position;
    }
  }

  size_t thread_scratch_bytes() const override {
    return static_cast<size_t>(scratch_elements(strip_rows_)) * sizeof(T);
  }

  std::string describe() const override {
    std::string layers = spec_.expand.defined() ? "expand + depthwise " : "depthwise ";
    layers += std::to_string(spec_.window.kernel_h) + "×" + std::to_string(spec_.window.kernel_w);
    if (spec_.project.defined()) layers += " + project";
    return layers + " over strips of " + std::to_string(strip_rows_) + " rows" +
           (spec_.sums >= 0 ? ", sums for squeeze-excite" : "");
  }

 private:
  // Whether two threads meet within a row of outputs, which both filter then, or between two: 19 rows on two threads
  // are 10 and 9. What is expanded for a row would be computed twice as well. A multiply-add of the depthwise
  // convolution takes about as long as four of the product.
  bool meets_within_rows(int threads) const {
    if (spec_.expand.defined() || !spec_.project.defined()) return false;
    const int64_t rows = y_.n * y_.h, whole = (rows + threads - 1) / threads;
    const int64_t filter = 4 * spec_.window.kernel_h * spec_.window.kernel_w, product = y_.c;
    return (rows + threads) * filter + rows * product < whole * threads * (filter + product);
  }

  int64_t expanded_elements(int64_t rows) const {
    const Window& w = spec_.window;
    const int64_t input_rows = (rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
    return spec_.expand.defined() ? round_up(std::min(input_rows, x_.h) * x_.w * hidden_, 16) : 0;
  }
  int64_t scratch_elements(int64_t rows) const {
    return expanded_elements(rows) + (spec_.project.defined() ? rows * y_.w * hidden_ : 0);
  }

  // y = activation(x · packed + residual), (rows, channels) to (rows, columns).
  void multiply(const at::Tensor& packed, Activation activation, const T* x, int64_t channels, int64_t columns,
                int64_t rows, const T* residual, T* y) const {
    if (rows == 0) return;
    GemmArgs<T> args = product(kernels_, x, rows, channels, packed, columns, activation, y);
    args.residual = residual;
    kernels_.gemm(args);
  }

  // Output rows `rows` from the input rows [begin, end), which lie at x.
  void filter(const T* x, Range rows, int64_t begin, int64_t end, T* y, T* sums) const {
    const Window& w = spec_.window;
    DepthwiseArgs<T> args{};
    args.x = x;
    args.x_pixel_stride = args.y_pixel_stride = args.channels = hidden_;
    args.x_row_stride = x_.w * hidden_;
    args.height = end - begin;
    args.width = x_.w;
    args.weight = spec_.depthwise.const_data_ptr<T>();
    args.y = y;
    args.y_row_stride = y_.w * hidden_;
    args.row_end = rows.size();
    args.out_width = y_.w;
    args.kernel_h = w.kernel_h;
    args.kernel_w = w.kernel_w;
    args.stride_h = w.stride_h;
    args.stride_w = w.stride_w;
    args.pad_top = begin - (rows.begin * w.stride_h - w.pad_top);
    args.pad_left = w.pad_left;
    args.dilation_h = w.dilation_h;
    args.dilation_w = w.dilation_w;
    args.activation = spec_.depthwise_activation;
    args.sums = sums;
    args.sums_stride = hidden_;
    if (sums != nullptr) std::fill_n(sums, rows.size() * hidden_, T(0));
    kernels_.depthwise_conv2d(args);
  }

  const Kernels<T>& kernels_;
  InvertedResidualSpec spec_;
  ImageShape x_, y_;
  int64_t hidden_, strip_rows_;
};

}  // namespace

std::unique_ptr<Step> make_inverted_residual(Isa isa, const InvertedResidualSpec& spec) {
  return dispatch(spec.depthwise.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<InvertedResidual<decltype(zero)>>(isa, spec);
  });
}

}  // namespace mobilenet_fast
