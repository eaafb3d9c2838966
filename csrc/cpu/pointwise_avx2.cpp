// The pointwise kernels for AVX-2; without code where the compiler or the processor family cannot have it.
#include "pointwise_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx2,fma,f16c")
#define TGDP_AVX2
#define TGDP_CAPABILITY "avx2"
#include "pointwise.inc"

const tgdp::Pointwise* tgdp::pointwise_copies::avx2() { return &kPointwise; }
#else
const tgdp::Pointwise* tgdp::pointwise_copies::avx2() { return nullptr; }
#endif
