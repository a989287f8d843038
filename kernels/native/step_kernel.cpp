// One position through one residual selective block: generation, token by token.
//
//     sequence + output_projection(scan(silu(convolution(inputs))) * silu(gate)),  (inputs, gate) = projection(norm(sequence))
//
// A single position has no neighbours to share work with, so everything is done in one call, vectors run along the rows of
// the projections and along the states of a channel, and nothing depends on how many positions came before.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

constexpr int64_t rows_at_once = 4;                  // of a projection: as many sums are on their way together
constexpr int64_t products_per_thread = int64_t(1) << 17;  // fewer are done sooner than a thread is woken

template <typename Real> struct Step {
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreBlockStep& step;

  static int64_t units(int64_t width) { return (width + lanes - 1) / lanes; }
  static int ragged(int64_t width, int64_t unit) { return static_cast<int>(std::min<int64_t>(lanes, width - unit * lanes)); }
  static const Real* numbers(const void* data) { return static_cast<const Real*>(data); }
  // Replaces `count` values by function(value), a vector at a time.
  template <typename Function> static void map(Real* values, int64_t count, const Function& function) {
    for (int64_t unit = 0; unit < units(count); ++unit) {
      Real* here = values + unit * lanes;
      store(here, function(load(here, ragged(count, unit)), unit), ragged(count, unit));
    }
  }

  // to[row] = bias[row] + <weight[row], from>, for all rows; `to` may start with what is to be added to.
  void project(const void* weight, const void* bias, const Real* from, int64_t rows, int64_t width, Real* to, bool add) const {
    const Real *matrix = numbers(weight), *offset = numbers(bias);
    const int64_t blocks = (rows + rows_at_once - 1) / rows_at_once;
    const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(step.threads, rows * width / products_per_thread));
    parallel_for(tasks, tasks, [&](int64_t task) {
      for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
        const int64_t first = block * rows_at_once, count = std::min(rows_at_once, rows - first);
        Vector sums[rows_at_once] = {};
        for (int64_t unit = 0; unit < units(width); ++unit) {
          const int here = ragged(width, unit);
          const Vector value = load(from + unit * lanes, here);
          for (int64_t row = 0; row < count; ++row) sums[row] += value * load(matrix + (first + row) * width + unit * lanes, here);
        }
        for (int64_t row = 0; row < count; ++row) {
          const Real sum = sum_of_lanes<Real>(sums[row]) + (offset != nullptr ? offset[first + row] : Real(0));
          to[first + row] = add ? to[first + row] + sum : sum;
        }
      }
    });
  }

  void normalise(const Real* from, Real* to) const {
    Vector squares = Vector{};
    for (int64_t unit = 0; unit < units(step.model_width); ++unit) {
      const Vector value = load(from + unit * lanes, ragged(step.model_width, unit));
      squares += value * value;
    }
    const Real mean = sum_of_lanes<Real>(squares) / static_cast<Real>(step.model_width);
    const Real inverse = Real(1) / std::sqrt(mean + static_cast<Real>(step.epsilon));
    for (int64_t channel = 0; channel < step.model_width; ++channel)
      to[channel] = from[channel] * inverse * numbers(step.norm_weight)[channel];
  }

  // The convolution at the present position, in place, and the inputs that it hands on.
  void convolve(int64_t batch, Real* inputs) const {
    const int64_t history = step.kernel_width - 1, width = step.inner_width;
    const Real* before = step.convolution_state == nullptr ? nullptr : numbers(step.convolution_state) + batch * history * width;
    Real* after = static_cast<Real*>(step.new_convolution_state) + batch * history * width;
    const Real *weight = numbers(step.convolution_weight), *bias = numbers(step.convolution_bias);
    for (int64_t channel = 0; channel < width; ++channel) {
      const Real* taps = weight + channel * step.kernel_width;
      Real sum = taps[history] * inputs[channel] + (bias != nullptr ? bias[channel] : Real(0));
      for (int64_t tap = 0; tap < history; ++tap) {
        const Real earlier = before != nullptr ? before[tap * width + channel] : Real(0);
        sum += taps[tap] * earlier;
        if (tap > 0) after[(tap - 1) * width + channel] = earlier;
      }
      if (history > 0) after[(history - 1) * width + channel] = inputs[channel];
      inputs[channel] = sum;
    }
    map(inputs, width, [](Vector sum, int64_t) { return sum * sigmoid_lanes<Real>(sum); });
  }

  // One channel's states: from `before` (null: zeros) to `after`; returns what is read out. Complex numbers are pairs.
  Real advance(int64_t channel, Real step_size, Real drive, const Real* into, const Real* out_of, const Real* before,
               Real* after) const {
    const Real* log_rate = numbers(step.log_decay_rate) + channel * step.state_size;
    if (step.frequency != nullptr) {
      const Real* frequency = numbers(step.frequency) + channel * step.state_size;
      Real sum = 0;
      for (int64_t state = 0; state < step.state_size; ++state) {
        const Real magnitude = std::exp(-step_size * std::exp(log_rate[state])), angle = step_size * frequency[state];
        const Real decay_real = magnitude * std::cos(angle), decay_imaginary = magnitude * std::sin(angle);
        const int64_t real = 2 * state, imaginary = real + 1;
        const Real held_real = before != nullptr ? before[real] : 0, held_imaginary = before != nullptr ? before[imaginary] : 0;
        after[real] = decay_real * held_real - decay_imaginary * held_imaginary + drive * into[real];
        after[imaginary] = decay_real * held_imaginary + decay_imaginary * held_real + drive * into[imaginary];
        sum += after[real] * out_of[real] - after[imaginary] * out_of[imaginary];
      }
      return 2 * sum;
    }
    Vector sum = Vector{};
    for (int64_t unit = 0; unit < units(step.state_size); ++unit) {
      const int64_t first = unit * lanes;
      const int here = ragged(step.state_size, unit);
      const Vector decay = exp_lanes<Real>(-step_size * exp_lanes<Real>(load(log_rate + first, here)));
      const Vector held = before != nullptr ? load(before + first, here) : Vector{};
      const Vector state = decay * held + drive * load(into + first, here);
      store(after + first, state, here);
      sum += state * load(out_of + first, here);
    }
    return sum_of_lanes<Real>(sum);
  }

  void run() const {
    const int64_t width = step.inner_width, numbers_per_channel = step.state_size * (step.frequency != nullptr ? 2 : 1);
    const int64_t selected_width = step.step_rank + 2 * numbers_per_channel;
    Scratch<Real> normalised(step.model_width), inner(2 * width), selected(selected_width), step_size(width);
    Real *inputs = inner.data(), *gate = inputs + width;
    for (int64_t batch = 0; batch < step.batch; ++batch) {
      const Real* sequence = numbers(step.sequence) + batch * step.model_width;
      Real* outputs = static_cast<Real*>(step.outputs) + batch * step.model_width;
      normalise(sequence, normalised.data());
      project(step.input_weight, step.input_bias, normalised.data(), 2 * width, step.model_width, inputs, false);
      convolve(batch, inputs);
      project(step.selection_weight, nullptr, inputs, selected_width, width, selected.data(), false);
      project(step.step_weight, step.step_bias, selected.data(), width, step.step_rank, step_size.data(), false);
      map(step_size.data(), width, [](Vector raw, int64_t) { return softplus_lanes<Real>(raw); });
      const Real* into = selected.data() + step.step_rank;
      const Real* out_of = into + numbers_per_channel;
      const int64_t item = batch * width * numbers_per_channel;
      for (int64_t channel = 0; channel < width; ++channel) {
        const int64_t where = item + channel * numbers_per_channel;
        const Real size = step_size[channel];
        const Real* before = step.scan_state == nullptr ? nullptr : numbers(step.scan_state) + where;
        const Real read = advance(channel, size, size * inputs[channel], into, out_of, before,
                                  static_cast<Real*>(step.new_scan_state) + where);
        inputs[channel] = read + numbers(step.skip_weight)[channel] * inputs[channel];
      }
      map(inputs, width, [&](Vector outputs_here, int64_t unit) {
        const Vector gate_here = load(gate + unit * lanes, ragged(width, unit));
        return outputs_here * gate_here * sigmoid_lanes<Real>(gate_here);
      });
      std::copy_n(sequence, step.model_width, outputs);
      project(step.output_weight, step.output_bias, inputs, step.model_width, width, outputs, true);
    }
  }
};

}  // namespace

void block_step(const MambacoreBlockStep& step) {
  if (step.element == MAMBACORE_FLOAT64) Step<double>{step}.run();
  else Step<float>{step}.run();
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
