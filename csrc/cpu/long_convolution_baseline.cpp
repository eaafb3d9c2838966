// The kernel of long_convolution for any processor.
#include "long_convolution_headers.h"

#define TGDP_CAPABILITY "baseline"
#include "long_convolution.inc"

const tgdp::LongConvolutionKernels* tgdp::long_convolution_copies::baseline() { return &kLongConvolutionKernels; }
