// Working memory that threads keep.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace tgdp {

// Memory that grows and is kept, aligned to a cache line and zero when new. One per thread and purpose: allocating it
// for each call would cost a page fault per 4 KiB.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // At least `bytes` of memory; its contents are lost when it has to grow.
  unsigned char* reserve(int64_t bytes);

 private:
  unsigned char* data_ = nullptr;
  int64_t size_ = 0;
};

// Carves aligned arrays out of memory; without memory it only counts what they need.
class Arena {
 public:
  explicit Arena(unsigned char* data) : data_(data) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* result = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(result);
  }
  Operand take_operand(Precision precision, int64_t rows, int64_t ld);
  Slopes take_slopes(Precision precision, int64_t rows, int64_t ld);
  bool counts() const { return data_ == nullptr; }
  int64_t used() const { return used_; }

 private:
  unsigned char* data_;
  int64_t used_ = 0;
};

// A T(arguments.., arena) with its arrays in scratch memory.
template <typename T, typename... Arguments>
T laid_out(Scratch& scratch, const Arguments&... arguments) {
  Arena count(nullptr);
  T(arguments..., count);
  Arena arena(scratch.reserve(count.used()));
  return T(arguments..., arena);
}

}  // namespace tgdp
