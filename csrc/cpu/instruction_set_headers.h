// Everything that the kernels use, to be included before an instruction set is chosen: what a header defines must not
// be compiled for a CPU that may not be there. The arithmetic of csrc/common may: it is always inlined.
#pragma once

#include "../common/portable.h"

#if defined(TGDP_X86)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/low_precision.h"
#include "../common/normal.h"
#include "guided_step.h"
#include "instruction_set.h"
#include "long_convolution.h"
#include "pointwise.h"
#include "residual_block.h"
