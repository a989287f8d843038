// Matrix times vector for a few vectors at once: what a single step of a model is made of.
//
// A weight is read once for all of the sequences that share it. Each output is summed in one order, over the lanes and
// then between them, whatever else is computed beside it: a sequence is the same alone, in a batch, and on any number of
// threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// How many of `width` numbers a vector at `first` holds.
template <typename Real> inline int count_at(int64_t width, int64_t first) {
  return static_cast<int>(std::min<int64_t>(lane_count<Real>, width - first));
}

#if !defined(__clang__)
// Lane by lane one of two vectors, by Choice::lane(index), from 0 to twice the lanes: known to the compiler.
template <typename Real, typename Choice> inline Lanes<Real> choose(Lanes<Real> first, Lanes<Real> second) {
  constexpr int lanes = lane_count<Real>;
  typedef typename LanesOf<Real>::integers Integers;
  Integers indices;
  if constexpr (lanes == 2) indices = Integers{Choice::lane(0), Choice::lane(1)};
  if constexpr (lanes == 4) indices = Integers{Choice::lane(0), Choice::lane(1), Choice::lane(2), Choice::lane(3)};
  if constexpr (lanes == 8)
    indices = Integers{Choice::lane(0), Choice::lane(1), Choice::lane(2), Choice::lane(3),
                       Choice::lane(4), Choice::lane(5), Choice::lane(6), Choice::lane(7)};
  if constexpr (lanes == 16)
    indices = Integers{Choice::lane(0),  Choice::lane(1),  Choice::lane(2),  Choice::lane(3), Choice::lane(4),  Choice::lane(5),
                       Choice::lane(6),  Choice::lane(7),  Choice::lane(8),  Choice::lane(9), Choice::lane(10), Choice::lane(11),
                       Choice::lane(12), Choice::lane(13), Choice::lane(14), Choice::lane(15)};
  return __builtin_shuffle(first, second, indices);
}
// The first or, with an offset, the second half of every group of `width` lanes: the first vector's, then the second's.
template <int lanes, int width, int offset> struct HalfGroups {
  static constexpr int lane(int number) {
    const int half = width / 2, group = number / half, groups = lanes / width;
    return (group < groups ? 0 : lanes) + group % groups * width + number % half + offset;
  }
};
// Vectors hold groups of `width` lanes to be added up; two neighbours become one with groups half as wide.
template <typename Real, int width> inline void halve(Lanes<Real>* vectors) {
  constexpr int lanes = lane_count<Real>;
  if constexpr (width > 1) {
#pragma GCC unroll 8
    for (int number = 0; number < width / 2; ++number) {
      const Lanes<Real> one = vectors[2 * number], other = vectors[2 * number + 1];
      vectors[number] = choose<Real, HalfGroups<lanes, width, 0>>(one, other) +
                        choose<Real, HalfGroups<lanes, width, width / 2>>(one, other);
    }
    halve<Real, width / 2>(vectors);
  }
}
// Of a square's two vectors, `distance` apart: what they hold after blocks of so many lanes have changed places.
template <int lanes, int distance, bool second> struct Exchanged {
  static constexpr int lane(int number) {
    if (second) return number & distance ? lanes + number : number + distance;
    return number & distance ? lanes + number - distance : number;
  }
};
template <typename Real, int distance> inline void exchange(Lanes<Real>* square) {
  constexpr int lanes = lane_count<Real>;
  if constexpr (distance < lanes) {
#pragma GCC unroll 16
    for (int number = 0; number < lanes; ++number) {
      if (number & distance) continue;
      const Lanes<Real> one = square[number], other = square[number + distance];
      square[number] = choose<Real, Exchanged<lanes, distance, false>>(one, other);
      square[number + distance] = choose<Real, Exchanged<lanes, distance, true>>(one, other);
    }
    exchange<Real, distance * 2>(square);
  }
}
#endif

// The sums over the lanes of as many vectors as there are lanes, as the lanes of one. The vectors are used up.
template <typename Real> inline Lanes<Real> sums_of_lanes(Lanes<Real>* vectors) {
#if defined(__clang__)
  Lanes<Real> sums;
  for (int lane = 0; lane < lane_count<Real>; ++lane) sums[lane] = sum_of_lanes<Real>(vectors[lane]);
  return sums;
#else
  halve<Real, lane_count<Real>>(vectors);
  return vectors[0];
#endif
}

// Turns a square of as many vectors as there are lanes: lane `j` of vector `i` becomes lane `i` of vector `j`.
template <typename Real> inline void transpose(Lanes<Real>* square) {
#if defined(__clang__)
  for (int row = 0; row < lane_count<Real>; ++row)
    for (int column = 0; column < row; ++column) {
      const Real kept = square[row][column];
      square[row][column] = square[column][row];
      square[column][row] = kept;
    }
#else
  exchange<Real, 1>(square);
#endif
}

// (rows, columns) to (columns, rows), with strides in numbers.
template <typename Real>
void transpose_matrix(const Real* from, int64_t from_stride, int64_t rows, int64_t columns, Real* to, int64_t to_stride) {
  constexpr int lanes = lane_count<Real>;
  for (int64_t row = 0; row < rows; row += lanes) {
    for (int64_t column = 0; column < columns; column += lanes) {
      const int here = count_at<Real>(rows, row), wide = count_at<Real>(columns, column);
      Lanes<Real> square[lanes];
      for (int number = 0; number < lanes; ++number)
        square[number] = number < here ? load(from + (row + number) * from_stride + column, wide) : Lanes<Real>{};
      transpose<Real>(square);
      for (int number = 0; number < wide; ++number) store(to + (column + number) * to_stride + row, square[number], here);
    }
  }
}

// A linear layer as modules keep it, (outputs, inputs); biases may be null. Programs of steps have layouts of their own
// (panels.h).
template <typename Real, typename Weight> struct Linear {
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const Weight* weight;
  int64_t inputs, outputs;
  const Real* bias;

  // Some outputs: those from `row` on of `Items` sequences, as many as make `lanes` numbers.
  template <int Items>
  void tile(int64_t row, int64_t end, const Real* const* from, Real* const* to) const {
    constexpr int rows = lanes / Items;
    const Weight* weights[rows];  // past the end, the last row again, whose sums are not used
    for (int number = 0; number < rows; ++number) weights[number] = weight + std::min(row + number, end - 1) * inputs;
    Vector sums[lanes] = {};
    const auto add = [&](int64_t input, int count) {
      Vector values[Items];
      for (int item = 0; item < Items; ++item) values[item] = load(from[item] + input, count);
      for (int number = 0; number < rows; ++number) {
        const Vector column = load<Real>(weights[number] + input, count);
        for (int item = 0; item < Items; ++item) sums[number * Items + item] += values[item] * column;
      }
    };
    int64_t input = 0;
    for (; input + lanes <= inputs; input += lanes) add(input, lanes);
    if (input < inputs) add(input, static_cast<int>(inputs - input));
    const Vector total = sums_of_lanes<Real>(sums);
    const int count = static_cast<int>(std::min<int64_t>(rows, end - row));
    for (int number = 0; number < count; ++number) {
      const Real offset = bias != nullptr ? bias[row + number] : Real(0);
      for (int item = 0; item < Items; ++item) to[item][row + number] = total[number * Items + item] + offset;
    }
  }

  // `lanes` outputs of `Items` sequences.
  template <int Items>
  void tiles(int64_t row, int64_t end, const Real* const* from, Real* const* to) const {
    for (int64_t here = row; here < std::min(row + lanes, end); here += lanes / Items) tile<Items>(here, end, from, to);
  }

  // to[item] = weight from[item] + bias, for outputs from `begin` to `end`. Sequences are taken so many at a time that what
  // they read stays in the fastest cache; weights come from the next one again for each such few.
  void range(int64_t begin, int64_t end, const Real* const* from, Real* const* to, int64_t items) const {
    constexpr int64_t in_cache = 16;
    for (int64_t first = 0; first < items; first += in_cache) few(begin, end, from + first, to + first, std::min(in_cache, items - first));
  }
  void few(int64_t begin, int64_t end, const Real* const* from, Real* const* to, int64_t items) const {
    for (int64_t row = begin; row < end; row += lanes) {
      int64_t item = 0;
      if constexpr (lanes >= 4) {
        for (; item + 4 <= items; item += 4) tiles<4>(row, end, from + item, to + item);
      }
      for (; item + 2 <= items; item += 2) tiles<2>(row, end, from + item, to + item);
      if (item < items) tiles<1>(row, end, from + item, to + item);
    }
  }
  void all(const Real* const* from, Real* const* to, int64_t items) const { range(0, outputs, from, to, items); }

  // The same with outputs shared out between threads, where there is enough to do for several.
  void shared(const Real* const* from, Real* const* to, int64_t items, int64_t threads) const {
    constexpr int64_t products_per_thread = int64_t(1) << 17;  // fewer are done sooner than a thread is woken
    const int64_t units = (outputs + lanes - 1) / lanes;
    const int64_t tasks = std::max<int64_t>(1, std::min({threads, units, outputs * inputs * items / products_per_thread}));
    parallel_for(tasks, tasks, [&](int64_t task) {
      const int64_t begin = units * task / tasks * lanes, end = std::min(units * (task + 1) / tasks * lanes, outputs);
      range(begin, end, from, to, items);
    });
  }
  // Two layers of the same inputs.
  void shared_with(const Linear& other, const Real* const* from, Real* const* to, Real* const* to_other, int64_t items,
                   int64_t threads) const {
    shared(from, to, items, threads);
    other.shared(from, to_other, items, threads);
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
