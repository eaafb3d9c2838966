// Matmuls of tensor cores, their loads from shared memory, and asynchronous copies to it, for sm_80 and newer: inline
// PTX.
#pragma once

#include "device.cuh"

namespace tgdp::cuda {

#if !defined(TGDP_EMULATION)

// d += a b for a [16, 16] and b [16, 8], by the 32 lanes of a warp; with g = lane / 4 and t = lane % 4, a pair of
// 16-bit elements per word:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);  b: (2t, g), (2t + 8, g);  d: (g, 2t), (g + 8, 2t)
template <typename Element>
TGDP_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define TGDP_MMA(type)                                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                     \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (Element::kDtype == Dtype::bf16) {
    TGDP_MMA("bf16");
  } else {
    TGDP_MMA("f16");
  }
#undef TGDP_MMA
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 m + r names the first element of row r of matrix m. Word m of a lane
// is elements (lane / 4, 2 (lane % 4)) and the next of matrix m, or of its transpose.
template <bool kTransposed>
TGDP_DEVICE void load_matrices(uint32_t (&words)[4], Shared<uint16_t> row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 16 bytes, the last 16 - `bytes` of them zeros. Both addresses are multiples of 16.
template <typename T>
TGDP_DEVICE void copy_async(Shared<T> to, const void* from, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}

// Ends a group of copies.
TGDP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until the thread's own copies have arrived but for the latest kPending groups.
template <int kPending>
TGDP_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace tgdp::cuda
