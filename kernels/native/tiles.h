// Products of bytes by the tiles of AMX: sixteen sequences and sixteen outputs at a time.
//
// The sums are integers, so they equal those of the other ways whatever the order; a first product of known bytes is compared
// with its sums before tiles are used for anything. With MAMBACORE_EMULATED_TILES a test runs the same code without AMX.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

#if defined(MAMBACORE_EMULATED_TILES)
#define MAMBACORE_TILES 1
#define MAMBACORE_TILE_TARGET
#elif defined(__AVX512F__) && defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MAMBACORE_TILES 1
#define MAMBACORE_TILE_TARGET __attribute__((target("avx512f,amx-tile,amx-int8")))
#endif

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

constexpr int64_t tile_rows = 16, tile_bytes = 64;
constexpr int64_t fewest_for_tiles = 8;  // sequences; fewer leave most of a tile empty

#if defined(MAMBACORE_TILES)

// Rounded inputs (16, row_bytes), zero up to a multiple of 64 bytes, and how many of them are numbers.
struct TileInputs {
  const uint8_t* rows;
  int64_t row_bytes, inputs;
};

// Tile 0 to 3: sums of four panels; 4 and 5: inputs and weights; 6 and 7: the same at the end, for the last inputs.
class TileShapes {
 public:
  MAMBACORE_TILE_TARGET explicit TileShapes(int64_t inputs) {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 6; ++tile) shapes.rows[tile] = tile_rows, shapes.bytes[tile] = tile_bytes;
    const int64_t groups = (inputs % tile_bytes + 3) / 4;
    if (groups > 0) {
      shapes.rows[6] = tile_rows, shapes.bytes[6] = static_cast<uint16_t>(4 * groups);
      shapes.rows[7] = static_cast<uint8_t>(groups), shapes.bytes[7] = tile_bytes;
    }
    _tile_loadconfig(&shapes);
  }
  MAMBACORE_TILE_TARGET ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// sums[panel][row][output] of `panels` panels, at most four, `stride` bytes apart, each (groups, 16 outputs, 4 inputs) of
// unsigned weights. The shapes are loaded.
MAMBACORE_TILE_TARGET inline void tile_sums(const TileInputs& from, const uint8_t* weights, int64_t stride, int64_t panels,
                                            int32_t (*sums)[tile_rows][16]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t whole = from.inputs / tile_bytes * tile_bytes;
  for (int64_t input = 0; input < whole; input += tile_bytes) {
    const uint8_t* here = weights + input * 16;
    _tile_loadd(4, from.rows + input, from.row_bytes);
    _tile_loadd(5, here, tile_bytes);
    _tile_dpbsud(0, 4, 5);
    if (panels > 1) {
      _tile_loadd(5, here + stride, tile_bytes);
      _tile_dpbsud(1, 4, 5);
    }
    if (panels > 2) {
      _tile_loadd(5, here + 2 * stride, tile_bytes);
      _tile_dpbsud(2, 4, 5);
    }
    if (panels > 3) {
      _tile_loadd(5, here + 3 * stride, tile_bytes);
      _tile_dpbsud(3, 4, 5);
    }
  }
  if (whole < from.inputs) {
    const uint8_t* here = weights + whole * 16;
    _tile_loadd(6, from.rows + whole, from.row_bytes);
    _tile_loadd(7, here, tile_bytes);
    _tile_dpbsud(0, 6, 7);
    if (panels > 1) {
      _tile_loadd(7, here + stride, tile_bytes);
      _tile_dpbsud(1, 6, 7);
    }
    if (panels > 2) {
      _tile_loadd(7, here + 2 * stride, tile_bytes);
      _tile_dpbsud(2, 6, 7);
    }
    if (panels > 3) {
      _tile_loadd(7, here + 3 * stride, tile_bytes);
      _tile_dpbsud(3, 6, 7);
    }
  }
  _tile_stored(0, sums[0], tile_bytes);
  if (panels > 1) _tile_stored(1, sums[1], tile_bytes);
  if (panels > 2) _tile_stored(2, sums[2], tile_bytes);
  if (panels > 3) _tile_stored(3, sums[3], tile_bytes);
}

// Whether four panels of known bytes, with a ragged end, give the sums that they should.
inline bool tiles_add_up() {
  constexpr int64_t inputs = 76, row = 128, panels = 4, stride = (inputs / 4) * 64 + 64;
  static uint8_t rows[tile_rows * row], weights[panels * stride];
  uint32_t number = 1;
  const auto next = [&] { return static_cast<uint8_t>((number = number * 1664525u + 1013904223u) >> 24); };
  std::memset(rows, 0, sizeof rows);
  for (int64_t item = 0; item < tile_rows; ++item)
    for (int64_t input = 0; input < inputs; ++input) rows[item * row + input] = next();
  for (uint8_t& weight : weights) weight = next();
  int32_t sums[panels][tile_rows][16];
  {
    const TileShapes shapes(inputs);
    tile_sums({rows, row, inputs}, weights, stride, panels, sums);
  }
  for (int64_t at = 0; at < panels; ++at)
    for (int64_t item = 0; item < tile_rows; ++item)
      for (int64_t output = 0; output < 16; ++output) {
        int32_t wanted = 0;
        for (int64_t input = 0; input < inputs; ++input)
          wanted += int32_t(weights[at * stride + (input / 4 * 16 + output) * 4 + input % 4]) * int32_t(int8_t(rows[item * row + input]));
        if (sums[at][item][output] != wanted) return false;
      }
  return true;
}

// Whether the processor has tiles for bytes, the system lets this process use them, and they add up.
inline bool has_tiles() {
#if defined(MAMBACORE_EMULATED_TILES)
  return tiles_add_up();
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;  // the system saves states as XSAVE does
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // those of tiles too
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) == 0 || (d >> 25 & 1) == 0) return false;
  constexpr long ask_for_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, ask_for_permission, tile_data) != 0) return false;
  return tiles_add_up();
#endif
}
inline bool multiplies_tiles() {
  static const bool found = has_tiles();
  return found;
}

#else
inline bool multiplies_tiles() { return false; }
#endif

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
