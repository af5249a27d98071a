// Matmuls by AMX, the tile registers of Intel's server processors since 2023. A tile holds up to 16 rows of 64 bytes.
//
// One instruction multiplies a tile of rows by a tile of weights (16 columns) over 64 bytes of depth, 32 values of
// bfloat16 or 64 of int8, and adds the products to a tile of 16 x 16 sums. The panels of matmul.h and int8.h have the
// layout it reads: the same 4 bytes of depth of all columns are consecutive. A row of sums does not depend on the other
// rows.
//
// A block is 32 rows by one panel: tiles 0 to 3 hold its sums, 4 and 5 rows, 6 and 7 weights. A deep matmul is done in
// parts of its depth: the weights of a part stay in the first-level cache while all blocks use them. Between parts, the
// sums are in memory; their order does not change. GCC's intrinsics do not say which memory they read, so a barrier
// precedes them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define LAS_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace las {

inline bool tiles_allowed = true;  // false in tests of what processors without AMX run

#ifndef LAS_AMX
inline bool has_tiles() { return false; }
#else
// Ask Linux for the tile registers, which it saves only for processes that have asked.
inline bool request_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

inline bool has_tiles() {
  static const bool granted = request_tiles();
  return granted && tiles_allowed && max_lanes >= 16;
}

constexpr int64_t AMX_ROWS = 16, AMX_BYTES = 64;         // a whole tile: its rows, and the bytes of each
constexpr int64_t AMX_BLOCK = 2 * AMX_ROWS;              // rows of a block
constexpr int64_t PANEL_STRIDE = 4 * COLUMNS;            // bytes from one row of a tile of weights to the next
constexpr int64_t PANEL_STEP = AMX_ROWS * PANEL_STRIDE;  // bytes of a panel for one tile of depth
constexpr int64_t MAX_PART = 10 * AMX_BYTES;             // bytes of depth of a part: 20 KiB of a panel

// The operand of the instruction that sets the shapes of all tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // per row
  uint8_t rows[16] = {};
};

// Set the shapes for a block of `count` rows, and zero the tiles.
LAS_AMX inline void configure_tiles(int64_t count) {
  TileShapes shapes;
  const auto upper = uint8_t(std::min(count, AMX_ROWS)), lower = uint8_t(std::max<int64_t>(count - AMX_ROWS, 1));
  const uint8_t rows[] = {upper, upper, lower, lower, upper, lower, AMX_ROWS, AMX_ROWS};
  for (int i = 0; i < 8; ++i) shapes.rows[i] = rows[i], shapes.bytes[i] = AMX_BYTES;
  asm volatile("" : : : "memory");
  _tile_loadconfig(&shapes);
}

// Rows of a matmul as bytes. What is left of the depth (in bytes, a multiple of 4) after the last whole tile is copied
// and padded with zeros.
struct ByteRows {
  ByteRows(const void* from, int64_t stride, int64_t count, int64_t depth)
      : data(static_cast<const char*>(from)), stride(stride), count(count), whole(depth / AMX_BYTES * AMX_BYTES),
        rest(depth - whole), padded_rest(rest ? count * AMX_BYTES : 0) {
    for (int64_t i = 0; rest && i < count; ++i) {
      char* to = padded_rest.data() + i * AMX_BYTES;
      std::memcpy(to, data + i * stride + whole, rest);
      std::memset(to + rest, 0, AMX_BYTES - rest);
    }
  }

  const char* data;
  int64_t stride, count;
  int64_t whole, rest;             // bytes of depth in whole tiles, and after them
  AlignedArray<char> padded_rest;  // (count, AMX_BYTES) if rest > 0
};

// Add to the sums the products of the tiles of rows and weights. LOWER: the block has more than AMX_ROWS rows.
template <class T, bool LOWER>
LAS_AMX LAS_INLINE void multiply_tiles() {
  if constexpr (std::is_same_v<T, int8_t>) {  // rows are unsigned
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if constexpr (LOWER) _tile_dpbusd(2, 5, 6);
    if constexpr (LOWER) _tile_dpbusd(3, 5, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (LOWER) _tile_dpbf16ps(2, 5, 6);
    if constexpr (LOWER) _tile_dpbf16ps(3, 5, 7);
  }
}

// Multiply one tile of depth.
template <class T, bool LOWER>
LAS_AMX LAS_INLINE void multiply_depth(const char* rows, int64_t stride, const char* weights) {
  _tile_loadd(4, rows, stride);
  _tile_loadd(6, weights, PANEL_STRIDE);
  _tile_loadd(7, weights + AMX_BYTES, PANEL_STRIDE);
  if constexpr (LOWER) _tile_loadd(5, rows + AMX_ROWS * stride, stride);
  multiply_tiles<T, LOWER>();
}

// A part of the depth of a panel.
struct DepthPart {
  int64_t begin, end;   // bytes of depth, whole tiles only
  const char* weights;  // of the panel, at `begin`
  const char* rest;     // the incomplete last tile of weights, padded with zeros; null except in the last part
};

// Multiply a block of rows, from `row` on, by a part of a panel. sums (count, COLUMNS) has 4-byte elements and rows
// that are `stride` bytes apart; the products are added to it if `add`.
template <class T, bool LOWER>
LAS_AMX void multiply_block(const ByteRows& rows, int64_t row, const DepthPart& part, char* sums, int64_t stride,
                            bool add) {
  asm volatile("" : : : "memory");
  if (add) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + AMX_BYTES, stride);
    if constexpr (LOWER) {
      _tile_loadd(2, sums + AMX_ROWS * stride, stride);
      _tile_loadd(3, sums + AMX_ROWS * stride + AMX_BYTES, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *from = rows.data + row * rows.stride, *weights = part.weights;
  for (int64_t k = part.begin; k < part.end; k += AMX_BYTES, weights += PANEL_STEP)
    multiply_depth<T, LOWER>(from + k, rows.stride, weights);
  if (part.rest) multiply_depth<T, LOWER>(rows.padded_rest.data() + row * AMX_BYTES, AMX_BYTES, part.rest);
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + AMX_BYTES, stride);
  if constexpr (LOWER) {
    _tile_stored(2, sums + AMX_ROWS * stride, stride);
    _tile_stored(3, sums + AMX_ROWS * stride + AMX_BYTES, stride);
  }
}

// Call block(column, row, count, first, multiply) for each panel, each part of the depth and each block of rows.
// `first`: the part is the first. multiply(sums, stride, add) computes the sums of the block as multiply_block does.
// `panels`: the packed weights, (columns, depth).
template <class T, class Block>
LAS_AMX void for_each_block(const ByteRows& rows, const void* panels, int64_t columns, const Block& block) {
  const int64_t panel_bytes = (rows.whole + rows.rest) * COLUMNS;
  // int8 has one part: its sums are scaled as soon as a block is done.
  const int64_t parts = std::is_same_v<T, int8_t> ? 1 : std::max<int64_t>(1, padded(rows.whole, MAX_PART) / MAX_PART);
  const int64_t part_bytes = padded(rows.whole, parts * AMX_BYTES) / parts;
  alignas(CACHE_LINE) char rest[PANEL_STEP] = {};
  int64_t configured = 0;
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    const char* panel = static_cast<const char*>(panels) + column / COLUMNS * panel_bytes;
    if (rows.rest) std::memcpy(rest, panel + rows.whole * COLUMNS, rows.rest * COLUMNS);
    for (int64_t i = 0, begin = 0; i < parts; ++i, begin += part_bytes) {
      const int64_t end = std::min(begin + part_bytes, rows.whole);
      const DepthPart part{begin, end, panel + begin * COLUMNS, rows.rest && i + 1 == parts ? rest : nullptr};
      for (int64_t row = 0; row < rows.count; row += AMX_BLOCK) {
        const int64_t count = std::min(AMX_BLOCK, rows.count - row);
        if (count != configured) configure_tiles(configured = count);
        block(column, row, count, i == 0, [&](void* sums, int64_t stride, bool add) {
          const auto run = count > AMX_ROWS ? multiply_block<T, true> : multiply_block<T, false>;
          run(rows, row, part, static_cast<char*>(sums), stride, add);
        });
      }
    }
  }
  _tile_release();
}
#endif

}  // namespace las
