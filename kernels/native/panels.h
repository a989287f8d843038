// Linear layers of programs of steps, with weights laid out for a few vectors at a time.
//
// A matrix (outputs, inputs) lies in panels of 16 outputs: of each group of neighbouring inputs, the 16 outputs in turn. A
// group is one number of the compute type, two bfloat16 numbers or four int8 ones, so that 16 outputs' weights of a group
// are one load and nothing is summed across lanes. Outputs past the last one are zeros.
//
// Each output is summed over the inputs in their order by one accumulator, whatever else is computed beside it: a sequence is
// the same alone, in a batch, and on any number of threads. Int8 weights meet inputs that are rounded to 8 bits too, with a
// scale per vector: their sums are integers and the same on every processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "matrix_product.h"
#include "selective.h"
#include "tiles.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
#define MAMBACORE_DOT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")))
inline bool multiplies_bytes() { return __builtin_cpu_supports("avx512vnni") && multiplies_bfloat16(); }
#else
#define MAMBACORE_DOT_TARGET
inline bool multiplies_bytes() { return false; }
#endif

constexpr int64_t panel = padding;         // outputs
constexpr int32_t weight_offset = 128;     // int8 weights are kept as unsigned bytes, this much larger
constexpr float largest_byte = 127;        // of rounded inputs
constexpr int64_t byte_alignment = 64;     // of rows of rounded inputs: what a tile takes at once

// What a layer multiplies: the inputs of a few sequences, rounded where the weights want it.
struct RoundedInputs {
  Scratch<uint8_t> numbers;
  int64_t row;  // bytes from one sequence to the next
  float scales[items_at_once];
  int32_t sums[items_at_once];
  RoundedInputs(int64_t items, int64_t widest)
      : numbers((items + tile_rows - 1) / tile_rows * tile_rows * row_bytes(widest)), row(row_bytes(widest)) {}
  static int64_t row_bytes(int64_t inputs) { return (2 * inputs + byte_alignment - 1) / byte_alignment * byte_alignment; }
  uint8_t* operator[](int64_t item) { return numbers.data() + item * row; }
};

// `inputs` numbers as multiples of a 127th of the largest magnitude, followed by zeros up to the alignment. Where one is not
// finite the scale is NaN, and with it every output.
inline void round_to_bytes(const float* from, int64_t inputs, int8_t* to, float& scale, int32_t& sum) {
  using Vector = Lanes<float>;
  constexpr int lanes = lane_count<float>;
  Vector largest = Vector{}, unfit = Vector{};
  for (int64_t first = 0; first < inputs; first += lanes) {
    const Vector value = load(from + first, count_at<float>(inputs, first));
    const Vector magnitude = value < Vector{} ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    unfit += value - value;
  }
#if defined(__AVX512F__)
  const float most = _mm512_reduce_max_ps(reinterpret_cast<__m512>(largest));
#else
  float lane_values[lanes];
  std::memcpy(lane_values, &largest, sizeof largest);
  const float most = *std::max_element(lane_values, lane_values + lanes);
#endif
  const float inverse = most > 0 ? largest_byte / most : 0;
  scale = most / largest_byte + sum_of_lanes<float>(unfit);
  const int64_t aligned = (inputs + byte_alignment - 1) / byte_alignment * byte_alignment;
  if (scale != scale) {  // an input is not finite: the scale alone makes all outputs NaN, and no whole number is formed
    std::fill(to, to + aligned, int8_t(0));
    sum = 0;
    return;
  }
  typedef LanesOf<float>::integers Integers;
  const Vector shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  Integers total = Integers{};
  for (int64_t first = 0; first < inputs; first += lanes) {
    const int count = count_at<float>(inputs, first);
    const Vector shifted = load(from + first, count) * inverse + shifter;
    const Integers whole = reinterpret_cast<Integers>(shifted) - 0x4b400000;
    total += whole;
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + first), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(whole)));
#else
    for (int lane = 0; lane < count; ++lane) to[first + lane] = static_cast<int8_t>(whole[lane]);
#endif
  }
  if (aligned > inputs) std::fill(to + inputs, to + aligned, int8_t(0));
#if defined(__AVX512F__)
  sum = _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(total));
#else
  sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += total[lane];
#endif
}

template <typename Real> struct PanelLayer {
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  static constexpr int vectors = static_cast<int>(panel) / lanes;  // of a panel
  static constexpr int accumulators = lanes >= 16 || (lanes == 8 && vectors == 2 && sizeof(Real) == 8) ? 16 : 8;

  const uint8_t* weight;
  int64_t element;
  int64_t inputs, outputs;
  const Real* bias;  // padded; may be null
  RoundedInputs* rounded;

  static int64_t group_of(int64_t element) { return element == MAMBACORE_INT8 ? 4 : element == MAMBACORE_BFLOAT16 ? 2 : 1; }
  static int64_t panel_bytes(int64_t element, int64_t inputs) {
    const int64_t group = group_of(element), groups = (inputs + group - 1) / group;
    if (group == 1) return groups * panel * static_cast<int64_t>(sizeof(Real));
    return groups * panel * 4 + (element == MAMBACORE_INT8 ? panel * 4 : 0);  // int8: then the scales
  }
  int64_t stride() const { return panel_bytes(element, inputs); }

  // ---- the sums of a few panels for a few sequences ----

  template <int Items, int Panels>
  void finish(Vector (&sums)[Items][Panels * vectors], int64_t first, Real* const* to) const {
    for (int item = 0; item < Items; ++item) {
      for (int vector = 0; vector < Panels * vectors; ++vector) {
        const int64_t row = first * panel + vector * lanes;
        if (bias != nullptr) sums[item][vector] += whole(bias + row);
        keep(to[item] + row, sums[item][vector]);
      }
    }
  }

  template <int Items, int Panels> void numbers(int64_t first, const Real* const* from, Real* const* to) const {
    const int64_t step = stride();
    const uint8_t* weights = weight + first * step;
    Vector sums[Items][Panels * vectors] = {};
    for (int64_t input = 0; input < inputs; ++input, weights += panel * sizeof(Real)) {
      Vector columns[Panels * vectors];
      for (int number = 0; number < Panels; ++number) {
        for (int vector = 0; vector < vectors; ++vector)
          columns[number * vectors + vector] =
              whole(reinterpret_cast<const Real*>(weights + number * step) + vector * lanes);
      }
      for (int item = 0; item < Items; ++item) {
        const Vector value = splat(from[item][input]);
        for (int vector = 0; vector < Panels * vectors; ++vector) sums[item][vector] += value * columns[vector];
      }
    }
    finish<Items, Panels>(sums, first, to);
  }

  // Bfloat16 weights where the processor does not multiply them: widened, two numbers a lane.
  template <int Items, int Panels> void widened(int64_t first, const float* const* from, float* const* to) const {
    typedef LanesOf<float>::integers Integers;
    const int64_t step = stride();
    const uint8_t* weights = weight + first * step;
    Vector sums[Items][Panels * vectors] = {};
    for (int64_t input = 0; input < inputs; input += 2, weights += panel * 4) {
      Vector lower[Panels * vectors], upper[Panels * vectors];
      for (int number = 0; number < Panels; ++number) {
        for (int vector = 0; vector < vectors; ++vector) {
          Integers pair;
          std::memcpy(&pair, weights + number * step + vector * vector_bytes, sizeof pair);
          lower[number * vectors + vector] = reinterpret_cast<Vector>(pair << 16);
          upper[number * vectors + vector] = reinterpret_cast<Vector>(pair & static_cast<int32_t>(0xffff0000));
        }
      }
      for (int item = 0; item < Items; ++item) {
        const Vector one = splat(from[item][input]);
        const Vector other = splat(input + 1 < inputs ? from[item][input + 1] : 0.0f);
        for (int vector = 0; vector < Panels * vectors; ++vector)
          sums[item][vector] = sums[item][vector] + one * lower[vector] + other * upper[vector];
      }
    }
    finish<Items, Panels>(sums, first, to);
  }

  // Int8 weights by shifts and products of 32-bit integers.
  template <int Items, int Panels> void shifted(int64_t first, int64_t item_at, float* const* to) const {
    typedef LanesOf<float>::integers Integers;
    const int64_t step = stride();
    const uint8_t* weights = weight + first * step;
    Integers sums[Items][Panels * vectors];
    for (int item = 0; item < Items; ++item)
      for (auto& sum : sums[item]) sum = Integers{} - weight_offset * rounded->sums[item_at + item];
    for (int64_t input = 0; input < inputs; input += 4, weights += panel * 4) {
      for (int number = 0; number < Panels; ++number) {
        for (int vector = 0; vector < vectors; ++vector) {
          Integers four;
          std::memcpy(&four, weights + number * step + vector * vector_bytes, sizeof four);
          for (int part = 0; part < 4; ++part) {
            const Integers one = (four >> (8 * part)) & 255;
            for (int item = 0; item < Items; ++item)
              sums[item][number * vectors + vector] += one * static_cast<int8_t>((*rounded)[item_at + item][input + part]);
          }
        }
      }
    }
    for (int item = 0; item < Items; ++item) {
      Vector found[Panels * vectors];
      for (int vector = 0; vector < Panels * vectors; ++vector) found[vector] = __builtin_convertvector(sums[item][vector], Vector);
      scaled<Panels>(found, first, item_at + item, to[item]);
    }
  }

  // to = sums * (scales of the outputs) * (scale of the inputs) + bias, for whole panels.
  template <int Panels> void scaled(const Vector* sums, int64_t first, int64_t item, float* to) const {
    const int64_t step = stride();
    const uint8_t* scales = weight + (first + 1) * step - panel * 4;
    const Vector factor = splat(rounded->scales[item]);
    for (int number = 0; number < Panels; ++number) {
      for (int vector = 0; vector < vectors; ++vector) {
        const int64_t row = (first + number) * panel + vector * lanes;
        Vector value = sums[number * vectors + vector] *
                       whole(reinterpret_cast<const float*>(scales + number * step) + vector * lanes) * factor;
        if (bias != nullptr) value += whole(bias + row);
        keep(to + row, value);
      }
    }
  }

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
  template <int Items, int Panels>
  MAMBACORE_DOT_TARGET void pairs(int64_t first, int64_t item_at, float* const* to) const {
    const int64_t step = stride();
    const uint8_t* weights = weight + first * step;
    Vector sums[Items][Panels] = {};
    for (int64_t input = 0; input < inputs; input += 2, weights += panel * 4) {
      __m512i columns[Panels];
      for (int number = 0; number < Panels; ++number) {
        columns[number] = _mm512_loadu_si512(weights + number * step);
      }
      for (int item = 0; item < Items; ++item) {
        int32_t two;
        std::memcpy(&two, (*rounded)[item_at + item] + 2 * input, sizeof two);
        const __m512i value = _mm512_set1_epi32(two);
        for (int number = 0; number < Panels; ++number) {
          sums[item][number] = reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[item][number]),
                                                                         (__m512bh)columns[number], (__m512bh)value));
        }
      }
    }
    finish<Items, Panels>(sums, first, to);
  }

  template <int Items, int Panels>
  MAMBACORE_DOT_TARGET void fours(int64_t first, int64_t item_at, float* const* to) const {
    const int64_t step = stride();
    const uint8_t* weights = weight + first * step;
    __m512i sums[Items][Panels];
    for (int item = 0; item < Items; ++item)
      for (auto& sum : sums[item]) sum = _mm512_set1_epi32(-weight_offset * rounded->sums[item_at + item]);
    for (int64_t input = 0; input < inputs; input += 4, weights += panel * 4) {
      __m512i columns[Panels];
      for (int number = 0; number < Panels; ++number) {
        columns[number] = _mm512_loadu_si512(weights + number * step);
      }
      for (int item = 0; item < Items; ++item) {
        int32_t four;
        std::memcpy(&four, (*rounded)[item_at + item] + input, sizeof four);
        const __m512i value = _mm512_set1_epi32(four);
        for (int number = 0; number < Panels; ++number)
          sums[item][number] = _mm512_dpbusd_epi32(sums[item][number], columns[number], value);
      }
    }
    for (int item = 0; item < Items; ++item) {
      Vector found[Panels];
      for (int number = 0; number < Panels; ++number)
        found[number] = reinterpret_cast<Vector>(_mm512_cvtepi32_ps(sums[item][number]));
      scaled<Panels>(found, first, item_at + item, to[item]);
    }
  }

  MAMBACORE_DOT_TARGET static void round_to_pairs(const float* from, int64_t inputs, uint8_t* to) {
    for (int64_t first = 0; first < inputs; first += 16) {
      const auto value = reinterpret_cast<__m512>(load(from + first, count_at<float>(inputs, first)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * first), (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
#endif

  // ---- all panels ----

  enum class Way { numbers, widened, pairs, shifted, fours };

  template <Way way, int Items, int Panels>
  void tile(int64_t first, int64_t item, const Real* const* from, Real* const* to) const {
    if constexpr (way == Way::numbers) numbers<Items, Panels>(first, from + item, to + item);
    else if constexpr (way == Way::widened) widened<Items, Panels>(first, from + item, to + item);
    else if constexpr (way == Way::shifted) shifted<Items, Panels>(first, item, to + item);
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    else if constexpr (way == Way::pairs) pairs<Items, Panels>(first, item, to + item);
    else fours<Items, Panels>(first, item, to + item);
#endif
  }

  template <Way way, int Panels>
  void columns(int64_t first, const Real* const* from, Real* const* to, int64_t items) const {
    int64_t item = 0;
    if constexpr (8 * Panels * vectors <= accumulators)
      for (; item + 8 <= items; item += 8) tile<way, 8, Panels>(first, item, from, to);
    if constexpr (4 * Panels * vectors <= accumulators)
      for (; item + 4 <= items; item += 4) tile<way, 4, Panels>(first, item, from, to);
    if constexpr (2 * Panels * vectors <= accumulators)
      for (; item + 2 <= items; item += 2) tile<way, 2, Panels>(first, item, from, to);
    for (; item < items; ++item) tile<way, 1, Panels>(first, item, from, to);
  }

  template <Way way> void by(const Real* const* from, Real* const* to, int64_t items) const {
    const int64_t panels = (outputs + panel - 1) / panel;
    int64_t first = 0;
    if (items < 8) {
      for (; first + 4 <= panels; first += 4) columns<way, 4>(first, from, to, items);
    }
    for (; first + 2 <= panels; first += 2) columns<way, 2>(first, from, to, items);
    if (first < panels) columns<way, 1>(first, from, to, items);
  }

  // Inputs as this layer's weights want them, kept for the products that follow.
  void round(const Real* const* from, int64_t items) const {
    if constexpr (std::is_same_v<Real, float>) {
      for (int64_t item = 0; item < items; ++item) {
        if (element == MAMBACORE_INT8)
          round_to_bytes(from[item], inputs, reinterpret_cast<int8_t*>((*rounded)[item]), rounded->scales[item], rounded->sums[item]);
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
        if (element == MAMBACORE_BFLOAT16 && multiplies_bfloat16()) round_to_pairs(from[item], inputs, (*rounded)[item]);
#endif
      }
    }
  }
  // to[item] = weight from[item] + bias, the inputs having been rounded. Outputs are written up to a whole panel.
  void multiply(const Real* const* from, Real* const* to, int64_t items) const {
    if constexpr (std::is_same_v<Real, float>) {
      if (element == MAMBACORE_INT8) {
        if (items >= fewest_for_tiles && multiplies_tiles()) return by_tiles(to, items);
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
        if (multiplies_bytes()) return by<Way::fours>(from, to, items);
#endif
        return by<Way::shifted>(from, to, items);
      }
      if (element == MAMBACORE_BFLOAT16) {
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
        if (multiplies_bfloat16()) return by<Way::pairs>(from, to, items);
#endif
        return by<Way::widened>(from, to, items);
      }
    }
    by<Way::numbers>(from, to, items);
  }
  void all(const Real* const* from, Real* const* to, int64_t items) const {
    round(from, items);
    multiply(from, to, items);
  }
  // As those of `Linear`: a program's sequences are what is shared out between threads, not a layer.
  void shared(const Real* const* from, Real* const* to, int64_t items, int64_t) const { all(from, to, items); }
  void shared_with(const PanelLayer& other, const Real* const* from, Real* const* to, Real* const* to_other, int64_t items, int64_t) const {
    all(from, to, items);
    other.multiply(from, to_other, items);
  }

  // Sixteen sequences and sixteen outputs at a time. Integers add up to the same sums.
  void by_tiles(Real* const* to, int64_t items) const {
#if defined(MAMBACORE_TILES)
    constexpr int64_t at_once = 4;
    const int64_t step = stride(), panels = (outputs + panel - 1) / panel;
    const TileShapes shapes(inputs);
    for (int64_t item = 0; item < items; item += tile_rows) {
      for (int64_t first = 0; first < panels; first += at_once) {
        const int64_t count = std::min(at_once, panels - first);
        int32_t sums[at_once][tile_rows][panel];
        tile_sums({(*rounded)[item], rounded->row, inputs}, weight + first * step, step, count, sums);
        for (int64_t row = item; row < std::min(item + tile_rows, items); ++row) {
          for (int64_t number = 0; number < count; ++number) {
            Vector found[vectors];
            for (int vector = 0; vector < vectors; ++vector) {
              typename LanesOf<float>::integers here;
              std::memcpy(&here, sums[number][row - item] + vector * lanes, sizeof here);
              found[vector] = __builtin_convertvector(here - weight_offset * rounded->sums[row], Vector);
            }
            scaled<1>(found, first + number, row, to[row]);
          }
        }
      }
    }
#else
    (void)to, (void)items;
#endif
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
