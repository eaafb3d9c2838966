// The kernel of long_convolution for AVX-2; without code where the compiler or the processor family cannot have it.
#include "long_convolution_headers.h"

#if defined(TGDP_X86_COPIES)
#pragma GCC target("avx2,fma,f16c")
#define TGDP_AVX2
#define TGDP_CAPABILITY "avx2"
#include "long_convolution.inc"

const tgdp::LongConvolutionKernels* tgdp::long_convolution_copies::avx2() { return &kLongConvolutionKernels; }
#else
const tgdp::LongConvolutionKernels* tgdp::long_convolution_copies::avx2() { return nullptr; }
#endif
