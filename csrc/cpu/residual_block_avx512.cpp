// The kernels of residual_block for AVX-512; without code where the compiler or the processor
// family cannot have it.
#include "residual_block_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TGDP_AVX512
#define TGDP_CAPABILITY "avx512"
#include "residual_block.inc"

const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx512() { return &kResidualBlockKernels; }
#else
const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx512() { return nullptr; }
#endif
