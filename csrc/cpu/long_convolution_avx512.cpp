// The kernel of long_convolution for AVX-512; without code where the compiler or the processor family cannot have it.
#include "long_convolution_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TGDP_AVX512
#define TGDP_CAPABILITY "avx512"
#include "long_convolution.inc"

const tgdp::LongConvolutionKernels* tgdp::long_convolution_copies::avx512() { return &kLongConvolutionKernels; }
#else
const tgdp::LongConvolutionKernels* tgdp::long_convolution_copies::avx512() { return nullptr; }
#endif
