// The kernels for AVX2; none where the compiler or the CPU family cannot have them.
#include "instruction_set_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx2,fma,f16c")
#define TGDP_AVX2
#include "instruction_set.inc"

const tgdp::InstructionSet tgdp::instruction_sets::avx2 = kInstructionSet;
#else
const tgdp::InstructionSet tgdp::instruction_sets::avx2 = {};
#endif
