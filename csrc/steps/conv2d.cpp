// Dense convolution as a matrix product without an im2col buffer: the input rows that a block of output rows reads are
// copied, padded with zeros, into a strip of scratch memory, in which the taps of one kernel row are consecutive; the
// GEMM then walks one output row a call, one chunk a kernel row. Without padding the input is read in place.
//
// The strip holds whole pixels, N × H × W × C. An image of few channels that comes contiguous (N × C × H × W) is read
// plane by plane instead, with a chunk an element, since interleaving it would cost more than the convolution; such
// weights are packed in both orders (see pack_conv2d). A copy would cost a sixth of such a convolution, so only the
// outputs at the borders take theirs through a strip.
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
    // The chunks of a panel that all rows of a strip meet before the next ones do take half of it.
    const int64_t chunks = window.kernel_h * chunks_per_row(1);
    const int64_t chunk_bytes = static_cast<int64_t>(sizeof(T)) * window.kernel_h * window.kernel_w * x_shape_.c /
                                chunks * kernels_.panel_vectors * kernels_.lanes;
    const int64_t most = std::clamp<int64_t>(l2_cache_bytes() / 2 / chunk_bytes, 1, chunks);
    const int64_t slices = (chunks + most - 1) / most;
    slice_chunks_ = (chunks + slices - 1) / slices;
    zeros_.resize(static_cast<size_t>(vectors_ * kernels_.lanes));
  }

  void run(const Work& work) const override {
    Range unit_range, panel_range;
    work.team.share(y_shape_.n * y_shape_.h, panels_, &unit_range, &panel_range);
    if (unit_range.size() == 0 || panel_range.size() == 0) return;
    const Buffer& input = work.buffers[x_];
    const bool planar = packs_planes(x_shape_.c, window_.kernel_h * window_.kernel_w) && input.strides[1] != 1;
    const int64_t pixel = planar ? 1 : x_shape_.c, planes = planar ? x_shape_.c : 1;
    // Outputs whose inputs are all inside the image.
    const Range inner_rows = inner(x_shape_.h, y_shape_.h, window_.pad_top, window_.stride_h, reach_h());
    const Range inner_columns = inner(x_shape_.w, y_shape_.w, window_.pad_left, window_.stride_w, reach_w());
    const bool unpadded = inner_rows.size() == y_shape_.h && inner_columns.size() == y_shape_.w;
    const bool pixels_together = input.strides[3] == pixel && (planar || input.strides[1] == 1);
    const bool in_place = pixels_together && (unpadded || planar);
    const int64_t strip_row = strip_width_ * pixel, strip_plane = strip_input_rows(strip_rows_) * strip_row;

    int64_t* offsets = reinterpret_cast<int64_t*>(work.thread_scratch);
    int64_t* strip_offsets = offsets + max_chunks();
    T* strip = reinterpret_cast<T*>(work.thread_scratch + offset_bytes());
    fill_offsets(offsets, planes, pixel, input.strides[2], input.strides[1]);
    fill_offsets(strip_offsets, planes, pixel, strip_row, strip_plane);
    GemmArgs<T> args{};
    args.a_stride = window_.stride_w * pixel;
    const int64_t chunks = planes * window_.kernel_h * chunks_per_row(planes);
    args.chunk_length = window_.kernel_w / chunks_per_row(planes) * pixel;
    const T* bias = packed_.const_data_ptr<T>();
    args.weight = bias + vectors_ * kernels_.lanes;
    if (planar) {
      args.weight += round_up(y_shape_.c, kernels_.column_unit) * window_.kernel_h * window_.kernel_w * x_shape_.c;
    }
    args.columns = y_shape_.c;
    args.depth = chunks * args.chunk_length;
    args.out_stride = pixel_stride(work.buffers[y_], y_shape_.c);
    const T* residual = work.buffer<T>(residual_);
    T* y = work.buffer<T>(y_);
    // Outputs [columns) of `rows` output rows from `unit` on, whose inputs begin at a, a_row apart: panel by panel, and
    // of large panels slice by slice, so that each is read from beyond the L2 cache once. Sums of the slices before are
    // those of the next one's residual.
    const auto multiply = [&](int64_t unit, int64_t rows, Range columns, const T* a, int64_t a_row,
                              const int64_t* chunk_offset) {
      if (columns.size() == 0) return;
      args.rows = args.rows_per_block = columns.size();
      const int64_t most = rows == 1 || planar ? chunks : slice_chunks_;
      for (int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
        args.panel_begin = panel;
        args.panel_end = panel + 1;
        for (int64_t chunk = 0; chunk < chunks; chunk += most) {
          args.chunk_offset = chunk_offset + chunk;
          args.chunks = std::min(most, chunks - chunk);
          args.first_k = chunk * args.chunk_length;
          args.bias = chunk == 0 ? bias : zeros_.data();
          args.activation = chunk + most < chunks ? Activation::kNone : activation_;
          args.residual_stride = chunk == 0 ? y_shape_.c : args.out_stride;
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t y_pixel = (unit + row) * y_shape_.w + columns.begin;
            args.a = a + row * a_row;
            args.out = y + y_pixel * args.out_stride;
            const T* before = chunk > 0 ? args.out : nullptr;
            args.residual = chunk == 0 && residual != nullptr ? residual + y_pixel * y_shape_.c : before;
            kernels_.gemm(args);
          }
        }
      }
    };
    for (int64_t unit = unit_range.begin; unit < unit_range.end;) {
      const int64_t image = unit / y_shape_.h, first = unit % y_shape_.h;
      const T* source = static_cast<const T*>(input.data) + image * input.strides[0];
      // Outputs [columns) of `rows` output rows by way of the strip.
      const auto through_strip = [&](int64_t rows, Range columns) {
        if (columns.size() == 0) return;
        const int64_t top = first * window_.stride_h - window_.pad_top;
        const int64_t left = columns.begin * window_.stride_w - window_.pad_left;
        const int64_t width = (columns.size() - 1) * window_.stride_w + reach_w();
        for (int64_t plane = 0; plane < planes; ++plane) {
          fill_strip(source + plane * input.strides[1], input.strides, pixel, top, strip_input_rows(rows), left, width,
                     strip + plane * strip_plane);
        }
        multiply(unit, rows, columns, strip, window_.stride_h * strip_row, strip_offsets);
      };
      const int64_t rows =
          in_place && !unpadded ? 1 : std::min({strip_rows_, y_shape_.h - first, unit_range.end - unit});
      const bool inside = in_place && first >= inner_rows.begin && first < inner_rows.end;
      const Range direct = inside ? inner_columns : Range{0, 0};
      const int64_t top = first * window_.stride_h - window_.pad_top;
      const int64_t left = direct.begin * window_.stride_w - window_.pad_left;
      multiply(unit, rows, direct, source + top * input.strides[2] + left * pixel, window_.stride_h * input.strides[2],
               offsets);
      through_strip(rows, {0, direct.begin});
      through_strip(rows, {direct.end, y_shape_.w});
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
  int64_t reach_w() const { return (window_.kernel_w - 1) * window_.dilation_w + 1; }
  // Output rows whose inputs fit into this many input rows.
  int64_t rows_for(int64_t input_rows) const { return (input_rows - reach_h()) / window_.stride_h + 1; }
  int64_t strip_input_rows(int64_t rows) const { return (rows - 1) * window_.stride_h + reach_h(); }
  int64_t max_chunks() const { return window_.kernel_h * window_.kernel_w * x_shape_.c; }
  size_t offset_bytes() const {
    return static_cast<size_t>(round_up(2 * max_chunks() * static_cast<int64_t>(sizeof(int64_t)), 64));
  }
  // One chunk a kernel row where its taps are neighbours and long enough to be worth a loop, else one a tap.
  int64_t chunks_per_row(int64_t planes) const { return window_.dilation_w == 1 && planes == 1 ? 1 : window_.kernel_w; }

  // Of `outputs` along one axis, those that read no padding.
  static Range inner(int64_t inputs, int64_t outputs, int64_t pad, int64_t stride, int64_t reach) {
    const int64_t begin = std::min(outputs, (pad + stride - 1) / stride);
    const int64_t room = inputs + pad - reach;
    return {begin, std::clamp<int64_t>(room < 0 ? 0 : room / stride + 1, begin, outputs)};
  }

  void fill_offsets(int64_t* offsets, int64_t planes, int64_t pixel, int64_t row_stride, int64_t plane_stride) const {
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t ky = 0; ky < window_.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < chunks_per_row(planes); ++kx) {
          *offsets++ = plane * plane_stride + ky * window_.dilation_h * row_stride + kx * window_.dilation_w * pixel;
        }
      }
    }
  }

  // Input rows [top, top + rows) and columns [left, left + width), zeros where they are outside the image.
  void fill_strip(const T* x, const int64_t* strides, int64_t pixel, int64_t top, int64_t rows, int64_t left,
                  int64_t width, T* strip) const {
    const int64_t begin = std::clamp<int64_t>(-left, 0, width);
    const int64_t end = std::clamp<int64_t>(x_shape_.w - left, begin, width);
    for (int64_t row = 0; row < rows; ++row, strip += strip_width_ * pixel) {
      const int64_t iy = top + row;
      if (iy < 0 || iy >= x_shape_.h || begin == end) {
        std::fill_n(strip, width * pixel, T(0));
        continue;
      }
      const T* source = x + iy * strides[2] + (left + begin) * strides[3];
      std::fill_n(strip, begin * pixel, T(0));
      std::fill_n(strip + end * pixel, (width - end) * pixel, T(0));
      T* target = strip + begin * pixel;
      if (strides[3] == pixel && (pixel == 1 || strides[1] == 1)) {
        std::copy_n(source, (end - begin) * pixel, target);
        continue;
      }
      if (strides[1] == 1) {  // a slice of the channels
        for (int64_t i = 0; i < end - begin; ++i) std::copy_n(source + i * strides[3], pixel, target + i * pixel);
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
  int64_t vectors_, panels_, strip_width_, strip_rows_, slice_chunks_;
  std::vector<T> zeros_;
};

}  // namespace

std::unique_ptr<Step> make_conv2d(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                  Window window, Activation activation, int x, int y, int residual) {
  return dispatch(packed.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<Conv2d<decltype(zero)>>(isa, x_shape, y_shape, packed, window, activation, x, y, residual);
  });
}

}  // namespace mobilenet_fast
