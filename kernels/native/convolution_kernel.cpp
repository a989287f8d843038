// The causal depthwise convolution on a CPU, vectorised over channels, optionally followed by SiLU.
//
//     pre_t = bias + sum over taps of weight[tap] * input[t - (kernel_width - 1) + tap],   output_t = silu(pre_t)
//
// Inputs before the start come from the initial state (the last kernel_width - 1 inputs of what came before) or are
// zero. Positions do not wait for each other, so threads simply take stretches of the length.

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Element> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

constexpr int64_t rows_at_once = 64;  // backward's block: its gradients before the activation stay in the cache

template <typename Element> struct Convolution {
  using Real = typename ComputeOf<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreConvolution& arguments;
  int64_t batch;

  int64_t history() const { return arguments.kernel_width - 1; }
  int64_t units() const { return (arguments.channels + lanes - 1) / lanes; }
  int width(int64_t unit) const { return static_cast<int>(std::min<int64_t>(lanes, arguments.channels - unit * lanes)); }
  Element* at(const MambacoreSequence& sequence, int64_t position, int64_t unit) const {
    const int64_t row = arguments.reverse ? arguments.length - 1 - position : position;
    return static_cast<Element*>(sequence.data) + batch * sequence.batch_stride + row * sequence.row_stride + unit * lanes;
  }
  // Input at a position in scan order; negative positions lie in the initial state.
  Vector input(int64_t position, int64_t unit) const {
    if (position >= 0) return load<Real>(at(arguments.inputs, position, unit), width(unit));
    if (arguments.initial_state == nullptr) return Vector{};
    const Element* state = static_cast<const Element*>(arguments.initial_state);
    return load<Real>(state + (batch * history() + history() + position) * arguments.channels + unit * lanes, width(unit));
  }
  Vector tap_weight(int64_t tap, int64_t unit) const {
    return load(static_cast<const Real*>(arguments.weight) + tap * arguments.channels + unit * lanes, width(unit));
  }
  Vector before_activation(int64_t position, int64_t unit) const {
    Vector sum = arguments.bias == nullptr
                     ? Vector{}
                     : load(static_cast<const Real*>(arguments.bias) + unit * lanes, width(unit));
    for (int64_t tap = 0; tap < arguments.kernel_width; ++tap)
      sum += tap_weight(tap, unit) * input(position - history() + tap, unit);
    return sum;
  }
  // The gradient of `pre` at a position; zero past the end.
  Vector grad_before_activation(int64_t position, int64_t unit) const {
    if (position >= arguments.length) return Vector{};
    Vector grad = load<Real>(at(arguments.grad_outputs, position, unit), width(unit));
    if (arguments.silu) {
      const Vector pre = before_activation(position, unit);
      const Vector open = sigmoid_lanes<Real>(pre);
      grad *= open * (Real(1) + pre * (Real(1) - open));
    }
    return grad;
  }
};

template <typename Element> void forward(const MambacoreConvolution& arguments) {
  parallel_for(arguments.batch * arguments.segments, arguments.threads, [&](int64_t task) {
    const Convolution<Element> convolution{arguments, task / arguments.segments};
    const int64_t segment = task % arguments.segments;
    const int64_t end = arguments.length * (segment + 1) / arguments.segments;
    for (int64_t position = arguments.length * segment / arguments.segments; position < end; ++position) {
      for (int64_t unit = 0; unit < convolution.units(); ++unit) {
        auto output = convolution.before_activation(position, unit);
        if (arguments.silu) output *= sigmoid_lanes<typename Convolution<Element>::Real>(output);
        store(convolution.at(arguments.outputs, position, unit), output, convolution.width(unit));
      }
    }
  });
}

template <typename Element> void backward(const MambacoreConvolution& arguments) {
  using Real = typename Convolution<Element>::Real;
  using Vector = Lanes<Real>;
  const int64_t taps = arguments.kernel_width;
  parallel_for(arguments.batch * arguments.segments, arguments.threads, [&](int64_t task) {
    const Convolution<Element> convolution{arguments, task / arguments.segments};
    const int64_t segment = task % arguments.segments, units = convolution.units(), history = convolution.history();
    const int64_t begin = arguments.length * segment / arguments.segments;
    const int64_t end = arguments.length * (segment + 1) / arguments.segments;
    Scratch<Vector> grad_weight(taps * units), grad_bias(units), grad_pre(rows_at_once + history);
    for (int64_t block = begin; block < end; block += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, end - block);
      for (int64_t unit = 0; unit < units; ++unit) {
        for (int64_t row = 0; row < rows + history; ++row) grad_pre[row] = convolution.grad_before_activation(block + row, unit);
        for (int64_t row = 0; row < rows; ++row) {
          Vector grad_input = Vector{};
          for (int64_t tap = 0; tap < taps; ++tap) {
            grad_input += convolution.tap_weight(tap, unit) * grad_pre[row + history - tap];
            grad_weight[tap * units + unit] += grad_pre[row] * convolution.input(block + row - history + tap, unit);
          }
          grad_bias[unit] += grad_pre[row];
          store(convolution.at(arguments.grad_inputs, block + row, unit), grad_input, convolution.width(unit));
        }
      }
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t channel = unit * lane_count<Real>;
      for (int64_t tap = 0; tap < taps; ++tap)
        store<Real>(static_cast<Real*>(arguments.grad_weight) + (task * taps + tap) * arguments.channels + channel,
                    grad_weight[tap * units + unit], convolution.width(unit));
      store<Real>(static_cast<Real*>(arguments.grad_bias) + task * arguments.channels + channel, grad_bias[unit], convolution.width(unit));
    }
    // What the first positions owe to the inputs before the start: pre at `position` used state[position + tap].
    if (segment == 0 && arguments.grad_initial_state != nullptr) {
      Element* grad_state = static_cast<Element*>(arguments.grad_initial_state) + convolution.batch * history * arguments.channels;
      for (int64_t slot = 0; slot < history; ++slot) {
        for (int64_t unit = 0; unit < units; ++unit) {
          Vector grad = Vector{};
          for (int64_t position = 0; position <= slot; ++position)
            grad += convolution.tap_weight(slot - position, unit) * convolution.grad_before_activation(position, unit);
          store(grad_state + slot * arguments.channels + unit * lane_count<Real>, grad, convolution.width(unit));
        }
      }
    }
  });
}

}  // namespace

void convolution_forward(const MambacoreConvolution& convolution) {
  if (convolution.element == MAMBACORE_FLOAT64) forward<double>(convolution);
  else if (convolution.element == MAMBACORE_BFLOAT16) forward<BFloat16>(convolution);
  else forward<float>(convolution);
}
void convolution_backward(const MambacoreConvolution& convolution) {
  if (convolution.element == MAMBACORE_FLOAT64) backward<double>(convolution);
  else if (convolution.element == MAMBACORE_BFLOAT16) backward<BFloat16>(convolution);
  else backward<float>(convolution);
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
