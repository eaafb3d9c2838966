// The pointwise kernels for AVX-512; without code where the compiler or the processor family cannot have it.
#include "pointwise_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TGDP_AVX512
#define TGDP_CAPABILITY "avx512"
#include "pointwise.inc"

const tgdp::Pointwise* tgdp::pointwise_copies::avx512() { return &kPointwise; }
#else
const tgdp::Pointwise* tgdp::pointwise_copies::avx512() { return nullptr; }
#endif
