#include "steps/common.h"

namespace mobilenet_fast {
namespace {

template <class T>
class Pool2d final : public Step {
 public:
  Pool2d(Isa isa, ImageShape x_shape, ImageShape y_shape, Window window, PoolKind kind, int x, int y)
      : kernels_(kernels<T>(isa)), x_shape_(x_shape), y_shape_(y_shape), window_(window), kind_(kind), x_(x), y_(y) {}

  void run(const Work& work) const override {
    const int64_t x_pixel = pixel_stride(work.buffers[x_], x_shape_.c);
    const int64_t y_pixel = pixel_stride(work.buffers[y_], y_shape_.c);
    PoolArgs<T> args{};
    args.channels = x_shape_.c;
    args.x_pixel_stride = x_pixel;
    args.x_row_stride = x_shape_.w * x_pixel;
    args.height = x_shape_.h;
    args.width = x_shape_.w;
    args.y_pixel_stride = y_pixel;
    args.y_row_stride = y_shape_.w * y_pixel;
    args.out_width = y_shape_.w;
    args.kernel_h = window_.kernel_h;
    args.kernel_w = window_.kernel_w;
    args.stride_h = window_.stride_h;
    args.stride_w = window_.stride_w;
    args.pad_top = window_.pad_top;
    args.pad_left = window_.pad_left;
    args.dilation_h = window_.dilation_h;
    args.dilation_w = window_.dilation_w;
    args.mean = kind_.mean;
    args.count_padding = kind_.count_padding;
    args.divisor = kind_.divisor;
    const Range range = work.team.share(y_shape_.n * y_shape_.h);
    for (int64_t unit = range.begin; unit < range.end;) {
      const int64_t image = unit / y_shape_.h, first = unit % y_shape_.h;
      const int64_t rows = std::min(y_shape_.h - first, range.end - unit);
      args.x = work.buffer<T>(x_) + image * x_shape_.pixels() * x_pixel;
      args.y = work.buffer<T>(y_) + image * y_shape_.pixels() * y_pixel;
      args.row_begin = first;
      args.row_end = first + rows;
      kernels_.pool2d(args);
      unit += rows;
    }
  }

  std::string describe() const override {
    return std::string(kind_.mean ? "mean" : "maximum") + " over " + std::to_string(window_.kernel_h) + "×" +
           std::to_string(window_.kernel_w) + " stride " + std::to_string(window_.stride_h);
  }

 private:
  const Kernels<T>& kernels_;
  ImageShape x_shape_, y_shape_;
  Window window_;
  PoolKind kind_;
  int x_, y_;
};

}  // namespace

std::unique_ptr<Step> make_pool2d(Isa isa, at::ScalarType dtype, ImageShape x_shape, ImageShape y_shape, Window window,
                                  PoolKind kind, int x, int y) {
  return dispatch(dtype, [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<Pool2d<decltype(zero)>>(isa, x_shape, y_shape, window, kind, x, y);
  });
}

}  // namespace mobilenet_fast
