// Memory for large outputs, kept for the next ones.
#pragma once

#include <ATen/core/Tensor.h>

namespace tgdp {

// A new contiguous tensor. From 1 MiB on, its memory comes from a pool of what earlier tensors have given back, at most
// a sixteenth of the machine's memory. Memory that is new to the process is mapped page by page when it is first
// written, which takes several times as long as the writing, and the system's allocator gives large blocks back at
// once.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace tgdp
