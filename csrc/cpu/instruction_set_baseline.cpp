// The kernels for any CPU.
#include "instruction_set_headers.h"
#include "instruction_set.inc"

const tgdp::InstructionSet tgdp::instruction_sets::baseline = kInstructionSet;
