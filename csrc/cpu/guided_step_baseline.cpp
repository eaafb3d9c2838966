// The kernel of guided_step for any processor.
#include "guided_step_headers.h"

#define TGDP_CAPABILITY "baseline"
#if defined(TGDP_X86)
#define TGDP_VECTOR_BYTES 16
#else
#define TGDP_VECTOR_BYTES 0
#endif
#include "guided_step.inc"

const tgdp::GuidedStepKernels* tgdp::guided_step_copies::baseline() { return &kGuidedStepKernels; }
