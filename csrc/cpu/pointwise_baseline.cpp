// The pointwise kernels for any processor.
#include "pointwise_headers.h"

#define TGDP_CAPABILITY "baseline"
#include "pointwise.inc"

const tgdp::Pointwise* tgdp::pointwise_copies::baseline() { return &kPointwise; }
