// Tensor-core products, their loads from shared memory, and asynchronous copies to it, for sm_80 and newer: inline PTX,
// or the same by the fragment layouts of the PTX manual in the emulation.
#pragma once

#include "device.cuh"

namespace tgdp::cuda {

#if defined(TGDP_EMULATION)

using emulation::Block;
using emulation::Place;

#define TGDP_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// d += a b for a [16, 16] and b [16, 8], by the 32 lanes of a warp; with g = lane / 4 and t = lane % 4, a pair of
// 16-bit elements per word:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);  b: (2t, g), (2t + 8, g);  d: (g, 2t), (g + 8, 2t)
template <typename Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TGDP_PLACE) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } operand{d, a, b};
  Block::active->meet("mma_m16n8k16", {file, line}, operand, [](Operand** lanes, const emulation::Warp& warp) {
    if (warp.size != 32) throw emulation::Error("a product needs a whole warp");
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int word = 0; word < 4; ++word) {
          const auto bits = static_cast<uint16_t>(lanes[lane]->a[word] >> 16 * half);
          left[g + word % 2 * 8][2 * t + half + word / 2 * 8] = Element::to_float(bits);
        }
        for (int word = 0; word < 2; ++word) {
          const auto bits = static_cast<uint16_t>(lanes[lane]->b[word] >> 16 * half);
          right[2 * t + half + word * 8][g] = Element::to_float(bits);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes[lane]->d[i] = sum;
      }
    }
  });
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 m + r names the first element of row r of matrix m. Word m of a lane is
// elements (lane / 4, 2 (lane % 4)) and the next of matrix m, or of its transpose.
template <bool kTransposed>
void load_matrices(uint32_t (&words)[4], Shared<uint16_t> row, TGDP_PLACE) {
  struct Operand {
    uint32_t* words;
    Shared<uint16_t> row;
    uint16_t elements[8];
  } operand{words, row, {}};
  row.check(16);
  for (int i = 0; i < 8; ++i) operand.elements[i] = row[i];
  Block::active->meet("load_matrices", {file, line}, operand, [](Operand** lanes, const emulation::Warp& warp) {
    if (warp.size != 32) throw emulation::Error("matrices are loaded by a whole warp");
    // The rows of a matrix come at once where they lie in different banks: 16-byte parts of 128 bytes.
    for (int m = 0; m < 4; ++m) {
      uint32_t parts = 0;
      for (int r = 0; r < 8; ++r) parts |= 1u << lanes[8 * m + r]->row.offset() / 16 % 8;
      if (parts != 0xffu) ++emulation::settings.bank_conflicts;
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
          const int r = lane / 4, c = lane % 4 * 2 + half;
          const uint32_t bits = kTransposed ? lanes[8 * m + c]->elements[r] : lanes[8 * m + r]->elements[c];
          word |= bits << 16 * half;
        }
        lanes[lane]->words[m] = word;
      }
    }
  });
}

// Copies 16 bytes, the last 16 - `bytes` of them zeros. Both addresses are multiples of 16.
template <typename T>
void copy_async(Shared<T> to, const void* from, int bytes) {
  to.check(16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw emulation::Error("misaligned source of a copy");
  if (bytes < 0 || bytes > 16) throw emulation::Error("a copy has 0 to 16 bytes");
  Block::active->copy(to.offset(), from, static_cast<size_t>(bytes));
}

// Ends a group of copies.
inline void commit_copies() { Block::active->commit(); }

// Until the thread's own copies have arrived but for the latest kPending groups.
template <int kPending>
void wait_for_copies() {
  Block::active->wait_for_copies(kPending);
}

#else

template <typename Element>
TGDP_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (Element::kDtype == Dtype::bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

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

template <typename T>
TGDP_DEVICE void copy_async(Shared<T> to, const void* from, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}

TGDP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
TGDP_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace tgdp::cuda
