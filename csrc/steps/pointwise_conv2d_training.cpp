// A pointwise convolution as a block in training runs it: its input is read through the norm, activation and gate
// before it, and its output's statistics are taken while it is in cache; and the gradients of that.
#include <ATen/core/grad_mode.h>

#include "steps/training.h"

namespace mobilenet_fast {
namespace {

// Pixels a block: what is read, computed and written for them fits into half of the L2 cache, weights aside.
template <class T>
int64_t block_pixels(int64_t values) {
  const int64_t most = l2_cache_bytes() / 2 / static_cast<int64_t>(sizeof(T)) / values;
  return std::clamp<int64_t>(most, 48, 384);
}
// Each block adds to all weight gradients. Where they are so many that they come from beyond L2, the block would wait
// for them, and images are small against the products: these then are the BLAS library's, of whole images.
constexpr int64_t kManyWeights = 128 * 1024;

// PyTorch's is MKL on x86, which on other makes' processors is no faster than these kernels where they wait.
bool library_is_fast() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

template <class T>
class PointwiseForward final : public Step {
 public:
  PointwiseForward(Isa isa, ImageShape shape, int64_t out_channels, const at::Tensor& packed, const ReadAs& read,
                   at::Tensor sums, at::Tensor statistics)
      : kernels_(kernels<T>(isa)),
        shape_(shape),
        columns_(out_channels),
        packed_(packed),
        read_(read),
        blocks_(shape.n, shape.pixels(), block_pixels<T>(shape.c + out_channels)),
        groups_(std::min(blocks_.count(), kGroups)),
        counts_(groups_),
        sums_(std::move(sums)),
        statistics_(std::move(statistics)) {
    for (int64_t g = 0; g < groups_; ++g) {
      const Range range = share(blocks_.count(), groups_, g);
      counts_[g] = blocks_.block(range.end - 1).end - blocks_.block(range.begin).begin;
    }
  }

  void run(const Work& work) const override {
    const T* x = work.buffer<T>(0);
    T* y = work.buffer<T>(1);
    T* scratch = reinterpret_cast<T*>(work.thread_scratch);
    const Range groups = work.team.share(groups_);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      T* sums = sums_.data_ptr<T>() + g * 3 * columns_;
      std::fill_n(sums, 3 * columns_, T(0));
      const Range range = share(blocks_.count(), groups_, g);
      for (int64_t b = range.begin; b < range.end; ++b) {
        const Range rows = blocks_.block(b);
        const T* a = x + rows.begin * shape_.c;
        if (read_.folded.has_value()) {
          blocks_.for_each_image(b, [&](int64_t image, Range part, int64_t) {
            read_pixels(kernels_, read_, x + part.begin * shape_.c, shape_.c, image, part.size(), 0, shape_.c,
                        scratch + (part.begin - rows.begin) * shape_.c);
          });
          a = scratch;
        }
        T* out = y + rows.begin * columns_;
        kernels_.gemm(product(kernels_, a, rows.size(), shape_.c, packed_, columns_, Activation::kNone, out));
        if (b == range.begin) std::copy_n(out, columns_, sums);
        kernels_.statistics({out, columns_, rows.size(), columns_, sums, sums + columns_});
      }
    }
    work.team.sync();
    merge_statistics(sums_.const_data_ptr<T>(), counts_, columns_, work.team.share(columns_),
                     statistics_.data_ptr<T>());
  }

  size_t thread_scratch_bytes() const override {
    return read_.folded.has_value() ? static_cast<size_t>(blocks_.largest() * shape_.c) * sizeof(T) : 0;
  }
  std::string describe() const override { return "pointwise, statistics"; }

  static int64_t sums_elements(int64_t columns) { return kGroups * 3 * columns; }

 private:
  const Kernels<T>& kernels_;
  ImageShape shape_;
  int64_t columns_;
  at::Tensor packed_;
  ReadAs read_;
  PixelBlocks blocks_;
  int64_t groups_;
  std::vector<int64_t> counts_;
  mutable at::Tensor sums_, statistics_;
};

// Where the partial sums of groups go; undefined where they are not wanted.
struct PointwiseSums {
  at::Tensor weight;  // (groups, K, C), or (groups, C, K) where the step transposes()
  at::Tensor norm;    // (groups, 2, C)
  at::Tensor gate;    // (images, parts, C)
};

template <class T>
class PointwiseBackward final : public Step {
 public:
  PointwiseBackward(Isa isa, ImageShape shape, int64_t out_channels, const at::Tensor& packed,
                    const GradientAt& gradient, const ReadAs& read, const OptionalTensor& mean, bool need_input,
                    bool need_weight, bool adds)
      : kernels_(kernels<T>(isa)),
        shape_(shape),
        columns_(out_channels),
        packed_(packed),
        gradient_(gradient),
        read_(read),
        mean_(mean),
        need_input_(need_input),
        need_weight_(need_weight),
        adds_(adds),
        blocks_(shape.n, shape.pixels(), block_pixels<T>(2 * shape.c + out_channels)) {
    // Each group has a weight gradient of its own: fewer where those are larger than what they are summed from.
    const int64_t most = need_weight ? (int64_t{1} << 20) / (shape.c * out_channels) : kGroups;
    groups_ = std::min(blocks_.count(), std::clamp<int64_t>(most, 2, kGroups));
  }

  int64_t groups() const { return groups_; }
  int64_t parts() const { return blocks_.parts; }
  // Whether the sums of the weight's gradient are those of its transpose: rows of few columns make narrow tiles.
  bool transposes() const { return columns_ > shape_.c && shape_.c < kernels_.panel_vectors * kernels_.lanes; }
  void set_sums(PointwiseSums sums) { sums_ = std::move(sums); }

  // Buffers: the gradient, y (or null), x, the input's gradient, what is added to it, and the weight's gradient, (K, C)
  // or (C, K).
  void run(const Work& work) const override {
    const int64_t parts = parts_for(work.team.size);
    const Range items = work.team.share(groups_ * parts);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t g = item / parts;
      const Part part = part_of(item % parts, parts);
      if (part.weight.size() > 0) {
        std::fill_n(weight_sums(g) + part.weight.begin * row_elements(), part.weight.size() * row_elements(), T(0));
      }
      if (part.input && sums_.norm.defined()) {
        std::fill_n(sums_.norm.data_ptr<T>() + g * 2 * shape_.c, 2 * shape_.c, T(0));
      }
      const Range range = share(blocks_.count(), groups_, g);
      for (int64_t b = range.begin; b < range.end; ++b) run_block(work, g, b, b + 1 == range.end, part);
    }
    work.team.sync();
    if (need_weight_) {
      const int64_t elements = shape_.c * columns_;
      merge_sums(weight_sums(0), groups_, elements, work.team.share(elements), work.buffer<T>(5));
    }
    if (sums_.norm.defined()) {
      T* sums = sums_.norm.data_ptr<T>();
      merge_sums(sums, groups_, 2 * shape_.c, work.team.share(2 * shape_.c), sums);
    }
  }

  size_t thread_scratch_bytes() const override {
    const int64_t panel = need_weight_ ? kernels_.panel_vectors * kernels_.lanes : 0;
    return static_cast<size_t>(blocks_.largest() * (shape_.c + columns_ + panel)) * sizeof(T);
  }
  std::string describe() const override { return "pointwise gradients"; }

 private:
  // What one thread does of a group: rows of the weight's sums, and the input's gradient.
  struct Part {
    Range weight;
    bool input;
  };

  // Into how many parts a group's work is cut: more than one where there are more threads than groups, or groups don't
  // go into the threads evenly, and what each part reads anew is worth it.
  int64_t parts_for(int64_t threads) const {
    if (!need_weight_ || threads >= 2 * groups_) return need_weight_ ? threads / groups_ : 1;
    const int64_t halves = (2 * groups_ + threads - 1) / threads, wholes = (groups_ + threads - 1) / threads;
    return 10 * halves < 9 * 2 * wholes ? 2 : 1;
  }

  // Of several parts one is the input's gradient, and the others some rows each of the weight's. Every sum is taken by
  // one thread in the same order, however many there are.
  Part part_of(int64_t index, int64_t parts) const {
    const int64_t rows = need_weight_ ? shape_.c * columns_ / row_elements() : 0;
    if (parts == 1) return {{0, rows}, need_input_};
    if (!need_input_) return {share(rows, parts, index), false};
    if (index == 0) return {{0, 0}, true};
    return {share(rows, parts - 1, index - 1), false};
  }

  T* weight_sums(int64_t g) const { return sums_.weight.data_ptr<T>() + g * shape_.c * columns_; }
  int64_t row_elements() const { return transposes() ? columns_ : shape_.c; }

  void run_block(const Work& work, int64_t g, int64_t b, bool last, const Part& part) const {
    const Range rows = blocks_.block(b);
    const int64_t c = shape_.c;
    const T *grad = work.buffer<T>(0), *y = work.buffer<T>(1), *x = work.buffer<T>(2);
    T* scratch = reinterpret_cast<T*>(work.thread_scratch);
    T *z = scratch, *of_input = scratch, *of_y = scratch + rows.size() * c;  // the first two not at the same time
    const T* d = grad + rows.begin * columns_;
    if (gradient_.coefficients.has_value() || gradient_.activation != Activation::kNone) {
      blocks_.for_each_image(b, [&](int64_t image, Range part, int64_t) {
        NormGradientArgs<T> args = gradient_args<T>(gradient_, grad + part.begin * columns_,
                                                    y == nullptr ? nullptr : y + part.begin * columns_, columns_, image,
                                                    part.size(), 0, columns_);
        args.out = of_y + (part.begin - rows.begin) * columns_;
        args.out_stride = columns_;
        kernels_.norm_gradient(args);
      });
      d = of_y;
    }
    if (part.weight.size() > 0) {
      const T* a = x + rows.begin * c;
      if (read_.folded.has_value()) {
        blocks_.for_each_image(b, [&](int64_t image, Range part, int64_t) {
          read_pixels(kernels_, read_, x + part.begin * c, c, image, part.size(), 0, c,
                      z + (part.begin - rows.begin) * c);
        });
        a = z;
      }
      GemmTransposedArgs<T> args{};
      args.rows = rows.size();
      args.a = (transposes() ? a : d) + part.weight.begin;
      args.b = transposes() ? d : a;
      args.a_stride = transposes() ? c : columns_;
      args.columns_a = part.weight.size();
      args.b_stride = args.columns_b = args.out_stride = row_elements();
      args.out = weight_sums(g) + part.weight.begin * row_elements();
      args.panel = of_y + rows.size() * columns_;
      if (!last) {
        const Range next = blocks_.block(b + 1);
        const int64_t y_bytes = next.size() * columns_ * static_cast<int64_t>(sizeof(T));
        args.fetch[0] = grad + next.begin * columns_;
        args.fetch[1] = d == of_y && y != nullptr ? y + next.begin * columns_ : nullptr;
        args.fetch[2] = x + next.begin * c;
        args.fetch_bytes[0] = args.fetch_bytes[1] = y_bytes;
        args.fetch_bytes[2] = next.size() * c * static_cast<int64_t>(sizeof(T));
      }
      kernels_.gemm_transposed(args);
    }
    if (!part.input) return;
    T* out = work.buffer<T>(3) + rows.begin * c;
    const bool apart = sums_.norm.defined() || read_.activation != Activation::kNone;
    GemmArgs<T> args = product(kernels_, d, rows.size(), columns_, packed_, c, Activation::kNone,
                               apart && !sums_.gate.defined() ? of_input : out);
    if (adds_) args.residual = work.buffer<T>(4) + rows.begin * c;
    kernels_.gemm(args);
    if (sums_.gate.defined()) {
      blocks_.for_each_image(b, [&](int64_t, Range part, int64_t slot) {
        const int64_t from = (part.begin - rows.begin) * c;
        T* sums = sums_.gate.data_ptr<T>() + slot * c;
        std::fill_n(sums, c, T(0));
        kernels_.gate_gradient({out + from, c, x + part.begin * c, c, part.size(), c, row_or_null<T>(read_.folded, 0),
                                row_or_null<T>(read_.folded, 1), sums, read_.activation});
      });
    } else if (apart) {
      NormGradientArgs<T> at_norm{};
      at_norm.grad = of_input;
      at_norm.x = x + rows.begin * c;
      at_norm.out = out;
      at_norm.grad_stride = at_norm.x_stride = at_norm.out_stride = c;
      at_norm.rows = rows.size();
      at_norm.channels = c;
      at_norm.scale = row_or_null<T>(read_.folded, 0);
      at_norm.shift = row_or_null<T>(read_.folded, 1);
      at_norm.activation = read_.activation;
      at_norm.past_caches = goes_past_caches(out, shape_);
      if (sums_.norm.defined()) {
        at_norm.mean = mean_->const_data_ptr<T>();
        at_norm.sums = sums_.norm.data_ptr<T>() + g * 2 * c;
      }
      kernels_.norm_gradient(at_norm);
    }
  }

  const Kernels<T>& kernels_;
  ImageShape shape_;
  int64_t columns_;
  at::Tensor packed_;
  GradientAt gradient_;
  ReadAs read_;
  OptionalTensor mean_;
  bool need_input_, need_weight_, adds_;
  PixelBlocks blocks_;
  int64_t groups_;
  mutable PointwiseSums sums_;
};

void check_weight(const char* operation, const at::Tensor& x, const at::Tensor& weight) {
  check_tensor(operation, "weight", weight, x.scalar_type(), 4);
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                    operation, ": weight must be (K, C, 1, 1) with C=", x.size(1), ", got ",
                    shape_string(weight.sizes()));
}

// (pixels, C), without a copy.
at::Tensor as_rows(const at::Tensor& image) { return image.permute({0, 2, 3, 1}).reshape({-1, image.size(1)}); }

// The gradients by products of whole images. They are cut in two parts at least, by shapes alone, so that the library
// runs each on one thread and results do not depend on their number.
ConvGradients gradients_of_images(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                                  const OptionalTensor& mean, const at::Tensor& weight, bool need_input,
                                  bool need_weight, const OptionalTensor& added) {
  const at::NoGradGuard no_grad;
  const int64_t c = x.size(1), k = weight.size(0), pixels = x.numel() / c;
  const bool changes = gradient.coefficients.has_value() || gradient.activation != Activation::kNone;
  const at::Tensor rows = as_rows(changes ? batch_norm_gradient(gradient) : gradient.grad);
  ConvGradients result;
  if (need_weight) {
    const at::Tensor z = as_rows(read.folded.has_value() ? batch_norm_apply(x, read, std::nullopt) : x);
    result.weight = at::empty(weight.sizes(), weight.options().requires_grad(false));
    const at::Tensor out = result.weight.view({k, c}), columns = rows.t();
    int64_t parts = 2;  // of 128 rows or so and more, each of which reads all of z
    while (parts < 16 && k >= 256 * parts) parts *= 2;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const at::NoGradGuard no_grad_here;
      for (int64_t i = begin; i < end; ++i) {
        const Range range = share(k, parts, i);
        at::Tensor part = out.narrow(0, range.begin, range.size());
        at::mm_out(part, columns.narrow(0, range.begin, range.size()), z);
      }
    });
  }
  if (!need_input) return result;
  result.input = empty_channels_last(x.sizes(), x);
  const at::Tensor out = as_rows(result.input), matrix = weight.view({k, c});
  int64_t parts = 2;
  while (parts < 64 && pixels >= 256 * parts) parts *= 2;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad_here;
    for (int64_t i = begin; i < end; ++i) {
      const Range range = share(pixels, parts, i);
      at::Tensor part = out.narrow(0, range.begin, range.size());
      at::mm_out(part, rows.narrow(0, range.begin, range.size()), matrix);
    }
  });
  if (added.has_value()) result.input.add_(*added);
  gradients_before_norm(result, x, read, mean);
  return result;
}

}  // namespace

void gradients_before_norm(ConvGradients& result, const at::Tensor& x, const ReadAs& read, const OptionalTensor& mean) {
  if (read.gate.has_value()) {
    result.gate = batch_norm_pixel_sums(x, {read.folded, read.activation, std::nullopt}, result.input);
  } else if (mean.has_value() || read.activation != Activation::kNone) {
    const GradientAt at_norm{result.input, x, read.folded, read.activation, {}, {}, {}};
    if (mean.has_value()) {
      result.sums = batch_norm_gradient_sums(at_norm, *mean, result.input);
    } else {
      result.input = batch_norm_gradient(at_norm);
    }
  }
}

std::tuple<at::Tensor, at::Tensor> pointwise_conv2d_forward(const at::Tensor& x, const ReadAs& read,
                                                            const at::Tensor& weight) {
  constexpr const char* kName = "pointwise_conv2d_forward";
  check_read_as(kName, x, read);
  check_weight(kName, x, weight);
  const Isa isa = current_isa();
  const int64_t k = weight.size(0);
  at::Tensor y = empty_channels_last({x.size(0), k, x.size(2), x.size(3)}, x);
  at::Tensor statistics = at::empty({2, k}, x.options());
  const at::Tensor packed = pack_conv2d(weight, std::nullopt, std::nullopt, isa, call_weights());
  dispatch(x.scalar_type(), [&](auto zero) {
    using Forward = PointwiseForward<decltype(zero)>;
    run_step(Forward(isa, {x.size(0), x.size(2), x.size(3), x.size(1)}, k, packed, read,
                     at::empty({Forward::sums_elements(k)}, x.options()), statistics),
             {buffer_of(x), buffer_of(y)});
  });
  return {y, statistics};
}

ConvGradients pointwise_conv2d_gradients(const GradientAt& gradient, const at::Tensor& x, const ReadAs& read,
                                         const OptionalTensor& mean, const at::Tensor& weight, bool need_input,
                                         bool need_weight, const OptionalTensor& added) {
  constexpr const char* kName = "pointwise_conv2d_gradients";
  check_read_as(kName, x, read);
  check_gradient(kName, gradient);
  check_weight(kName, x, weight);
  check_vector(kName, "mean", mean, x.scalar_type(), x.size(1));
  const Isa isa = current_isa();
  const int64_t n = x.size(0), c = x.size(1), k = weight.size(0);
  const std::vector<int64_t> out_sizes = {n, k, x.size(2), x.size(3)};
  TORCH_CHECK_VALUE(gradient.grad.sizes() == at::IntArrayRef(out_sizes), kName, ": grad must be the output's ",
                    shape_string(out_sizes), ", got ", shape_string(gradient.grad.sizes()));
  if (c * k >= kManyWeights && library_is_fast()) {
    return gradients_of_images(gradient, x, read, mean, weight.contiguous(), need_input, need_weight, added);
  }
  ConvGradients result;
  if (need_input) result.input = empty_channels_last(x.sizes(), x);
  at::Tensor packed;
  if (need_input) packed = pack_conv2d(weight.transpose(0, 1), std::nullopt, std::nullopt, isa, call_weights());
  dispatch(x.scalar_type(), [&](auto zero) {
    PointwiseBackward<decltype(zero)> step(isa, {n, x.size(2), x.size(3), c}, k, packed, gradient, read, mean,
                                           need_input, need_weight, added.has_value());
    PointwiseSums sums;
    if (need_weight) sums.weight = empty_for_now(step.groups() * c * k, x);
    if (need_input && mean.has_value()) sums.norm = at::empty({step.groups(), 2, c}, x.options());
    if (need_input && read.gate.has_value()) sums.gate = at::empty({n, step.parts(), c}, x.options());
    step.set_sums(sums);
    const bool transposes = need_weight && step.transposes();
    at::Tensor transposed;
    if (need_weight) result.weight = at::empty(weight.sizes(), x.options().requires_grad(false));
    if (transposes) transposed = at::empty({c, k}, result.weight.options());
    run_step(step, {buffer_of(gradient.grad), gradient.y.has_value() ? buffer_of(*gradient.y) : Buffer{}, buffer_of(x),
                    need_input ? buffer_of(result.input) : Buffer{}, added.has_value() ? buffer_of(*added) : Buffer{},
                    need_weight ? buffer_of(transposes ? transposed : result.weight) : Buffer{}});
    if (transposes) result.weight.view({k, c}).copy_(transposed.t());
    if (sums.norm.defined()) result.sums = sums.norm.select(0, 0).clone();
    if (sums.gate.defined()) result.gate = sums.gate.sum(1);
  });
  return result;
}

}  // namespace mobilenet_fast
