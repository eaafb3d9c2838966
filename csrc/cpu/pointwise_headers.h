// Everything that pointwise.inc uses, to be included before an instruction set is chosen: what a header defines must
// not be compiled for a processor that may not be there.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#include "../common/silu.h"
#include "pointwise.h"
