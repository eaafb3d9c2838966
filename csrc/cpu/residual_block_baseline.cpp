// The kernels of residual_block for any processor.
#include "residual_block_headers.h"

#define TGDP_CAPABILITY "baseline"
#include "residual_block.inc"

const tgdp::ResidualBlockKernels* tgdp::residual_block_copies::baseline() { return &kResidualBlockKernels; }
