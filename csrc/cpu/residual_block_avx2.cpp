// The kernels of residual_block for AVX-2; without code where the compiler or the processor
// family cannot have it.
#include "residual_block_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx2,fma,f16c")
#define TGDP_AVX2
#define TGDP_CAPABILITY "avx2"
#include "residual_block.inc"

const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx2() { return &kResidualBlockKernels; }
#else
const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx2() { return nullptr; }
#endif
