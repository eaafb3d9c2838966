// Kernels that are wrong on purpose, each with a right one beside it, and single instructions: what the emulation of
// CUDA must see.
#include "../../csrc/cuda/cluster.cuh"
#include "../../csrc/cuda/tensor_core.cuh"

namespace {

using namespace tgdp::cuda;

constexpr int kThreads = 64;

enum Fault : int {
  kNone = 0,
  kNoBarrier,            // reads what another warp writes
  kNoBarrierBeforeWrite,  // overwrites what others read
  kNoWarpBarrier,         // the same within a warp
  kExitBeforeBarrier,
  kTwoBarriers,
  kOutside,
  kBefore,
  kUnwritten,
  kMisaligned,
  kNoWait,            // for an asynchronous copy
  kNoBarrierAfterWait,
  kOtherLanes,        // half of a warp misses a shuffle
  kOtherOperation,    // lanes of a warp at two shuffles
  kGlobalRace,        // result depends on the order of the threads, without shared memory
  kFaults
};

__global__ void faulty(int fault, const uint4* from, uint32_t* out) {
  const int thread = static_cast<int>(threadIdx.x), other = (thread + 33) % kThreads;
  const Shared<uint32_t> numbers = shared_array<uint32_t>(0, kThreads);
  const Shared<uint4> copied = shared_array<uint4>(kThreads * 4, kThreads);
  if (fault != kUnwritten || thread != 5) numbers[thread] = static_cast<uint32_t>(thread);
  if (fault == kExitBeforeBarrier && thread == 40) return;
  if (fault == kTwoBarriers && thread == 40) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  uint32_t value = numbers[other];
  if (fault == kOutside && thread == 63) value += numbers[thread + 1];
  if (fault == kBefore && thread == 0) value += numbers[-1];
  if (fault == kMisaligned && thread == 7) value += shared_as<uint32_t>(shared_as<uint16_t>(numbers) + 3)[0];
  if (fault != kNoBarrierBeforeWrite) __syncthreads();
  numbers[thread] = value + 1;
  if (fault != kNoWarpBarrier) __syncwarp();
  value += numbers[thread ^ 1];
  copy_async(copied + thread, from + thread, thread == 3 ? 8 : 16);
  commit_copies();
  if (fault == kNoWait) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<0>();
  }
  if (fault != kNoBarrierAfterWait) __syncthreads();
  const uint4 part = copied[other];
  value += part.x + part.w;
  if (fault == kOtherLanes && thread % 32 < 16) {
    out[thread] = value;
    return;
  }
  if (fault == kOtherOperation && thread % 32 < 16) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value += __shfl_xor_sync(0xffffffffu, value, 16);
  }
  value += __shfl_sync(0xffffffffu, value, (thread + 1) % 32);
  out[thread] = value;
  if (fault == kGlobalRace) out[0] = static_cast<uint32_t>(thread);
}

enum ClusterFault : int {
  kNoClusterFault = 0,
  kNoStart,              // writes before the others run
  kNoClusterBarrier,     // reads what another block writes
  kOnlyBlockBarrier,     // the same with a barrier of the block alone
  kOverwrites,           // what another block still reads
  kTwoWriters,           // of the same place
  kBlockEnds,            // before a barrier of the cluster
  kWritesToEnded,
  kOtherBarrier,         // blocks at two barriers
  kNoSuchBlock,
  kClusterFaults
};

// Every thread hands a number to the next block of its cluster, twice.
__global__ void faulty_cluster(int fault, uint32_t* out) {
  const int thread = static_cast<int>(threadIdx.x), rank = cluster_rank(), next = (rank + 1) % kClusterBlocks;
  const Shared<uint4> numbers = shared_array<uint4>(0, kThreads);
  const uint32_t number = 1000 * blockIdx.x + static_cast<uint32_t>(thread);
  if (fault != kNoStart) cluster_barrier();
  if (fault == kBlockEnds && rank == 3) return;
  const int to = fault == kNoSuchBlock && rank == 2 ? kClusterBlocks : next;
  store_to_block(to, numbers + thread, {number, number, number, number});
  if (fault == kTwoWriters && rank == 5) store_to_block(rank, numbers + thread, {});
  if (fault == kOtherBarrier && rank == 4) {
    cluster_barrier();
  } else if (fault == kOnlyBlockBarrier) {
    __syncthreads();
  } else if (fault != kNoClusterBarrier) {
    cluster_barrier();
  }
  const uint4 first = numbers[thread];
  if (fault != kOverwrites) cluster_barrier();
  if (fault == kWritesToEnded && rank != 6) return;
  if (fault == kWritesToEnded) {
    // The others end while this block waits for itself, whatever the order.
    for (int i = 0; i < 4; ++i) __syncthreads();
  }
  store_to_block(next, numbers + thread, {number + first.x, 0, 0, 0});
  cluster_barrier();
  const uint4 second = numbers[thread];
  out[blockIdx.x * kThreads + threadIdx.x] = second.x + first.w;
}

// d [16, 8] = a [16, 16] b: b is [16, 8], or with kTransposed given as its transpose [8, 16].
template <typename Element, bool kTransposed>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const Shared<uint16_t> left = shared_array<uint16_t>(0, 256), right = shared_array<uint16_t>(512, 256);
  for (int i = lane; i < 256; i += 32) {
    left[i] = a[i];
    right[i] = i < 128 ? b[i] : 0;
  }
  __syncthreads();
  uint32_t a_words[4], b_words[4];
  load_matrices<false>(a_words, left + (lane % 16 * 16 + lane / 16 * 8));
  // Four matrices are loaded, of which the last two are repeated and dropped.
  const int row = lane % 8, matrix = lane / 8 % 2;
  if constexpr (kTransposed) {
    load_matrices<false>(b_words, right + (row * 16 + matrix * 8));
  } else {
    load_matrices<true>(b_words, right + (matrix * 8 + row) * 8);
  }
  const uint32_t b_pair[2] = {b_words[0], b_words[1]};
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_m16n8k16<Element>(sums, a_words, b_pair);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Every lane writes a pair of words and reads one of them, `stride` pairs from the next lane's.
__global__ void strided_accesses(int stride, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const Shared<float2> pairs = shared_array<float2>(0, static_cast<size_t>(31 * stride + 1));
  pairs[lane * stride] = float2{1.0f, 2.0f};
  __syncwarp();
  out[lane] = shared_as<float>(pairs)[2 * lane * stride];
}

}  // namespace

extern "C" {

int test_faults() { return kFaults; }

const char* test_fault(int fault, const void* from, uint32_t* out) {
  return launch(&faulty, 1, kThreads, kThreads * 20, nullptr, fault, static_cast<const uint4*>(from), out);
}

const char* test_strided_accesses(int stride, float* out) {
  return launch(&strided_accesses, 1, 32, static_cast<size_t>(31 * stride + 1) * sizeof(float2), nullptr, stride, out);
}

int test_cluster_faults() { return kClusterFaults; }

const char* test_cluster_fault(int fault, uint32_t* out) {
  return launch_clusters(&faulty_cluster, kClusterBlocks, 2 * kClusterBlocks, kThreads, kThreads * 16, nullptr, fault, out);
}

const char* test_product(int dtype, int transposed, const uint16_t* a, const uint16_t* b, float* d) {
  if (dtype == 1) return launch(transposed ? &product<Bf16, true> : &product<Bf16, false>, 1, 32, 1024, nullptr, a, b, d);
  return launch(transposed ? &product<F16, true> : &product<F16, false>, 1, 32, 1024, nullptr, a, b, d);
}

}  // extern "C"
