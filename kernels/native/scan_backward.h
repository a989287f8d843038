// The gradients of the scan.
//
// With g_t the gradient of the state after position t and carry = conj(decay_{t+1}) g_{t+1} (conj does nothing to real
// numbers; r is 1 for real states and 2 for complex ones):
//     g_t = r conj(C_t) dy_t + carry     dB_t += g_t (step x)_t     dC_t += r dy_t conj(state_t)
//     d(step x)_t = sum_n Re(g_t conj(B_t))
//     d(step A) = conj(decay_t) g_t conj(state_{t-1}), which goes to dstep_t (Re of it times conj(A)) and dA (times step)

#pragma once

#include "scan_forward.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// Where the gradients of a matrix are summed up: for every position of an interval over the units of a task (`stride` is
// then the state size), or, of a fixed matrix, for every unit over the positions (`stride` is 0).
template <typename Kind> struct MatrixGradient {
  typename Kind::Value* sums;
  int64_t stride;
};

// What retreat_states adds to.
template <typename Kind> struct Gradients {
  typename Kind::Vector *step, *drive;
  typename Kind::Value *carry, *rate;  // of the unit
  MatrixGradient<Kind> input_matrix, output_matrix;
};

// Takes `count` states of one unit back over an interval. `boundary` are these states before the interval, in the layout of
// `history`; `zeros` stands for them where a record begins.
template <typename Kind, int count, bool any_fixed>
inline void retreat_states(const Interval<Kind>& interval, int64_t length, int64_t first_state,
                           const typename Kind::Vector* grad_outputs, const typename Kind::Value* rate,
                           const typename Kind::Value* boundary, const typename Kind::Value* zeros,
                           const typename Kind::Value* history, const Gradients<Kind>& grad) {
  using Vector = typename Kind::Vector;
  using Value = typename Kind::Value;
  Value carried[count], rate_sums[count];
  for (int index = 0; index < count; ++index) {
    carried[index] = grad.carry[first_state + index];
    rate_sums[index] = grad.rate[first_state + index];
  }
  for (int64_t offset = length - 1; offset >= 0; --offset) {
    const Vector step_now = interval.step[offset], drive_now = interval.drive[offset];
    const Vector grad_read = grad_outputs[offset] * Kind::read_factor;
    const bool begins = interval.resets[offset] != 0;
    const Value* kept = history + offset * count * 2;
    const Value* before = begins ? zeros : offset > 0 ? kept - count * 2 : boundary;
    Value* grad_into = grad.input_matrix.sums + offset * grad.input_matrix.stride + first_state;
    Value* grad_out_of = grad.output_matrix.sums + offset * grad.output_matrix.stride + first_state;
    Vector step_sum = grad.step[offset], drive_sum = grad.drive[offset];
    for (int index = 0; index < count; ++index) {
      const int64_t number = first_state + index;
      Value grad_state = carried[index];
      grad_state += Kind::scaled_conjugate(interval.output_matrix.template at<any_fixed>(offset, number), grad_read);
      grad_into[index] += Kind::scaled(grad_state, drive_now);
      grad_out_of[index] += Kind::scaled_conjugate(kept[index * 2], grad_read);
      drive_sum += Kind::real_of_product_with_conjugate(
          grad_state, interval.input_matrix.template at<any_fixed>(offset, number));
      carried[index] = Kind::product_with_conjugate(grad_state, kept[index * 2 + 1]);
      const Value grad_exponent = Kind::product_with_conjugate(carried[index], before[index * 2]);
      step_sum += Kind::real_of_product_with_conjugate(grad_exponent, rate[number]);
      rate_sums[index] += Kind::scaled(grad_exponent, step_now);
    }
    if (__builtin_expect(begins, 0)) {
      for (int index = 0; index < count; ++index) carried[index] = Value{};
    }
    grad.step[offset] = step_sum;
    grad.drive[offset] = drive_sum;
  }
  for (int index = 0; index < count; ++index) {
    grad.carry[first_state + index] = carried[index];
    grad.rate[first_state + index] = rate_sums[index];
  }
}

// The gradient of y from that of the output: through the gate when there is one.
template <typename Kind>
inline typename Kind::Vector grad_before_gate(const Task<Kind>& task, int64_t row, int64_t unit) {
  using Real = typename Kind::Real;
  const int width = task.width(unit);
  typename Kind::Vector grad = load<Real>(task.at(task.scan.grad_outputs, row, task.channel(unit)), width);
  if (task.scan.gate.data != nullptr) {
    const auto gate = load<Real>(task.at(task.scan.gate, row, task.channel(unit)), width);
    grad *= gate * sigmoid_lanes<Real>(gate);
  }
  return grad;
}

// Adds up the lanes of a matrix's gradients over an interval and writes them to their rows.
template <typename Kind>
void write_rows(const Task<Kind>& task, int64_t interval, const MatrixGradient<Kind>& gradient, void* to) {
  using Real = typename Kind::Real;
  const MambacoreScan& scan = task.scan;
  const int64_t numbers = scan.state_size * Kind::parts;
  const auto* vectors = reinterpret_cast<const typename Kind::Vector*>(gradient.sums);
  for (int64_t offset = 0; offset < task.interval_length(interval); ++offset) {
    const int64_t position = (task.range * scan.batch + task.batch) * scan.length + task.row(interval, offset);
    Real* row = static_cast<Real*>(to) + (position * scan.groups + task.group) * numbers;
    for (int64_t number = 0; number < numbers; ++number) row[number] = sum_of_lanes<Real>(vectors[offset * numbers + number]);
  }
}

// One segment from the gradient carried in from its end, which it replaces by the gradient at its start.
template <typename Kind> void backward_task(const Task<Kind>& task, typename Kind::Value* carries) {
  using Real = typename Kind::Real;
  using Vector = typename Kind::Vector;
  using Value = typename Kind::Value;
  const MambacoreScan& scan = task.scan;
  const int64_t size = scan.boundary_interval, states = scan.state_size;
  const Parameters<Kind> parameters(task);
  Workspace<Kind> workspace(scan, 4);
  Interval<Kind>& interval = workspace.interval;
  Vector *grad_outputs = workspace.extra, *grad_step = grad_outputs + size, *grad_drive = grad_step + size;
  Vector* gate_slope = grad_drive + size;
  constexpr int together = Kind::states_at_once;
  Scratch<Value> history(size * together * 2), boundary(together * 2), zeros(together * 2), advanced(states);
  Scratch<Value> grad_rates(task.units() * states);
  Scratch<Vector> grad_skip(task.units()), grad_bias(task.units());
  // One for each position of an interval and state, or for each unit and state of a fixed matrix.
  Scratch<Value> grad_input_matrix((scan.input_matrix.fixed ? task.units() : size) * states);
  Scratch<Value> grad_output_matrix((scan.output_matrix.fixed ? task.units() : size) * states);

  for (int64_t index = task.end_interval - 1; index >= task.first_interval; --index) {
    const int64_t length = task.interval_length(index);
    interval.find(task, index);
    if (!scan.input_matrix.fixed) std::fill_n(grad_input_matrix.data(), size * states, Value{});
    if (!scan.output_matrix.fixed) std::fill_n(grad_output_matrix.data(), size * states, Value{});
    Ahead<Kind> ahead(task, index - 1);
    for (const MambacoreSequence& sequence : {scan.inputs, scan.step_size, scan.gate, scan.grad_outputs, scan.grad_inputs,
                                              scan.grad_step_size, scan.grad_gate})
      ahead.add(sequence);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      const int width = task.width(unit);
      const int64_t channel = task.channel(unit);
      const Vector skip_weight = task.parameter(scan.skip_weight, unit);
      interval.read(task, index, unit);
      parameters.take_fixed(interval, unit);
      task.recall(index, unit, advanced.data());
      const bool gated = scan.gate.data != nullptr;
      for (int64_t offset = 0; offset < length; ++offset) {
        const int64_t row = task.row(index, offset);
        grad_outputs[offset] = load<Real>(task.at(scan.grad_outputs, row, channel), width);
        if (!gated) continue;
        const Vector gate = load<Real>(task.at(scan.gate, row, channel), width), open = sigmoid_lanes<Real>(gate);
        gate_slope[offset] = grad_outputs[offset] * open * (Real(1) + gate * (Real(1) - open)) * Kind::read_factor;
        grad_outputs[offset] *= gate * open;
        interval.outputs[offset] = skip_weight * interval.inputs[offset] / Kind::read_factor;
      }

      std::fill_n(grad_step, length, Vector{});
      std::fill_n(grad_drive, length, Vector{});
      const auto sums_of = [&](const MambacoreMatrix& matrix, Scratch<Value>& sums) {
        return MatrixGradient<Kind>{sums.data() + (matrix.fixed ? unit * states : 0), matrix.fixed ? 0 : states};
      };
      const Gradients<Kind> grad{grad_step, grad_drive, carries + unit * states, grad_rates.data() + unit * states,
                                 sums_of(scan.input_matrix, grad_input_matrix),
                                 sums_of(scan.output_matrix, grad_output_matrix)};
      // A few states at a time go forward through the interval again and then back: theirs is all that has to stay in the
      // cache between the two.
      with_fixed(parameters.any_fixed, [&](auto any_fixed) {
        for_states<Kind>(states, [&](auto count, int64_t first_state) {
          for (int state = 0; state < count(); ++state) boundary[state * 2] = advanced[first_state + state];
          const auto go = [&](auto read_out) {
            advance_states<Kind, count(), read_out(), true, any_fixed()>(interval, length, first_state, parameters.binary(unit),
                                                                         advanced.data(), history.data(), ahead, unit);
          };
          if (gated) go(std::true_type{});
          else go(std::false_type{});
          retreat_states<Kind, count(), any_fixed()>(interval, length, first_state, grad_outputs, parameters.natural(unit),
                                                     boundary.data(), zeros.data(), history.data(), grad);
        });
      });
      if (gated) {
        for (int64_t offset = 0; offset < length; ++offset)
          store(task.at(scan.grad_gate, task.row(index, offset), channel), gate_slope[offset] * interval.outputs[offset], width);
      }

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
    if (!scan.input_matrix.fixed) write_rows<Kind>(task, index, {grad_input_matrix.data(), states}, scan.grad_input_matrix);
    if (!scan.output_matrix.fixed) write_rows<Kind>(task, index, {grad_output_matrix.data(), states}, scan.grad_output_matrix);
  }
  const int64_t outer = task.batch * scan.plan.segments + task.segment;
  for (int64_t unit = 0; unit < task.units(); ++unit) {
    task.scatter(grad_rates.data() + unit * states, scan.grad_state_matrix, outer, unit);
    if (scan.input_matrix.fixed) task.scatter(grad_input_matrix.data() + unit * states, scan.grad_input_matrix, outer, unit);
    if (scan.output_matrix.fixed) task.scatter(grad_output_matrix.data() + unit * states, scan.grad_output_matrix, outer, unit);
    const int64_t where = outer * scan.channels + task.channel(unit);
    store<Real>(static_cast<Real*>(scan.grad_skip_weight) + where, grad_skip[unit], task.width(unit));
    store<Real>(static_cast<Real*>(scan.grad_step_bias) + where, grad_bias[unit], task.width(unit));
  }
}

// The gradient that a segment hands to the one before it is an affine map of the gradient that it receives. Returns
// whether a record begins in it, which leaves nothing of the received one.
template <typename Kind>
bool summarise_backward(const Task<Kind>& task, typename Kind::Value* carries, typename Kind::StepSum* step_sums) {
  using Vector = typename Kind::Vector;
  using Value = typename Kind::Value;
  const MambacoreScan& scan = task.scan;
  const Parameters<Kind> parameters(task);
  Workspace<Kind> workspace(scan, 0);
  Interval<Kind>& interval = workspace.interval;
  bool cut = false;
  for (int64_t index = task.end_interval - 1; index >= task.first_interval; --index) {
    cut = interval.find(task, index) || cut;
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      interval.read(task, index, unit);
      parameters.take_fixed(interval, unit);
      for (int64_t offset = task.interval_length(index) - 1; offset >= 0; --offset) {
        const Vector grad_read = grad_before_gate(task, task.row(index, offset), unit) * Kind::read_factor;
        const Vector step = interval.step[offset];
        add_widened<typename Kind::Real>(step_sums[unit], step);
        for (int64_t state = 0; state < scan.state_size; ++state) {
          Value& carry = carries[unit * scan.state_size + state];
          carry += Kind::scaled_conjugate(interval.output_matrix.template at<true>(offset, state), grad_read);
          carry = Kind::product_with_conjugate(carry, Kind::decay(step, parameters.binary(unit)[state]));
          if (interval.resets[offset]) carry = Value{};
        }
      }
    }
  }
  return cut;
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
