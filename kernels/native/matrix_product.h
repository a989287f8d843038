// Products of small matrices that lie in the cache: the parts that the chunks of a scan are made of.
//
// A matrix is made of units: numbers of the compute type, or, for bfloat16 sequences on processors that multiply these
// in pairs, two bfloat16 numbers that are neighbours along the dimension that the product sums over. Sums are float32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

#if defined(__AVX512F__) && defined(__GNUC__) && (__GNUC__ >= 10)
#define MAMBACORE_BFLOAT16_PRODUCTS 1
#endif

// Two bfloat16 numbers in one unit.
struct BFloat16Pair {
  uint32_t bits;
};

// Which rows of the right matrix count for a row of the left one: all, those up to it, or those from it on.
enum class Shape { full, lower, upper };

template <typename Unit> struct ProductTraits {
  using Real = Unit;
  static constexpr int numbers = 1;  // numbers in a unit
};
template <> struct ProductTraits<BFloat16Pair> {
  using Real = float;
  static constexpr int numbers = 2;
};

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
#define MAMBACORE_PRODUCT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
inline bool multiplies_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
#else
#define MAMBACORE_PRODUCT_TARGET
inline bool multiplies_bfloat16() { return false; }
#endif

// A left matrix: unit k of row i is data[i * row + k * unit]. A right one: vector v of unit k is at k * row + v * lanes.
template <typename Unit> struct LeftMatrix {
  const Unit* data;
  int64_t row, unit;
};
template <typename Unit> struct RightMatrix {
  const Unit* data;
  int64_t row;
};

// out[i] = keep * out[i] + scale[i] * sum over k of left[i, k] * right[k], for `rows` rows (of `vectors` vectors each)
// and `units` units of k; `scale` null stands for 1. `shape` counts numbers of k, of which `chunk` rows are in line with
// the rows of the left matrix.
template <int row_count, int vector_count, typename Unit>
MAMBACORE_PRODUCT_TARGET inline void product_tile(
    LeftMatrix<Unit> left, RightMatrix<Unit> right, typename ProductTraits<Unit>::Real* out, int64_t out_row,
    int64_t begin, int64_t end, typename ProductTraits<Unit>::Real keep,
    const typename ProductTraits<Unit>::Real* scale) {
  using Real = typename ProductTraits<Unit>::Real;
  using Vector = Lanes<Real>;
  constexpr int lanes = lane_count<Real>;
  Vector sums[row_count][vector_count];
  for (int row = 0; row < row_count; ++row)
    for (int vector = 0; vector < vector_count; ++vector) sums[row][vector] = Vector{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit* across = right.data + unit * right.row;
    const Unit* down = left.data + unit * left.unit;
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    if constexpr (ProductTraits<Unit>::numbers == 2) {
      __m512i pairs[vector_count];
      for (int vector = 0; vector < vector_count; ++vector) pairs[vector] = _mm512_loadu_si512(across + vector * lanes);
      for (int row = 0; row < row_count; ++row) {
        const __m512i number = _mm512_set1_epi32(static_cast<int>(down[row * left.row].bits));
        for (int vector = 0; vector < vector_count; ++vector) {
          sums[row][vector] = reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[row][vector]),
                                                                        (__m512bh)number, (__m512bh)pairs[vector]));
        }
      }
      continue;
    }
#endif
    if constexpr (ProductTraits<Unit>::numbers == 1) {
      Vector numbers[vector_count];
      for (int vector = 0; vector < vector_count; ++vector) numbers[vector] = load(across + vector * lanes, lanes);
      for (int row = 0; row < row_count; ++row) {
        const Vector number = splat(down[row * left.row]);
        for (int vector = 0; vector < vector_count; ++vector) sums[row][vector] += number * numbers[vector];
      }
    }
  }
  for (int row = 0; row < row_count; ++row) {
    for (int vector = 0; vector < vector_count; ++vector) {
      Real* place = out + row * out_row + vector * lanes;
      Vector sum = scale ? splat(scale[row]) * sums[row][vector] : sums[row][vector];
      if (keep != Real(0)) sum += splat(keep) * load(place, lanes);
      store(place, sum, lanes);
    }
  }
}

template <int vector_count, typename Unit>
MAMBACORE_PRODUCT_TARGET inline void product_columns(
    LeftMatrix<Unit> left, RightMatrix<Unit> right, typename ProductTraits<Unit>::Real* out, int64_t out_row,
    int64_t rows, int64_t units, Shape shape, typename ProductTraits<Unit>::Real keep,
    const typename ProductTraits<Unit>::Real* scale) {
  constexpr int numbers = ProductTraits<Unit>::numbers, tile = vector_count > 2 ? 4 : 8;
  for (int64_t row = 0; row < rows;) {
    const bool whole = row + tile <= rows;
    const int64_t last = row + (whole ? tile : 1);
    const int64_t begin = shape == Shape::upper ? row / numbers : 0;
    const int64_t end = shape == Shape::lower ? std::min(units, (last + numbers - 1) / numbers) : units;
    const LeftMatrix<Unit> here{left.data + row * left.row, left.row, left.unit};
    const auto* scale_here = scale ? scale + row : nullptr;
    if (whole) product_tile<tile, vector_count>(here, right, out + row * out_row, out_row, begin, end, keep, scale_here);
    else product_tile<1, vector_count>(here, right, out + row * out_row, out_row, begin, end, keep, scale_here);
    row = last;
  }
}

template <typename Unit>
MAMBACORE_PRODUCT_TARGET void product(
    LeftMatrix<Unit> left, RightMatrix<Unit> right, typename ProductTraits<Unit>::Real* out, int64_t out_row,
    int64_t rows, int64_t vectors, int64_t units, Shape shape, typename ProductTraits<Unit>::Real keep,
    const typename ProductTraits<Unit>::Real* scale = nullptr) {
  constexpr int lanes = lane_count<typename ProductTraits<Unit>::Real>;
  int64_t vector = 0;
  for (; vector + 4 <= vectors; vector += 4) {
    product_columns<4>(left, {right.data + vector * lanes, right.row}, out + vector * lanes, out_row, rows, units, shape,
                       keep, scale);
  }
  for (; vector + 2 <= vectors; vector += 2) {
    product_columns<2>(left, {right.data + vector * lanes, right.row}, out + vector * lanes, out_row, rows, units, shape,
                       keep, scale);
  }
  for (; vector < vectors; ++vector) {
    product_columns<1>(left, {right.data + vector * lanes, right.row}, out + vector * lanes, out_row, rows, units, shape,
                       keep, scale);
  }
}

// ---- units from numbers ----

// (rows, columns) to units of neighbouring columns: (rows, units of a row). `columns` is padded with zeros to a multiple
// of the lanes. Numbers are their own units.
template <typename Unit, typename Real>
MAMBACORE_PRODUCT_TARGET inline LeftMatrix<Unit> along_rows(const Real* from, int64_t row, int64_t rows, Unit* to) {
  if constexpr (ProductTraits<Unit>::numbers == 1) {
    (void)rows, (void)to;
    return {from, row, 1};
  } else {
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    for (int64_t number = 0; number < rows * row; number += 16) {  // rows are whole vectors, one after the other
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(to) + number),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + number)));
    }
#endif
    return {to, row / 2, 1};
  }
}

// (rows, columns) to units of neighbouring rows: (units of a column, columns). The row after an odd last one is zero.
template <typename Unit, typename Real>
MAMBACORE_PRODUCT_TARGET inline RightMatrix<Unit> down_columns(const Real* from, int64_t row, int64_t rows, Unit* to) {
  if constexpr (ProductTraits<Unit>::numbers == 1) {
    (void)rows, (void)to;
    return {from, row};
  } else {
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    for (int64_t first = 0; first < rows; first += 2) {
      for (int64_t column = 0; column < row; column += 16) {
        const float* place = from + first * row + column;
        const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(place)));
        __m512i pair = lower;
        if (first + 1 < rows) {
          const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(place + row)));
          pair = _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
        }
        _mm512_storeu_si512(to + first / 2 * row + column, pair);
      }
    }
#endif
    return {to, row};
  }
}

// The transpose of a left matrix whose columns are units, as a left matrix.
template <typename Unit> inline LeftMatrix<Unit> transposed(RightMatrix<Unit> matrix) {
  return {matrix.data, 1, matrix.row};
}

// A copy with rows and columns exchanged: to[column][row] = from[row][column], both with rows of so many units.
template <typename Unit>
inline void transpose(const Unit* from, int64_t from_row, int64_t rows, int64_t columns, Unit* to, int64_t to_row) {
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t column = 0; column < columns; column += 16) {
#if defined(__AVX512F__)
      if constexpr (sizeof(Unit) == 4) {
        if (row + 16 <= rows && column + 16 <= columns) {
          __m512i first[16], second[16];
          for (int line = 0; line < 16; ++line) first[line] = _mm512_loadu_si512(from + (row + line) * from_row + column);
          for (int line = 0; line < 16; line += 2) {
            second[line] = _mm512_unpacklo_epi32(first[line], first[line + 1]);
            second[line + 1] = _mm512_unpackhi_epi32(first[line], first[line + 1]);
          }
          for (int line = 0; line < 16; line += 4) {
            first[line] = _mm512_unpacklo_epi64(second[line], second[line + 2]);
            first[line + 1] = _mm512_unpackhi_epi64(second[line], second[line + 2]);
            first[line + 2] = _mm512_unpacklo_epi64(second[line + 1], second[line + 3]);
            first[line + 3] = _mm512_unpackhi_epi64(second[line + 1], second[line + 3]);
          }
          for (int line = 0; line < 4; ++line) {
            second[line] = _mm512_shuffle_i32x4(first[line], first[line + 4], 0x88);
            second[line + 4] = _mm512_shuffle_i32x4(first[line], first[line + 4], 0xdd);
            second[line + 8] = _mm512_shuffle_i32x4(first[line + 8], first[line + 12], 0x88);
            second[line + 12] = _mm512_shuffle_i32x4(first[line + 8], first[line + 12], 0xdd);
          }
          for (int line = 0; line < 4; ++line) {
            first[line] = _mm512_shuffle_i32x4(second[line], second[line + 8], 0x88);
            first[line + 8] = _mm512_shuffle_i32x4(second[line], second[line + 8], 0xdd);
            first[line + 4] = _mm512_shuffle_i32x4(second[line + 4], second[line + 12], 0x88);
            first[line + 12] = _mm512_shuffle_i32x4(second[line + 4], second[line + 12], 0xdd);
          }
          for (int line = 0; line < 16; ++line) _mm512_storeu_si512(to + (column + line) * to_row + row, first[line]);
          continue;
        }
      }
#endif
      for (int64_t line = row; line < std::min(row + 16, rows); ++line)
        for (int64_t place = column; place < std::min(column + 16, columns); ++place)
          to[place * to_row + line] = from[line * from_row + place];
    }
  }
}

// Calls function(an element of the type that the number stands for, a unit of its products).
template <typename Function> inline void with_units(int32_t element_type, const Function& function) {
  with_element(element_type, [&](auto element) {
    using Element = decltype(element);
    using Real = typename ComputeType<Element>::type;
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    if constexpr (std::is_same_v<Element, BFloat16>) {
      if (multiplies_bfloat16()) {
        function(element, BFloat16Pair{});
        return;
      }
    }
#endif
    function(element, Real{});
  });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
