// The kernel of guided_step for AVX-2; without code where the compiler or the processor family cannot have it.
#include "guided_step_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx2,fma,f16c")
#define TGDP_CAPABILITY "avx2"
#define TGDP_VECTOR_BYTES 32
#include "guided_step.inc"

const tgdp::GuidedStepKernels* tgdp::guided_step_copies::avx2() { return &kGuidedStepKernels; }
#else
const tgdp::GuidedStepKernels* tgdp::guided_step_copies::avx2() { return nullptr; }
#endif
