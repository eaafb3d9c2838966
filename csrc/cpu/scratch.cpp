#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

namespace tgdp {

Scratch::~Scratch() { std::free(data_); }

unsigned char* Scratch::reserve(int64_t bytes) {
  if (bytes <= size_) return data_;
  std::free(data_);
  data_ = nullptr;
  size_ = 0;
  // Large memory in huge pages where the system provides them: a matmul walks through many rows that lie far apart.
  const size_t page = bytes >= (4 << 20) ? size_t{2} << 20 : 4096;
  const auto size = (static_cast<size_t>(bytes) + page - 1) / page * page;
  data_ = static_cast<unsigned char*>(std::aligned_alloc(page, size));
  if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (page > 4096) (void)madvise(data_, size, MADV_HUGEPAGE);
#endif
  std::memset(data_, 0, size);
  size_ = static_cast<int64_t>(size);
  return data_;
}

Operand Arena::take_operand(Precision precision, int64_t rows, int64_t ld) {
  Operand result;
  result.ld = ld;
  if (precision == Precision::f32) result.f32 = take<float>(rows * ld);
  if (precision != Precision::f32) result.high = take<uint16_t>(rows * ld);
  if (precision == Precision::bf16x3) result.low = take<uint16_t>(rows * ld);
  return result;
}

Slopes Arena::take_slopes(Precision precision, int64_t rows, int64_t ld) {
  Slopes result;
  result.ld = ld;
  if (precision == Precision::bf16) {
    result.bf16 = take<uint16_t>(rows * ld);
  } else {
    result.f32 = take<float>(rows * ld);
  }
  return result;
}

}  // namespace tgdp
