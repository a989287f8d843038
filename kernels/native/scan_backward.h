// The gradients of the scan.
//
// With g_t the gradient of the state after position t and carry = decay_{t+1} g_{t+1}:
//     g_t = C_t dy_t + carry        dB_t += g_t (step x)_t       dC_t += dy_t state_t
//     d(step x)_t = sum_n g_t B_t   d(step A) = g_t decay_t state_{t-1}, which goes to dstep_t (times A) and dA (times step)

#pragma once

#include "scan_forward.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// The lanes of dB and dC over an interval, summed over the units of a task before the lanes are summed.
template <typename Real> struct MatrixGradients {
  Lanes<Real> *input_matrix, *output_matrix;
};

template <int count, typename Real>
inline void retreat_states(int64_t length, int64_t state_size, int64_t first_state, const Lanes<Real>* step,
                           const Lanes<Real>* drive, const Lanes<Real>* grad_outputs, const Real* const* input_matrix,
                           const Real* const* output_matrix, const Lanes<Real>* rate, const Lanes<Real>* border,
                           const Lanes<Real>* history, Lanes<Real>* carry, Lanes<Real>* grad_rate,
                           Lanes<Real>* grad_step, Lanes<Real>* grad_drive, MatrixGradients<Real> grad) {
  Lanes<Real> carried[count], rate_sums[count];
  for (int index = 0; index < count; ++index) {
    carried[index] = carry[first_state + index];
    rate_sums[index] = grad_rate[first_state + index];
  }
  for (int64_t offset = length - 1; offset >= 0; --offset) {
    const Lanes<Real> step_now = step[offset], drive_now = drive[offset], grad_now = grad_outputs[offset];
    const Real* into = input_matrix[offset] + first_state;
    const Real* out_of = output_matrix[offset] + first_state;
    const Lanes<Real>* kept = history + (offset * state_size + first_state) * 2;
    const Lanes<Real>* before = kept - state_size * 2;
    Lanes<Real>* grad_into = grad.input_matrix + offset * state_size + first_state;
    Lanes<Real>* grad_out_of = grad.output_matrix + offset * state_size + first_state;
    Lanes<Real> step_sum = grad_step[offset], drive_sum = grad_drive[offset];
    for (int index = 0; index < count; ++index) {
      const Lanes<Real> state_before = offset > 0 ? before[index * 2] : border[first_state + index];
      const Lanes<Real> grad_state = grad_now * out_of[index] + carried[index];
      grad_into[index] += grad_state * drive_now;
      grad_out_of[index] += grad_now * kept[index * 2];
      drive_sum += grad_state * into[index];
      carried[index] = grad_state * kept[index * 2 + 1];
      const Lanes<Real> grad_exponent = carried[index] * state_before;
      step_sum += grad_exponent * rate[first_state + index];
      rate_sums[index] += grad_exponent * step_now;
    }
    grad_step[offset] = step_sum;
    grad_drive[offset] = drive_sum;
  }
  for (int index = 0; index < count; ++index) {
    carry[first_state + index] = carried[index];
    grad_rate[first_state + index] = rate_sums[index];
  }
}

// The gradient of y from that of the output: through the gate when there is one.
template <typename Element>
inline Lanes<typename ComputeType<Element>::type> grad_before_gate(const Task<Element>& task, int64_t row, int64_t unit) {
  using Real = typename ComputeType<Element>::type;
  const int width = task.width(unit);
  Lanes<Real> grad = load<Real>(task.at(task.scan.grad_outputs, row, task.channel(unit)), width);
  if (task.scan.gate.data != nullptr) {
    const Lanes<Real> gate = load<Real>(task.at(task.scan.gate, row, task.channel(unit)), width);
    grad *= gate * sigmoid_lanes<Real>(gate);
  }
  return grad;
}

// One segment from the gradient carried in from its end, which it replaces by the gradient at its start.
template <typename Element>
void backward_task(const Task<Element>& task, Lanes<typename ComputeType<Element>::type>* carries) {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  const MambacoreScan& scan = task.scan;
  const int64_t size = scan.border_interval, states = scan.state_size;
  Rates<Element> rates(task);
  Workspace<Element> workspace(scan, 3);
  Interval<Element>& interval = workspace.interval;
  Vector *grad_outputs = workspace.extra, *grad_step = grad_outputs + size, *grad_drive = grad_step + size;
  Scratch<Vector> history(size * states * 2), matrix_gradients(size * states * 2);
  Scratch<Vector> border(states), advanced(states);
  Scratch<Vector> grad_rates(task.units() * states), grad_skip(task.units()), grad_bias(task.units());
  const MatrixGradients<Real> grad{matrix_gradients.data(), matrix_gradients.data() + size * states};

  for (int64_t index = task.end_interval - 1; index >= task.first_interval; --index) {
    const int64_t length = task.interval_length(index);
    interval.find_matrices(task, index);
    std::fill_n(matrix_gradients.data(), 2 * size * states, Vector{});
    Ahead<Element> ahead(task, index - 1);
    for (const MambacoreSequence& sequence : {scan.inputs, scan.step_size, scan.gate, scan.grad_outputs, scan.grad_inputs,
                                              scan.grad_step_size, scan.grad_gate})
      ahead.add(sequence);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      const int width = task.width(unit);
      const int64_t channel = task.channel(unit);
      const Vector* rate = rates.binary.data() + unit * states;
      const Vector skip_weight = task.parameter(scan.skip_weight, unit);
      interval.read(task, index, unit);
      for (int64_t state = 0; state < states; ++state) advanced[state] = border[state] = load<Real>(task.border(index, state, unit), width);

      // Again forward through the interval, this time keeping states and decays in the cache.
      const auto recompute = [&](auto with_outputs) {
        for_states(states, [&](auto count, int64_t first_state) {
          advance_states<count(), with_outputs(), true, Real>(length, states, first_state, interval.step, interval.drive,
                                                              interval.input_matrix, interval.output_matrix, rate,
                                                              advanced.data(), interval.outputs, history.data(), ahead, unit);
        });
      };
      if (scan.gate.data != nullptr) {
        for (int64_t offset = 0; offset < length; ++offset) interval.outputs[offset] = skip_weight * interval.inputs[offset];
        recompute(std::true_type{});
        for (int64_t offset = 0; offset < length; ++offset) {
          const int64_t row = task.row(index, offset);
          const Vector gate = load<Real>(task.at(scan.gate, row, channel), width);
          const Vector grad_output = load<Real>(task.at(scan.grad_outputs, row, channel), width);
          const Vector open = sigmoid_lanes<Real>(gate);
          grad_outputs[offset] = grad_output * gate * open;
          const Vector grad_gate = grad_output * interval.outputs[offset] * open * (Real(1) + gate * (Real(1) - open));
          store(task.at(scan.grad_gate, row, channel), grad_gate, width);
        }
      } else {
        recompute(std::false_type{});
        for (int64_t offset = 0; offset < length; ++offset)
          grad_outputs[offset] = load<Real>(task.at(scan.grad_outputs, task.row(index, offset), channel), width);
      }

      std::fill_n(grad_step, length, Vector{});
      std::fill_n(grad_drive, length, Vector{});
      for_states(states, [&](auto count, int64_t first_state) {
        retreat_states<count(), Real>(length, states, first_state, interval.step, interval.drive, grad_outputs,
                                      interval.input_matrix, interval.output_matrix,
                                      rates.natural.data() + unit * states, border.data(), history.data(),
                                      carries + unit * states, grad_rates.data() + unit * states, grad_step, grad_drive,
                                      grad);
      });

      const Vector bias = task.parameter(scan.step_bias, unit);
      for (int64_t offset = 0; offset < length; ++offset) {
        const int64_t row = task.row(index, offset);
        const Vector grad_input = grad_drive[offset] * interval.step[offset] + grad_outputs[offset] * skip_weight;
        Vector grad_raw = grad_step[offset] + grad_drive[offset] * interval.inputs[offset];
        if (scan.step_softplus) {
          const Vector raw = load<Real>(task.at(scan.step_size, row, channel), width) + bias;
          grad_raw *= sigmoid_lanes<Real>(raw);
        }
        grad_skip[unit] += grad_outputs[offset] * interval.inputs[offset];
        grad_bias[unit] += grad_raw;
        store(task.at(scan.grad_inputs, row, channel), grad_input, width);
        store(task.at(scan.grad_step_size, row, channel), grad_raw, width);
      }
    }
    for (int64_t offset = 0; offset < length; ++offset) {
      const int64_t where =
          (((task.range * scan.batch + task.batch) * scan.length + task.row(index, offset)) * scan.groups + task.group) * states;
      for (int64_t state = 0; state < states; ++state) {
        static_cast<Real*>(scan.grad_input_matrix)[where + state] = sum_of_lanes<Real>(grad.input_matrix[offset * states + state]);
        static_cast<Real*>(scan.grad_output_matrix)[where + state] = sum_of_lanes<Real>(grad.output_matrix[offset * states + state]);
      }
    }
  }
  const int64_t outer = task.batch * scan.plan.segments + task.segment;
  for (int64_t unit = 0; unit < task.units(); ++unit) {
    task.scatter(grad_rates.data() + unit * states, scan.grad_state_matrix, outer, unit);
    const int64_t where = outer * scan.channels + task.channel(unit);
    store<Real>(static_cast<Real*>(scan.grad_skip_weight) + where, grad_skip[unit], task.width(unit));
    store<Real>(static_cast<Real*>(scan.grad_step_bias) + where, grad_bias[unit], task.width(unit));
  }
}

// The gradient that a segment hands to the one before it is an affine map of the gradient that it receives.
template <typename Element>
void summarise_backward(const Task<Element>& task, Lanes<typename ComputeType<Element>::type>* carries,
                        Lanes<typename ComputeType<Element>::type>* step_sums) {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  const MambacoreScan& scan = task.scan;
  Rates<Element> rates(task);
  Workspace<Element> workspace(scan, 0);
  Interval<Element>& interval = workspace.interval;
  for (int64_t index = task.end_interval - 1; index >= task.first_interval; --index) {
    interval.find_matrices(task, index);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      interval.read(task, index, unit);
      for (int64_t offset = task.interval_length(index) - 1; offset >= 0; --offset) {
        const Vector grad = grad_before_gate(task, task.row(index, offset), unit);
        const Vector step = interval.step[offset];
        step_sums[unit] += step;
        for (int64_t state = 0; state < scan.state_size; ++state) {
          Vector& carry = carries[unit * scan.state_size + state];
          carry = (grad * interval.output_matrix[offset][state] + carry) *
                  exp2_lanes(step * rates.binary[unit * scan.state_size + state]);
        }
      }
    }
  }
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
