// The scan, onwards.
#pragma once

#include "scan_task.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// Advances `count` states of one unit over an interval and adds their part of y. When `history` is given, keeps every
// state and every decay for backward: history[(offset * state_size + state) * 2] and the element behind it.
template <int count, bool read_out, bool keep, typename Real, typename Prefetch>
inline void advance_states(int64_t length, int64_t state_size, int64_t first_state, const Lanes<Real>* step,
                           const Lanes<Real>* drive, const Real* const* input_matrix, const Real* const* output_matrix,
                           const Lanes<Real>* rate, Lanes<Real>* state, Lanes<Real>* outputs, Lanes<Real>* history,
                           const Prefetch& ahead, int64_t unit) {
  Lanes<Real> held[count], rates[count];
  for (int index = 0; index < count; ++index) {
    held[index] = state[first_state + index];
    rates[index] = rate[first_state + index];
  }
  for (int64_t offset = 0; offset < length; ++offset) {
    if (first_state == 0) ahead.fetch(unit, offset);
    const Lanes<Real> step_now = step[offset], drive_now = drive[offset];
    const Real* into = input_matrix[offset] + first_state;
    const Real* out_of = output_matrix[offset] + first_state;
    Lanes<Real> sum = read_out ? outputs[offset] : Lanes<Real>{};
    for (int index = 0; index < count; ++index) {
      const Lanes<Real> decay = exp2_lanes(step_now * rates[index]);
      held[index] = decay * held[index] + drive_now * into[index];
      if (read_out) sum += held[index] * out_of[index];
      if (keep) {
        Lanes<Real>* kept = history + (offset * state_size + first_state + index) * 2;
        kept[0] = held[index];
        kept[1] = decay;
      }
    }
    if (read_out) outputs[offset] = sum;
  }
  for (int index = 0; index < count; ++index) state[first_state + index] = held[index];
}

template <typename Element>
void forward_task(const Task<Element>& task, Lanes<typename ComputeType<Element>::type>* states) {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  const MambacoreScan& scan = task.scan;
  Rates<Element> rates(task);
  Workspace<Element> workspace(scan, 0);
  Interval<Element>& interval = workspace.interval;
  for (int64_t index = task.first_interval; index < task.end_interval; ++index) {
    const int64_t length = task.interval_length(index);
    interval.find_matrices(task, index);
    Ahead<Element> ahead(task, index + 1);
    for (const MambacoreSequence& sequence : {scan.inputs, scan.step_size, scan.gate, scan.outputs}) ahead.add(sequence);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      Vector* state = states + unit * scan.state_size;
      const int width = task.width(unit);
      const int64_t channel = task.channel(unit);
      if (scan.border_states != nullptr) {
        for (int64_t number = 0; number < scan.state_size; ++number)
          store<Real>(task.border(index, number, unit), state[number], width);
      }
      interval.read(task, index, unit);
      const Vector skip_weight = task.parameter(scan.skip_weight, unit);
      for (int64_t offset = 0; offset < length; ++offset) interval.outputs[offset] = skip_weight * interval.inputs[offset];
      for_states(scan.state_size, [&](auto count, int64_t first_state) {
        advance_states<count(), true, false, Real>(length, scan.state_size, first_state, interval.step, interval.drive,
                                                   interval.input_matrix, interval.output_matrix,
                                                   rates.binary.data() + unit * scan.state_size, state,
                                                   interval.outputs, nullptr, ahead, unit);
      });
      for (int64_t offset = 0; offset < length; ++offset) {
        const int64_t row = task.row(index, offset);
        Vector output = interval.outputs[offset];
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
// its steps, from which the decay over the whole segment follows.
template <typename Element>
void summarise_forward(const Task<Element>& task, Lanes<typename ComputeType<Element>::type>* states,
                       Lanes<typename ComputeType<Element>::type>* step_sums) {
  using Real = typename ComputeType<Element>::type;
  const MambacoreScan& scan = task.scan;
  Rates<Element> rates(task);
  Workspace<Element> workspace(scan, 0);
  Interval<Element>& interval = workspace.interval;
  for (int64_t index = task.first_interval; index < task.end_interval; ++index) {
    interval.find_matrices(task, index);
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      interval.read(task, index, unit);
      for (int64_t offset = 0; offset < task.interval_length(index); ++offset) step_sums[unit] += interval.step[offset];
      for_states(scan.state_size, [&](auto count, int64_t first_state) {
        advance_states<count(), false, false, Real>(
            task.interval_length(index), scan.state_size, first_state, interval.step, interval.drive,
            interval.input_matrix, interval.output_matrix, rates.binary.data() + unit * scan.state_size,
            states + unit * scan.state_size, nullptr, nullptr, NothingAhead{}, unit);
      });
    }
  }
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
