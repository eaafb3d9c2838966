// Element types of tensors that the kernels read and write.
#pragma once

#include <cstdint>

namespace tgdp {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace tgdp
