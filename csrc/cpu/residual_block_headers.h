// What residual_block.inc uses, to be included before an instruction set is chosen (see pointwise_headers.h).
#pragma once

#include "../common/portable.h"

#if defined(TGDP_X86)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "residual_block.h"
