// What long_convolution.inc uses, to be included before an instruction set is chosen (see pointwise_headers.h).
#pragma once

#include "../common/portable.h"

#if defined(TGDP_X86)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../common/low_precision.h"
#include "long_convolution.h"
#include "pointwise.h"
