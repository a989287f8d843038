// The parts of a dual scan's forward pass for bfloat16 sequences on processors that multiply these in pairs: products
// read what lies in memory, and no float32 copy of a chunk's inputs, masks or outputs is written in between.
//
// Units are pairs of bfloat16 numbers (matrix_product.h); rows of a chunk are positions.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "matrix_product.h"

#if defined(__AVX512F__) && defined(MAMBACORE_BFLOAT16_PRODUCTS)

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

constexpr int64_t pair_lanes = 16;  // float32 numbers, or pairs, of a vector

// Rows of bfloat16 numbers in memory; a walk from the last position to the first has a negative stride.
struct PairRows {
  uint16_t* data;
  int64_t stride, width;
  uint16_t* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  __mmask16 mask(int64_t column) const {
    const int64_t count = std::max<int64_t>(0, std::min<int64_t>(pair_lanes, width - column));
    return static_cast<__mmask16>((1u << count) - 1);
  }
};

MAMBACORE_PRODUCT_TARGET inline __m512i read_numbers(const PairRows& rows, int64_t row, int64_t column) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows.mask(column), rows.at(row, column)));
}
MAMBACORE_PRODUCT_TARGET inline __m512 read_floats(const PairRows& rows, int64_t row, int64_t column) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(read_numbers(rows, row, column), 16));
}
MAMBACORE_PRODUCT_TARGET inline __m512i pair_of(__m512 lower, __m512 upper) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lower));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(upper));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline __m512 as_vector(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 exponential(__m512 exponent) {
  return reinterpret_cast<__m512>(exp_lanes<float>(reinterpret_cast<Lanes<float>>(exponent)));
}

// Pairs of neighbouring columns: (rows, padded / 2).
inline void pairs_along(const PairRows& from, int64_t rows, int64_t padded, BFloat16Pair* to) {
  for (int64_t row = 0; row < rows; ++row) {
    uint16_t* line = reinterpret_cast<uint16_t*>(to + row * padded / 2);
    std::copy(from.at(row, 0), from.at(row, from.width), line);
    std::fill(line + from.width, line + padded, uint16_t(0));
  }
}

// Pairs of neighbouring rows: (rows / 2, padded), each row times its factor where there are factors.
template <bool scaled>
MAMBACORE_PRODUCT_TARGET inline void pairs_down(const PairRows& from, int64_t rows, int64_t padded, const float* factors,
                                                BFloat16Pair* to) {
  for (int64_t row = 0; row < rows; row += 2) {
    const bool both = row + 1 < rows;
    for (int64_t column = 0; column < padded; column += pair_lanes) {
      __m512i pair;
      if constexpr (scaled) {
        const __m512 lower = _mm512_mul_ps(read_floats(from, row, column), _mm512_set1_ps(factors[row]));
        const __m512 upper = both ? _mm512_mul_ps(read_floats(from, row + 1, column), _mm512_set1_ps(factors[row + 1]))
                                  : _mm512_setzero_ps();
        pair = pair_of(lower, upper);
      } else {
        pair = read_numbers(from, row, column);
        if (both) pair = _mm512_or_si512(pair, _mm512_slli_epi32(read_numbers(from, row + 1, column), 16));
      }
      _mm512_storeu_si512(to + row / 2 * padded + column, pair);
    }
  }
}

// Of one head and chunk: c as a sum of two numbers, the weights, and which record a position belongs to (null: one).
struct PairDecays {
  const float *high, *low, *weight, *own;
  const int64_t* record;
  bool grows;  // whether a decay is above 1
};

// Scores times the mask, in rows of pairs (rows, square / 2); after the diagonal's block of 16 nothing is written.
//
// Left of that block exp(c_i - c_j) is a product of two exponentials, by way of the block's first position: one per row and
// one per column instead of one for each of both. Where the state decays neither is above 1.
MAMBACORE_PRODUCT_TARGET inline void mask_scores(const PairDecays& decays, const float* scores, int64_t rows,
                                                 int64_t square, float* columns, BFloat16Pair* to) {
  for (int64_t first = 0; first < rows; first += pair_lanes) {
    const __m512 first_high = _mm512_set1_ps(decays.high[first]), first_low = _mm512_set1_ps(decays.low[first]);
    const auto since = [&](__m512 high, __m512 low, int64_t column) MAMBACORE_PRODUCT_TARGET {
      return _mm512_add_ps(_mm512_sub_ps(high, as_vector(decays.high + column)),
                           _mm512_sub_ps(low, as_vector(decays.low + column)));
    };
    const bool split = decays.record == nullptr && !decays.grows;
    alignas(64) float of_rows[pair_lanes];
    if (split) {
      _mm512_store_ps(of_rows, exponential(_mm512_sub_ps(_mm512_setzero_ps(), since(first_high, first_low, first))));
      for (int64_t column = 0; column < first; column += pair_lanes)
        _mm512_storeu_ps(columns + column, _mm512_mul_ps(exponential(since(first_high, first_low, column)),
                                                         as_vector(decays.weight + column)));
    }
    for (int64_t row = first; row < std::min(first + pair_lanes, rows); ++row) {
      const __m512 high = _mm512_set1_ps(decays.high[row]), low = _mm512_set1_ps(decays.low[row]);
      uint16_t* line = reinterpret_cast<uint16_t*>(to + row * square / 2);
      const auto write = [&](int64_t column, __m512 mask) MAMBACORE_PRODUCT_TARGET {
        const __m512 value = _mm512_mul_ps(mask, as_vector(scores + row * square + column));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(line + column), (__m256i)_mm512_cvtneps_pbh(value));
      };
      const auto faded = [&](int64_t column, __mmask16 earlier) MAMBACORE_PRODUCT_TARGET {
        if (decays.record) {
          for (int lane = 0; lane < pair_lanes && column + lane < row; ++lane)
            if (decays.record[column + lane] != decays.record[row]) earlier &= static_cast<__mmask16>(~(1u << lane));
        }
        const __m512 fading = _mm512_maskz_mov_ps(earlier, exponential(since(high, low, column)));
        return _mm512_mul_ps(fading, as_vector(decays.weight + column));
      };
      for (int64_t column = 0; column < first; column += pair_lanes) {
        if (split) write(column, _mm512_mul_ps(_mm512_set1_ps(of_rows[row - first]), as_vector(columns + column)));
        else write(column, faded(column, 0xffff));
      }
      const __mmask16 itself = static_cast<__mmask16>(1u << (row - first));
      write(first, _mm512_mask_mov_ps(faded(first, static_cast<__mmask16>(itself - 1)), itself,
                                      _mm512_set1_ps(decays.own[row])));
    }
  }
}

// What the outputs of a chunk are made of, and where they go.
struct PairOutputs {
  int64_t rows, width, size, square;  // the latter padded to whole vectors
  const BFloat16Pair *out_of;         // output matrix, (rows, size / 2)
  const BFloat16Pair *state;          // (size / 2, width)
  const BFloat16Pair *mask;           // masked scores, (rows, square / 2)
  const BFloat16Pair *inputs;         // (rows / 2, width)
  const float* from_rows;             // what is left of the state that arrives
  float skip;
  PairRows read, written;  // the inputs and the outputs
};

template <int row_count, int vector_count>
MAMBACORE_PRODUCT_TARGET inline void accumulate_pairs(__m512 (&sums)[row_count][vector_count], const BFloat16Pair* left,
                                                      int64_t left_row, int64_t left_unit, const BFloat16Pair* right,
                                                      int64_t right_row, int64_t units) {
  for (int64_t unit = 0; unit < units; ++unit) {
    __m512i pairs[vector_count];
    for (int vector = 0; vector < vector_count; ++vector)
      pairs[vector] = _mm512_loadu_si512(right + unit * right_row + vector * pair_lanes);
    for (int row = 0; row < row_count; ++row) {
      const __m512i number = _mm512_set1_epi32(static_cast<int>(left[row * left_row + unit * left_unit].bits));
      for (int vector = 0; vector < vector_count; ++vector)
        sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], (__m512bh)number, (__m512bh)pairs[vector]);
    }
  }
}

template <int row_count, int vector_count>
MAMBACORE_PRODUCT_TARGET inline void output_tile(const PairOutputs& parts, int64_t first, int64_t column) {
  __m512 sums[row_count][vector_count];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  accumulate_pairs(sums, parts.out_of + first * parts.size / 2, parts.size / 2, 1, parts.state + column, parts.width,
                   parts.size / 2);
  for (int row = 0; row < row_count; ++row)
    for (auto& sum : sums[row]) sum = _mm512_mul_ps(sum, _mm512_set1_ps(parts.from_rows[first + row]));
  accumulate_pairs(sums, parts.mask + first * parts.square / 2, parts.square / 2, 1, parts.inputs + column, parts.width,
                   (first + row_count + 1) / 2);
  const __m512 skip = _mm512_set1_ps(parts.skip);
  for (int row = 0; row < row_count; ++row) {
    for (int vector = 0; vector < vector_count; ++vector) {
      const int64_t place = column + vector * pair_lanes;
      const __m512 value = _mm512_fmadd_ps(skip, read_floats(parts.read, first + row, place), sums[row][vector]);
      _mm256_mask_storeu_epi16(parts.written.at(first + row, place), parts.written.mask(place),
                               (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

// state = kept * state + into^T written, of `size` rows, and its pairs of neighbouring rows.
struct PairState {
  int64_t rows, width, size;
  const BFloat16Pair* into;     // input matrix, (rows / 2, size)
  const BFloat16Pair* written;  // inputs times what is left of them at the end of the chunk, (rows / 2, width)
  float kept;
  float* state;         // (size, width)
  BFloat16Pair* pairs;  // (size / 2, width)
};

template <int row_count, int vector_count>
MAMBACORE_PRODUCT_TARGET inline void state_tile(const PairState& parts, int64_t first, int64_t column) {
  __m512 sums[row_count][vector_count];
  const __m512 kept = _mm512_set1_ps(parts.kept);
  float* state = parts.state + first * parts.width + column;
  for (int row = 0; row < row_count; ++row)
    for (int vector = 0; vector < vector_count; ++vector)
      sums[row][vector] = _mm512_mul_ps(kept, as_vector(state + row * parts.width + vector * pair_lanes));
  accumulate_pairs(sums, parts.into + first, 1, parts.size, parts.written + column, parts.width, (parts.rows + 1) / 2);
  for (int row = 0; row < row_count; ++row)
    for (int vector = 0; vector < vector_count; ++vector)
      _mm512_storeu_ps(state + row * parts.width + vector * pair_lanes, sums[row][vector]);
  for (int row = 0; row < row_count; row += 2)
    for (int vector = 0; vector < vector_count; ++vector)
      _mm512_storeu_si512(parts.pairs + (first + row) / 2 * parts.width + column + vector * pair_lanes,
                          pair_of(sums[row][vector], sums[row + 1][vector]));
}

// Tiles of 16 sums: registers hold these with what they are made of.
template <int vector_count>
MAMBACORE_PRODUCT_TARGET inline void output_columns(const PairOutputs& parts, int64_t column) {
  constexpr int tile = vector_count > 2 ? 4 : 8;
  int64_t row = 0;
  for (; row + tile <= parts.rows; row += tile) output_tile<tile, vector_count>(parts, row, column);
  for (; row < parts.rows; ++row) output_tile<1, vector_count>(parts, row, column);
}
template <int vector_count>
MAMBACORE_PRODUCT_TARGET inline void state_columns(const PairState& parts, int64_t column) {
  constexpr int tile = vector_count > 2 ? 4 : 8;  // sizes are whole vectors
  for (int64_t row = 0; row < parts.size; row += tile) state_tile<tile, vector_count>(parts, row, column);
}

MAMBACORE_PRODUCT_TARGET inline void compute_outputs(const PairOutputs& parts) {
  int64_t column = 0;
  for (; column + 4 * pair_lanes <= parts.width; column += 4 * pair_lanes) output_columns<4>(parts, column);
  for (; column + 2 * pair_lanes <= parts.width; column += 2 * pair_lanes) output_columns<2>(parts, column);
  for (; column < parts.width; column += pair_lanes) output_columns<1>(parts, column);
}
MAMBACORE_PRODUCT_TARGET inline void compute_state(const PairState& parts) {
  int64_t column = 0;
  for (; column + 4 * pair_lanes <= parts.width; column += 4 * pair_lanes) state_columns<4>(parts, column);
  for (; column + 2 * pair_lanes <= parts.width; column += 2 * pair_lanes) state_columns<2>(parts, column);
  for (; column < parts.width; column += pair_lanes) state_columns<1>(parts, column);
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore

#endif
