// One guided solver step in one pass over memory, noise in registers: reference twin
// tgdp_fast.ops.guided_step.guided_step_reference.
//
// For N elements of b bytes, e and g bytes per element of epsilon and gradient, H slots: N (b (3 + 2 H) + e + g) bytes
// from and to memory, less inputs that are not given; N (5 + (1 + H) (3 + 2 H)) FLOPs at most, and for noise about 25
// integer operations and 40 FLOPs per element. Bound by memory.
//
// A thread takes a chunk of kCount adjacent elements of one sample: whole groups of four, which share their random
// words, whatever the size of the samples. Whole and aligned chunks move as vectors, others element by element.
#pragma once

#include "../common/solver_step.h"
#include "noise.cuh"

namespace tgdp::cuda {

constexpr int kStepThreads = 256;
// Of the kernel for any table; its arguments are limited to 4 KB.
constexpr int kMostSlots = 16;

// The step, with copies of the history and the matrix that it points to. kSlots < 0: any number up to kMostSlots.
template <int kSlots>
struct StepArguments {
  static constexpr int kRoom = kSlots < 0 ? kMostSlots : kSlots;
  SolverStep step;
  // Without noise, all elements count as one sample.
  int64_t samples, sample_size, chunks_per_sample;
  Elements history[kRoom > 0 ? kRoom : 1];
  float matrix[(1 + kRoom) * (2 + kRoom)];
};

// An element type that is known at run time only.
struct AnyElement {};

template <int kBytes>
struct VectorOf {
  using Type = uint4;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};

// Elements [0, count) of a chunk as floats, zeros after them.
template <typename Element, int kCount>
TGDP_DEVICE void load_chunk(const typename Element::Storage* from, int count, float (&to)[kCount]) {
  using Storage = typename Element::Storage;
  constexpr int kBytes = kCount * sizeof(Storage);
  using Vector = typename VectorOf<kBytes>::Type;
  Storage values[kCount];
  if (count == kCount && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
    Vector vectors[kBytes / sizeof(Vector)];
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Vector)); ++i) {
      vectors[i] = reinterpret_cast<const Vector*>(from)[i];
    }
    memcpy(values, vectors, kBytes);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? from[i] : Storage{0};
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = Element::to_float(values[i]);
}

template <typename Element, int kCount>
TGDP_DEVICE void store_chunk(typename Element::Storage* to, int count, const float (&from)[kCount]) {
  using Storage = typename Element::Storage;
  constexpr int kBytes = kCount * sizeof(Storage);
  using Vector = typename VectorOf<kBytes>::Type;
  Storage values[kCount];
  if constexpr (sizeof(Storage) == 2) {
    uint32_t pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = Element::pack(from[2 * i], from[2 * i + 1]);
    memcpy(values, pairs, kBytes);
  } else {
    memcpy(values, from, kBytes);
  }
  if (count == kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0) {
    Vector vectors[kBytes / sizeof(Vector)];
    memcpy(vectors, values, kBytes);
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Vector)); ++i) reinterpret_cast<Vector*>(to)[i] = vectors[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = values[i];
    }
  }
}

// Calls body with the element type: the static one, or the one of dtype.
template <typename Element>
struct WithElement {
  template <typename Body>
  static TGDP_DEVICE void call(Dtype, Body body) {
    body(Element{});
  }
};
template <>
struct WithElement<AnyElement> {
  template <typename Body>
  static TGDP_DEVICE void call(Dtype dtype, Body body) {
    if (dtype == Dtype::f32) {
      body(F32{});
    } else if (dtype == Dtype::bf16) {
      body(Bf16{});
    } else {
      body(F16{});
    }
  }
};

template <typename Element, int kCount>
TGDP_DEVICE void load_elements(const Elements& from, int64_t first, int count, float (&to)[kCount]) {
  WithElement<Element>::call(from.dtype, [&](auto element) {
    using Known = decltype(element);
    load_chunk<Known>(static_cast<const typename Known::Storage*>(from.data) + first, count, to);
  });
}

template <typename Element, int kCount>
TGDP_DEVICE void store_elements(void* to, Dtype dtype, int64_t first, int count, const float (&from)[kCount]) {
  WithElement<Element>::call(dtype, [&](auto element) {
    using Known = decltype(element);
    store_chunk<Known>(static_cast<typename Known::Storage*>(to) + first, count, from);
  });
}

template <typename Element, int kCount>
TGDP_DEVICE void load_or_zeros(const Elements& from, int64_t first, int count, float (&to)[kCount]) {
  if (from.data != nullptr) {
    load_elements<Element>(from, first, count, to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = 0.0f;
  }
}

// The noise of a chunk that starts at `element` of a sample, a multiple of four.
template <int kCount>
TGDP_DEVICE void chunk_noise(const NoiseCoordinates& noise, int64_t sample, int64_t element, int count,
                             float (&values)[kCount]) {
  const int64_t index = noise.samples == nullptr ? sample : noise.samples[sample];
#pragma unroll
  for (int begin = 0; begin < kCount; begin += 4) {
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (begin < count) {
      normal_group(index, (element + begin) / 4, noise.key_low, noise.key_high, noise.evaluation, z);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[begin + i] = z[i];
  }
}

// The values that the rows of the matrix multiply.
template <int kSlots, int kCount>
struct ChunkValues {
  static constexpr int kHeld = kSlots > 0 ? kSlots : 1;
  float x[kCount], history[kHeld][kCount], guided[kCount], noise[kCount];
};

template <typename X, int kCount>
TGDP_DEVICE void store_row(const SolverStep& step, int row, int64_t first, int count, const float (&values)[kCount]) {
  void* to = row == 0 ? step.x_next : step.history_next;
  store_elements<X>(to, step.x.dtype, row == 0 ? first : (row - 1) * step.elements + first, count, values);
}

template <typename X, int kSlots, int kCount>
TGDP_DEVICE void store_rows(const StepArguments<kSlots>& call, int64_t first, int count,
                            const ChunkValues<kSlots, kCount>& chunk) {
#pragma unroll
  for (int row = 0; row <= kSlots; ++row) {
    float coefficients[kSlots + 3], out[kCount];
#pragma unroll
    for (int term = 0; term < kSlots + 2; ++term) coefficients[term] = call.matrix[row * (kSlots + 2) + term];
    coefficients[kSlots + 2] = row == 0 ? call.step.noise_scale : 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float values[kSlots + 3];
      values[0] = chunk.x[i];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) values[1 + slot] = chunk.history[slot][i];
      values[kSlots + 1] = chunk.guided[i];
      values[kSlots + 2] = chunk.noise[i];
      out[i] = matrix_row<kSlots + 3>(coefficients, values);
    }
    store_row<X>(call.step, row, first, count, out);
  }
}

// For any number of slots, which do not fit in registers: every row reads them again, from the caches.
template <typename X, int kCount>
TGDP_DEVICE void store_rows(const StepArguments<-1>& call, int64_t first, int count,
                            const ChunkValues<-1, kCount>& chunk) {
  const int slots = static_cast<int>(call.step.slots);
  for (int row = 0; row <= slots; ++row) {
    const float* coefficients = call.matrix + row * (slots + 2);
    const float noise_scale = row == 0 ? call.step.noise_scale : 0.0f;
    float out[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = coefficients[0] * chunk.x[i];
    for (int slot = 0; slot < slots; ++slot) {
      if (coefficients[1 + slot] == 0.0f) continue;
      float values[kCount];
      load_or_zeros<X>(call.history[slot], first, count, values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] += coefficients[1 + slot] * values[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] += coefficients[1 + slots] * chunk.guided[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] += noise_scale * chunk.noise[i];
    store_row<X>(call.step, row, first, count, out);
  }
}

template <typename X, typename Network, int kSlots, int kCount>
TGDP_DEVICE void step_chunk(const StepArguments<kSlots>& call, int64_t sample, int64_t element, int count) {
  const SolverStep& step = call.step;
  const int64_t first = sample * call.sample_size + element;
  ChunkValues<kSlots, kCount> chunk;
  float epsilon[kCount], gradient[kCount], x0[kCount];
  load_elements<X>(step.x, first, count, chunk.x);
  load_elements<Network>(step.epsilon, first, count, epsilon);
  if (step.gradient.data != nullptr) {
    load_elements<Network>(step.gradient, first, count, gradient);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) gradient[i] = 0.0f;
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) load_or_zeros<X>(call.history[slot], first, count, chunk.history[slot]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (step.guidance.clamp) {
      guide<true, true>(step.guidance, chunk.x[i], epsilon[i], gradient[i], chunk.guided[i], x0[i]);
    } else {
      guide<true, false>(step.guidance, chunk.x[i], epsilon[i], gradient[i], chunk.guided[i], x0[i]);
    }
  }
  store_elements<X>(step.x0, step.x.dtype, first, count, x0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) chunk.noise[i] = 0.0f;
  if (step.noise_scale != 0.0f) chunk_noise<kCount>(step.noise, sample, element, count, chunk.noise);
  store_rows<X>(call, first, count, chunk);
}

// X: elements of x, history and outputs; Network: of epsilon and gradient.
template <typename X, typename Network, int kSlots, int kCount>
__global__ void __launch_bounds__(kStepThreads) guided_step_kernel(const __grid_constant__ StepArguments<kSlots> call) {
  const int64_t chunks = call.samples * call.chunks_per_sample;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; chunk < chunks; chunk += threads) {
    int64_t sample = 0;
    if (call.samples > 1) {
      // A 32-bit division takes a fraction of the time of a 64-bit one.
      sample = chunks <= 0xffffffffll
                   ? static_cast<int64_t>(static_cast<uint32_t>(chunk) / static_cast<uint32_t>(call.chunks_per_sample))
                   : chunk / call.chunks_per_sample;
    }
    const int64_t element = (chunk - sample * call.chunks_per_sample) * kCount;
    const int64_t left = call.sample_size - element;
    step_chunk<X, Network, kSlots, kCount>(call, sample, element, left < kCount ? static_cast<int>(left) : kCount);
  }
}

}  // namespace tgdp::cuda
