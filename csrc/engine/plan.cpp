#include "engine/plan.h"

#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "steps/common.h"

namespace mobilenet_fast {
namespace {

at::MemoryFormat engine_format(size_t dim) {
  return dim == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Buffer dense_buffer(void* data, const std::vector<int64_t>& shape) {
  Buffer buffer{data, {0, 0, 0, 0}};
  if (shape.size() == 4) {
    const int64_t c = shape[1], h = shape[2], w = shape[3];
    const int64_t strides[4] = {h * w * c, 1, w * c, c};
    std::copy_n(strides, 4, buffer.strides);
  }
  return buffer;
}

// What the plan was made for, in memory of its own: anything else would be read out of bounds.
bool is_plan_input(const at::Tensor& input, const Value& value) {
  return input.defined() && input.device().is_cpu() && input.layout() == at::kStrided && input.has_storage() &&
         input.sizes() == at::IntArrayRef(value.shape);
}

void check_plan_input(const std::vector<at::Tensor>& inputs, const Value& value) {
  TORCH_CHECK_VALUE(value.location < static_cast<int64_t>(inputs.size()), "accelerate: the plan takes more than ",
                    inputs.size(), " inputs");
  const at::Tensor& input = inputs[value.location];
  TORCH_CHECK_VALUE(is_plan_input(input, value), "accelerate: the plan takes a dense CPU tensor of shape ",
                    shape_string(value.shape), ", got ", input.toString(), " of shape ", shape_string(input.sizes()));
}

// The value whose memory value `i` lies in.
size_t root(const std::vector<Value>& values, size_t i) {
  while (values[i].storage == Storage::kSlice) i = values[i].location;
  return i;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

size_t whole_lines(size_t bytes) { return static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64)); }

int64_t next_plan_id() {
  static std::atomic<int64_t> next{0};
  return next++;
}

// What each thread of a team does. `seconds`, where given, gets the time of each step added, from barrier to barrier.
template <class Steps>
void run_steps(const Work& work, const Steps& steps, double* seconds) {
  for (size_t i = 0; i < steps.size(); ++i) {
    if (i > 0) work.team.sync();
    const double start = seconds == nullptr ? 0.0 : now();
    steps[i]->run(work);
    if (seconds != nullptr) {
      work.team.sync();
      if (work.team.index == 0) seconds[i] += now() - start;
    }
  }
}

}  // namespace

Memory allocate(size_t bytes) {
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  const size_t huge = bytes / kHugePage * kHugePage;  // of what is left, a huge page would be mostly waste
  void* data = nullptr;
  if (posix_memalign(&data, huge > 0 ? kHugePage : kLine, bytes) != 0) throw std::bad_alloc();
  Memory memory(static_cast<char*>(data));
#if defined(MADV_HUGEPAGE)
  if (huge > 0) madvise(data, huge, MADV_HUGEPAGE);  // advice: a refusal costs speed only
#endif
  return memory;
}

double peak_gflops(Isa isa, int threads) {
  const Kernels<float>& k = kernels<float>(isa);
  constexpr int64_t kRounds = 20000;  // about a millisecond
  double best = 0;
  run_team(threads, [&](const Team& team) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      team.sync();
      const double start = now();
      const volatile float result = k.multiply_add(kRounds, 0.99f, 0.01f);
      (void)result;
      team.sync();
      const double gflops = 1e-9 * static_cast<double>(kRounds * k.multiply_add_flops * team.size) / (now() - start);
      if (team.index == 0) best = std::max(best, gflops);
    }
  });
  return best;
}

void run_step(const Step& step, const std::vector<Buffer>& buffers) {
  thread_local Scratch scratch;
  const int threads = static_cast<int>(std::clamp<int64_t>(step.threads_worth(), 1, team_size()));
  const size_t shared = whole_lines(step.shared_scratch_bytes()), thread = whole_lines(step.thread_scratch_bytes());
  char* memory = scratch.at_least(shared + thread * threads + 64);
  run_team(threads,
           [&](const Team& team) { step.run({team, buffers.data(), memory, memory + shared + thread * team.index}); });
}

std::unique_ptr<Arenas::Arena> Arenas::take(int64_t plan) {
  const std::lock_guard lock(mutex_);
  if (idle_.empty()) return std::make_unique<Arena>();
  auto found = std::find_if(idle_.begin(), idle_.end(), [&](const auto& arena) { return arena->plan == plan; });
  if (found == idle_.end()) --found;
  auto arena = std::move(*found);
  idle_.erase(found);
  return arena;
}

void Arenas::give_back(std::unique_ptr<Arena> arena) {
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(arena));
}

size_t Arenas::idle_bytes() const {
  const std::lock_guard lock(mutex_);
  size_t bytes = 0;
  for (const auto& arena : idle_) bytes += arena->memory.bytes() + arena->part_memory.bytes() + arena->scratch.bytes();
  return bytes;
}

Plan::Plan(at::ScalarType dtype, std::vector<Value> values, std::vector<int64_t> outputs, int64_t arena_bytes,
           int64_t part_bytes, std::shared_ptr<Arenas> arenas)
    : dtype_(dtype),
      values_(std::move(values)),
      outputs_(std::move(outputs)),
      arena_bytes_(arena_bytes),
      part_bytes_(part_bytes),
      id_(next_plan_id()),
      arenas_(std::move(arenas)) {
  for (size_t i = 0; i < values_.size(); ++i) {
    const Storage storage = values_[root(values_, i)].storage;
    if (storage != Storage::kArena && storage != Storage::kPart) outside_.push_back(static_cast<int64_t>(i));
  }
}

bool Plan::takes(const at::Tensor& input) const {
  const Value* only = nullptr;
  for (int64_t i : outside_) {
    if (values_[i].storage != Storage::kInput) continue;
    if (only != nullptr) return false;
    only = &values_[i];
  }
  return only != nullptr && only->location == 0 && input.scalar_type() == dtype_ && is_plan_input(input, *only);
}

void Plan::add(std::unique_ptr<Step> step) {
  if (segments_.empty() || segments_.back().aten != nullptr || segments_.back().parts != parts) {
    segments_.emplace_back();
    segments_.back().parts = parts;
  }
  Segment& segment = segments_.back();
  segment.shared_scratch_bytes = std::max(segment.shared_scratch_bytes, step->shared_scratch_bytes());
  segment.thread_scratch_bytes = std::max(segment.thread_scratch_bytes, step->thread_scratch_bytes());
  segment.steps.push_back(std::move(step));
}

void Plan::add(AtenStep step) {
  segments_.emplace_back();
  segments_.back().aten = std::make_unique<AtenStep>(std::move(step));
}

std::vector<std::string> Plan::describe() const {
  std::vector<std::string> lines;
  for (const Segment& segment : segments_) {
    const std::string times = segment.parts == 1 ? "" : std::to_string(segment.parts) + " × ";
    for (const auto& step : segment.steps) lines.push_back(times + step->describe());
    if (segment.aten != nullptr) lines.push_back("ATen " + c10::toString(segment.aten->op.operator_name()));
  }
  return lines;
}

void Plan::run_native(const Segment& segment, const std::vector<Buffer>& buffers, Arena& arena, double* seconds) const {
  if (segment.parts > 1) {
    run_parts(segment, buffers, arena, seconds);
    return;
  }
  const int threads = team_size();
  const size_t shared = whole_lines(segment.shared_scratch_bytes), thread = whole_lines(segment.thread_scratch_bytes);
  char* memory = arena.scratch.at_least(shared + thread * threads + 64);
  run_team(threads, [&](const Team& team) {
    run_steps({team, buffers.data(), memory, memory + shared + thread * team.index}, segment.steps, seconds);
  });
}

void Plan::run_parts(const Segment& segment, const std::vector<Buffer>& buffers, Arena& arena, double* seconds) const {
  const int threads = team_size();
  const int64_t most = std::min<int64_t>(threads, segment.parts);  // teams at once
  const size_t shared = whole_lines(segment.shared_scratch_bytes), thread = whole_lines(segment.thread_scratch_bytes);
  const size_t part_bytes = static_cast<size_t>(round_up(part_bytes_, 4096));
  char* scratch = arena.scratch.at_least(shared * most + thread * threads + 64);
  char* memory = arena.part_memory.at_least(part_bytes * most + 64);
  std::vector<Barrier> barriers(most);
  run_team(threads, [&](const Team& all) {
    std::vector<Buffer> own(values_.size());
    char* thread_scratch = scratch + shared * most + thread * all.index;
    for_each_part(all, segment.parts, barriers.data(), [&](const Team& team, int64_t index, int64_t part) {
      locate_part(part, segment.parts, buffers, memory + part_bytes * index, own);
      run_steps({team, own.data(), scratch + shared * index, thread_scratch}, segment.steps,
                index == 0 ? seconds : nullptr);
    });
  });
}

void Plan::locate_part(int64_t part, int64_t parts, const std::vector<Buffer>& whole, char* memory,
                       std::vector<Buffer>& buffers) const {
  const int64_t element = static_cast<int64_t>(at::elementSize(dtype_));
  for (size_t i = 0; i < values_.size(); ++i) {
    const Value& value = values_[i];
    if (value.storage == Storage::kPart) {
      buffers[i] = dense_buffer(memory + value.location, value.shape);
    } else if (value.storage == Storage::kSlice) {
      buffers[i] = buffers[value.location];
      buffers[i].data = static_cast<char*>(buffers[i].data) + value.channel * element;
    } else if (whole[i].data != nullptr && !value.shape.empty() && value.shape[0] > 0) {
      buffers[i] = whole[i];
      const int64_t images = value.shape[0] / parts;
      const int64_t image =
          value.shape.size() == 4 ? whole[i].strides[0] : c10::multiply_integers(value.shape) / value.shape[0];
      buffers[i].data = static_cast<char*>(whole[i].data) + part * images * image * element;
    }
  }
}

at::Tensor Plan::tensor_of(int64_t value, const std::vector<at::Tensor>& tensors,
                           const std::vector<Buffer>& buffers) const {
  if (tensors[value].defined()) return tensors[value];
  const Value& v = values_[value];
  const auto options = at::TensorOptions().dtype(dtype_);
  if (v.shape.size() != 4) return at::from_blob(buffers[value].data, v.shape, options);
  const int64_t c = v.shape[1], h = v.shape[2], w = v.shape[3];
  return at::from_blob(buffers[value].data, v.shape, {h * w * c, 1, w * c, c}, options);
}

void Plan::run_aten(const AtenStep& step, bool contiguous, std::vector<at::Tensor>& tensors,
                    std::vector<Buffer>& buffers) const {
  torch::jit::Stack stack;
  int64_t elements = 0;  // of the results
  for (int64_t value : step.outputs) elements += value < 0 ? 0 : c10::multiply_integers(values_[value].shape);
  std::vector<at::Tensor> borrowed;  // views of arena memory, which a result must not outlive
  std::vector<at::Tensor> others;    // what belongs to somebody else: inputs, constants, values before
  const auto get = [&](int64_t value) {
    at::Tensor tensor = tensor_of(value, tensors, buffers);
    (tensors[value].defined() ? others : borrowed).push_back(tensor);
    return step.returned && contiguous && tensor.numel() < elements ? tensor.contiguous() : tensor;
  };
  for (const AtenArgument& argument : step.arguments) {
    if (argument.kind == AtenArgument::kConstant) {
      stack.push_back(argument.constant);
      if (argument.constant.isTensor()) others.push_back(argument.constant.toTensor());
    } else if (argument.kind == AtenArgument::kValue) {
      stack.push_back(get(argument.values[0]));
    } else if (argument.kind == AtenArgument::kValues) {
      c10::List<at::Tensor> list;
      for (int64_t value : argument.values) list.push_back(get(value));
      stack.push_back(std::move(list));
    } else {
      c10::List<std::optional<at::Tensor>> list;
      for (int64_t value : argument.values) list.push_back(value < 0 ? std::nullopt : std::make_optional(get(value)));
      stack.push_back(std::move(list));
    }
  }
  step.op.callBoxed(stack);

  std::vector<at::Tensor> results;
  for (const c10::IValue& result : stack) {
    if (result.isTensor()) {
      results.push_back(result.toTensor());
    } else if (result.isTensorList()) {
      for (const at::Tensor& tensor : result.toTensorVector()) results.push_back(tensor);
    } else {
      TORCH_CHECK_NOT_IMPLEMENTED(false, "accelerate: ", c10::toString(step.op.operator_name()),
                                  " must return tensors to be a step of a plan");
    }
  }
  for (size_t i = 0; i < step.outputs.size() && i < results.size(); ++i) {
    const int64_t value = step.outputs[i];
    if (value < 0) continue;
    at::Tensor result = results[i];
    const bool is_output = std::find(outputs_.begin(), outputs_.end(), value) != outputs_.end();
    const auto is_shared = [&](const at::Tensor& tensor) { return tensor.defined() && result.is_alias_of(tensor); };
    if (std::any_of(borrowed.begin(), borrowed.end(), is_shared) ||
        (is_output && (std::any_of(others.begin(), others.end(), is_shared) ||
                       std::any_of(results.begin(), results.begin() + static_cast<int64_t>(i), is_shared)))) {
      result = result.clone();
    }
    const bool stays = step.returned && result.dim() == 4 && result.is_non_overlapping_and_dense();
    if (result.scalar_type() == dtype_ && !stays) {
      const at::Tensor dense = result.contiguous(engine_format(values_[value].shape.size()));
      buffers[value] = dense_buffer(dense.data_ptr(), values_[value].shape);
      result = dense;
    }
    tensors[value] = std::move(result);
  }
}

std::vector<double> Plan::profile(const std::vector<at::Tensor>& inputs) {
  std::vector<double> seconds;
  execute(inputs, &seconds);
  return seconds;
}

std::vector<at::Tensor> Plan::execute(const std::vector<at::Tensor>& inputs, std::vector<double>* seconds) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> tensors(values_.size());
  std::unique_ptr<Arena> arena = arenas_->take(id_);
  std::vector<Buffer>& buffers = arena->buffers;
  const auto locate = [&](size_t i) {
    const Value& value = values_[i];
    if (value.storage == Storage::kArena) {
      buffers[i] =
          dense_buffer(arena->memory.at_least(static_cast<size_t>(arena_bytes_)) + value.location, value.shape);
    } else if (value.storage == Storage::kInput) {
      check_plan_input(inputs, value);
      const at::Tensor input = inputs[value.location].resolve_neg();  // memory that holds the numbers themselves
      tensors[i] = value.any_strides ? input : input.contiguous(engine_format(value.shape.size()));
      buffers[i] =
          value.any_strides ? buffer_with_strides(tensors[i]) : dense_buffer(tensors[i].data_ptr(), value.shape);
    } else if (value.storage == Storage::kSlice) {
      buffers[i] = buffers[value.location];
      buffers[i].data =
          static_cast<char*>(buffers[i].data) + value.channel * static_cast<int64_t>(at::elementSize(dtype_));
    } else if (value.storage == Storage::kOutput) {
      tensors[i] = at::detail::empty_cpu(value.shape, dtype_, false, engine_format(value.shape.size()));
      buffers[i] = dense_buffer(tensors[i].data_ptr(), value.shape);
    } else {
      buffers[i] = Buffer{};  // until its step runs
    }
  };
  if (arena->plan != id_) {
    arena->plan = id_;
    buffers.resize(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) locate(i);
  } else {
    for (int64_t i : outside_) locate(i);
  }
  const bool contiguous = std::none_of(inputs.begin(), inputs.end(), [](const at::Tensor& input) {
    return !input.is_contiguous() && input.is_contiguous(at::MemoryFormat::ChannelsLast);
  });
  for (const Segment& segment : segments_) {
    const size_t steps = segment.aten != nullptr ? 1 : segment.steps.size();
    const double start = seconds == nullptr ? 0.0 : now();
    if (seconds != nullptr) seconds->resize(seconds->size() + steps, 0.0);
    double* times = seconds == nullptr ? nullptr : seconds->data() + seconds->size() - steps;
    if (segment.aten != nullptr) {
      run_aten(*segment.aten, contiguous, tensors, buffers);
      if (times != nullptr) *times = now() - start;
    } else {
      run_native(segment, buffers, *arena, times);
    }
  }
  std::vector<at::Tensor> results;
  for (int64_t output : outputs_) results.push_back(tensors[output]);
  arenas_->give_back(std::move(arena));
  return results;
}

}  // namespace mobilenet_fast
