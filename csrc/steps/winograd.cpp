// A dense 3×3 convolution of stride 1 by Winograd's algorithm (see kernels/winograd.h). A thread takes a block of
// tiles: transforms their inputs, then panel by panel of output channels multiplies by the 36 transformed weights and
// transforms back, so that transformed inputs and outputs stay in its L2 cache while the weights stream past once a
// block.
#include "steps/common.h"

namespace mobilenet_fast {
namespace {

constexpr int64_t kPlanes = 36;

template <class T>
class Winograd final : public Step {
 public:
  Winograd(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed, int64_t pad_top, int64_t pad_left,
           Activation activation, int x, int y, int residual)
      : kernels_(kernels<T>(isa)),
        x_shape_(x_shape),
        y_shape_(y_shape),
        packed_(packed),
        pad_top_(pad_top),
        pad_left_(pad_left),
        activation_(activation),
        x_(x),
        y_(y),
        residual_(residual) {
    panel_width_ = kernels_.panel_vectors * kernels_.lanes;
    panels_ = (y_shape_.c + panel_width_ - 1) / panel_width_;
    tiles_across_ = (y_shape_.w + 3) / 4;
    tiles_ = (y_shape_.h + 3) / 4 * tiles_across_;
    // Transformed inputs and the outputs of one panel take 5/8 of the L2 cache.
    const int64_t tile_bytes = kPlanes * (x_shape_.c + panel_width_) * static_cast<int64_t>(sizeof(T));
    block_ = std::clamp<int64_t>(l2_cache_bytes() * 5 / 8 / tile_bytes, 1, tiles_);
  }

  void run(const Work& work) const override {
    Range units, panels;
    work.team.share(y_shape_.n * tiles_, panels_, &units, &panels);
    if (panels.size() == 0) return;
    T* inputs = reinterpret_cast<T*>(work.thread_scratch);
    T* outputs = inputs + kPlanes * block_ * x_shape_.c;
    const T* bias = packed_.const_data_ptr<T>();
    const T* zeros = bias + panels_ * panel_width_;
    const int64_t y_pixel = pixel_stride(work.buffers[y_], y_shape_.c);
    for (int64_t unit = units.begin; unit < units.end;) {
      const int64_t image = unit / tiles_, first = unit % tiles_;
      const int64_t count = std::min({block_, tiles_ - first, units.end - unit});
      WinogradArgs<T> args{};
      args.image = work.buffer<T>(x_) + image * x_shape_.pixels() * x_shape_.c;
      args.image_row_stride = x_shape_.w * x_shape_.c;
      args.image_pixel_stride = args.channels = args.tile_stride = x_shape_.c;
      args.image_height = x_shape_.h;
      args.image_width = x_shape_.w;
      args.pad_top = pad_top_;
      args.pad_left = pad_left_;
      args.tiles = inputs;
      args.tile_begin = first;
      args.tile_end = first + count;
      args.tiles_across = tiles_across_;
      args.plane_stride = count * x_shape_.c;
      kernels_.winograd_input(args);

      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t column = panel * panel_width_, width = std::min(panel_width_, y_shape_.c - column);
        const int64_t padded = round_up(width, kernels_.column_unit), offset = 0;
        GemmArgs<T> gemm{};
        gemm.a_stride = gemm.chunk_length = x_shape_.c;
        gemm.rows = gemm.rows_per_block = count;
        gemm.chunk_offset = &offset;
        gemm.chunks = gemm.panel_end = 1;
        gemm.bias = zeros;
        gemm.columns = width;
        gemm.out_stride = padded;
        const T* weight = zeros + panel_width_ + column * kPlanes * x_shape_.c;
        for (int64_t plane = 0; plane < kPlanes; ++plane) {
          gemm.a = inputs + plane * count * x_shape_.c;
          gemm.weight = weight + plane * padded * x_shape_.c;
          gemm.out = outputs + plane * count * padded;
          kernels_.gemm(gemm);
        }
        args.output = work.buffer<T>(y_) + image * y_shape_.pixels() * y_pixel + column;
        args.image_row_stride = y_shape_.w * y_pixel;
        args.image_pixel_stride = y_pixel;
        args.image_height = y_shape_.h;
        args.image_width = y_shape_.w;
        args.tiles = outputs;
        args.tile_stride = padded;
        args.plane_stride = count * padded;
        args.channels = width;
        args.bias = bias + column;
        const T* residual = work.buffer<T>(residual_);
        args.residual = residual == nullptr ? nullptr : residual + image * y_shape_.pixels() * y_shape_.c + column;
        args.residual_stride = y_shape_.c;
        args.activation = activation_;
        kernels_.winograd_output(args);
      }
      unit += count;
    }
  }

  size_t thread_scratch_bytes() const override {
    return static_cast<size_t>(kPlanes * block_ * (x_shape_.c + panel_width_)) * sizeof(T);
  }

  std::string describe() const override {
    return "conv 3×3 by Winograd F(4, 3), blocks of " + std::to_string(block_) + " tiles";
  }

 private:
  const Kernels<T>& kernels_;
  ImageShape x_shape_, y_shape_;
  at::Tensor packed_;
  int64_t pad_top_, pad_left_;
  Activation activation_;
  int x_, y_, residual_;
  int64_t panel_width_, panels_, tiles_across_, tiles_, block_;
};

template <class T>
at::Tensor pack_winograd_as(const at::Tensor& weight, const OptionalTensor& bias, Isa isa, WeightMemory& memory) {
  const Kernels<T>& k = kernels<T>(isa);
  const int64_t columns = weight.size(0), depth = weight.size(1), panel_width = k.panel_vectors * k.lanes;
  const int64_t panels = (columns + panel_width - 1) / panel_width;
  // G · w · Gᵀ in float64, as (36, K, C).
  const at::Tensor g = at::tensor({1. / 4, 0., 0., -1. / 6, -1. / 6, -1. / 6, -1. / 6, 1. / 6, -1. / 6, 1. / 24,
                                   1. / 12, 1. / 6, 1. / 24, -1. / 12, 1. / 6, 0., 0., 1.},
                                  at::kDouble)
                           .view({6, 3});
  const at::Tensor transformed = at::matmul(at::matmul(g, weight.to(at::kDouble)), g.t())
                                     .permute({2, 3, 0, 1})
                                     .reshape({kPlanes, columns, depth})
                                     .to(weight.scalar_type())
                                     .contiguous();
  const int64_t last = round_up(columns - (panels - 1) * panel_width, k.column_unit);
  at::Tensor packed =
      memory.take((panels + 1) * panel_width + kPlanes * depth * ((panels - 1) * panel_width + last), weight);
  T* out = packed.data_ptr<T>();
  std::fill_n(out, (panels + 1) * panel_width, T(0));  // the bias, and a panel of zeros
  if (bias.has_value()) std::copy_n(bias->contiguous().template const_data_ptr<T>(), columns, out);
  out += (panels + 1) * panel_width;
  const T* source = transformed.const_data_ptr<T>();
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = panel * panel_width, width = panel + 1 < panels ? panel_width : last;
    for (int64_t plane = 0; plane < kPlanes; ++plane, out += width * depth) {
      k.pack_columns(source + (plane * columns + column) * depth, std::min(width, columns - column), depth, nullptr,
                     out, width);
    }
  }
  return packed;
}

}  // namespace

std::unique_ptr<Step> make_winograd(Isa isa, ImageShape x_shape, ImageShape y_shape, const at::Tensor& packed,
                                    int64_t pad_top, int64_t pad_left, Activation activation, int x, int y,
                                    int residual) {
  return dispatch(packed.scalar_type(), [&](auto zero) -> std::unique_ptr<Step> {
    return std::make_unique<Winograd<decltype(zero)>>(isa, x_shape, y_shape, packed, pad_top, pad_left, activation, x,
                                                      y, residual);
  });
}

at::Tensor pack_winograd(const at::Tensor& weight, const OptionalTensor& bias, Isa isa, WeightMemory& memory) {
  return dispatch(weight.scalar_type(),
                  [&](auto zero) { return pack_winograd_as<decltype(zero)>(weight, bias, isa, memory); });
}

}  // namespace mobilenet_fast
