// What kernels and launchers need of the compiler: CUDA, or its emulation on the CPU.
#pragma once

#if defined(TGDP_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <stddef.h>
#include <stdint.h>

#include <string>

#include "../common/dtype.h"
#include "../common/low_precision.h"

#define TGDP_DEVICE __device__ __forceinline__

namespace tgdp::cuda {

#if defined(TGDP_EMULATION)

using emulation::Shared;

template <typename T>
Shared<T> shared_array(size_t offset, size_t count) {
  return {offset, offset, offset + count * sizeof(T)};
}

template <typename To, typename From>
Shared<To> shared_as(Shared<From> from) {
  return from.template as<To>();
}

#else

// A pointer into shared memory; the emulation checks what is done with it.
template <typename T>
using Shared = T*;

// `count` entries, `offset` bytes into the dynamic shared memory of the block.
template <typename T>
TGDP_DEVICE Shared<T> shared_array(size_t offset, size_t count) {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory + offset);
}

template <typename To, typename From>
TGDP_DEVICE Shared<To> shared_as(From* from) {
  return reinterpret_cast<To*>(from);
}

#endif

#if !defined(TGDP_EMULATION)

inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// More shared memory than this must be asked for.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// A launch in clusters of `cluster_size` blocks; the attribute is part of it.
struct ClusterLaunch {
  ClusterLaunch(uint32_t blocks, uint32_t cluster_size, uint32_t threads, size_t shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster_size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    configuration.gridDim = dim3(blocks);
    configuration.blockDim = dim3(threads);
    configuration.dynamicSmemBytes = shared_bytes;
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &attribute;
    configuration.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t configuration{};
};

#endif

// Starts a kernel of blocks of `threads` threads, `cluster_size` of them in a cluster. Null, or what went wrong; the text
// is good until the thread's next launch.
template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), uint32_t cluster_size, uint32_t blocks, uint32_t threads,
                            size_t shared_bytes, [[maybe_unused]] void* stream, const Arguments&... arguments) {
#if defined(TGDP_EMULATION)
  static thread_local std::string message;
  try {
    emulation::launch(kernel, blocks, cluster_size, threads, shared_bytes, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
#else
  if (const char* error = text_of(allow_shared(kernel, shared_bytes))) return error;
  if (cluster_size == 1) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return text_of(cudaGetLastError());
  }
  const ClusterLaunch launch(blocks, cluster_size, threads, shared_bytes, stream);
  return text_of(cudaLaunchKernelEx(&launch.configuration, kernel, arguments...));
#endif
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  return launch_clusters(kernel, 1, blocks, threads, shared_bytes, stream, arguments...);
}

// How many clusters of such a kernel the current device runs at once; 0 where it cannot, or where the kernel was compiled
// for devices without clusters.
template <typename... Parameters>
int clusters_at_once([[maybe_unused]] void (*kernel)(Parameters...), [[maybe_unused]] uint32_t cluster_size,
                     [[maybe_unused]] uint32_t threads, [[maybe_unused]] size_t shared_bytes) {
#if defined(TGDP_EMULATION)
  return emulation::settings.clusters;
#else
  cudaFuncAttributes attributes{};
  int count = 0;
  const ClusterLaunch launch(cluster_size, cluster_size, threads, shared_bytes, nullptr);
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion < 90) return 0;
  if (error == cudaSuccess) error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.configuration);
  if (error == cudaSuccess) return count;
  // Nobody else shall find the error.
  cudaGetLastError();
  return 0;
#endif
}

// What of the current device decides how a kernel is launched.
struct Limits {
  int multiprocessors, shared_per_block, shared_per_multiprocessor;
};

inline const char* device_limits(Limits& limits) {
#if defined(TGDP_EMULATION)
  const auto& settings = emulation::settings;
  limits = {settings.multiprocessors, settings.shared_per_block, settings.shared_per_multiprocessor};
  return nullptr;
#else
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int& answer) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, attribute, device);
  };
  ask(cudaDevAttrMultiProcessorCount, limits.multiprocessors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.shared_per_block);
  ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, limits.shared_per_multiprocessor);
  return text_of(error);
#endif
}

// 16-bit elements as bits, so that no arithmetic happens in them by accident.
struct Bf16 {
  using Storage = uint16_t;
  static constexpr Dtype kDtype = Dtype::bf16;
  static TGDP_DEVICE float to_float(uint16_t bits) { return from_bf16(bits); }
  static TGDP_DEVICE uint16_t from_float(float value) { return static_cast<uint16_t>(pack(value, 0.0f)); }
  // Two neighbours, the first in the low half.
  static TGDP_DEVICE uint32_t pack(float first, float second) {
#if defined(TGDP_EMULATION)
    return to_bf16(first) | static_cast<uint32_t>(to_bf16(second)) << 16;
#else
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#endif
  }
};

struct F16 {
  using Storage = uint16_t;
  static constexpr Dtype kDtype = Dtype::f16;
  static TGDP_DEVICE float to_float(uint16_t bits) {
#if defined(TGDP_EMULATION)
    return from_f16(bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
  }
  static TGDP_DEVICE uint16_t from_float(float value) { return static_cast<uint16_t>(pack(value, 0.0f)); }
  static TGDP_DEVICE uint32_t pack(float first, float second) {
#if defined(TGDP_EMULATION)
    return to_f16(first) | static_cast<uint32_t>(to_f16(second)) << 16;
#else
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#endif
  }
};

struct F32 {
  using Storage = float;
  static constexpr Dtype kDtype = Dtype::f32;
  static TGDP_DEVICE float to_float(float value) { return value; }
};

}  // namespace tgdp::cuda
