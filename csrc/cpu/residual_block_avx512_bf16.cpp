// The kernels of residual_block for AVX-512 with its bf16 conversions; without code where the compiler
// or the processor family cannot have it.
#include "residual_block_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,prefer-vector-width=512")
#define TGDP_AVX512
#define TGDP_AVX512_BF16
#define TGDP_CAPABILITY "avx512_bf16"
#include "residual_block.inc"

const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx512_bf16() { return &kResidualBlockKernels; }
#else
const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::avx512_bf16() { return nullptr; }
#endif
