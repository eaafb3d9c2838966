// Everything that pointwise.inc uses, to be included before an instruction set is chosen: what a header defines must
// not be compiled for a processor that may not be there.
#pragma once

#include <cstdint>

#include "../common/low_precision.h"
#include "../common/silu.h"
#include "pointwise.h"
