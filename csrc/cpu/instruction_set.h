// The kernels that are compiled once per instruction set, and those that this CPU runs.
#pragma once

namespace tgdp {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best that the CPU has; TGDP_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 lowers it.
Capability capability();
const char* capability_name();

struct GuidedStepKernels;
struct LongConvolutionKernels;
struct PointwiseKernels;
struct ResidualBlockKernels;

// Null for kernels that an instruction set does not have, or the compiler cannot make: those of a lower one serve.
struct InstructionSet {
  const PointwiseKernels* pointwise = nullptr;
  const GuidedStepKernels* guided_step = nullptr;
  const LongConvolutionKernels* long_convolution = nullptr;
  const ResidualBlockKernels* residual_block = nullptr;
};

namespace instruction_sets {
extern const InstructionSet baseline, avx2, avx512, avx512_bf16;
}

// Of each kind of kernels the best that this CPU runs.
const InstructionSet& instruction_set();

}  // namespace tgdp
