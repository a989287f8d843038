// The scan, onwards.
#pragma once

#include "scan_task.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// Advances `count` states of one unit over an interval and adds their part of y / read_factor. With `keep`, notes every one
// of these states and its decay for backward: history[(offset * count + index) * 2] and the one behind it.
template <typename Kind, int count, bool read_out, bool keep, bool any_fixed, typename Prefetch>
inline void advance_states(const Interval<Kind>& interval, int64_t length, int64_t first_state,
                           const typename Kind::Value* rate, typename Kind::Value* state, typename Kind::Value* history,
                           const Prefetch& ahead, int64_t unit) {
  using Vector = typename Kind::Vector;
  using Value = typename Kind::Value;
  Value held[count], rates[count];
  for (int index = 0; index < count; ++index) {
    held[index] = state[first_state + index];
    rates[index] = rate[first_state + index];
  }
  for (int64_t offset = 0; offset < length; ++offset) {
    if (first_state == 0) ahead.fetch(unit, offset);
    if (__builtin_expect(interval.resets[offset], 0)) {
      for (int index = 0; index < count; ++index) held[index] = Value{};
    }
    const Vector step_now = interval.step[offset], drive_now = interval.drive[offset];
    Vector sum = read_out ? interval.outputs[offset] : Vector{};
    for (int index = 0; index < count; ++index) {
      const int64_t number = first_state + index;
      const Value decay = Kind::decay(step_now, rates[index]);
      held[index] = decay * held[index];
      held[index] += Kind::scaled(interval.input_matrix.template at<any_fixed>(offset, number), drive_now);
      if (read_out) {
        sum += Kind::real_of_product(held[index], interval.output_matrix.template at<any_fixed>(offset, number));
      }
      if (keep) {
        Value* kept = history + (offset * count + index) * 2;
        kept[0] = held[index];
        kept[1] = decay;
      }
    }
    if (read_out) interval.outputs[offset] = sum;
  }
  for (int index = 0; index < count; ++index) state[first_state + index] = held[index];
}

// Calls function(true or false constant): whether a matrix is fixed, so that scans without one need not ask.
template <typename Function> inline void with_fixed(bool any_fixed, const Function& function) {
  if (any_fixed) function(std::true_type{});
  else function(std::false_type{});
}

// Advances all states of a unit over an interval.
template <typename Kind, bool read_out, typename Prefetch>
void advance(const Interval<Kind>& interval, int64_t length, int64_t state_size, const Parameters<Kind>& parameters,
             typename Kind::Value* state, const Prefetch& ahead, int64_t unit) {
  with_fixed(parameters.any_fixed, [&](auto any_fixed) {
    for_states<Kind>(state_size, [&](auto count, int64_t first_state) {
      advance_states<Kind, count(), read_out, false, any_fixed()>(interval, length, first_state, parameters.binary(unit), state,
                                                                  nullptr, ahead, unit);
    });
  });
}

template <typename Kind> void forward_task(const Task<Kind>& task, typename Kind::Value* states) {
  using Real = typename Kind::Real;
  using Vector = typename Kind::Vector;
  const MambacoreScan& scan = task.scan;
  const Parameters<Kind> parameters(task);
  Workspace<Kind> workspace(scan, 0);
  Interval<Kind>& interval = workspace.interval;
  for (int64_t index = task.first_interval; index < task.end_interval; ++index) {
    const int64_t length = task.interval_length(index);
    interval.find(task, index);
    Ahead<Kind> ahead(task, index + 1);
    for (const MambacoreSequence& sequence : {scan.inputs, scan.step_size, scan.gate, scan.outputs}) ahead.add(sequence);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      const int width = task.width(unit);
      const int64_t channel = task.channel(unit);
      if (scan.boundary_states != nullptr) task.keep(index, unit, states + unit * scan.state_size);
      interval.read(task, index, unit);
      parameters.take_fixed(interval, unit);
      const Vector skip_weight = task.parameter(scan.skip_weight, unit) / Kind::read_factor;
      for (int64_t offset = 0; offset < length; ++offset) interval.outputs[offset] = skip_weight * interval.inputs[offset];
      advance<Kind, true>(interval, length, scan.state_size, parameters, states + unit * scan.state_size, ahead, unit);
      for (int64_t offset = 0; offset < length; ++offset) {
        const int64_t row = task.row(index, offset);
        Vector output = interval.outputs[offset] * Kind::read_factor;
        if (scan.gate.data != nullptr) {
          const Vector gate = load<Real>(task.at(scan.gate, row, channel), width);
          output *= gate * sigmoid_lanes<Real>(gate);
        }
        store(task.at(scan.outputs, row, channel), output, width);
      }
    }
  }
}

// A segment is an affine map of its incoming state. This finds the map: the state it makes out of zero, and the sum of
// its steps, from which the decay over the whole segment follows. Returns whether a record begins in it, which leaves
// nothing of the incoming state.
template <typename Kind>
bool summarise_forward(const Task<Kind>& task, typename Kind::Value* states, typename Kind::StepSum* step_sums) {
  const MambacoreScan& scan = task.scan;
  const Parameters<Kind> parameters(task);
  Workspace<Kind> workspace(scan, 0);
  Interval<Kind>& interval = workspace.interval;
  bool cut = false;
  for (int64_t index = task.first_interval; index < task.end_interval; ++index) {
    cut = interval.find(task, index) || cut;
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      const int64_t length = task.interval_length(index);
      interval.read(task, index, unit);
      parameters.take_fixed(interval, unit);
      for (int64_t offset = 0; offset < length; ++offset) add_widened<typename Kind::Real>(step_sums[unit], interval.step[offset]);
      advance<Kind, false>(interval, length, scan.state_size, parameters, states + unit * scan.state_size, NothingAhead{},
                           unit);
    }
  }
  return cut;
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
