// What states are made of: real numbers, or complex ones, one for each lane. The scan is written once for both.
#pragma once

#include <type_traits>

#include "lanes.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

template <typename Real> struct ComplexLanes {
  Lanes<Real> real, imaginary;
};
// One complex number of memory, the same for all lanes.
template <typename Real> struct ComplexNumber {
  Real real, imaginary;
};
template <typename Real> inline ComplexLanes<Real>& operator+=(ComplexLanes<Real>& sum, ComplexLanes<Real> term) {
  sum.real += term.real;
  sum.imaginary += term.imaginary;
  return sum;
}
template <typename Real> inline ComplexLanes<Real> operator*(ComplexLanes<Real> first, ComplexLanes<Real> second) {
  return {first.real * second.real - first.imaginary * second.imaginary,
          first.real * second.imaginary + first.imaginary * second.real};
}

// What a scan is compiled for: the type that sequences are kept in, and whether states are complex. In its functions a
// "number" may be one per lane (Value) or one for all lanes (Number).
template <typename Element_, bool is_complex_> struct Kind {
  using Element = Element_;
  static constexpr bool is_complex = is_complex_;
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  using Value = std::conditional_t<is_complex, ComplexLanes<Real>, Vector>;
  using Number = std::conditional_t<is_complex, ComplexNumber<Real>, Real>;
  static constexpr int parts = is_complex ? 2 : 1;  // real numbers that make up a number
  // A complex state stands for itself and its conjugate, so twice its real part is read.
  static constexpr Real read_factor = Real(parts);
  static constexpr int lanes = lane_count<Real>;
  // The sum of a segment's steps. A complex state turns by this sum times its frequency, thousands of turns of which only
  // the fraction counts, so it is added up and multiplied in double precision, whatever the compute type.
  using StepSum = WideLanes<Real>;
  // States that stay in registers together.
  static constexpr int states_at_once = MAMBACORE_INSTRUCTION_SET::states_at_once / parts;

  static inline Value everywhere(Number number) {
    if constexpr (is_complex) return {splat(number.real), splat(number.imaginary)};
    else return splat(number);
  }
  // exp(step * rate), the rate in powers of two and turns.
  static inline Value decay(Vector step, Value rate) {
    if constexpr (is_complex) {
      Vector cosine, sine;
      cosine_and_sine(step * rate.imaginary, cosine, sine);
      const Vector magnitude = exp2_lanes(step * rate.real);
      return {magnitude * cosine, magnitude * sine};
    } else {
      return exp2_lanes(step * rate);
    }
  }
  // The same over a segment.
  static inline Value decay_over(const StepSum& step_sum, Value rate) {
    if constexpr (is_complex) {
      Vector turns, cosine, sine;
      for (int lane = 0; lane < lanes; ++lane) {
        const double exact = step_sum[lane] * static_cast<double>(rate.imaginary[lane]);
        turns[lane] = static_cast<Real>(exact - std::nearbyint(exact));
      }
      cosine_and_sine(turns, cosine, sine);
      const Vector magnitude = exp2_lanes(narrow_lanes<Real>(step_sum) * rate.real);
      return {magnitude * cosine, magnitude * sine};
    } else {
      return exp2_lanes(narrow_lanes<Real>(step_sum) * rate);
    }
  }
  static inline Value in_powers_and_turns(Value rate) {
    constexpr Real turns_per_radian = Real(0.15915494309189533577);
    if constexpr (is_complex) return {rate.real * Real(log2_of_e), rate.imaginary * turns_per_radian};
    else return rate * Real(log2_of_e);
  }
  template <typename Any> static inline Value scaled(Any number, Vector factor) {
    if constexpr (is_complex) return {factor * number.real, factor * number.imaginary};
    else return factor * number;
  }
  template <typename Any> static inline Value scaled_conjugate(Any number, Vector factor) {
    if constexpr (is_complex) return {factor * number.real, -(factor * number.imaginary)};
    else return factor * number;
  }
  template <typename Any> static inline Vector real_of_product(Value value, Any number) {
    if constexpr (is_complex) return value.real * number.real - value.imaginary * number.imaginary;
    else return value * number;
  }
  template <typename Any> static inline Vector real_of_product_with_conjugate(Value value, Any number) {
    if constexpr (is_complex) return value.real * number.real + value.imaginary * number.imaginary;
    else return value * number;
  }
  static inline Value product_with_conjugate(Value value, Value other) {
    if constexpr (is_complex) {
      return {value.real * other.real + value.imaginary * other.imaginary,
              value.imaginary * other.real - value.real * other.imaginary};
    } else {
      return value * other;
    }
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
