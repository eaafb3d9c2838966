// Which kernel of long_convolution.cuh serves a call.
#include "long_convolution.cuh"

#include "launch.h"

namespace tgdp::cuda {
namespace {

template <typename Input, typename Output, typename Spectra, int kRows, int kColumns>
const char* run(const LongConvolutionCall& call, void* stream) {
  using Shape = ConvolutionShape<kRows, kColumns>;
  const auto signals = static_cast<uint32_t>(call.batch * call.channels);
  constexpr uint32_t kInBlock = Shape::kSignals * kConvolutionWarps;
  return launch(&long_convolution_kernel<Input, Output, Spectra, kRows, kColumns>,
                (signals + kInBlock - 1) / kInBlock, kConvolutionThreads, Shape::kSharedBytes, stream, call, signals);
}

template <typename Input, typename Output, typename Spectra>
const char* run(const LongConvolutionCall& call, void* stream) {
  switch (call.filters.points) {
    case 256:
      return run<Input, Output, Spectra, 16, 16>(call, stream);
    case 512:
      return run<Input, Output, Spectra, 32, 16>(call, stream);
    default:
      return run<Input, Output, Spectra, 32, 32>(call, stream);
  }
}

template <typename Element>
const char* run_half(const LongConvolutionCall& call, void* stream) {
  // Spectra may be more accurate than the elements.
  return call.filters.scales == nullptr ? run<Element, Element, FloatSpectra>(call, stream)
                                : run<Element, Element, HalfSpectra>(call, stream);
}

// With another dtype of y than of u.
const char* run_mixed(const LongConvolutionCall& call, void* stream) {
  if (call.filters.scales == nullptr) return "long_convolution: another dtype of the result needs float16 spectra";
  const bool from_float = call.dtype == Dtype::f32;
  if (from_float && call.y_dtype == Dtype::bf16) return run<F32, Bf16, HalfSpectra>(call, stream);
  if (from_float && call.y_dtype == Dtype::f16) return run<F32, F16, HalfSpectra>(call, stream);
  if (call.dtype == Dtype::f16 && call.y_dtype == Dtype::bf16) return run<F16, Bf16, HalfSpectra>(call, stream);
  return "long_convolution: no kernel has these dtypes of u and y";
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_long_convolution(const tgdp::LongConvolutionCall* call, void* stream) {
  using namespace tgdp::cuda;
  if (call->batch == 0 || call->channels == 0 || call->length == 0) return nullptr;
  if (call->filters.points != 256 && call->filters.points != 512 && call->filters.points != 1024) {
    return "long_convolution: transforms have 256, 512 or 1024 points";
  }
  if (call->batch > 0x7fffffff / call->channels) return "long_convolution: at most 2^31 - 1 signals at a time";
  if (call->length > call->filters.points) return "long_convolution: more positions than points";
  if (call->y_dtype != call->dtype) return run_mixed(*call, stream);
  switch (call->dtype) {
    case tgdp::Dtype::f32:
      if (call->filters.scales != nullptr) return "long_convolution: float32 signals need float32 spectra";
      return run<F32, F32, FloatSpectra>(*call, stream);
    case tgdp::Dtype::bf16:
      return run_half<Bf16>(*call, stream);
    default:
      return run_half<F16>(*call, stream);
  }
}
