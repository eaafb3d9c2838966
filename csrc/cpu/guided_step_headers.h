// What guided_step.inc uses, to be included before an instruction set is chosen (see pointwise_headers.h).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/low_precision.h"
#include "../common/normal.h"
#include "../common/portable.h"
#include "guided_step.h"
