// One position of a batch through one residual selective block: what `mambacore::selective_step` computes.
//
// States have the layout that blocks pass on, (batch, channels, state_size), and parameters that of the modules. Both are
// transposed here so that channels run along the lanes, which costs little beside the products.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "widened.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Element> struct Step {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreBlockStep& step;

  const Element* elements(const void* data) const { return static_cast<const Element*>(data); }

  void run() const {
    using Weights = Selective<Real, Linear<Real, Element>>;
    const int64_t inner = step.inner_width, width = padded(inner), model = step.model_width;
    const bool is_complex = step.frequency != nullptr;
    Widened<Real, Element> norm_weight(step.norm_weight, model), input_bias(step.input_bias, 2 * inner),
        convolution_bias(step.convolution_bias, inner), step_bias(step.step_bias, inner),
        skip_weight(step.skip_weight, inner), output_bias(step.output_bias, model);
    Scratch<Real> taps = turned<Real, Element>(step.convolution_weight, inner, step.kernel_width);
    Scratch<Real> rates = turned<Real, Element>(step.log_decay_rate, inner, step.state_size,
                                 [](Vector value) { return exp_lanes<Real>(value) * Real(-log2_of_e); });
    Scratch<Real> turns = turned<Real, Element>(step.frequency, inner, step.state_size,
                                 [](Vector value) { return value * Real(0.15915494309189533577); });
    Weights block{model, inner, step.state_size, step.kernel_width, step.step_rank, is_complex, step.epsilon,
                  norm_weight.data(), {}, {}, taps.data(), convolution_bias.data(), {}, {}, rates.data(), turns.data(),
                  skip_weight.data(), {}, false, false};
    const Element* come = elements(step.input_weight);
    block.inputs = {come, model, inner, input_bias.data()};
    block.gate = {come + inner * model, model, inner, step.input_bias == nullptr ? nullptr : input_bias.data() + inner};
    block.selection = {elements(step.selection_weight), inner, block.selected_width(), nullptr};
    block.step = {elements(step.step_weight), step.step_rank, inner, step_bias.data()};
    block.output = {elements(step.output_weight), inner, model, output_bias.data()};
    for (int64_t first = 0; first < step.batch; first += items_at_once)
      run(block, width, first, std::min(items_at_once, step.batch - first));
  }

  template <typename Weights> void run(const Weights& block, int64_t width, int64_t first, int64_t items) const {
    const int64_t inner = step.inner_width, model = step.model_width, past = step.kernel_width - 1;
    const int64_t numbers = block.numbers();
    typename Weights::Rooms rooms(items, model, inner, block.selected_width());
    Room<Real> sequences(items, model), histories(items, past * width);
    const Pointers<Real> sequence(sequences, items);
    for (int64_t item = 0; item < items; ++item) {
      convert<Real>(elements(step.sequence) + (first + item) * model, sequence.of[item], model);
      if (step.convolution_state == nullptr) continue;
      for (int64_t tap = 0; tap < past; ++tap)
        convert<Real>(elements(step.convolution_state) + ((first + item) * past + tap) * inner, histories[item] + tap * width, inner);
    }
    const auto states = [&](int64_t item, const auto& task) {
      Scratch<Real> held(numbers * lanes);
      for (int64_t channel = 0; channel < inner; channel += lanes) {
        const int64_t where = ((first + item) * inner + channel) * numbers, here = count_at<Real>(inner, channel);
        if (step.scan_state != nullptr)
          transpose_matrix(static_cast<const Real*>(step.scan_state) + where, numbers, here, numbers, held.data(), lanes);
        else std::fill_n(held.data(), held.size(), Real(0));
        task(channel, held.data(), lanes);
        transpose_matrix(held.data(), lanes, numbers, here, static_cast<Real*>(step.new_scan_state) + where, numbers);
      }
    };
    block.run(sequence.of, items, rooms, step.threads, [&](int64_t item) { return histories[item]; }, states);
    for (int64_t item = 0; item < items; ++item) {
      add(sequence.of[item], rooms.normalised[item], model);
      convert<Real>(sequence.of[item], static_cast<Element*>(step.outputs) + (first + item) * model, model);
      for (int64_t tap = 0; tap < past; ++tap)
        convert<Real>(histories[item] + tap * width,
                static_cast<Element*>(step.new_convolution_state) + ((first + item) * past + tap) * inner, inner);
    }
  }
};

}  // namespace

void block_step(const MambacoreBlockStep& step) {
  with_element(step.element, [&](auto element) { Step<decltype(element)>{step}.run(); });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
