// What the kernels and launchers of csrc/cuda need of the device, by the emulation: in place of the parts of device.cuh,
// cluster.cuh and tensor_core.cuh that are CUDA or PTX. What the functions do stands there.
#pragma once

#include "emulation.h"

namespace tgdp::cuda {

// device.cuh -------------------------------------------------------------------------------------------------

using emulation::Shared;

template <typename T>
Shared<T> shared_array(size_t offset, size_t count) {
  return {offset, offset, offset + count * sizeof(T)};
}

template <typename To, typename From>
Shared<To> shared_as(Shared<From> from) {
  return from.template as<To>();
}

inline float2 load_here(const float2* from) { return *from; }

inline uint32_t pack_bf16(float first, float second) { return to_bf16(first) | static_cast<uint32_t>(to_bf16(second)) << 16; }
inline uint32_t pack_f16(float first, float second) { return to_f16(first) | static_cast<uint32_t>(to_f16(second)) << 16; }
inline float unpack_f16(uint16_t bits) { return from_f16(bits); }

template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), uint32_t cluster_size, uint32_t blocks, uint32_t threads,
                            size_t shared_bytes, void*, const Arguments&... arguments) {
  static thread_local std::string message;
  try {
    emulation::launch(kernel, blocks, cluster_size, threads, shared_bytes, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

template <typename... Parameters>
int clusters_at_once(void (*)(Parameters...), uint32_t, uint32_t, size_t) {
  return emulation::settings.clusters;
}

inline const char* device_limits(Limits& limits) {
  const auto& settings = emulation::settings;
  limits = {settings.sms, settings.shared_per_block, settings.shared_per_sm};
  return nullptr;
}

// cluster.cuh ------------------------------------------------------------------------------------------------

inline int cluster_rank() { return emulation::Block::active->rank(); }

inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::Block::active->cluster_barrier({file, line});
}

inline void store_to_block(int rank, Shared<uint4> to, const uint4& value) {
  to.check(16);
  emulation::Block::active->write_to(rank, to.offset(), &value, sizeof(value));
}

// tensor_core.cuh --------------------------------------------------------------------------------------------

using emulation::Block;

#define TGDP_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// By the fragment layouts of the PTX manual.
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

template <typename T>
void copy_async(Shared<T> to, const void* from, int bytes) {
  to.check(16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw emulation::Error("misaligned source of a copy");
  if (bytes < 0 || bytes > 16) throw emulation::Error("a copy has 0 to 16 bytes");
  Block::active->copy(to.offset(), from, static_cast<size_t>(bytes));
}

inline void commit_copies() { Block::active->commit(); }

template <int kPending>
void wait_for_copies() {
  Block::active->wait_for_copies(kPending);
}

#undef TGDP_PLACE

}  // namespace tgdp::cuda
