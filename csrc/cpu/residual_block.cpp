#include "residual_block.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "instruction_set.h"
#include "matmul.h"

namespace tgdp {
namespace {

// Bytes of u and y of the samples that pass a block together, so that they stay in the last-level cache; the spectra of
// each group of channels are then read once for all of them.
constexpr int64_t kPartBytes = 16 << 20;

const auto& kernels() { return *instruction_set().residual_block; }

// The operands and results of a call's matmuls.
class Block {
 public:
  explicit Block(const ResidualBlockCall& call)
      : call_(call),
        precision_(call.dtype == Dtype::bf16 ? Precision::bf16 : Precision::f32),
        rows_(2 * call.channels),
        ld_(padded(call.length)),
        tiles_((call.length + kTilePositions - 1) / kTilePositions),
        part_(std::clamp<int64_t>(kPartBytes / sample_bytes(), 1, call.batch)) {
    thread_local Scratch memory;
    Arena arena(memory.reserve(part_ * sample_bytes()));
    u_ = arena.take<float>(part_ * rows_ * ld_);
    y_ = arena.take<unsigned char>(part_ * rows_ * ld_ * size_of(call.dtype));
  }

  int64_t part() const { return part_; }

  // Samples [begin, end), at most part().
  void run(int64_t begin, int64_t end) const {
    for_tiles(begin, end, [&](int64_t sample, int64_t first, int64_t columns, const Tile& tile) {
      convolve_taps(sample, sample - begin, first, columns, tile);
    });
    convolve_long(call_.first, end - begin);
    for_tiles(begin, end, [&](int64_t sample, int64_t first, int64_t columns, const Tile& tile) {
      mix(call_.first, sample - begin, first, columns, tile);
      kernels().normalize(u_at(sample - begin, first), ld_, rows_, columns, norm(call_.first, sample, tile));
    });
    convolve_long(call_.second, end - begin);
    for_tiles(begin, end, [&](int64_t sample, int64_t first, int64_t columns, const Tile& tile) {
      mix(call_.second, sample - begin, first, columns, tile);
      put_out(sample, sample - begin, first, columns, tile);
    });
  }

 private:
  // Memory of a thread for a tile.
  struct Tile {
    Tile(const Block& block, Arena& arena) {
      const int64_t channels = block.call_.channels;
      factor = arena.take<float>(3 * channels * kTilePositions);
      change = arena.take<float>((channels + block.call_.skip) * kTilePositions);
      shift = arena.take<float>(2 * channels);
    }
    float* factor;  // a right operand
    float* change;  // of the state
    float* shift;   // of a LayerNorm
  };

  int64_t sample_bytes() const { return rows_ * ld_ * (4 + size_of(call_.dtype)) + 128; }
  float* u_at(int64_t index, int64_t first) const { return u_ + index * rows_ * ld_ + first; }

  template <typename Body>
  void for_tiles(int64_t begin, int64_t end, const Body& body) const {
    at::parallel_for(0, (end - begin) * tiles_, 1, [&](int64_t from, int64_t to) {
      thread_local Scratch memory;
      const auto tile = laid_out<Tile>(memory, *this);
      for (int64_t task = from; task < to; ++task) {
        const int64_t first = task % tiles_ * kTilePositions;
        body(begin + task / tiles_, first, padded(std::min(kTilePositions, call_.length - first)), tile);
      }
      release_matmul(precision_);
    });
  }

  // u = convolution of three taps + step bias.
  void convolve_taps(int64_t sample, int64_t index, int64_t first, int64_t columns, const Tile& tile) const {
    const int64_t channels = call_.channels, length = call_.length;
    const float* bias = call_.step_bias + sample * call_.step_stride;
    float* u = u_at(index, first);
    for (int64_t r = 0; r < rows_; ++r) {
      std::fill_n(u + r * ld_, columns, bias[r]);
      if (first == 0) u[r * ld_] -= bias[rows_ + r];
      if (first + kTilePositions >= length) u[r * ld_ + length - 1 - first] -= bias[2 * rows_ + r];
    }
    const float* state = call_.state + sample * (channels + call_.skip) * length;
    kernels().gather[precision_](state, channels, length, first, columns, tile.factor);
    matmul(precision_, rows_, columns, 3 * channels, left_operand(precision_, call_.convolution, 3 * channels),
             right_operand(precision_, tile.factor, kTilePositions), 0, u, ld_, true);
  }

  // y = gelu(filters * u) of `samples` samples.
  void convolve_long(const S4Layer& layer, int64_t samples) const {
    LongConvolutionCall call;
    call.batch = samples;
    call.channels = rows_;
    call.length = call_.length;
    call.y_dtype = call_.dtype;
    call.u = u_;
    call.y = y_;
    call.u_sample = call.y_sample = rows_ * ld_;
    call.u_channel = call.y_channel = ld_;
    call.filters = layer.filters;
    long_convolution(call);
  }

  // u += mixture y.
  void mix(const S4Layer& layer, int64_t index, int64_t first, int64_t columns, const Tile& tile) const {
    const unsigned char* y = y_ + (index * rows_ * ld_ + first) * size_of(call_.dtype);
    PackedMatrix right = right_operand(precision_, y, ld_);
    if (precision_ != Precision::f32) {
      const auto* rows = reinterpret_cast<const uint16_t*>(y);
      for (int64_t r = 0; r < rows_; r += 2) {
        pointwise().interleave(rows + r * ld_, rows + (r + 1) * ld_, columns,
                               tile.factor + r / 2 * kTilePositions);
      }
      right = right_operand(precision_, tile.factor, kTilePositions);
    }
    matmul(precision_, rows_, columns, rows_, left_operand(precision_, layer.mixture, rows_), right, 0,
           u_at(index, first), ld_, true);
  }

  Normalization norm(const S4Layer& layer, int64_t sample, const Tile& tile) const {
    Normalization result{layer.mixture_bias, layer.norm_weight, layer.norm_bias, layer.epsilon};
    if (&layer == &call_.first && call_.label_bias != nullptr) {
      const float* labels = call_.label_bias + sample * call_.label_stride;
      for (int64_t r = 0; r < rows_; ++r) tile.shift[r] = layer.norm_bias[r] + labels[r];
      result.shift = tile.shift;
    }
    return result;
  }

  // The state from u of the second layer, before its LayerNorm.
  void put_out(int64_t sample, int64_t index, int64_t first, int64_t columns, const Tile& tile) const {
    const int64_t channels = call_.channels, length = call_.length, total = channels + call_.skip;
    kernels().gate[precision_](u_at(index, first), ld_, channels, columns,
                                                norm(call_.second, sample, tile), tile.factor);
    matmul(precision_, total, columns, channels, left_operand(precision_, call_.output, channels),
             right_operand(precision_, tile.factor, kTilePositions), 0, tile.change, kTilePositions);
    float* state = call_.state + sample * total * length + first;
    const int64_t inside = std::min(kTilePositions, length - first);
    kernels().update(state, length, channels, inside, std::sqrt(0.5f), tile.change, call_.output_bias);
    kernels().update(state + channels * length, length, call_.skip, inside, 1.0f,
                     tile.change + channels * kTilePositions, call_.output_bias + channels);
  }

  const ResidualBlockCall& call_;
  Precision precision_;
  int64_t rows_;  // H
  int64_t ld_;    // of u and y
  int64_t tiles_;
  int64_t part_;
  float* u_;          // [part, H, ld]
  unsigned char* y_;  // [part, H, ld] in the dtype of the matmuls
};

}  // namespace

bool has_bf16_matmuls() { return matmul_precision(Dtype::bf16, false) == Precision::bf16; }

void residual_block(const ResidualBlockCall& call) {
  if (call.batch == 0) return;
  const Block block(call);
  for (int64_t begin = 0; begin < call.batch; begin += block.part()) {
    block.run(begin, std::min(begin + block.part(), call.batch));
  }
}

}  // namespace tgdp
