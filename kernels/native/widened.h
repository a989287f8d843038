// Parameters and states as modules keep them, in the compute type and the layout that the steps read.
#pragma once

#include "selective.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// `count` numbers of any type in the compute type, with zeros up to the padding.
template <typename Real, typename Weight> class Widened {
 public:
  Widened(const void* data, int64_t count) : numbers_(data == nullptr ? 0 : padded(count)) {
    if (data == nullptr) return;
    for (int64_t first = 0; first < count; first += lane_count<Real>) {
      const int here = count_at<Real>(count, first);
      store(numbers_.data() + first, load<Real>(static_cast<const Weight*>(data) + first, here), here);
    }
  }
  Real* data() { return numbers_.size() == 0 ? nullptr : numbers_.data(); }
  const Real* data() const { return numbers_.size() == 0 ? nullptr : numbers_.data(); }

 private:
  Scratch<Real> numbers_;
};

// `count` numbers from one type to another.
template <typename Real, typename From, typename To> void convert(const From* from, To* to, int64_t count) {
  for (int64_t first = 0; first < count; first += lane_count<Real>) {
    const int here = count_at<Real>(count, first);
    store(to + first, load<Real>(from + first, here), here);
  }
}

// (channels, numbers) parameters as (numbers, padded channels), each number put through a function.
template <typename Real, typename Element, typename Function>
Scratch<Real> turned(const void* data, int64_t channels, int64_t numbers, const Function& function) {
  constexpr int lanes = lane_count<Real>;
  if (data == nullptr) return Scratch<Real>(0);
  Widened<Real, Element> rows(data, channels * numbers);
  for (int64_t first = 0; first < channels * numbers; first += lanes) keep(rows.data() + first, function(whole(rows.data() + first)));
  Scratch<Real> columns(numbers * padded(channels));
  transpose_matrix(rows.data(), numbers, channels, numbers, columns.data(), padded(channels));
  return columns;
}
template <typename Real, typename Element> Scratch<Real> turned(const void* data, int64_t channels, int64_t numbers) {
  return turned<Real, Element>(data, channels, numbers, [](Lanes<Real> value) { return value; });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
