#include <ATen/core/grad_mode.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>

#include "steps/common.h"

namespace mobilenet_fast {
namespace {

// One range of addresses, of which as much has pages as was ever in use at once. Blocks that are given back join their
// neighbours: a step takes them in one order and gives them back in the reverse one, so that the gradients of large
// maps find room where many small ones were.
class ImageMemory {
 public:
  static ImageMemory& instance() {
    static ImageMemory* const memory = new ImageMemory;  // outlives the last tensor
    return *memory;
  }

  static size_t rounded(size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

  // Null if there are no addresses left.
  char* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      if (range->second >= bytes && (best == free_.end() || range->second < best->second)) best = range;
    }
    if (best == free_.end()) {
      const bool grows = !free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_;
      char* const begin = grows ? free_.rbegin()->first : end_;
      if (static_cast<size_t>(limit_ - begin) < bytes) return nullptr;
      if (grows) free_.erase(std::prev(free_.end()));
      end_ = begin + bytes;
      best = free_.emplace(begin, bytes).first;
    }
    const auto [data, size] = *best;
    free_.erase(best);
    if (size > bytes) free_.emplace(data + bytes, size - bytes);
    used_ += bytes;
    most_ = std::max(most_, used_);
    return data;
  }

  void give_back(char* data, size_t bytes) {
    const std::lock_guard lock(mutex_);
    used_ -= bytes;
    auto range = free_.emplace(data, bytes).first;
    const auto next = std::next(range);
    if (next != free_.end() && data + bytes == next->first) {
      range->second += next->second;
      free_.erase(next);
    }
    if (range != free_.begin()) {
      const auto before = std::prev(range);
      if (before->first + before->second == range->first) {
        before->second += range->second;
        free_.erase(range);
      }
    }
    if (used_ == 0 && static_cast<size_t>(end_ - begin_) > most_ + most_ / 2) drop();
  }

  void release() {
    const std::lock_guard lock(mutex_);
    drop();
  }

 private:
  static constexpr size_t kUnit = size_t{64} << 10, kHugePage = size_t{2} << 20;

  ImageMemory() {
    const size_t pages = static_cast<size_t>(std::max(0L, sysconf(_SC_PHYS_PAGES)));
    const size_t bytes = pages / 2 * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* const all = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (all == MAP_FAILED) return;
    const auto address = reinterpret_cast<uintptr_t>(all);
    begin_ = end_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    limit_ = begin_ + bytes;
#if defined(MADV_HUGEPAGE)
    madvise(begin_, bytes, MADV_HUGEPAGE);  // advice: a refusal costs speed only
#endif
  }

  // Gives the system the pages of what is free.
  void drop() {
    for (const auto& [data, size] : free_) madvise(data, size, MADV_DONTNEED);
    if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_) {
      end_ = free_.rbegin()->first;
      free_.erase(std::prev(free_.end()));
    }
    most_ = used_;
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;  // by address, none beside another
  char *begin_ = nullptr, *end_ = nullptr, *limit_ = nullptr;
  size_t used_ = 0, most_ = 0;
};

}  // namespace

namespace {

// No view of another tensor, which could not be written to in place where it leaves a function of autograd.
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& like) {
  constexpr size_t kLarge = size_t{1} << 20;
  const at::TensorOptions options = like.requires_grad(false);
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  const size_t taken = ImageMemory::rounded(bytes);
  char* const data = bytes < kLarge ? nullptr : ImageMemory::instance().take(taken);
  if (data == nullptr) return at::empty_strided(sizes, strides, options);
  const auto give_back = [taken](void* memory) {
    ImageMemory::instance().give_back(static_cast<char*>(memory), taken);
  };
  return at::from_blob(data, sizes, strides, give_back, options);
}

}  // namespace

at::Tensor empty_image(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  if (format == at::MemoryFormat::Contiguous) return empty_strided(sizes, {c * h * w, h * w, w, 1}, options);
  return empty_strided(sizes, {h * w * c, 1, w * c, c}, options);
}

at::Tensor empty_channels_last(at::IntArrayRef sizes, const at::Tensor& like) {
  return empty_image(sizes, like.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor empty_for_now(int64_t elements, const at::Tensor& like) {
  return empty_strided({elements}, {1}, like.options());
}

at::Tensor converted(const at::Tensor& image, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  return empty_image(image.sizes(), image.options().dtype(dtype), at::MemoryFormat::ChannelsLast).copy_(image);
}

void release_images() { ImageMemory::instance().release(); }

}  // namespace mobilenet_fast
