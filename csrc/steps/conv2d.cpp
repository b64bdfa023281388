// Dense convolution as a matrix product without an im2col buffer: the input rows that a block of output rows reads are
// copied, padded with zeros, into a strip of scratch memory, in which the taps of one kernel row are consecutive; the
// GEMM then walks one output row a call, one chunk a kernel row. Without padding the input is read in place.
//
// The strip holds whole pixels, N × H × W × C. An image of few channels that comes contiguous (N × C × H × W) is copied
// plane by plane instead, with a chunk an element, since interleaving it would cost more than the
// convolution; such weights are packed in both orders (see pack_conv2d).
#include "steps/common.h"

namespace mobilenet_fast {
namespace {

template <class T>
class Conv2d final : public Step {
 public:
  Conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed, Window window,
         Activation activation, int x, int y, int residual)
      : kernels_(kernels<T>(isa)),
        x_shape_(x_shape),
        y_shape_(y_shape),
        packed_(packed),
        window_(window),
        activation_(activation),
        x_(x),
        y_(y),
        residual_(residual) {
    vectors_ = (y_shape_.c + kernels_.lanes - 1) / kernels_.lanes;
    panels_ = panel_count(vectors_, kernels_.panel_vectors);
    strip_width_ = (y_shape_.w - 1) * window.stride_w + (window.kernel_w - 1) * window.dilation_w + 1;
    const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * strip_width_ * x_shape_.c;
    // A strip takes a quarter of the L2 cache at most.
    strip_rows_ = std::clamp<int64_t>(rows_for(l2_cache_bytes() / 4 / row_bytes), 1, y_shape_.h);
  }

  void run(const Work& work) const override {
    Range unit_range, panel_range;
    work.team.share(y_shape_.n * y_shape_.h, panels_, &unit_range, &panel_range);
    if (unit_range.size() == 0 || panel_range.size() == 0) return;
    const Buffer& input = work.buffers[x_];
    const bool planar = packs_planes(x_shape_.c, window_.kernel_h * window_.kernel_w) && input.strides[1] != 1;
    const bool dense = input.strides[1] == 1 && input.strides[3] == x_shape_.c;
    const bool in_place = dense && window_.pad_top == 0 && window_.pad_left == 0 &&
                          (y_shape_.h - 1) * window_.stride_h + reach_h() <= x_shape_.h && strip_width_ <= x_shape_.w;
    // The strip: planes of rows of pixels of so many elements.
    const int64_t planes = planar ? x_shape_.c : 1, pixel = planar ? 1 : x_shape_.c;
    const int64_t row_stride = in_place ? input.strides[2] : strip_width_ * pixel;
    const int64_t plane_stride = strip_input_rows(strip_rows_) * row_stride;

    int64_t* offsets = reinterpret_cast<int64_t*>(work.thread_scratch);
    T* strip = reinterpret_cast<T*>(work.thread_scratch + offset_bytes());
    // One chunk a kernel row where its taps are neighbours and long enough to be worth a loop, else one a tap.
    const int64_t taps = window_.dilation_w == 1 && !planar ? 1 : window_.kernel_w;
    int64_t chunks = 0;
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t ky = 0; ky < window_.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < taps; ++kx) {
          offsets[chunks++] =
              plane * plane_stride + ky * window_.dilation_h * row_stride + kx * window_.dilation_w * pixel;
        }
      }
    }
    GemmArgs<T> args{};
    args.a_stride = window_.stride_w * pixel;
    args.rows = y_shape_.w;
    args.chunk_offset = offsets;
    args.chunks = chunks;
    args.chunk_length = window_.kernel_w / taps * pixel;
    args.bias = packed_.const_data_ptr<T>();
    args.weight = args.bias + vectors_ * kernels_.lanes;
    if (planar) {
      args.weight += round_up(y_shape_.c, kernels_.column_unit) * window_.kernel_h * window_.kernel_w * x_shape_.c;
    }
    args.columns = y_shape_.c;
    args.panel_begin = panel_range.begin;
    args.panel_end = panel_range.end;
    args.residual_stride = y_shape_.c;
    args.out_stride = pixel_stride(work.buffers[y_], y_shape_.c);
    args.rows_per_block = y_shape_.w;
    args.activation = activation_;
    const T* x = static_cast<const T*>(input.data);
    const T* residual = work.buffer<T>(residual_);
    T* y = work.buffer<T>(y_);
    for (int64_t unit = unit_range.begin; unit < unit_range.end;) {
      const int64_t image = unit / y_shape_.h, first = unit % y_shape_.h;
      const int64_t rows = std::min({strip_rows_, y_shape_.h - first, unit_range.end - unit});
      const int64_t top = first * window_.stride_h - window_.pad_top;
      const T* source = x + image * input.strides[0];
      for (int64_t plane = 0; plane < planes && !in_place; ++plane) {
        fill_strip(source + plane * input.strides[1], input.strides, pixel, top, strip_input_rows(rows),
                   strip + plane * plane_stride);
      }
      const T* a = in_place ? source + top * row_stride : strip;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t y_pixel = (unit + row) * y_shape_.w;
        args.a = a + row * window_.stride_h * row_stride;
        args.residual = residual == nullptr ? nullptr : residual + y_pixel * y_shape_.c;
        args.out = y + y_pixel * args.out_stride;
        kernels_.gemm(args);
      }
      unit += rows;
    }
  }

  size_t thread_scratch_bytes() const override {
    return offset_bytes() + static_cast<size_t>(strip_input_rows(strip_rows_) * strip_width_ * x_shape_.c) * sizeof(T);
  }

  std::string describe() const override {
    return "conv " + std::to_string(window_.kernel_h) + "×" + std::to_string(window_.kernel_w) + " stride " +
           std::to_string(window_.stride_h) + " as gemm, strips of " + std::to_string(strip_rows_) + " rows";
  }

 private:
  int64_t reach_h() const { return (window_.kernel_h - 1) * window_.dilation_h + 1; }
  // Output rows whose inputs fit into this many input rows.
  int64_t rows_for(int64_t input_rows) const { return (input_rows - reach_h()) / window_.stride_h + 1; }
  int64_t strip_input_rows(int64_t rows) const { return (rows - 1) * window_.stride_h + reach_h(); }
  size_t offset_bytes() const {
    const int64_t most = window_.kernel_h * window_.kernel_w * x_shape_.c;
    return static_cast<size_t>(round_up(most * static_cast<int64_t>(sizeof(int64_t)), 64));
  }

  // Input rows [top, top + rows) and the columns that the output reads, zeros where they are outside the image.
  void fill_strip(const T* x, const int64_t* strides, int64_t pixel, int64_t top, int64_t rows, T* strip) const {
    const int64_t begin = std::min(window_.pad_left, strip_width_);
    const int64_t end = std::max(begin, std::min(strip_width_, window_.pad_left + x_shape_.w));
    for (int64_t row = 0; row < rows; ++row, strip += strip_width_ * pixel) {
      const int64_t iy = top + row;
      if (iy < 0 || iy >= x_shape_.h || begin == end) {
        std::fill_n(strip, strip_width_ * pixel, T(0));
        continue;
      }
      const T* source = x + iy * strides[2];
      std::fill_n(strip, begin * pixel, T(0));
      std::fill_n(strip + end * pixel, (strip_width_ - end) * pixel, T(0));
      T* target = strip + begin * pixel;
      if (strides[3] == pixel && (pixel == 1 || strides[1] == 1)) {
        std::copy_n(source, (end - begin) * pixel, target);
        continue;
      }
      for (int64_t c = 0; c < pixel; ++c) {
        for (int64_t i = 0; i < end - begin; ++i) target[i * pixel + c] = source[c * strides[1] + i * strides[3]];
      }
    }
  }

  const Kernels<T>& kernels_;
  ImageShape x_shape_, y_shape_;
  at::Tensor packed_;
  Window window_;
  Activation activation_;
  int x_, y_, residual_;
  int64_t vectors_, panels_, strip_width_, strip_rows_;
};

}  // namespace

std::unique_ptr<Step> make_conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                  Window window, Activation activation, int x, int y, int residual) {
  return dispatch(packed.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<Conv2d<decltype(zero)>>(isa, x_shape, y_shape, packed, window, activation, x, y, residual);
  });
}

}  // namespace mobilenet_fast
