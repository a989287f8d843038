// One position through what lies between the two projections of a Mamba-2 or Mamba-3 mixer, for single steps and programs
// of them (mambacore/layers/mamba2.py and mamba3.py have the equations). All states of a head fade alike.
//
// A state of a head is (head_width, state_size), as the modules have it: states run along the lanes.
#pragma once

#include <algorithm>
#include <cmath>

#include "selective.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// Their sizes, and what is the same in both.
template <typename Real> struct Dual {
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;

  int64_t heads, head_width, state_size, groups, rank;

  int64_t inner() const { return heads * head_width; }
  int64_t scan_numbers() const { return inner() * state_size; }

  static Real sigmoid(Real value) { return Real(1) / (Real(1) + std::exp(-value)); }
  static Real silu(Real value) { return value * sigmoid(value); }
  static Real softplus(Real value) { return value > Real(20) ? value : std::log1p(std::exp(value)); }

  // One channel's states: faded, then written to with `rank` vectors, `heads_apart` from one to the next, each weighed.
  void write(Real* states, Real kept, const Real* into, int64_t apart, const Real* weights) const {
    for (int64_t first = 0; first < state_size; first += lanes) {
      const int count = count_at<Real>(state_size, first);
      Vector now = kept * load(states + first, count);
      for (int64_t member = 0; member < rank; ++member) now += weights[member] * load(into + member * apart + first, count);
      store(states + first, now, count);
    }
  }
  Real read(const Real* states, const Real* out_of) const {
    Vector sum = Vector{};
    for (int64_t first = 0; first < state_size; first += lanes) {
      const int count = count_at<Real>(state_size, first);
      sum += load(states + first, count) * load(out_of + first, count);
    }
    return sum_of_lanes<Real>(sum);
  }
};

// ---- Mamba-2 ----

template <typename Real> struct Mamba2 : Dual<Real> {
  using Base = Dual<Real>;
  using Vector = typename Base::Vector;
  using Base::lanes;

  int64_t kernel_width;
  const Real *taps, *convolution_bias;  // (kernel_width, padded mixed channels); (mixed channels,) or null
  const Real *step_bias, *rates;        // (heads,): rates are A, negative
  const Real *skip_weight, *norm_weight, *step_limits;  // (heads,); (inner,); two numbers or null
  double norm_epsilon;

  int64_t mixed() const { return this->inner() + 2 * this->groups * this->state_size; }
  int64_t history() const { return (kernel_width - 1) * padded(mixed()); }

  // As Selective::convolve, but nothing is known of what lies behind the last channel.
  void convolve(Real* here, Real* history) const {
    const int64_t channels = mixed(), stride = padded(channels), past = kernel_width - 1;
    for (int64_t channel = 0; channel < channels; channel += lanes) {
      const int count = count_at<Real>(channels, channel);
      const Vector present = load(here + channel, count);
      Vector sum = whole(taps + past * stride + channel) * present;
      if (convolution_bias != nullptr) sum += load(convolution_bias + channel, count);
      for (int64_t tap = 0; tap < past; ++tap) {
        const Vector earlier = whole(history + tap * stride + channel);
        sum += whole(taps + tap * stride + channel) * earlier;
        if (tap > 0) keep(history + (tap - 1) * stride + channel, earlier);
      }
      if (past > 0) keep(history + (past - 1) * stride + channel, present);
      store(here + channel, sum * sigmoid_lanes<Real>(sum), count);
    }
  }

  // `projected`: gate, inputs, input and output matrix, step; it is used up. `past`: history of the convolution. `states`:
  // (inner, state_size).
  void run(Real* projected, Real* past, Real* states, Real* outputs) const {
    const int64_t inner = this->inner(), width = this->head_width, size = this->state_size;
    const Real *gate = projected, *raw_step = projected + inner + mixed();
    Real* inputs = projected + inner;
    convolve(inputs, past);
    const Real *matrices = inputs + inner, *out_matrices = matrices + this->groups * size;
    for (int64_t head = 0; head < this->heads; ++head) {
      Real step = Base::softplus(raw_step[head] + step_bias[head]);
      if (step_limits != nullptr) step = std::min(std::max(step, step_limits[0]), step_limits[1]);
      const Real kept = std::exp(rates[head] * step);
      const int64_t group = head / (this->heads / this->groups);
      for (int64_t channel = head * width; channel < (head + 1) * width; ++channel) {
        const Real drive = step * inputs[channel];
        this->write(states + channel * size, kept, matrices + group * size, 0, &drive);
        const Real read = this->read(states + channel * size, out_matrices + group * size);
        outputs[channel] = (read + skip_weight[head] * inputs[channel]) * Base::silu(gate[channel]);
      }
    }
    const int64_t stretch = inner / this->groups;
    for (int64_t first = 0; first < inner; first += stretch)
      normalise(outputs + first, norm_weight + first, stretch, norm_epsilon, outputs + first);
  }
};

// ---- Mamba-3 ----

template <typename Real> struct Mamba3 : Dual<Real> {
  using Base = Dual<Real>;

  int64_t angles;
  bool trapezoidal;
  const Real* step_bias;                                                // (heads,)
  const Real *input_norm, *output_norm;                                 // (state_size,)
  const Real *input_bias, *output_bias;                                 // (heads, rank, state_size)
  const Real *rank_inputs, *rank_gates, *rank_outputs;                  // (heads, rank, head_width); null for rank 1
  const Real *skip_weight, *head_norm;                                  // (heads,); (inner,) or null
  double matrix_epsilon, head_epsilon;

  // The angles are kept as a sum of two numbers: over a million positions, float32 would lose the phase.
  int64_t angle_numbers() const { return this->heads * angles; }
  int64_t key_numbers() const { return this->heads * this->rank * this->state_size; }
  int64_t room_numbers() const { return 2 * this->rank * (this->state_size + 1) + 2 * angles + this->head_width; }

  Real of_rank(const Real* weights, int64_t head, int64_t member, int64_t channel) const {
    return weights == nullptr ? Real(1) : weights[(head * this->rank + member) * this->head_width + channel];
  }

  // A normalised matrix with its bias, rotated: neighbouring states are a pair, or with several vectors those that are
  // half the states apart.
  void rotate(const Real* matrix, const Real* bias, const Real* cosine, const Real* sine, Real* to) const {
    const int64_t size = this->state_size, apart = this->rank == 1 ? 1 : size / 2, stride = this->rank == 1 ? 2 : 1;
    for (int64_t state = 0; state < size; ++state) to[state] = matrix[state] + bias[state];
    for (int64_t pair = 0; pair < angles; ++pair) {
      Real *first = to + pair * stride, *second = first + apart;
      const Real one = *first, other = *second;
      *first = one * cosine[pair] - other * sine[pair];
      *second = one * sine[pair] + other * cosine[pair];
    }
  }

  // The parts of a state. An angle is the sum of `angle` and `rest`, (heads, angles); `scan` is (inner, state_size), `keys`
  // (heads, rank, state_size), `values` (inner).
  struct State {
    Real *angle, *rest, *scan, *keys, *values;
  };
  State state_at(Real* memory) const {
    Real *rest = memory + angle_numbers(), *scan = rest + angle_numbers(), *keys = scan + this->scan_numbers();
    return {memory, rest, scan, keys, keys + key_numbers()};
  }

  // `projected`: gate, inputs, input and output matrices, step, decay, share, turn; the matrices are used up. `room` has
  // `room_numbers()`.
  void run(Real* projected, const State& state, Real* outputs, Real* room) const {
    constexpr double pi = 3.14159265358979323846;
    const int64_t inner = this->inner(), width = this->head_width, size = this->state_size, rank = this->rank;
    const int64_t matrices = rank * this->groups, heads = this->heads;
    const Real *gate = projected, *inputs = gate + inner;
    Real *into = projected + 2 * inner, *out_of = into + matrices * size;
    const Real *raw_step = out_of + matrices * size, *raw_decay = raw_step + heads;
    const Real *raw_share = raw_decay + heads, *raw_turn = raw_share + (trapezoidal ? heads : 0);
    Real *angle = state.angle, *rest = state.rest, *states = state.scan;
    Real *last_keys = state.keys, *last_values = state.values;
    Real *keys = room, *queries = keys + rank * size, *cosine = queries + rank * size, *sine = cosine + angles;
    Real *before = sine + angles, *own = before + rank, *values = own + rank;
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      normalise(into + matrix * size, input_norm, size, matrix_epsilon, into + matrix * size);
      normalise(out_of + matrix * size, output_norm, size, matrix_epsilon, out_of + matrix * size);
    }
    for (int64_t head = 0; head < heads; ++head) {
      const Real step = Base::softplus(raw_step[head] + step_bias[head]), raw = raw_decay[head];
      const Real rate = std::max(raw >= 0 ? Real(1) + raw : Real(1) / (Real(1) - raw), Real(1e-4));
      const Real kept = std::exp(-rate * step), share = trapezoidal ? Base::sigmoid(raw_share[head]) : Real(1);
      for (int64_t pair = 0; pair < angles; ++pair) {
        Real &high = angle[head * angles + pair], &low = rest[head * angles + pair];
        const Real turn = static_cast<Real>(pi) * std::tanh(raw_turn[pair]) * step;
        double total = std::fmod(static_cast<double>(high) + static_cast<double>(low) + static_cast<double>(turn), 2 * pi);
        if (total < 0) total += 2 * pi;
        high = static_cast<Real>(total);
        low = static_cast<Real>(total - static_cast<double>(high));
        cosine[pair] = std::cos(high);
        sine[pair] = std::sin(high);
      }
      const int64_t group = head / (heads / this->groups);
      for (int64_t member = 0; member < rank; ++member) {
        const int64_t matrix = (member * this->groups + group) * size, bias = (head * rank + member) * size;
        rotate(into + matrix, input_bias + bias, cosine, sine, keys + member * size);
        rotate(out_of + matrix, output_bias + bias, cosine, sine, queries + member * size);
      }
      Real* key = last_keys + head * rank * size;
      for (int64_t channel = 0; channel < width; ++channel) {
        const int64_t place = head * width + channel;
        Real* held = states + place * size;
        for (int64_t member = 0; member < rank; ++member) {
          const Real weight = of_rank(rank_inputs, head, member, channel);
          before[member] = (Real(1) - share) * step * kept * last_values[place] * weight;
          own[member] = share * step * inputs[place] * weight;
        }
        this->write(held, kept, key, size, before);
        this->write(held, Real(1), keys, size, own);
        last_values[place] = inputs[place];
      }
      std::copy_n(keys, rank * size, key);
      read_head(head, states + head * width * size, queries, inputs + head * width, gate + head * width, values,
                outputs + head * width);
    }
  }

  // The outputs of a head: what each vector reads, normalised if asked, gated, and summed over the vectors.
  void read_head(int64_t head, const Real* states, const Real* queries, const Real* inputs, const Real* gate, Real* values,
                 Real* outputs) const {
    const int64_t width = this->head_width, size = this->state_size;
    std::fill_n(outputs, width, Real(0));
    for (int64_t member = 0; member < this->rank; ++member) {
      Real squares = 0, scale = 1;
      for (int64_t channel = 0; channel < width; ++channel) {
        values[channel] = this->read(states + channel * size, queries + member * size) +
                          skip_weight[head] * inputs[channel] * of_rank(rank_inputs, head, member, channel);
        squares += values[channel] * values[channel];
      }
      if (head_norm != nullptr) scale = Real(1) / std::sqrt(squares / static_cast<Real>(width) + static_cast<Real>(head_epsilon));
      for (int64_t channel = 0; channel < width; ++channel) {
        const Real weight = head_norm == nullptr ? Real(1) : head_norm[head * width + channel];
        outputs[channel] += values[channel] * scale * weight * of_rank(rank_outputs, head, member, channel) *
                            Base::silu(gate[channel] * of_rank(rank_gates, head, member, channel));
      }
    }
  }
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
