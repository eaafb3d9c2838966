// The CUDA kernels as the host sees them: plain data in, null or an error message out, which is good until the thread's
// next call. Memory is the device's, `stream` a cudaStream_t; nothing waits for the device. Host arrays that a call
// points to are read before the function returns.
#pragma once

#include "../common/guided_step_call.h"

extern "C" {

// Reference twin tgdp_fast.ops.guided_step.guided_step_reference. At most 16 slots.
const char* tgdp_cuda_guided_step(const tgdp::GuidedStepCall* call, void* stream);

}
