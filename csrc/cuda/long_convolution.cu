// Which kernel of long_convolution.cuh serves a call.
#include "long_convolution.cuh"

#include "launch.h"

namespace tgdp::cuda {
namespace {

template <typename Element, typename Spectra, int kRows, int kColumns>
const char* run(const LongConvolutionKernelCall& call, void* stream) {
  using Shape = ConvolutionShape<kRows, kColumns>;
  ConvolutionArguments arguments{};
  arguments.batch = static_cast<uint32_t>(call.batch);
  arguments.signals = static_cast<uint32_t>(call.batch * call.channels);
  arguments.length = static_cast<int>(call.length);
  arguments.u = call.u;
  arguments.u_sample = call.u_sample;
  arguments.u_channel = call.u_channel;
  arguments.y = call.y;
  arguments.y_sample = call.y_sample;
  arguments.y_channel = call.y_channel;
  arguments.spectra = call.spectra;
  arguments.scales = call.scales;
  arguments.gelu = call.gelu;
  constexpr uint32_t kInBlock = Shape::kSignals * kConvolutionWarps;
  return launch(&long_convolution_kernel<Element, Spectra, kRows, kColumns>,
                (arguments.signals + kInBlock - 1) / kInBlock, kConvolutionThreads, Shape::kSharedBytes, stream, arguments);
}

template <typename Element, typename Spectra>
const char* run(const LongConvolutionKernelCall& call, void* stream) {
  switch (call.points) {
    case 256:
      return run<Element, Spectra, 16, 16>(call, stream);
    case 512:
      return run<Element, Spectra, 32, 16>(call, stream);
    default:
      return run<Element, Spectra, 32, 32>(call, stream);
  }
}

template <typename Element>
const char* run_half(const LongConvolutionKernelCall& call, void* stream) {
  // Spectra may be more exact than the elements.
  return call.scales == nullptr ? run<Element, FloatSpectra>(call, stream) : run<Element, HalfSpectra>(call, stream);
}

}  // namespace
}  // namespace tgdp::cuda

const char* tgdp_cuda_long_convolution(const tgdp::LongConvolutionKernelCall* call, void* stream) {
  using namespace tgdp::cuda;
  if (call->batch == 0 || call->channels == 0 || call->length == 0) return nullptr;
  if (call->points != 256 && call->points != 512 && call->points != 1024) {
    return "long_convolution: transforms have 256, 512 or 1024 points";
  }
  if (call->batch > 0x7fffffff / call->channels) return "long_convolution: at most 2^31 - 1 signals at a time";
  if (call->length > call->points) return "long_convolution: more positions than points";
  switch (call->dtype) {
    case tgdp::Dtype::f32:
      if (call->scales != nullptr) return "long_convolution: float32 signals need float32 spectra";
      return run<F32, FloatSpectra>(*call, stream);
    case tgdp::Dtype::bf16:
      return run_half<Bf16>(*call, stream);
    default:
      return run_half<F16>(*call, stream);
  }
}
