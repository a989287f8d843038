// The choice of the next token from its logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "selective.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

template <typename Real> class Draw {
 public:
  Draw(int64_t classes, double temperature, double top_p)
      : classes_(classes), temperature_(temperature), top_p_(top_p), powers_(padded(classes)), mixed_(padded(classes)),
        order_(top_p < 1 ? static_cast<size_t>(classes) : 0) {}

  // The first class, in their order, at which the probabilities add up to more than this share of their sum.
  int64_t operator()(const Real* logits, double uniform) {
    if (temperature_ == 0) return std::max_element(logits, logits + classes_) - logits;
    double sum = exponentials(logits, largest_of(logits), 1 / temperature_);
    if (top_p_ < 1) sum = keep_likeliest(top_p_ * sum);
    const double wanted = uniform * sum;
    double before = 0;
    int64_t first = 0;
    while (first + lanes < classes_) {  // the vector of classes that holds the one that is looked for
      const double here = before + static_cast<double>(sum_of_lanes<Real>(whole(powers_.data() + first)));
      if (here > wanted) break;
      before = here;
      first += lanes;
    }
    int64_t last = first;
    for (int64_t number = first; number < classes_; ++number) {
      const double power = static_cast<double>(powers_[number]);
      if (power == 0) continue;
      before += power;
      last = number;
      if (before > wanted) break;
    }
    while (powers_[last] == 0) --last;  // roundings led past the last class that has a probability
    return last;
  }

  double log_likelihood(const Real* logits, int64_t token) {
    const Real largest = largest_of(logits);
    return double(logits[token]) - double(largest) - std::log(exponentials(logits, largest, 1));
  }

  // Classifier-free guidance: from the logits of the sequence without labels towards, and past, those of the one with them.
  const Real* guided(const Real* labelled, const Real* unlabelled, double guidance) {
    for (int64_t number = 0; number < classes_; ++number) {
      const double without = double(unlabelled[number]);
      mixed_[number] = static_cast<Real>(without + guidance * (double(labelled[number]) - without));
    }
    return mixed_.data();
  }

 private:
  static constexpr int lanes = lane_count<Real>;

  Real largest_of(const Real* logits) const {
    Lanes<Real> largest = splat(logits[0]);
    int64_t first = 0;
    for (; first + lanes <= classes_; first += lanes) {
      const Lanes<Real> here = whole(logits + first);
      largest = here > largest ? here : largest;
    }
    Real values[lanes];
    keep(values, largest);
    const Real found = *std::max_element(values, values + lanes);
    return first == classes_ ? found : std::max(found, *std::max_element(logits + first, logits + classes_));
  }

  // powers = exp((logits - largest) * factor), and their sum.
  double exponentials(const Real* logits, Real largest, double factor) {
    const auto scale = static_cast<Real>(factor * log2_of_e);
    WideLanes<Real> sums = WideLanes<Real>{};
    for (int64_t first = 0; first < classes_; first += lanes) {
      const int count = count_at<Real>(classes_, first);
      Lanes<Real> power = exp2_lanes((load(logits + first, count) - largest) * scale);
      for (int lane = count; lane < lanes; ++lane) power[lane] = 0;
      keep(powers_.data() + first, power);
      add_widened<Real>(sums, power);
    }
    double sum = 0;
    for (int lane = 0; lane < lanes; ++lane) sum += sums[lane];
    return sum;
  }

  // Leaves the fewest classes that make up `limit`, likeliest first; their sum.
  double keep_likeliest(double limit) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    const Real* powers = powers_.data();
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t one, int64_t other) { return powers[one] > powers[other]; });
    double before = 0, kept = 0;
    for (const int64_t number : order_) {
      const double power = powers_[number];
      if (before >= limit) powers_[number] = 0;
      else kept += power;
      before += power;
    }
    return kept;
  }

  int64_t classes_;
  double temperature_, top_p_;
  Scratch<Real> powers_, mixed_;
  std::vector<int64_t> order_;
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
