#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace tgdp {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kSmallest = kPage / 2;

// Bytes that may be kept: a sixteenth of the machine's memory, at least 512 MiB.
size_t most_kept() {
  constexpr size_t least = size_t{512} << 20;
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) return std::max(least, static_cast<size_t>(pages) / 16 * static_cast<size_t>(page));
#endif
  return least;
}

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    void* memory = take(size);
    if (memory == nullptr) {
      memory = std::aligned_alloc(kPage, size);
      TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "tgdp_fast: cannot allocate ", size, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      // Only advice: nothing is lost where it is refused.
      (void)madvise(memory, size, MADV_HUGEPAGE);
#endif
    }
    c10::profiledCPUMemoryReporter().New(memory, size);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[memory] = size;
    return {memory, memory, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }

  static Pool& instance() {
    // Never destroyed: tensors may outlive everything else.
    static auto* pool = new Pool;
    return *pool;
  }

 private:
  struct Block {
    void* memory;
    size_t size;
  };

  // The newest kept block of this size, or null.
  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = kept_.size(); i-- > 0;) {
      if (kept_[i].size != size) continue;
      void* memory = kept_[i].memory;
      kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
      kept_bytes_ -= size;
      return memory;
    }
    return nullptr;
  }

  static void give_back(void* memory) {
    Pool& pool = instance();
    c10::profiledCPUMemoryReporter().Delete(memory);
    std::vector<void*> surplus;
    {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      const auto entry = pool.sizes_.find(memory);
      const size_t size = entry->second;
      pool.sizes_.erase(entry);
      pool.kept_.push_back({memory, size});
      pool.kept_bytes_ += size;
      // The oldest blocks are freed first, this one too if it is too large.
      while (pool.kept_bytes_ > pool.most_) {
        surplus.push_back(pool.kept_.front().memory);
        pool.kept_bytes_ -= pool.kept_.front().size;
        pool.kept_.erase(pool.kept_.begin());
      }
    }
    for (void* old : surplus) std::free(old);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  size_t kept_bytes_ = 0;
  const size_t most_ = most_kept();
  std::unordered_map<void*, size_t> sizes_;
};

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t elements = 1;
  for (int64_t size : sizes) elements *= size;
  const auto type = c10::typeMetaToScalarType(options.dtype());
  if (static_cast<size_t>(elements) * c10::elementSize(type) < kSmallest) {
    return at::detail::empty_cpu(sizes, type, false, at::MemoryFormat::Contiguous);
  }
  return at::detail::empty_generic(sizes, &Pool::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                   at::MemoryFormat::Contiguous);
}

}  // namespace tgdp
