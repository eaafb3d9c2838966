// Clusters, sm_90 and newer: blocks that run at once and reach each other's shared memory. Inline PTX.
#pragma once

#include "device.cuh"

namespace tgdp::cuda {

// Blocks of a cluster: the most that every device with clusters takes.
constexpr int kClusterBlocks = 8;

#if !defined(TGDP_EMULATION)

TGDP_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of the cluster meet. What each wrote before, to whichever block's shared memory, all read afterwards.
TGDP_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to where `to` is in the shared memory of another block of the cluster.
TGDP_DEVICE void store_to_block(int rank, Shared<uint4> to, const uint4& value) {
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

#endif

}  // namespace tgdp::cuda
