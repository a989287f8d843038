// What decays and weights make of one chunk of a dual scan: masks, and what the rows see of the states around them
// (ssd_kernel.cpp has the names).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "ssd_pairs.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// The masks of a chunk that decays and weights give one head, and their gradients.
template <typename Walk> struct Decays {
  using Real = typename Walk::Real;
  using Vector = typename Walk::Vector;
  static constexpr int lanes = Walk::lanes;

  int64_t chunk;
  std::vector<double> total;      // c, and as the sum of two numbers, of which differences are as exact
  std::vector<Real> high, low;
  std::vector<int64_t> record;    // 0 for the record that comes into the chunk
  std::vector<Real> weight, own, fading, pairs, columns;
  std::vector<Real> from_rows, to_rows, written_rows, of_from, of_to;
  Real kept = 0;
  int64_t records = 0;  // that begin in the chunk
  bool grows = false;   // whether a decay is above 1

  Decays(int64_t chunk_positions, int64_t rows)
      : chunk(chunk_positions), total(size(chunk)), high(size(padded(chunk))), low(size(padded(chunk))), record(size(chunk)), weight(size(padded(chunk))), own(size(padded(chunk))),
        fading(size(chunk * padded(chunk))), pairs(size(chunk * padded(chunk))), columns(size(padded(chunk))),
        from_rows(size(rows)), to_rows(size(rows)), written_rows(size(rows)), of_from(size(rows)), of_to(size(rows)) {}
  static Vector get(const Real* from) { return load(from, lanes); }
  static void put(Real* to, Vector value) { store(to, value, lanes); }
  static size_t size(int64_t count) { return static_cast<size_t>(count); }
  static int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

  void compute(const Walk& walk, int64_t head) {
    sum_up(walk, head);
    fill_fading(walk);
    fill_rows(walk);
  }

  // c, the weights and the records of a head.
  void sum_up(const Walk& walk, int64_t head) {
    const MambacoreSsd& scan = walk.scan_;
    const int64_t positions = walk.positions_;
    double sum = 0;
    records = 0;
    grows = false;
    for (int64_t position = 0; position < positions; ++position) {
      const int64_t place = walk.weight_place(position, head);
      const bool start = scan.resets && scan.resets[walk.batch_ * scan.length + walk.place_of(position)];
      const Real log_decay = static_cast<const Real*>(scan.log_decay)[place];
      grows = grows || log_decay > 0;
      sum = start ? 0.0 : sum + static_cast<double>(log_decay);
      records += start;
      total[size(position)] = sum;
      record[size(position)] = records;
      high[size(position)] = static_cast<Real>(sum);
      low[size(position)] = static_cast<Real>(sum - static_cast<double>(high[size(position)]));
      weight[size(position)] = static_cast<const Real*>(scan.input_weight)[place];
      own[size(position)] = scan.own_weight ? static_cast<const Real*>(scan.own_weight)[place] : weight[size(position)];
    }
  }

  void fill_fading(const Walk& walk) {
    const int64_t positions = walk.positions_, stride = padded(positions);
    for (int64_t position = 0; position < positions; ++position) {
      Real* row = fading.data() + position * stride;
      const Vector above = splat(high[size(position)]), rest = splat(low[size(position)]);
      int64_t other = 0;
      for (; other < position; other += lanes)
        put(row + other, exp_lanes<Real>((above - get(high.data() + other)) + (rest - get(low.data() + other))));
      std::fill(row + position, row + stride, Real(0));
      if (records == 0) continue;
      for (other = 0; other < position; ++other)
        if (record[size(other)] != record[size(position)]) row[other] = 0;
    }
  }

  void fill_rows(const Walk& walk) {
    const MambacoreSsd& scan = walk.scan_;
    const int64_t last = record[size(walk.positions_ - 1)];
    const double end = total[size(walk.positions_ - 1)];
    for (int64_t row = 0; row < walk.here_; ++row) {
      const size_t position = size(row / scan.rank);
      from_rows[size(row)] = record[position] == 0 ? static_cast<Real>(std::exp(total[position])) : Real(0);
      to_rows[size(row)] = record[position] == last ? static_cast<Real>(std::exp(end - total[position])) : Real(0);
      written_rows[size(row)] = to_rows[size(row)] * weight[position];
    }
    kept = last == 0 ? static_cast<Real>(std::exp(end)) : Real(0);
  }

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
  PairDecays for_pairs() const {
    return {high.data(), low.data(), weight.data(), own.data(), records == 0 ? nullptr : record.data(), grows};
  }
#endif

  // fading * weight of the earlier position, and `own` for positions themselves; in rows.
  void fill_mask(const Walk& walk, Real* mask) const {
    const int64_t rank = walk.scan_.rank, stride = padded(walk.positions_);
    for (int64_t row = 0; row < walk.here_; ++row) {
      const int64_t position = row / rank;
      const Real* faded = fading.data() + position * stride;
      Real* to = mask + row * walk.square_;
      if (rank == 1) {
        for (int64_t other = 0; other < position; ++other) to[other] = faded[other] * weight[size(other)];
        to[position] = own[size(position)];
        std::fill(to + position + 1, to + walk.square_, Real(0));
        continue;
      }
      for (int64_t other = 0; other < walk.here_; ++other) to[other] = faded[other / rank] * weight[size(other / rank)];
      for (int64_t other = position * rank; other < (position + 1) * rank; ++other) to[other] = own[size(position)];
      for (int64_t other = walk.here_; other < walk.square_; ++other) to[other] = 0;
    }
  }

  // Of decays and weights, from the gradient of the masked scores and what `backward` has put into of_from and of_to.
  void write_gradients(const Walk& walk, int64_t head, const Real* scores, const Real* grad_mask, Real of_kept) {
    const MambacoreSsd& scan = walk.scan_;
    const int64_t positions = walk.positions_, rank = scan.rank, stride = padded(positions);
    std::fill(pairs.begin(), pairs.begin() + positions * stride, Real(0));
    for (int64_t row = 0; row < walk.here_; ++row) {
      const Real *left = scores + row * walk.square_, *right = grad_mask + row * walk.square_;
      Real* sums = pairs.data() + row / rank * stride;
      const int64_t end = (row / rank + 1) * rank;
      if (rank == 1) {
        for (int64_t other = 0; other < end; ++other) sums[other] = left[other] * right[other];
        continue;
      }
      for (int64_t other = 0; other < end; ++other) sums[other / rank] += left[other] * right[other];
    }
    Real* grad_weight = static_cast<Real*>(scan.grad_input_weight);
    Real* grad_own = static_cast<Real*>(scan.grad_own_weight);
    Real* grad_decay = static_cast<Real*>(scan.grad_log_decay);
    std::fill(columns.begin(), columns.end(), Real(0));
    // The decay of a position stands between all i from it on and all j before it: from the last position to the
    // first, `columns` sums the pairs of each j with all i so far.
    Real following = 0;  // sum of of_from from here on
    std::vector<Real> earlier(size(positions));
    Real so_far = 0;
    for (int64_t position = 0; position < positions; ++position) {
      Real left = 0;
      for (int64_t row = position * rank; row < (position + 1) * rank; ++row) left += of_to[size(row)] * to_rows[size(row)];
      earlier[size(position)] = so_far;
      so_far += left * weight[size(position)];
      Real sum = left;
      const int64_t place = walk.weight_place(position, head);
      const Real of_own = pairs[size(position * stride + position)];
      pairs[size(position * stride + position)] = 0;
      if (grad_own) grad_own[place] = of_own;
      else sum += of_own;
      grad_weight[place] = sum;
    }
    std::vector<Real> of_weight(size(stride), Real(0));
    for (int64_t position = positions - 1; position >= 0; --position) {
      Real* row = pairs.data() + position * stride;
      const Real* faded = fading.data() + position * stride;
      for (int64_t other = 0; other < position; ++other) {
        const Real pair = row[other] * faded[other];
        of_weight[size(other)] += pair;
        columns[size(other)] += pair * weight[size(other)];
      }
      for (int64_t line = position * rank; line < (position + 1) * rank; ++line) following += of_from[size(line)];
      Vector sums = Vector{};
      int64_t begin = 0;
      for (; begin + lanes <= position; begin += lanes) sums += get(columns.data() + begin);
      Real spanning = sum_of_lanes<Real>(sums);
      for (int64_t other = begin; other < position; ++other) spanning += columns[size(other)];
      grad_decay[walk.weight_place(position, head)] = spanning + following + earlier[size(position)] + of_kept;
    }
    for (int64_t position = 0; position < positions; ++position)
      grad_weight[walk.weight_place(position, head)] += of_weight[size(position)];
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
