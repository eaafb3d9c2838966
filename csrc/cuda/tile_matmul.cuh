// Matmuls of a block of rows in shared memory with a matrix that is streamed from global memory tile by tile.
//
// A block of 256 threads computes panels of Tile::kPanel columns. Tiles arrive by asynchronous copies two steps ahead,
// with one barrier per step. The caller says what happens to a finished panel.
#pragma once

#include "../common/portable.h"
#include "device.cuh"
#include "tensor_core.cuh"

namespace tgdp::cuda {

constexpr int kMatmulThreads = 256;
constexpr int kStages = 3;
constexpr int kLongSum = 512;  // terms

// A matrix in global memory with contiguous rows.
struct Matrix {
  const void* data;
  int64_t stride;  // elements between rows; 0 repeats one row
};

TGDP_FUNCTION int rounded_up(int value, int step) { return (value + step - 1) / step * step; }

// The layout of a tile whose rows have kColumns: with padding after each row, so that rows start in different banks,
template <int kColumns, int kPadding>
struct PaddedTile {
  static constexpr int kPitch = kColumns + kPadding;
  static TGDP_FUNCTION int at(int row, int column) { return row * kPitch + column; }
};

// or without padding, the 16-byte pieces of eight rows swizzled, so that both the pieces of one column and those of one
// row are in different banks.
template <typename Storage, int kColumns>
struct SwizzledTile {
  static constexpr int kPitch = kColumns;
  static constexpr int kPiece = 16 / sizeof(Storage);
  static constexpr int kPieces = kColumns / kPiece;
  // Rows that together fill all banks.
  static constexpr int kRowsOfBanks = kPieces < 8 ? 8 / kPieces : 1;
  static_assert(kPieces >= 2 && (kPieces & (kPieces - 1)) == 0);
  static TGDP_FUNCTION int at(int row, int column) {
    constexpr int kTurns = 8 / kRowsOfBanks;
    return row * kColumns + ((column / kPiece) ^ (row / kRowsOfBanks % kTurns)) * kPiece + column % kPiece;
  }
};

// The part of a panel that a thread holds: `kRows` rows of a matmul of 16-bit elements on tensor cores. Eight warps are
// arranged two by four; where there are only rows for four, the others just copy. The wider the panel, the fewer bytes
// of shared memory are read per multiplication: one of two by four warps reads (kRows / 2 + kPanel / 4) kDepth elements
// for kRows kPanel kDepth / 8 multiplications.
template <typename Element_, int kRows_, int kPanel_ = 128, int kTileBytes = 8192>
class TensorCoreTile {
 public:
  using Element = Element_;
  using Storage = uint16_t;
  static constexpr int kRows = kRows_;
  static constexpr int kPanel = kPanel_;
  static constexpr int kDepth = kTileBytes / 2 / kPanel;  // of a tile
  static constexpr int kPadding = 8;  // of left operands: 16 bytes, so that eight rows lie in different banks
  template <int kColumns>
  using Layout = SwizzledTile<uint16_t, kColumns>;  // of tiles
  static constexpr int kAdjacent = 2;  // columns that a thread holds together
  static constexpr int kRowWarps = kRows < 32 ? 1 : 2, kColumnWarps = 4;
  static constexpr int kRowTiles = kRows / (16 * kRowWarps);  // of 16 rows, of a warp
  static constexpr int kHeldRows = 2 * kRowTiles;
  static constexpr int kColumnTiles = kPanel / (8 * kColumnWarps);  // of eight columns, of a warp
  static constexpr int kHeld = 2 * kColumnTiles * kRowTiles;  // times kAdjacent values
  static constexpr int kLanesOfRow = 4;  // lanes of a warp that hold parts of the same row: neighbors
  static_assert(kRows % (16 * kRowWarps) == 0 && kPanel % 64 == 0 && kDepth % 16 == 0);

  TGDP_DEVICE TensorCoreTile() { clear(); }

  TGDP_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][n][e] = 0.0f;
      }
    }
  }

  // Adds left times the tile: left [kRows, kDepth] with row stride `pitch`; the tile is [kPanel, kDepth], or with
  // kTransposed [kDepth, kPanel], in its Layout.
  template <bool kTransposed>
  TGDP_DEVICE void multiply(Shared<uint16_t> left, int pitch, Shared<uint16_t> tile, bool = false) {
    if (!has_columns()) return;
    const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices<false>(a[i], left + ((first_row() + 16 * i + lane % 16) * pitch + k + lane / 16 * 8));
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n) {
        // Columns 0 to 7 and 8 to 15 of 16, each with both halves of the depth.
        const int column = first_column() + 16 * n + matrix / 2 * 8, depth = k + matrix % 2 * 8;
        if constexpr (kTransposed) {
          load_matrices<true>(b[n], tile + Layout<kPanel>::at(depth + row, column));
        } else {
          load_matrices<false>(b[n], tile + Layout<kDepth>::at(column + row, depth));
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma_m16n8k16<Element>(sums_[i][n], a[i], pair);
        }
      }
    }
  }

  // body(row, column, number of the row among those held, number among all held, values of kAdjacent columns)
  template <typename Body>
  TGDP_DEVICE void each(const Body& body) {
    if (!has_columns()) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const float values[2] = {sums_[i][n][2 * half], sums_[i][n][2 * half + 1]};
          body(first_row() + 16 * i + 8 * half + lane / 4, first_column() + 8 * n + lane % 4 * 2, 2 * i + half,
               (2 * i + half) * kColumnTiles + n, values);
        }
      }
    }
  }

  // The row of a number among those held.
  static TGDP_DEVICE int row_of(int held) {
    return first_row() + 16 * (held / 2) + 8 * (held % 2) + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  static TGDP_DEVICE int column_warp() { return static_cast<int>(threadIdx.x) / 32 % kColumnWarps; }
  // The first column of the warp.
  static TGDP_DEVICE int first_column() { return column_warp() * (kPanel / kColumnWarps); }

  static TGDP_DEVICE uint32_t pack(const float (&values)[2]) { return Element::pack(values[0], values[1]); }
  static TGDP_DEVICE void store(Shared<uint16_t> to, const float (&values)[2]) {
    *shared_as<uint32_t>(to) = pack(values);
  }

 private:
  // Whether the warp holds any.
  static TGDP_DEVICE bool has_columns() {
    return kRowWarps * kColumnWarps == 8 || static_cast<int>(threadIdx.x) < 32 * kRowWarps * kColumnWarps;
  }
  static TGDP_DEVICE int first_row() {
    return static_cast<int>(threadIdx.x) / (32 * kColumnWarps) * (kRows / kRowWarps);
  }

  float sums_[kRowTiles][kColumnTiles][4];
};

// The same in float32 with plain fused multiply-adds: every warp takes kRows / 8 rows, every lane kPanel / 32 columns
// of them. In long sums four terms are added up before they are added to the rest: the error grows with the square root
// of the number of additions to one sum.
template <int kRows_, int kPanel_ = 128, int kDepth_ = 16>
class FloatTile {
 public:
  using Element = F32;
  using Storage = float;
  static constexpr int kRows = kRows_;
  static constexpr int kPanel = kPanel_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kPadding = 4;
  template <int kColumns>
  using Layout = PaddedTile<kColumns, kPadding>;
  static constexpr int kAdjacent = 1;
  static constexpr int kHeldRows = kRows / 8;
  static constexpr int kHeldColumns = kPanel / 32;
  static constexpr int kHeld = kHeldColumns * kHeldRows;
  static constexpr int kColumnWarps = 1;
  static constexpr int kLanesOfRow = 32;
  static_assert(kRows % 8 == 0 && kPanel % 32 == 0);

  TGDP_DEVICE FloatTile() { clear(); }

  TGDP_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kHeldRows; ++i) {
#pragma unroll
      for (int j = 0; j < kHeldColumns; ++j) sums_[i][j] = 0.0f;
    }
  }

  template <bool kTransposed>
  TGDP_DEVICE void multiply(Shared<float> left, int pitch, Shared<float> tile, bool long_sum = false) {
    if (long_sum) {
      multiply_as<kTransposed, true>(left, pitch, tile);
    } else {
      multiply_as<kTransposed, false>(left, pitch, tile);
    }
  }

  template <bool kTransposed, bool kInFours>
  TGDP_DEVICE void multiply_as(Shared<float> left, int pitch, Shared<float> tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      float right[kHeldColumns][4];
#pragma unroll
      for (int j = 0; j < kHeldColumns; ++j) {
        const int column = lane + 32 * j;
        if constexpr (kTransposed) {
#pragma unroll
          for (int e = 0; e < 4; ++e) right[j][e] = tile[Layout<kPanel>::at(k + e, column)];
        } else {
          const float4 part = *shared_as<float4>(tile + Layout<kDepth>::at(column, k));
          right[j][0] = part.x;
          right[j][1] = part.y;
          right[j][2] = part.z;
          right[j][3] = part.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kHeldRows; ++i) {
        const float4 part = *shared_as<float4>(left + (row_of(i) * pitch + k));
#pragma unroll
        for (int j = 0; j < kHeldColumns; ++j) {
          float sum = kInFours ? 0.0f : sums_[i][j];
          sum += part.x * right[j][0];
          sum += part.y * right[j][1];
          sum += part.z * right[j][2];
          sum += part.w * right[j][3];
          sums_[i][j] = kInFours ? sums_[i][j] + sum : sum;
        }
      }
    }
  }

  template <typename Body>
  TGDP_DEVICE void each(const Body& body) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kHeldRows; ++i) {
#pragma unroll
      for (int j = 0; j < kHeldColumns; ++j) {
        const float values[1] = {sums_[i][j]};
        body(row_of(i), lane + 32 * j, i, kHeldColumns * i + j, values);
      }
    }
  }

  static TGDP_DEVICE int row_of(int held) { return static_cast<int>(threadIdx.x) / 32 * kHeldRows + held; }
  static TGDP_DEVICE int column_warp() { return 0; }
  static TGDP_DEVICE int first_column() { return 0; }
  static TGDP_DEVICE void store(Shared<float> to, const float (&values)[1]) { *to = values[0]; }

 private:
  float sums_[kHeldRows][kHeldColumns];
};

// Elements of a stage: a tile of either orientation.
template <typename Tile, int kByDepth = Tile::kPanel * Tile::template Layout<Tile::kDepth>::kPitch,
          int kByColumn = Tile::kDepth * Tile::template Layout<Tile::kPanel>::kPitch>
constexpr int kStageElements = kByDepth > kByColumn ? kByDepth : kByColumn;

// Copies rows [row, row + kTileRows) and columns [column, column + kTileColumns) of a matrix [rows, columns] into a
// Layout; zeros outside of the matrix. The caller commits the copies.
template <typename Tile, typename Layout, int kTileRows, int kTileColumns>
TGDP_DEVICE void load_tile(Shared<typename Tile::Storage> to, const Matrix& from, int64_t row, int64_t column,
                           int64_t rows, int64_t columns) {
  using Storage = typename Tile::Storage;
  constexpr int kPart = 16 / sizeof(Storage);  // elements of a copy
  constexpr int kParts = kTileColumns / kPart;
  const auto* data = static_cast<const Storage*>(from.data);
  const bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && from.stride % kPart == 0;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kParts; i += kMatmulThreads) {
    const int tile_row = i / kParts, tile_column = i % kParts * kPart;
    const int64_t left = row + tile_row < rows ? columns - (column + tile_column) : 0;
    const int count = left < 0 ? 0 : left < kPart ? static_cast<int>(left) : kPart;
    const Storage* source = data + (row + tile_row) * from.stride + column + tile_column;
    const Shared<Storage> target = to + Layout::at(tile_row, tile_column);
    if (whole) {
      copy_async(target, count > 0 ? source : data, count * static_cast<int>(sizeof(Storage)));
    } else {
      Storage elements[kPart];
#pragma unroll
      for (int e = 0; e < kPart; ++e) elements[e] = e < count ? source[e] : Storage{0};
      uint4 part;
      memcpy(&part, elements, sizeof(part));
      *shared_as<uint4>(target) = part;
    }
  }
}

// A tile from depth k and a column on, of a weight [columns, depth], or transposed [depth, columns].
template <typename Tile>
TGDP_DEVICE void load_weights(Shared<typename Tile::Storage> to, const Matrix& weight, bool transposed, int k,
                              int column, int depth, int columns) {
  using ByDepth = typename Tile::template Layout<Tile::kDepth>;
  using ByColumn = typename Tile::template Layout<Tile::kPanel>;
  if (transposed) {
    load_tile<Tile, ByColumn, Tile::kDepth, Tile::kPanel>(to, weight, k, column, depth, columns);
  } else {
    load_tile<Tile, ByDepth, Tile::kPanel, Tile::kDepth>(to, weight, column, k, columns, depth);
  }
}

// result [kRows, columns] = left [kRows, depth] times the transpose of weight [columns, depth], or with kTransposed
// times weight [depth, columns]; panel by panel: finish(first column, number of the panel, tile).
//
// left(k, stage) gives the left operand of a step, load_left(k, stage) loads what it needs from depth k on. On return
// all threads have finished.
template <typename Tile, bool kTransposed, typename LoadLeft, typename Left, typename Finish>
TGDP_DEVICE void tile_matmul(const Matrix& weight, int columns, int depth, Shared<typename Tile::Storage> stages,
                         const LoadLeft& load_left, const Left& left, const Finish& finish) {
  // Without any depth, one part of zeros.
  const int parts = depth > 0 ? (depth + Tile::kDepth - 1) / Tile::kDepth : 1;
  const int steps = (columns + Tile::kPanel - 1) / Tile::kPanel * parts;
  int load_panel = 0, load_part = 0;
  const auto load = [&](int stage) {
    if (load_panel * Tile::kPanel < columns) {
      const Shared<typename Tile::Storage> to = stages + stage * kStageElements<Tile>;
      const int column = load_panel * Tile::kPanel, k = load_part * Tile::kDepth;
      load_weights<Tile>(to, weight, kTransposed, k, column, depth, columns);
      load_left(k, stage);
      if (++load_part == parts) {
        load_part = 0;
        ++load_panel;
      }
    }
    // Empty groups too, so that a step always waits for the same number.
    commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  Tile tile;
  int panel = 0, part = 0, stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    // All threads' copies for this step have arrived, and none reads the stage of the last step any more.
    __syncthreads();
    load(stage == 0 ? kStages - 1 : stage - 1);
    const auto operand = left(part * Tile::kDepth, stage);
    // Not for columns that do not exist, as in narrow outputs.
    if (panel * Tile::kPanel + Tile::first_column() < columns) {
      tile.template multiply<kTransposed>(operand.data, operand.pitch, stages + stage * kStageElements<Tile>,
                                          depth > kLongSum);
    }
    if (++stage == kStages) stage = 0;
    if (++part == parts) {
      finish(panel * Tile::kPanel, panel, tile);
      tile.clear();
      part = 0;
      ++panel;
    }
  }
  wait_for_copies<0>();
  __syncthreads();
}

// A left operand in shared memory.
template <typename Storage>
struct LeftOperand {
  Shared<Storage> data;
  int pitch;
};

}  // namespace tgdp::cuda
