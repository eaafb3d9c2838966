#include "long_convolution.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/low_precision.h"
#include "instruction_set.h"
#include "scratch.h"

namespace tgdp {
namespace {

// Samples that one thread computes with the same spectra of a group.
constexpr int64_t kSampleBlock = 8;
// The largest number in float16 spectra, so that their sums cannot overflow and small numbers keep their digits.
constexpr double kLargestHalf = 16384.0;

const auto& kernels() { return *instruction_set().long_convolution; }

// exp(-2 pi i numerator / (4 denominator)).
void put_root(float* to, int64_t numerator, int64_t denominator) {
  const double angle = std::acos(-1.0) * static_cast<double>(numerator % (4 * denominator)) / (2.0 * denominator);
  to[0] = static_cast<float>(std::cos(angle));
  to[1] = static_cast<float>(-std::sin(angle));
}

// Interpolates at Chebyshev nodes. The first piece has no constant term, because GELU is 0 at 0.
void put_gelu_pieces(int degree, float* to) {
  const double pi = std::acos(-1.0);
  for (int piece = 0; piece < kPieces; ++piece) {
    const int nodes = piece == 0 ? degree : degree + 1;
    double x[kGeluDegree + 1], d[kGeluDegree + 1], powers[kGeluDegree + 1] = {};
    for (int i = 0; i < nodes; ++i) {
      x[i] = 0.5 * std::cos((i + 0.5) * pi / nodes);
      if (piece == 0) x[i] = 0.25 + x[i] / 2;
      const double y = (x[i] + piece) * kPieceWidth;
      d[i] = 0.5 * y * std::erfc(y / std::sqrt(2.0)) / (piece == 0 ? x[i] : 1.0);
    }
    // Divided differences, and the Newton form expanded.
    for (int i = 1; i < nodes; ++i) {
      for (int j = nodes - 1; j >= i; --j) d[j] = (d[j] - d[j - 1]) / (x[j] - x[j - i]);
    }
    for (int i = nodes - 1; i >= 0; --i) {
      for (int j = nodes - 1; j >= 0; --j) powers[j] = (j > 0 ? powers[j - 1] : d[i]) - x[i] * powers[j];
    }
    for (int j = 0; j <= degree; ++j) {
      const int from = piece == 0 ? j - 1 : j;
      to[j * kPieces + piece] = from < 0 ? 0.0f : static_cast<float>(powers[from]);
    }
  }
}

GeluPieces gelu_pieces() {
  struct Tables {
    alignas(64) float fine[(kGeluDegree + 1) * kPieces];
    alignas(64) float rough[(kRoughGeluDegree + 1) * kPieces];
    Tables() {
      put_gelu_pieces(kGeluDegree, fine);
      put_gelu_pieces(kRoughGeluDegree, rough);
    }
  };
  static const Tables tables;
  return {tables.fine, tables.rough};
}

class Plan {
 public:
  Plan(int64_t rows, int64_t columns) : memory_(2 * (2 * rows * columns + rows + columns)) {
    float* between = memory_.data();
    float* by_row = between + 2 * rows * columns;
    float* within_column = by_row + 2 * rows * columns;
    float* within_row = within_column + 2 * rows;
    for (int64_t n2 = 0; n2 < columns; ++n2) {
      for (int64_t k1 = 0; k1 < rows; ++k1) {
        put_root(between + 2 * (n2 * rows + k1), n2 * (4 * k1 - 1), rows * columns);
        put_root(by_row + 2 * (k1 * columns + n2), n2 * (4 * k1 - 1), rows * columns);
      }
    }
    for (int64_t a = 0; a < 4; ++a) {
      for (int64_t b = 0; b < rows / 4; ++b) put_root(within_column + 2 * (a * (rows / 4) + b), b * (4 * a - 1), rows);
      for (int64_t b = 0; b < columns / 4; ++b) put_root(within_row + 2 * (a * (columns / 4) + b), 4 * a * b, columns);
    }
    plan_ = {rows * columns, rows, columns, between, by_row, within_column, within_row, gelu_pieces()};
  }
  const TransformPlan& get() const { return plan_; }

 private:
  std::vector<float> memory_;
  TransformPlan plan_;
};

// Null if there is no kernel for it.
const TransformPlan* plan_for(int64_t points) {
  static const Plan plans[] = {{8, 8}, {16, 8}, {16, 16}, {32, 16}, {32, 32}};
  for (const Plan& plan : plans) {
    if (plan.get().points == points) return &plan.get();
  }
  return nullptr;
}

int64_t groups_of(int64_t channels) { return (channels + kChannelGroup - 1) / kChannelGroup; }

}  // namespace

bool has_long_convolution(int64_t points) { return plan_for(points) != nullptr; }

int64_t packed_filter_size(int64_t channels, int64_t points) {
  return groups_of(channels) * kChannelGroup * points * 2;
}

int64_t long_convolution_scratch(const TransformPlan& plan) {
  return 4 * kChannelGroup * (plan.points + 2 * plan.rows * (plan.columns + 1));
}

void pack_filters(const double* spectra, int64_t channels, int64_t points, void* packed, float* scales) {
  const TransformPlan& plan = *plan_for(points);
  at::parallel_for(0, groups_of(channels), 1, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin * kChannelGroup; channel < end * kChannelGroup; ++channel) {
      const double* spectrum = channel < channels ? spectra + 2 * channel * points : nullptr;
      double scale = 1.0;
      if (scales != nullptr) {
        double largest = 0.0;
        for (int64_t i = 0; spectrum != nullptr && i < 2 * points; ++i) {
          largest = std::max(largest, std::abs(spectrum[i]));
        }
        // A power of two, which rounds nothing.
        if (largest > 0.0 && std::isfinite(largest)) scale = std::exp2(std::ceil(std::log2(largest / kLargestHalf)));
        scales[channel] = static_cast<float>(scale);
      }
      const int64_t start = channel / kChannelGroup * kChannelGroup * points * 2 + channel % kChannelGroup;
      for (int64_t i = 0; i < 2 * points; ++i) {
        const int64_t k1 = i / 2 / plan.columns, k2 = i / 2 % plan.columns;
        const double value = spectrum == nullptr ? 0.0 : spectrum[2 * (k1 + plan.rows * k2) + i % 2] / scale;
        const int64_t at = start + i * kChannelGroup;
        if (scales == nullptr) {
          static_cast<float*>(packed)[at] = static_cast<float>(value);
        } else {
          static_cast<uint16_t*>(packed)[at] = to_f16(static_cast<float>(value));
        }
      }
    }
  });
}

void long_convolution(const LongConvolutionCall& call) {
  const TransformPlan& plan = *plan_for(call.filters.points);
  const int64_t blocks = (call.batch + kSampleBlock - 1) / kSampleBlock;
  at::parallel_for(0, groups_of(call.channels) * blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    unsigned char* scratch = memory.reserve(long_convolution_scratch(plan));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task % blocks * kSampleBlock;
      kernels().convolve(call, plan, task / blocks * kChannelGroup, sample, std::min(sample + kSampleBlock, call.batch),
                         scratch);
    }
  });
}

}  // namespace tgdp
