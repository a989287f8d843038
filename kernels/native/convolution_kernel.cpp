// The causal depthwise convolution on a CPU, vectorised over channels, optionally followed by SiLU.
//
//     pre_t = bias + sum over taps of weight[tap] * input[t - (kernel_width - 1) + tap],   output_t = silu(pre_t)
//
// Inputs before the start come from the initial state (the last kernel_width - 1 inputs of what came before) or are
// zero. Positions do not wait for each other, so threads simply take stretches of the length.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

constexpr int64_t rows_at_once = 64;  // a block of rows, taken one vector of channels ("unit") after the other

// The tensors of one call as seen by one unit of one batch item.
template <typename Element> struct Unit {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreConvolution& arguments;
  int64_t batch, first_channel, history;
  int width;

  Unit(const MambacoreConvolution& convolution, int64_t batch, int64_t number)
      : arguments(convolution), batch(batch), first_channel(number * lanes), history(convolution.kernel_width - 1),
        width(static_cast<int>(std::min<int64_t>(lanes, convolution.channels - first_channel))) {}

  Element* at(const MambacoreSequence& sequence, int64_t position) const {
    const int64_t row = arguments.reverse ? arguments.length - 1 - position : position;
    return static_cast<Element*>(sequence.data) + batch * sequence.batch_stride + row * sequence.row_stride + first_channel;
  }
  // Input at a position in scan order; negative positions lie in the initial state.
  Vector input(int64_t position) const {
    if (position >= 0) return load<Real>(at(arguments.inputs, position), width);
    if (arguments.initial_state == nullptr) return Vector{};
    const Element* state = static_cast<const Element*>(arguments.initial_state);
    return load<Real>(state + (batch * history + history + position) * arguments.channels + first_channel, width);
  }
  Vector tap_weight(int64_t tap) const {
    return load(static_cast<const Real*>(arguments.weight) + tap * arguments.channels + first_channel, width);
  }
  // How far back the taps at a position may reach: to where its record begins, and `history` at most.
  int64_t reach(int64_t position) const {
    if (arguments.resets == nullptr) return history;
    const uint8_t* resets = arguments.resets + batch * arguments.length;
    for (int64_t back = 0; back < history && back <= position; ++back) {
      if (resets[arguments.reverse ? arguments.length - 1 - (position - back) : position - back]) return back;
    }
    return history;
  }
  Vector bias() const {
    if (arguments.bias == nullptr) return Vector{};
    return load(static_cast<const Real*>(arguments.bias) + first_channel, width);
  }
};

// What one task needs again and again: tap weights, the inputs of a block with those before it, and backward's
// gradients before the activation.
template <typename Element> struct Block {
  using Real = typename Unit<Element>::Real;
  using Vector = Lanes<Real>;
  explicit Block(int64_t kernel_width)
      : taps(kernel_width), storage(kernel_width + 3 * (rows_at_once + 2 * kernel_width)), weight(storage.data()),
        inputs(weight + taps), before_activation(inputs + rows_at_once + 2 * taps),
        grad(before_activation + rows_at_once + 2 * taps), reach(rows_at_once + 2 * taps) {}
  int64_t taps;
  Scratch<Vector> storage;
  Vector *weight, *inputs, *before_activation, *grad;
  std::vector<int64_t> reach;  // of every row
  bool any_cut;                // whether a row's taps may not all be used

  // Whether a tap may be used at a row.
  bool meets(int64_t tap, int64_t row) const { return !any_cut || taps - 1 - tap <= reach[row]; }

  // Reads inputs[0 .. rows + history) = positions [first - history, first + rows) and sums them up with the weights.
  void sum_up(const Unit<Element>& unit, int64_t first, int64_t rows) {
    for (int64_t tap = 0; tap < taps; ++tap) weight[tap] = unit.tap_weight(tap);
    for (int64_t row = 0; row < rows + taps - 1; ++row) inputs[row] = unit.input(first - (taps - 1) + row);
    any_cut = false;
    if (unit.arguments.resets != nullptr) {
      for (int64_t row = 0; row < rows; ++row) {
        reach[row] = unit.reach(first + row);
        any_cut = any_cut || reach[row] < taps - 1;
      }
    }
    const Vector bias = unit.bias();
    if (taps == 4 && !any_cut) {  // the width of every published model
      for (int64_t row = 0; row < rows; ++row)
        before_activation[row] = bias + weight[0] * inputs[row] + weight[1] * inputs[row + 1] +
                                 weight[2] * inputs[row + 2] + weight[3] * inputs[row + 3];
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      Vector sum = bias;
      for (int64_t tap = 0; tap < taps; ++tap) {
        if (meets(tap, row)) sum += weight[tap] * inputs[row + tap];
      }
      before_activation[row] = sum;
    }
  }
  // grad[0 .. rows) = gradients before the activation at positions [first, first + rows); zero past the end.
  void take_gradients(const Unit<Element>& unit, int64_t first, int64_t rows) {
    const int64_t inside = std::max<int64_t>(0, std::min(rows, unit.arguments.length - first));
    sum_up(unit, first, inside);
    for (int64_t row = 0; row < inside; ++row) {
      grad[row] = load<Real>(unit.at(unit.arguments.grad_outputs, first + row), unit.width);
      if (unit.arguments.silu) {
        const Vector open = sigmoid_lanes<Real>(before_activation[row]);
        grad[row] *= open * (Real(1) + before_activation[row] * (Real(1) - open));
      }
    }
    std::fill(grad + inside, grad + rows, Vector{});
    if (any_cut) std::fill(reach.begin() + inside, reach.begin() + rows, taps - 1);
  }
};

template <typename Element> void forward(const MambacoreConvolution& arguments) {
  const int64_t units = (arguments.channels + Unit<Element>::lanes - 1) / Unit<Element>::lanes;
  parallel_for(arguments.batch * arguments.segments, arguments.threads, [&](int64_t task) {
    const int64_t segment = task % arguments.segments;
    const int64_t end = arguments.length * (segment + 1) / arguments.segments;
    Block<Element> block(arguments.kernel_width);
    for (int64_t first = arguments.length * segment / arguments.segments; first < end; first += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, end - first);
      for (int64_t number = 0; number < units; ++number) {
        const Unit<Element> unit(arguments, task / arguments.segments, number);
        block.sum_up(unit, first, rows);
        for (int64_t row = 0; row < rows; ++row) {
          auto output = block.before_activation[row];
          if (arguments.silu) output *= sigmoid_lanes<typename Unit<Element>::Real>(output);
          store(unit.at(arguments.outputs, first + row), output, unit.width);
        }
      }
    }
  });
}

template <typename Element> void backward(const MambacoreConvolution& arguments) {
  using Real = typename Unit<Element>::Real;
  using Vector = Lanes<Real>;
  const int64_t taps = arguments.kernel_width, history = taps - 1;
  const int64_t units = (arguments.channels + Unit<Element>::lanes - 1) / Unit<Element>::lanes;
  parallel_for(arguments.batch * arguments.segments, arguments.threads, [&](int64_t task) {
    const int64_t segment = task % arguments.segments, batch = task / arguments.segments;
    const int64_t begin = arguments.length * segment / arguments.segments;
    const int64_t end = arguments.length * (segment + 1) / arguments.segments;
    Scratch<Vector> grad_weight(taps * units), grad_bias(units);
    Block<Element> block(taps);
    for (int64_t first = begin; first < end; first += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, end - first);
      for (int64_t number = 0; number < units; ++number) {
        const Unit<Element> unit(arguments, batch, number);
        block.take_gradients(unit, first, rows + history);
        const Vector* grad = block.grad;
        for (int64_t row = 0; row < rows; ++row) {
          Vector grad_input = Vector{};
          for (int64_t tap = 0; tap < taps; ++tap) {
            if (block.meets(tap, row + history - tap)) grad_input += block.weight[tap] * grad[row + history - tap];
          }
          store(unit.at(arguments.grad_inputs, first + row), grad_input, unit.width);
        }
        for (int64_t tap = 0; tap < taps; ++tap) {
          Vector sum = Vector{};
          for (int64_t row = 0; row < rows; ++row) {
            if (block.meets(tap, row)) sum += grad[row] * block.inputs[row + tap];
          }
          grad_weight[tap * units + number] += sum;
        }
        for (int64_t row = 0; row < rows; ++row) grad_bias[number] += grad[row];
      }
    }
    for (int64_t number = 0; number < units; ++number) {
      const Unit<Element> unit(arguments, batch, number);
      for (int64_t tap = 0; tap < taps; ++tap)
        store<Real>(static_cast<Real*>(arguments.grad_weight) + (task * taps + tap) * arguments.channels + unit.first_channel,
                    grad_weight[tap * units + number], unit.width);
      store<Real>(static_cast<Real*>(arguments.grad_bias) + task * arguments.channels + unit.first_channel,
                  grad_bias[number], unit.width);
      // What the first positions owe to the inputs before the start: `pre` at a position used state[position + tap].
      if (segment > 0 || arguments.grad_initial_state == nullptr) continue;
      block.take_gradients(unit, 0, history);
      Element* grad_state = static_cast<Element*>(arguments.grad_initial_state) + batch * history * arguments.channels;
      for (int64_t slot = 0; slot < history; ++slot) {
        Vector grad = Vector{};
        for (int64_t position = 0; position <= slot; ++position) {
          if (block.meets(slot - position, position)) grad += block.weight[slot - position] * block.grad[position];
        }
        store(grad_state + slot * arguments.channels + unit.first_channel, grad, unit.width);
      }
    }
  });
}

}  // namespace

void convolution_forward(const MambacoreConvolution& convolution) {
  with_element(convolution.element, [&](auto element) { forward<decltype(element)>(convolution); });
}
void convolution_backward(const MambacoreConvolution& convolution) {
  with_element(convolution.element, [&](auto element) { backward<decltype(element)>(convolution); });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
