// Everything that pointwise.inc uses, to be included before an instruction set is chosen: what a header defines must
// not be compiled for a processor that may not be there. The arithmetic of csrc/common may: it is inlined always.
#pragma once

#include "../common/portable.h"

#if defined(TGDP_X86)
#include <immintrin.h>
#endif

#include <cstdint>

#include "../common/low_precision.h"
#include "pointwise.h"
