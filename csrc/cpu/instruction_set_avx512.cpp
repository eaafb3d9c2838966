// The kernels for AVX-512; none where the compiler or the CPU family cannot have them.
#include "instruction_set_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TGDP_AVX512
#include "instruction_set.inc"

const tgdp::InstructionSet tgdp::instruction_sets::avx512 = kInstructionSet;
#else
const tgdp::InstructionSet tgdp::instruction_sets::avx512 = {};
#endif
