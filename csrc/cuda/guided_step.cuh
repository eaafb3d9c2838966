// One guided solver step in one pass over memory, noise in registers: reference twin
// tgdp_fast.ops.guided_step.guided_step_reference.
//
// For N elements of b bytes, e and g bytes per element of epsilon and gradient, H slots: N (b (3 + 2 H) + e + g) bytes
// from and to memory, less what is not given; N (5 + (1 + H) (3 + 2 H)) FLOPs at most, and for noise about 25 integer
// operations and 40 FLOPs per element. Bound by memory.
//
// A thread takes a chunk of kCount neighbouring elements of one sample: whole groups of four, which share their random
// words, whatever the size of the samples. Chunks of whole and aligned vectors move as such, others element by element.
#pragma once

#include "../common/guided_step_call.h"
#include "../common/solver_step.h"
#include "noise.cuh"

namespace tgdp::cuda {

constexpr int kStepThreads = 256;
// Of the kernel for any table; its arguments are limited to 4 KB.
constexpr int kMostSlots = 16;

// kSlots < 0: any number up to kMostSlots.
template <int kSlots>
struct StepArguments {
  static constexpr int kRoom = kSlots < 0 ? kMostSlots : kSlots;
  // Without noise, all elements count as one sample.
  int64_t elements, samples, sample_size, chunks_per_sample;
  int slots;
  Elements x, epsilon, gradient, history[kRoom > 0 ? kRoom : 1];
  float matrix[(1 + kRoom) * (2 + kRoom)];  // row-major for `slots`
  Guidance guidance;
  bool clamp;
  float noise_scale;
  const int64_t* sample_index;  // null: 0, 1, 2, ..
  uint32_t key_low, key_high, evaluation;
  void *x_next, *history_next, *x0;
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

// The noise of a chunk that starts at `element` of a sample, a multiple of four.
template <int kCount>
TGDP_DEVICE void chunk_noise(int64_t sample, int64_t element, int count, uint32_t key_low, uint32_t key_high,
                             uint32_t evaluation, float (&noise)[kCount]) {
#pragma unroll
  for (int begin = 0; begin < kCount; begin += 4) {
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (begin < count) normal_group(sample, (element + begin) / 4, key_low, key_high, evaluation, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) noise[begin + i] = z[i];
  }
}

template <typename X, typename Network, int kSlots, int kCount>
TGDP_DEVICE void step_chunk(const StepArguments<kSlots>& call, int64_t sample, int64_t element, int count) {
  const int64_t first = sample * call.sample_size + element;
  float x[kCount], epsilon[kCount], gradient[kCount], guided[kCount], x0[kCount], noise[kCount];
  load_elements<X>(call.x, first, count, x);
  load_elements<Network>(call.epsilon, first, count, epsilon);
  if (call.gradient.data != nullptr) {
    load_elements<Network>(call.gradient, first, count, gradient);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) gradient[i] = 0.0f;
  }
  const auto slot_values = [&](int slot, float(&values)[kCount]) {
    if (call.history[slot].data != nullptr) {
      load_elements<X>(call.history[slot], first, count, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
    }
  };
  constexpr int kHeld = kSlots > 0 ? kSlots : 1;
  float history[kHeld][kCount];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) slot_values(slot, history[slot]);

#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (call.clamp) {
      guide<true, true>(call.guidance, x[i], epsilon[i], gradient[i], guided[i], x0[i]);
    } else {
      guide<true, false>(call.guidance, x[i], epsilon[i], gradient[i], guided[i], x0[i]);
    }
  }
  store_elements<X>(call.x0, call.x.dtype, first, count, x0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) noise[i] = 0.0f;
  if (call.noise_scale != 0.0f) {
    const int64_t index = call.sample_index == nullptr ? sample : call.sample_index[sample];
    chunk_noise<kCount>(index, element, count, call.key_low, call.key_high, call.evaluation, noise);
  }

  float out[kCount];
  if constexpr (kSlots >= 0) {
#pragma unroll
    for (int row = 0; row <= kSlots; ++row) {
      float coefficients[kSlots + 3];
#pragma unroll
      for (int term = 0; term < kSlots + 2; ++term) coefficients[term] = call.matrix[row * (kSlots + 2) + term];
      coefficients[kSlots + 2] = row == 0 ? call.noise_scale : 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float values[kSlots + 3];
        values[0] = x[i];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) values[1 + slot] = history[slot][i];
        values[kSlots + 1] = guided[i];
        values[kSlots + 2] = noise[i];
        out[i] = matrix_row<kSlots + 3>(coefficients, values);
      }
      void* to = row == 0 ? call.x_next : call.history_next;
      store_elements<X>(to, call.x.dtype, row == 0 ? first : (row - 1) * call.elements + first, count, out);
    }
  } else {
    // Slots do not fit in registers: every row reads them again, from the caches.
    for (int row = 0; row <= call.slots; ++row) {
      const float* coefficients = call.matrix + row * (call.slots + 2);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = coefficients[0] * x[i];
      for (int slot = 0; slot < call.slots; ++slot) {
        if (coefficients[1 + slot] == 0.0f) continue;
        slot_values(slot, history[0]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) out[i] += coefficients[1 + slot] * history[0][i];
      }
      const float noise_scale = row == 0 ? call.noise_scale : 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] += coefficients[1 + call.slots] * guided[i];
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] += noise_scale * noise[i];
      void* to = row == 0 ? call.x_next : call.history_next;
      store_elements<X>(to, call.x.dtype, row == 0 ? first : (row - 1) * call.elements + first, count, out);
    }
  }
}

// X: elements of x, history and outputs; Network: of epsilon and gradient.
template <typename X, typename Network, int kSlots, int kCount>
__global__ void __launch_bounds__(kStepThreads) guided_step_kernel(const __grid_constant__ StepArguments<kSlots> call) {
  const int64_t chunks = call.samples * call.chunks_per_sample;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; chunk < chunks; chunk += threads) {
    int64_t sample = 0;
    if (call.samples > 1) {
      // A quotient of 32 bits takes a fraction of one of 64.
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
