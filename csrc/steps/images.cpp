#include <map>
#include <mutex>

#include "steps/training.h"

namespace mobilenet_fast {
namespace {

// Blocks of whole huge pages.
class ImageMemory {
 public:
  static ImageMemory& instance() {
    static ImageMemory* const memory = new ImageMemory;  // outlives the last tensor
    return *memory;
  }

  // The block, and how large it is.
  std::pair<char*, size_t> take(size_t bytes) {
    bytes = (bytes + kUnit - 1) / kUnit * kUnit;
    const std::lock_guard lock(mutex_);
    auto found = kept_.lower_bound(bytes);
    if (found != kept_.end() && found->first <= bytes + bytes / 8 + kUnit) {
      const std::pair<char*, size_t> block{found->second, found->first};
      kept_.erase(found);
      kept_bytes_ -= block.second;
      used_bytes_ += block.second;
      return block;
    }
    used_bytes_ += bytes;
    most_bytes_ = std::max(most_bytes_, used_bytes_);
    while (!kept_.empty() && used_bytes_ + kept_bytes_ > most_bytes_ + most_bytes_ / 8) drop(kept_.begin());
    return {allocate(bytes).release(), bytes};
  }

  void give_back(char* data, size_t bytes) {
    const std::lock_guard lock(mutex_);
    used_bytes_ -= bytes;
    kept_bytes_ += bytes;
    kept_.emplace(bytes, data);
  }

  void release() {
    const std::lock_guard lock(mutex_);
    while (!kept_.empty()) drop(kept_.begin());
    most_bytes_ = used_bytes_;
  }

 private:
  static constexpr size_t kUnit = size_t{2} << 20;

  void drop(std::multimap<size_t, char*>::iterator block) {
    kept_bytes_ -= block->first;
    std::free(block->second);
    kept_.erase(block);
  }

  std::mutex mutex_;
  std::multimap<size_t, char*> kept_;
  size_t used_bytes_ = 0, kept_bytes_ = 0, most_bytes_ = 0;
};

}  // namespace

at::Tensor empty_channels_last(at::IntArrayRef sizes, const at::Tensor& like) {
  constexpr size_t kLarge = size_t{1} << 20;
  const at::TensorOptions options = like.options().requires_grad(false);
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * like.element_size();
  if (bytes < kLarge) return at::empty(sizes, options, at::MemoryFormat::ChannelsLast);
  const auto [data, size] = ImageMemory::instance().take(bytes);
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  const auto give_back = [size = size](void* memory) {
    ImageMemory::instance().give_back(static_cast<char*>(memory), size);
  };
  return at::from_blob(data, sizes, {h * w * c, 1, w * c, c}, give_back, options);
}

void release_images() { ImageMemory::instance().release(); }

}  // namespace mobilenet_fast
