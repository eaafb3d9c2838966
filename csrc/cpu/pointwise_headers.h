// Everything that pointwise.inc uses, to be included before an instruction set is chosen: what a header defines must
// not be compiled for a processor that may not be there.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "../common/portable.h"
#include "pointwise.h"
