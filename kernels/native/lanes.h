// One machine vector of numbers ("lanes"), written once for every instruction set with the compilers' vector
// extensions (GCC and Clang). The width is the widest that the flags of this translation unit allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "interface.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int states_at_once = 8;  // state lanes kept in registers together: 3 x 8 of the 32 registers in backward
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
constexpr int states_at_once = 4;
#else
constexpr int vector_bytes = 16;
constexpr int states_at_once = 4;
#endif

template <typename Real> struct LanesOf;
template <> struct LanesOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t integers __attribute__((vector_size(vector_bytes)));
};
template <> struct LanesOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t integers __attribute__((vector_size(vector_bytes)));
};
template <typename Real> using Lanes = typename LanesOf<Real>::type;
template <typename Real> constexpr int lane_count = vector_bytes / static_cast<int>(sizeof(Real));

// As many numbers in double precision.
template <typename Real> struct WideLanesOf;
template <> struct WideLanesOf<float> { typedef double type __attribute__((vector_size(2 * vector_bytes))); };
template <> struct WideLanesOf<double> { typedef double type __attribute__((vector_size(vector_bytes))); };
template <typename Real> using WideLanes = typename WideLanesOf<Real>::type;
// Added to in place and read by reference: a vector wider than the registers is not passed by value.
template <typename Real> inline void add_widened(WideLanes<Real>& sum, Lanes<Real> lanes) {
  sum += __builtin_convertvector(lanes, WideLanes<Real>);
}
template <typename Real> inline Lanes<Real> narrow_lanes(const WideLanes<Real>& lanes) {
  return __builtin_convertvector(lanes, Lanes<Real>);
}

template <typename Real> inline Lanes<Real> splat(Real value) { return value - Lanes<Real>{}; }

// ---- loads and stores; `count` < lane_count is the ragged end of the channels, filled with zeros ----

struct BFloat16 {
  uint16_t bits;
};

inline float widen(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline BFloat16 narrow(float value) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

// What elements are computed in.
template <typename Element> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };

// Calls function(an element of the type that the number stands for).
template <typename Function> inline void with_element(int32_t element, const Function& function) {
  if (element == MAMBACORE_FLOAT64) function(double{});
  else if (element == MAMBACORE_BFLOAT16) function(BFloat16{});
  else function(float{});
}

template <typename Real> inline Lanes<Real> load(const Real* from, int count) {
  Lanes<Real> lanes;
  if (count == lane_count<Real>) {
    std::memcpy(&lanes, from, sizeof lanes);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == sizeof(float))
      return reinterpret_cast<Lanes<Real>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
    else
      return reinterpret_cast<Lanes<Real>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from));
#endif
    lanes = Lanes<Real>{};
    for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  }
  return lanes;
}
template <typename Real> inline Lanes<Real> load(const BFloat16* from, int count) {
#if defined(__AVX512F__)
  const __m256i narrow_bits = count == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                          : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return reinterpret_cast<Lanes<Real>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bits), 16));
#endif
  Lanes<Real> lanes = Lanes<Real>{};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = widen(from[lane]);
  return lanes;
}
template <typename Real> inline void store(Real* to, Lanes<Real> lanes, int count) {
  if (count == lane_count<Real>) {
    std::memcpy(to, &lanes, sizeof lanes);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == sizeof(float)) {
      return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(lanes));
    } else {
      return _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), reinterpret_cast<__m512d>(lanes));
    }
#endif
    for (int lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
  }
}
inline void store(BFloat16* to, Lanes<float> lanes, int count) {
#if defined(__AVX512F__)
  if (count == 16) {  // as narrow(), sixteen at a time
    const auto value = reinterpret_cast<__m512>(lanes);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), bits,
                                              _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    return;
  }
#endif
  for (int lane = 0; lane < count; ++lane) to[lane] = narrow(lanes[lane]);
}

template <typename Real> inline Real sum_of_lanes(Lanes<Real> lanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) return _mm512_reduce_add_ps(reinterpret_cast<__m512>(lanes));
#endif
  Real parts[lane_count<Real>];
  std::memcpy(parts, &lanes, sizeof lanes);
  for (int half = lane_count<Real> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  }
  return parts[0];
}

// ---- functions ----

constexpr double log2_of_e = 1.4426950408889634074;

// 2^x. Split x = whole + rest with |rest| <= 1/2; 2^rest by a minimax polynomial whose constant term is exactly 1,
// so that decays close to 1 keep their distance from 1 (relative error of the polynomial: 9.2e-8).
inline Lanes<float> exp2_lanes(Lanes<float> exponent) {
#if defined(__AVX512F__)
  const Lanes<float> whole =
      reinterpret_cast<Lanes<float>>(_mm512_roundscale_ps(reinterpret_cast<__m512>(exponent), 8));
#else
  // Outside this range the result is as good as zero or infinite; a NaN passes through both comparisons.
  exponent = exponent < splat(-126.0f) ? splat(-126.0f) : exponent;
  exponent = exponent > splat(127.0f) ? splat(127.0f) : exponent;
  const Lanes<float> shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Lanes<float> shifted = exponent + shifter;
  const Lanes<float> whole = shifted - shifter;
#endif
  const Lanes<float> rest = exponent - whole;
  Lanes<float> power = splat(1.3264720e-3f);
  power = power * rest + 9.6715130e-3f;
  power = power * rest + 5.5507340e-2f;
  power = power * rest + 2.4022242e-1f;
  power = power * rest + 6.9314700e-1f;
  power = power * rest + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes<float>>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(power), reinterpret_cast<__m512>(whole)));
#else
  typedef LanesOf<float>::integers Integers;
  const Integers scale = (reinterpret_cast<Integers>(shifted) << 23) + (127 << 23);
  return power * reinterpret_cast<Lanes<float>>(scale);
#endif
}
inline Lanes<double> exp2_lanes(Lanes<double> exponent) {
  Lanes<double> result;
  for (int lane = 0; lane < lane_count<double>; ++lane) result[lane] = std::exp2(exponent[lane]);
  return result;
}
template <typename Real> inline Lanes<Real> exp_lanes(Lanes<Real> exponent) {
  return exp2_lanes(exponent * static_cast<Real>(log2_of_e));
}

// The cosine and sine of a number of turns. With |rest| <= 1/2 a turn, both follow from those of the half angle; the cosine
// as 1 - 2 sin^2, so that a small angle leaves the length of what it turns as it is (absolute error of the pair: 5e-7).
inline void cosine_and_sine(Lanes<float> turns, Lanes<float>& cosine, Lanes<float>& sine) {
#if defined(__AVX512F__)
  const Lanes<float> whole =
      reinterpret_cast<Lanes<float>>(_mm512_roundscale_ps(reinterpret_cast<__m512>(turns), 8));
#else
  const Lanes<float> shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Lanes<float> whole = (turns + shifter) - shifter;
#endif
  const Lanes<float> rest = turns - whole, square = rest * rest;
  Lanes<float> half_sine = splat(0.0776594074f);
  half_sine = half_sine * square - 0.598292159f;
  half_sine = half_sine * square + 2.55007766f;
  half_sine = half_sine * square - 5.16771009f;
  half_sine = half_sine * square + 3.14159264f;
  half_sine = half_sine * rest;
  Lanes<float> half_cosine = splat(-0.0243967164f);
  half_cosine = half_cosine * square + 0.234937559f;
  half_cosine = half_cosine * square - 1.33521206f;
  half_cosine = half_cosine * square + 4.05870916f;
  half_cosine = half_cosine * square - 4.93480214f;
  half_cosine = half_cosine * square + 1.0f;
  const Lanes<float> twice = half_sine + half_sine;
  sine = twice * half_cosine;
  cosine = 1.0f - twice * half_sine;
}
inline void cosine_and_sine(Lanes<double> turns, Lanes<double>& cosine, Lanes<double>& sine) {
  for (int lane = 0; lane < lane_count<double>; ++lane) {
    const double angle = 6.283185307179586477 * (turns[lane] - std::nearbyint(turns[lane]));
    cosine[lane] = std::cos(angle);
    sine[lane] = std::sin(angle);
  }
}

// 1 / x for 1 <= x < 1e37: an estimate good to 14 bits and one step of Newton's method, four times as fast as dividing.
template <typename Real> inline Lanes<Real> reciprocal_lanes(Lanes<Real> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    const auto estimate = reinterpret_cast<Lanes<Real>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(value)));
    return estimate * (Real(2) - value * estimate);
  }
#endif
  return Real(1) / value;
}
template <typename Real> inline Lanes<Real> sigmoid_lanes(Lanes<Real> value) {
  const Lanes<Real> lowest = splat(Real(-80));  // exp(80) is still finite; a NaN stays a NaN
  value = value < lowest ? lowest : value;
  return reciprocal_lanes<Real>(Real(1) + exp_lanes<Real>(-value));
}

// log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)) by its series: the argument is at most 1/3.
template <typename Real> inline Lanes<Real> log1p_lanes(Lanes<Real> value) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    Lanes<Real> result;
    for (int lane = 0; lane < lane_count<Real>; ++lane) result[lane] = std::log1p(value[lane]);
    return result;
  } else {
    const Lanes<Real> ratio = value * reciprocal_lanes<Real>(Real(2) + value);
    const Lanes<Real> square = ratio * ratio;
    Lanes<Real> series = splat(Real(1.0 / 15));
    series = series * square + Real(1.0 / 13);
    series = series * square + Real(1.0 / 11);
    series = series * square + Real(1.0 / 9);
    series = series * square + Real(1.0 / 7);
    series = series * square + Real(1.0 / 5);
    series = series * square + Real(1.0 / 3);
    series = series * square + Real(1);
    return Real(2) * ratio * series;
  }
}
template <typename Real> inline Lanes<Real> softplus_lanes(Lanes<Real> value) {
  const Lanes<Real> zero = Lanes<Real>{};
  const Lanes<Real> magnitude = value < zero ? -value : value;
  const Lanes<Real> positive_part = value < zero ? zero : value;  // a NaN stays a NaN
  return positive_part + log1p_lanes<Real>(exp_lanes<Real>(-magnitude));
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
