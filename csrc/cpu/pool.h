// Memory for large outputs that is kept for the next ones.
#pragma once

#include <ATen/core/Tensor.h>

namespace tgdp {

// A new contiguous tensor. From 1 MiB on, its memory comes from a pool of what such tensors have given back, at most a
// sixteenth of the machine's memory: memory that is new to the process has to be mapped page by page on first writing,
// which takes several times as long as the writing, and the system's allocator returns large blocks at once.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace tgdp
