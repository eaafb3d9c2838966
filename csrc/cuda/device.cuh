// What kernels and launchers need of the compiler and the device: CUDA, or in tests its emulation on the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/dtype.h"
#include "../common/low_precision.h"

#define TGDP_DEVICE __device__ __forceinline__

namespace tgdp::cuda {

// The properties of the current device that decide how a kernel is launched.
struct Limits {
  int sms, shared_per_block, shared_per_sm;
};

}  // namespace tgdp::cuda

#if defined(TGDP_EMULATION)
#include "emulated_device.h"  // of tests/cuda
#else
#include <cuda_runtime.h>

namespace tgdp::cuda {

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

// Reads a constant where it is used: otherwise it would be read once, and kept in registers.
TGDP_DEVICE float2 load_here(const float2* from) {
  float2 value;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(__cvta_generic_to_global(from)));
  return value;
}

// Pairs of 16-bit elements, the first in the low half.
TGDP_DEVICE uint32_t pack_bf16(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
TGDP_DEVICE uint32_t pack_f16(float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
TGDP_DEVICE float unpack_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Kernels must ask for more shared memory than this.
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

// Starts a kernel with blocks of `threads` threads, `cluster_size` blocks in a cluster. Null, or an error, which is
// valid until the thread's next launch.
template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), uint32_t cluster_size, uint32_t blocks, uint32_t threads,
                            size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (const char* error = text_of(allow_shared(kernel, shared_bytes))) return error;
  if (cluster_size == 1) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return text_of(cudaGetLastError());
  }
  const ClusterLaunch launch(blocks, cluster_size, threads, shared_bytes, stream);
  return text_of(cudaLaunchKernelEx(&launch.configuration, kernel, arguments...));
}

// How many clusters of such a kernel the current device runs at once; 0 where it cannot, or where the kernel was
// compiled for devices without clusters.
template <typename... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), uint32_t cluster_size, uint32_t threads, size_t shared_bytes) {
  cudaFuncAttributes attributes{};
  int count = 0;
  const ClusterLaunch launch(cluster_size, cluster_size, threads, shared_bytes, nullptr);
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion < 90) return 0;
  if (error == cudaSuccess) error = allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.configuration);
  if (error == cudaSuccess) return count;
  // Clears the error.
  cudaGetLastError();
  return 0;
}

inline const char* device_limits(Limits& limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int& answer) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, attribute, device);
  };
  ask(cudaDevAttrMultiProcessorCount, limits.sms);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.shared_per_block);
  ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, limits.shared_per_sm);
  return text_of(error);
}

}  // namespace tgdp::cuda
#endif

namespace tgdp::cuda {

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  return launch_clusters(kernel, 1, blocks, threads, shared_bytes, stream, arguments...);
}

// 16-bit elements as bits, so that no arithmetic happens in them by accident.
template <Dtype kType>
struct HalfElement {
  using Storage = uint16_t;
  static constexpr Dtype kDtype = kType;
  static TGDP_DEVICE float to_float(uint16_t bits) {
    return kType == Dtype::bf16 ? from_bf16(bits) : unpack_f16(bits);
  }
  static TGDP_DEVICE uint16_t from_float(float value) { return static_cast<uint16_t>(pack(value, 0.0f)); }
  // Two neighbors, the first in the low half.
  static TGDP_DEVICE uint32_t pack(float first, float second) {
    return kType == Dtype::bf16 ? pack_bf16(first, second) : pack_f16(first, second);
  }
};
using Bf16 = HalfElement<Dtype::bf16>;
using F16 = HalfElement<Dtype::f16>;

struct F32 {
  using Storage = float;
  static constexpr Dtype kDtype = Dtype::f32;
  static TGDP_DEVICE float to_float(float value) { return value; }
};

}  // namespace tgdp::cuda
