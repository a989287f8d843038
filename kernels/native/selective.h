// One position through a residual selective block:
//
//     sequence + output_projection(scan(silu(convolution(inputs))) * silu(gate)),  (inputs, gate) = projection(norm(sequence))
//
// Generation step by step and programs of steps share it. Channels run along the lanes.
#pragma once

#include <cmath>

#include "product.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

constexpr int64_t padding = 16;  // numbers; a whole number of vectors in every instruction set and type

inline int64_t padded(int64_t width) { return (width + padding - 1) / padding * padding; }

template <typename Real> inline Lanes<Real> whole(const Real* from) { return load(from, lane_count<Real>); }
template <typename Real> inline void keep(Real* to, Lanes<Real> value) { store(to, value, lane_count<Real>); }

// 2^x to within 1e-4 of itself, and 1 - 2^x to within 4e-4 of itself near 1: two products fewer than `exp2_lanes`.
template <typename Real> inline Lanes<Real> rough_exp2_lanes(Lanes<Real> exponent) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    const auto whole_part = reinterpret_cast<Lanes<Real>>(_mm512_roundscale_ps(reinterpret_cast<__m512>(exponent), 8));
    const Lanes<Real> rest = exponent - whole_part;
    Lanes<Real> power = splat(Real(0.05500892)) * rest + Real(0.24221096);
    power = power * rest + Real(0.69328293);
    power = power * rest + Real(1);
    return reinterpret_cast<Lanes<Real>>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), reinterpret_cast<__m512>(whole_part)));
  }
#endif
  return exp2_lanes(exponent);
}

// Root-mean-square normalisation of one position (norm_kernel.cpp is for many).
template <typename Real> void normalise(const Real* from, const Real* weight, int64_t width, double epsilon, Real* to) {
  Lanes<Real> squares = Lanes<Real>{};
  for (int64_t first = 0; first < width; first += lane_count<Real>) {
    const Lanes<Real> value = load(from + first, count_at<Real>(width, first));
    squares += value * value;
  }
  const Real mean = sum_of_lanes<Real>(squares) / static_cast<Real>(width);
  const Real inverse = Real(1) / std::sqrt(mean + static_cast<Real>(epsilon));
  for (int64_t channel = 0; channel < width; ++channel) to[channel] = from[channel] * inverse * weight[channel];
}

template <typename Real> inline void add(Real* to, const Real* from, int64_t width) {
  for (int64_t channel = 0; channel < width; ++channel) to[channel] += from[channel];
}

// Activations of a few sequences inside one operation, in one piece of memory.
template <typename Real> struct Room {
  Scratch<Real> numbers;
  int64_t width;
  Room(int64_t items, int64_t numbers_each) : numbers(items * padded(numbers_each)), width(padded(numbers_each)) {}
  Real* operator[](int64_t item) { return numbers.data() + item * width; }
};

// Sequences whose weights are read together.
constexpr int64_t items_at_once = 64;

template <typename Real> struct Pointers {
  Real* of[items_at_once];
  Pointers(Room<Real>& room, int64_t items) {
    for (int64_t item = 0; item < items; ++item) of[item] = room[item];
  }
  Pointers(Real* first, int64_t stride, int64_t items) {
    for (int64_t item = 0; item < items; ++item) of[item] = first + item * stride;
  }
};

// The sizes and weights of a block. Those per channel are padded with zeros to a multiple of 16 channels.
template <typename Real, typename Layer> struct Selective {
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  static_assert(padding % lanes == 0, "padded widths are whole vectors");

  int64_t model_width, inner_width, state_size, kernel_width, step_rank;
  bool is_complex;
  double epsilon;
  const Real* norm_weight;
  Layer inputs, gate;                          // the two halves of the projection that comes in
  const Real *taps, *convolution_bias;         // (kernel_width, channels); (channels,) or null
  Layer selection, step;
  const Real *rates, *turns;                   // log2 of the decay, and turns, per unit of step size: (states, channels)
  const Real* skip_weight;                     // (channels,)
  Layer output;
  bool by_panel;  // rates and turns are (channels / 16, states, 16)
  bool roughly;   // weights are rounded, so that decays good to 1e-4 of themselves and of their distance from 1 do

  int64_t width() const { return padded(inner_width); }
  int64_t numbers() const { return state_size * (is_complex ? 2 : 1); }
  int64_t selected_width() const { return step_rank + 2 * numbers(); }

  struct Rooms {
    Room<Real> normalised, inputs, gate, selected, step_size;
    Rooms(int64_t items, int64_t model_width, int64_t inner_width, int64_t selected_width)
        : normalised(items, model_width), inputs(items, inner_width), gate(items, inner_width),
          selected(items, selected_width), step_size(items, inner_width) {}
  };

  // The convolution at this position, in place, and its history (kernel_width - 1, channels), oldest first.
  void convolve(Real* here, Real* history) const {
    const int64_t channels = width(), past = kernel_width - 1;
    for (int64_t channel = 0; channel < channels; channel += lanes) {
      const Vector present = whole(here + channel);
      Vector sum = whole(taps + past * channels + channel) * present;
      if (convolution_bias != nullptr) sum += whole(convolution_bias + channel);
      for (int64_t tap = 0; tap < past; ++tap) {
        const Vector earlier = whole(history + tap * channels + channel);
        sum += whole(taps + tap * channels + channel) * earlier;
        if (tap > 0) keep(history + (tap - 1) * channels + channel, earlier);
      }
      if (past > 0) keep(history + (past - 1) * channels + channel, present);
      keep(here + channel, sum * sigmoid_lanes<Real>(sum));
    }
  }

  template <bool rough>
  Vector advance_real(Vector size, Vector drive, const Real* rate, int64_t apart, const Real* into, const Real* out_of,
                      Real* states, int64_t stride) const {
    Vector sum = Vector{};
    for (int64_t state = 0; state < state_size; ++state, rate += apart, states += stride) {
      if (by_panel) __builtin_prefetch(states + padding * state_size, 1);  // of the next channels
      const Vector exponent = size * whole(rate);
      const Vector now = (rough ? rough_exp2_lanes<Real>(exponent) : exp2_lanes(exponent)) * whole(states) + drive * into[state];
      keep(states, now);
      sum += now * out_of[state];
    }
    return sum;
  }

  // One vector of channels through the scan: from `present` inputs to what is read out of the states, which are at
  // `states` with a stride from one number to the next. Complex numbers: real part, then imaginary part.
  Vector advance(int64_t channel, Vector size, Vector present, const Real* into, const Real* out_of, Real* states,
                 int64_t stride) const {
    const Vector drive = size * present;
    const int64_t first = by_panel ? channel / padding * padding * state_size + channel % padding : channel;
    const int64_t apart = by_panel ? padding : width();
    Vector sum = Vector{};
    if (!is_complex) {
      return roughly ? advance_real<true>(size, drive, rates + first, apart, into, out_of, states, stride)
                     : advance_real<false>(size, drive, rates + first, apart, into, out_of, states, stride);
    }
    for (int64_t state = 0; state < state_size; ++state) {
      const int64_t place = first + state * apart;
      const Vector magnitude = exp2_lanes(size * whole(rates + place));
      Real *real = states + 2 * state * stride, *imaginary = real + stride;
      Vector cosine, sine;
      cosine_and_sine(size * whole(turns + place), cosine, sine);
      const Vector real_decay = magnitude * cosine, imaginary_decay = magnitude * sine;
      const Vector before = whole(real), imaginary_before = whole(imaginary);
      const Vector now = real_decay * before - imaginary_decay * imaginary_before + drive * into[2 * state];
      const Vector imaginary_now = real_decay * imaginary_before + imaginary_decay * before + drive * into[2 * state + 1];
      keep(real, now);
      keep(imaginary, imaginary_now);
      sum += now * out_of[2 * state] - imaginary_now * out_of[2 * state + 1];
    }
    return sum + sum;
  }

  // The whole step. `states(item, task)` walks a sequence's states: it calls task(channel, states, stride) for every
  // vector of channels, with its states there. Results go to `normalised`, to be added to the sequence.
  template <typename History, typename States>
  void run(const Real* const* sequence, int64_t items, Rooms& rooms, int64_t threads, const History& history,
           const States& states) const {
    const Pointers<Real> normalised(rooms.normalised, items), before(rooms.inputs, items), gates(rooms.gate, items),
        selected(rooms.selected, items), step_size(rooms.step_size, items);
    for (int64_t item = 0; item < items; ++item)
      normalise(sequence[item], norm_weight, model_width, epsilon, normalised.of[item]);
    inputs.shared_with(gate, normalised.of, before.of, gates.of, items, threads);
    for (int64_t item = 0; item < items; ++item) convolve(before.of[item], history(item));
    selection.shared(before.of, selected.of, items, threads);
    step.shared(selected.of, step_size.of, items, threads);
    constexpr int64_t states_per_thread = int64_t(1) << 15;
    const int64_t tasks = std::max<int64_t>(1, std::min({threads, items, items * inner_width * state_size / states_per_thread}));
    parallel_for(tasks, tasks, [&](int64_t task) {
      for (int64_t item = items * task / tasks; item < items * (task + 1) / tasks; ++item) {
        const Real *into = selected.of[item] + step_rank, *out_of = into + numbers();
        states(item, [&](int64_t channel, Real* held, int64_t stride) {
          Real* here = before.of[item] + channel;
          const Vector size = softplus_lanes<Real>(whole(step_size.of[item] + channel)), present = whole(here);
          const Vector read = advance(channel, size, present, into, out_of, held, stride);
          const Vector open = whole(gates.of[item] + channel);
          keep(here, (read + whole(skip_weight + channel) * present) * open * sigmoid_lanes<Real>(open));
        });
      }
    });
    output.shared(before.of, normalised.of, items, threads);
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
