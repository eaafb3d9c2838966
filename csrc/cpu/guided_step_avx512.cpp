// The kernel of guided_step for AVX-512; without code where the compiler or the processor family cannot have it.
#include "guided_step_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TGDP_CAPABILITY "avx512"
#define TGDP_VECTOR_BYTES 64
#include "guided_step.inc"

const tgdp::GuidedStepKernels* tgdp::guided_step_copies::avx512() { return &kGuidedStepKernels; }
#else
const tgdp::GuidedStepKernels* tgdp::guided_step_copies::avx512() { return nullptr; }
#endif
