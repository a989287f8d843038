// One position of a batch through one residual Mamba-2 or Mamba-3 block: what `mambacore::mamba2_step` and
// `mambacore::mamba3_step` compute. Each sequence's new states are written where they are handed on.

#include <algorithm>
#include <cmath>

#include "dual.h"
#include "kernels.h"
#include "widened.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Element> struct DualStep {
  using Real = typename ComputeType<Element>::type;
  using Parameter = Widened<Real, Element>;
  const MambacoreDualStep& step;

  static const Element* elements(const void* data) { return static_cast<const Element*>(data); }

  int64_t head_width() const { return step.inner_width / step.heads; }
  Dual<Real> heads_of(int64_t rank) const { return {step.heads, head_width(), step.state_size, step.groups, rank}; }

  // The scan's state of one sequence, where its successor goes, to be advanced there.
  Real* scan_state(int64_t row) const {
    const int64_t count = step.inner_width * step.state_size;
    Real* now = static_cast<Real*>(step.new_scan_state) + row * count;
    if (step.scan_state == nullptr) std::fill_n(now, count, Real(0));
    else std::copy_n(static_cast<const Real*>(step.scan_state) + row * count, count, now);
    return now;
  }

  // Norm, projection, `between(row, projected, outputs)` for every sequence, projection back, and the residual.
  template <typename Between> void run(const Between& between) const {
    const int64_t model = step.model_width, inner = step.inner_width;
    Parameter norm_weight(step.norm_weight, model), input_bias(step.input_bias, step.projected_width),
        output_bias(step.output_bias, model);
    const Linear<Real, Element> come{elements(step.input_weight), model, step.projected_width, input_bias.data()},
        go{elements(step.output_weight), inner, model, output_bias.data()};
    constexpr int64_t states_per_thread = int64_t(1) << 15;
    for (int64_t first = 0; first < step.batch; first += items_at_once) {
      const int64_t items = std::min(items_at_once, step.batch - first);
      Room<Real> sequences(items, model), normalised(items, model), projections(items, step.projected_width), results(items, inner);
      const Pointers<Real> sequence(sequences, items), branch(normalised, items), projected(projections, items),
          outputs(results, items);
      for (int64_t item = 0; item < items; ++item) {
        convert<Real>(elements(step.sequence) + (first + item) * model, sequence.of[item], model);
        normalise(sequence.of[item], norm_weight.data(), model, step.epsilon, branch.of[item]);
      }
      come.shared(branch.of, projected.of, items, step.threads);
      const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({step.threads, items, items * inner * step.state_size / states_per_thread}));
      parallel_for(threads, threads, [&](int64_t task) {
        for (int64_t item = items * task / threads; item < items * (task + 1) / threads; ++item)
          between(first + item, projected.of[item], outputs.of[item]);
      });
      go.shared(outputs.of, branch.of, items, step.threads);
      for (int64_t item = 0; item < items; ++item) {
        add(sequence.of[item], branch.of[item], model);
        convert<Real>(sequence.of[item], static_cast<Element*>(step.outputs) + (first + item) * model, model);
      }
    }
  }

  void mamba2() const {
    const int64_t inner = step.inner_width, mixed = inner + 2 * step.groups * step.state_size, past = step.kernel_width - 1;
    Parameter convolution_bias(step.convolution_bias, mixed), step_bias(step.step_bias, step.heads),
        rates(step.log_decay_rate, step.heads), skip_weight(step.skip_weight, step.heads),
        gate_norm_weight(step.gate_norm_weight, inner);
    for (int64_t head = 0; head < step.heads; ++head) rates.data()[head] = -std::exp(rates.data()[head]);
    Scratch<Real> taps = turned<Real, Element>(step.convolution_weight, mixed, step.kernel_width);
    const Real limits[2] = {static_cast<Real>(step.smallest_step), static_cast<Real>(step.largest_step)};
    const Mamba2<Real> mixer{heads_of(1), step.kernel_width, taps.data(), convolution_bias.data(), step_bias.data(),
                             rates.data(), skip_weight.data(), gate_norm_weight.data(), limits, step.inner_epsilon};
    run([&](int64_t row, Real* projected, Real* outputs) {
      Room<Real> history(past, mixed);
      for (int64_t tap = 0; tap < past && step.convolution_state != nullptr; ++tap)
        convert<Real>(elements(step.convolution_state) + (row * past + tap) * mixed, history[tap], mixed);
      mixer.run(projected, history[0], scan_state(row), outputs);
      for (int64_t tap = 0; tap < past; ++tap)
        convert<Real>(history[tap], static_cast<Element*>(step.new_convolution_state) + (row * past + tap) * mixed, mixed);
    });
  }

  void mamba3() const {
    const int64_t heads = step.heads, rank = step.rank, size = step.state_size, inner = step.inner_width;
    const int64_t biases = heads * rank * size, of_rank = rank * inner, keys = heads * rank * size;
    Parameter step_bias(step.step_bias, heads), input_norm(step.input_norm_weight, size), output_norm(step.output_norm_weight, size),
        input_bias(step.input_matrix_bias, biases), output_bias(step.output_matrix_bias, biases),
        rank_inputs(step.rank_inputs, of_rank), rank_gates(step.rank_gates, of_rank), rank_outputs(step.rank_outputs, of_rank),
        skip_weight(step.skip_weight, heads), head_norm(step.head_norm_weight, inner);
    const Mamba3<Real> mixer{heads_of(rank), step.angles, step.is_trapezoidal != 0, step_bias.data(), input_norm.data(),
                             output_norm.data(), input_bias.data(), output_bias.data(), rank_inputs.data(), rank_gates.data(),
                             rank_outputs.data(), skip_weight.data(), head_norm.data(), step.inner_epsilon, step.output_epsilon};
    const int64_t angles = mixer.angle_numbers();
    run([&](int64_t row, Real* projected, Real* outputs) {
      Scratch<Real> room(mixer.room_numbers()), small(2 * angles + keys + inner);
      Real *high = small.data(), *low = high + angles, *key = low + angles, *value = key + keys;
      for (int64_t number = 0; number < angles && step.angle_state != nullptr; ++number) {
        const double angle = static_cast<const double*>(step.angle_state)[row * angles + number];
        high[number] = static_cast<Real>(angle);
        low[number] = static_cast<Real>(angle - static_cast<double>(high[number]));
      }
      const auto at = [&](int64_t head, int64_t member) { return row * keys + (member * heads + head) * size; };
      if (step.key_state != nullptr)
        for (int64_t head = 0; head < heads; ++head)
          for (int64_t member = 0; member < rank; ++member)
            convert<Real>(elements(step.key_state) + at(head, member), key + (head * rank + member) * size, size);
      if (step.value_state != nullptr) convert<Real>(elements(step.value_state) + row * inner, value, inner);
      mixer.run(projected, {high, low, scan_state(row), key, value}, outputs, room.data());
      for (int64_t number = 0; number < angles; ++number)
        static_cast<double*>(step.new_angle_state)[row * angles + number] =
            static_cast<double>(high[number]) + static_cast<double>(low[number]);
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t member = 0; member < rank; ++member)
          convert<Real>(key + (head * rank + member) * size, static_cast<Element*>(step.new_key_state) + at(head, member), size);
      convert<Real>(value, static_cast<Element*>(step.new_value_state) + row * inner, inner);
    });
  }
};

}  // namespace

void dual_step(const MambacoreDualStep& step) {
  with_element(step.element, [&](auto element) {
    const DualStep<decltype(element)> work{step};
    if (step.is_mamba3 != 0) work.mamba3();
    else work.mamba2();
  });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
