// A step: one operation with its shapes, packed weights and choices fixed. An eager operator runs a plan of one step, a
// network a plan of many; either way this is the only place where the operation is split over threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/team.h"
#include "kernels/isa.h"

namespace mobilenet_fast {

// Where a tensor that a step reads or writes lies at run time. Tensors of four dimensions are (N, C, H, W) in memory as
// N × H × W × C, dense; only a step that says so accepts the other strides given here.
struct Buffer {
  void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};  // of (N, C, H, W), in elements, for four dimensions; 0 for dense
};

struct Work {
  const Team& team;
  const Buffer* buffers;
  char* shared_scratch;  // of all threads
  char* thread_scratch;  // of this thread

  template <class T>
  T* buffer(int index) const {
    return index < 0 ? nullptr : static_cast<T*>(buffers[index].data);
  }
};

class Step {
 public:
  virtual ~Step() = default;
  // Called by every thread of the team. The caller synchronises the team after it.
  virtual void run(const Work& work) const = 0;
  virtual size_t shared_scratch_bytes() const { return 0; }
  virtual size_t thread_scratch_bytes() const { return 0; }
  // More threads than this would wait for each other longer than they work, when the step runs alone.
  virtual int64_t threads_worth() const { return INT32_MAX; }
  // What the step chose, for reports: "gemm 784×72×40, panels of 3 vectors".
  virtual std::string describe() const = 0;
};

// Memory for arenas and packed weights, in huge pages where it is large: a network walks through it once a forward, and
// the page tables of 4 KiB pages cost a sixth of the bandwidth.
struct FreeDeleter {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, FreeDeleter>;
Memory allocate(size_t bytes);

// Memory that only grows.
class Scratch {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = allocate(bytes);
      size_ = bytes;
    }
    return memory_.get();
  }
  size_t bytes() const { return size_; }

 private:
  Memory memory_;
  size_t size_ = 0;
};

// Multiply-adds of `threads` threads together that registers alone allow, in float32 GFLOP/s.
double peak_gflops(Isa isa, int threads);

// Runs one step for an eager operator.
void run_step(const Step& step, const std::vector<Buffer>& buffers);

}  // namespace mobilenet_fast
