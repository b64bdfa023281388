// A network as a list of steps over one arena. Made by Python (mobilenet_fast/accelerate), run here: runs of native
// steps share one parallel region, a step that goes through ATen stands between regions.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/step.h"

namespace mobilenet_fast {

enum class Storage { kArena, kPart, kInput, kOutput, kAten, kSlice };

// A tensor of the plan. In the arena and in outputs, four-dimensional tensors lie as N × H × W × C and others
// contiguous. One of a part of the batch lies in memory of the threads that run that part. A slice is some of the
// channels of another value, for a step to write or read.
struct Value {
  Storage storage;
  // kArena, kPart: offset in bytes; kInput, kOutput: position; kSlice: the value it is part of, an earlier one
  int64_t location;
  std::vector<int64_t> shape;
  bool any_strides;  // kInput: its readers accept it as it comes
  int64_t channel;   // kSlice: the first
};

// One argument of an ATen operator: a constant, a value of the plan, or a list of values (-1 for None).
struct AtenArgument {
  enum Kind { kConstant, kValue, kValues, kOptionalValues } kind;
  c10::IValue constant;
  std::vector<int64_t> values;
};

struct AtenStep {
  c10::OperatorHandle op;
  std::vector<AtenArgument> arguments;
  std::vector<int64_t> outputs;  // values that take its results, in order; a list result is spread out; -1 drops one
  bool returned;                 // no other step reads them: images keep the layout that the operator gives
};

// The memory that a network's plans run in, one arena a call at a time: plans of all shapes share them, so that they
// take what the largest takes.
class Arenas {
 public:
  struct Arena {
    Scratch memory;
    Scratch part_memory;
    Scratch scratch;
    std::vector<Buffer> buffers;  // of all values of the plan that ran here last; those in the arena stay as they are
    int64_t plan = -1;            // which that was
  };

  // The one where this plan ran last, if it is free.
  std::unique_ptr<Arena> take(int64_t plan);
  void give_back(std::unique_ptr<Arena> arena);
  // What those without a call hold.
  size_t idle_bytes() const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> idle_;
};

class Plan {
 public:
  Plan(at::ScalarType dtype, std::vector<Value> values, std::vector<int64_t> outputs, int64_t arena_bytes,
       int64_t part_bytes, std::shared_ptr<Arenas> arenas);
  // Steps added while `parts` > 1 are for one of so many equal parts of the batch, and run once for each. They read and
  // write values of a part, and that part of the first dimension of any other value.
  int64_t parts = 1;
  void add(std::unique_ptr<Step> step);
  void add(AtenStep step);

  // Any number of calls may run at once; each takes an arena of its own. Outputs are fresh tensors.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) { return execute(inputs, nullptr); }
  // Whether the plan is for one such tensor.
  bool takes(const at::Tensor& input) const;
  // The seconds that each step of one run takes, in the order of describe().
  std::vector<double> profile(const std::vector<at::Tensor>& inputs);

  at::ScalarType dtype() const { return dtype_; }
  std::vector<std::string> describe() const;

 private:
  using Arena = Arenas::Arena;
  struct Segment {  // native steps that run in one region, or one ATen step
    std::vector<std::unique_ptr<Step>> steps;
    std::unique_ptr<AtenStep> aten;
    int64_t parts = 1;
    size_t shared_scratch_bytes = 0, thread_scratch_bytes = 0;
  };

  std::vector<at::Tensor> execute(const std::vector<at::Tensor>& inputs, std::vector<double>* seconds);
  void run_native(const Segment& segment, const std::vector<Buffer>& buffers, Arena& arena, double* seconds) const;
  void run_parts(const Segment& segment, const std::vector<Buffer>& buffers, Arena& arena, double* seconds) const;
  void locate_part(int64_t part, int64_t parts, const std::vector<Buffer>& whole, char* memory,
                   std::vector<Buffer>& buffers) const;
  // Results that are outputs of the plan share no memory with an argument, nor with one another. A step whose results
  // are returned gets images `contiguous` if results should be so, where those are larger.
  void run_aten(const AtenStep& step, bool contiguous, std::vector<at::Tensor>& tensors,
                std::vector<Buffer>& buffers) const;
  at::Tensor tensor_of(int64_t value, const std::vector<at::Tensor>& tensors, const std::vector<Buffer>& buffers) const;

  at::ScalarType dtype_;
  std::vector<Value> values_;
  std::vector<int64_t> outside_;  // the values in neither the arena nor the memory of a part
  std::vector<int64_t> outputs_;
  int64_t arena_bytes_, part_bytes_;
  std::vector<Segment> segments_;
  const int64_t id_;  // no other plan of the process has it
  std::shared_ptr<Arenas> arenas_;
};

}  // namespace mobilenet_fast
