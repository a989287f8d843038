// What the scan's two directions share: where a task's rows are, one interval widened to the compute type, and the
// look-ahead into memory.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// What one task works on, and where its rows are.
template <typename Element> struct Task {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;

  const MambacoreScan& scan;
  int64_t batch, group, range, segment;
  int64_t first_channel, channels;       // of this task
  int64_t first_interval, end_interval;  // in scan order

  Task(const MambacoreScan& arguments, int64_t index) : scan(arguments) {
    const MambacoreScanPlan plan = scan.plan;
    segment = index % plan.segments;
    range = index / plan.segments % plan.ranges;
    group = index / (plan.segments * plan.ranges) % scan.groups;
    batch = index / (plan.segments * plan.ranges * scan.groups);
    const int64_t group_channels = scan.channels / scan.groups;
    const int64_t group_units = (group_channels + lanes - 1) / lanes;
    const int64_t begin = std::min(group_channels, group_units * range / plan.ranges * lanes);
    const int64_t end = std::min(group_channels, group_units * (range + 1) / plan.ranges * lanes);
    first_channel = group * group_channels + begin;
    channels = end - begin;
    first_interval = intervals() * segment / plan.segments;
    end_interval = intervals() * (segment + 1) / plan.segments;
  }

  int64_t intervals() const { return (scan.length + scan.border_interval - 1) / scan.border_interval; }
  int64_t units() const { return (channels + lanes - 1) / lanes; }
  int width(int64_t unit) const { return static_cast<int>(std::min<int64_t>(lanes, channels - unit * lanes)); }
  int64_t channel(int64_t unit) const { return first_channel + unit * lanes; }
  int64_t interval_length(int64_t interval) const {
    return std::min(scan.border_interval, scan.length - interval * scan.border_interval);
  }
  // The row in memory of the `offset`-th position of an interval in scan order.
  int64_t row(int64_t interval, int64_t offset) const {
    const int64_t position = interval * scan.border_interval + offset;
    return scan.reverse ? scan.length - 1 - position : position;
  }
  Element* at(const MambacoreSequence& sequence, int64_t row, int64_t channel) const {
    return static_cast<Element*>(sequence.data) + batch * sequence.batch_stride + row * sequence.row_stride + channel;
  }
  const Real* at(const MambacoreMatrix& matrix, int64_t row) const {
    return static_cast<const Real*>(matrix.data) + batch * matrix.batch_stride + row * matrix.row_stride +
           group * matrix.group_stride;
  }
  // Per-channel parameters as lanes; absent ones read as zero.
  Vector parameter(const void* data, int64_t unit) const {
    return data == nullptr ? Vector{} : load(static_cast<const Real*>(data) + channel(unit), width(unit));
  }
  // (channels, state_size) rows in memory <-> state_size vectors of lanes.
  void gather(const void* data, int64_t outer, int64_t unit, Vector* to) const {
    const Real* from = static_cast<const Real*>(data) + (outer * scan.channels + channel(unit)) * scan.state_size;
    for (int64_t state = 0; state < scan.state_size; ++state) {
      to[state] = Vector{};
      for (int lane = 0; lane < width(unit); ++lane) to[state][lane] = from[lane * scan.state_size + state];
    }
  }
  void scatter(const Vector* from, void* data, int64_t outer, int64_t unit) const {
    Real* to = static_cast<Real*>(data) + (outer * scan.channels + channel(unit)) * scan.state_size;
    for (int64_t state = 0; state < scan.state_size; ++state) {
      for (int lane = 0; lane < width(unit); ++lane) to[lane * scan.state_size + state] = from[state][lane];
    }
  }
  Real* border(int64_t interval, int64_t state, int64_t unit) const {
    return static_cast<Real*>(scan.border_states) +
           ((batch * intervals() + interval) * scan.state_size + state) * scan.channels + channel(unit);
  }
};

// One unit over one interval: the rows of the sequence tensors, widened to the compute type.
template <typename Element> struct Interval {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  Vector *inputs, *step, *drive, *outputs;
  const Real **input_matrix, **output_matrix;

  void read(const Task<Element>& task, int64_t interval, int64_t unit) {
    const MambacoreScan& scan = task.scan;
    const Vector bias = task.parameter(scan.step_bias, unit);
    const int width = task.width(unit);
    const int64_t channel = task.channel(unit), length = task.interval_length(interval);
    for (int64_t offset = 0; offset < length; ++offset) {
      const int64_t row = task.row(interval, offset);
      inputs[offset] = load<Real>(task.at(scan.inputs, row, channel), width);
      const Vector raw = load<Real>(task.at(scan.step_size, row, channel), width) + bias;
      step[offset] = scan.step_softplus ? softplus_lanes<Real>(raw) : raw;
      drive[offset] = step[offset] * inputs[offset];
    }
  }
  void find_matrices(const Task<Element>& task, int64_t interval) {
    for (int64_t offset = 0; offset < task.interval_length(interval); ++offset) {
      input_matrix[offset] = task.at(task.scan.input_matrix, task.row(interval, offset));
      output_matrix[offset] = task.at(task.scan.output_matrix, task.row(interval, offset));
    }
  }
};

// One unit takes a single line out of every row, a pattern that no processor foresees and that leaves it waiting for
// memory. So while an interval is computed, the next one is asked for, line after line in the order of memory, which
// also sets the processor's own look-ahead going.
template <typename Element> class Ahead {
 public:
  Ahead(const Task<Element>& task, int64_t interval)
      : task_(task), interval_(interval), units_(task.units()),
        rows_(interval >= task.first_interval && interval < task.end_interval ? task.interval_length(interval) : 0) {}
  void add(const MambacoreSequence& sequence) {
    if (rows_ == 0 || sequence.data == nullptr) return;
    first_[count_] = task_.at(sequence, task_.row(interval_, 0), task_.first_channel);
    stride_[count_++] = task_.scan.reverse ? -sequence.row_stride : sequence.row_stride;
  }
  // Asks for the lines that are due at this unit and offset of the present interval. Always inline: GCC takes a function
  // that only prefetches for one without effect, and drops its calls.
  __attribute__((always_inline)) inline void fetch(int64_t unit, int64_t offset) const {
    const int64_t due = unit * task_.scan.border_interval + offset;
    const int64_t row = due / units_, place = due % units_ * Task<Element>::lanes;
    if (row >= rows_) return;
    for (int index = 0; index < count_; ++index) __builtin_prefetch(first_[index] + row * stride_[index] + place, 0, 2);
  }

 private:
  const Task<Element>& task_;
  int64_t interval_, units_, rows_;
  int count_ = 0;
  const Element* first_[7];
  int64_t stride_[7];
};
struct NothingAhead {
  void fetch(int64_t, int64_t) const {}
};

template <typename Element> class Workspace {
 public:
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  Workspace(const MambacoreScan& scan, int64_t vectors_per_position)
      : matrices_(2 * scan.border_interval), vectors_((4 + vectors_per_position) * scan.border_interval) {
    const int64_t size = scan.border_interval;
    interval.inputs = vectors_.data();
    interval.step = interval.inputs + size;
    interval.drive = interval.step + size;
    interval.outputs = interval.drive + size;
    extra = interval.outputs + size;
    interval.input_matrix = matrices_.data();
    interval.output_matrix = matrices_.data() + size;
  }
  Interval<Element> interval;
  Vector* extra;

 private:
  std::vector<const Real*> matrices_;
  Scratch<Vector> vectors_;
};

// Calls function(integral constant of how many states, first state) until all states are done.
template <typename Function> inline void for_states(int64_t state_size, const Function& function) {
  int64_t state = 0;
  for (; state + states_at_once <= state_size; state += states_at_once)
    function(std::integral_constant<int, states_at_once>{}, state);
  if constexpr (states_at_once > 4) {
    for (; state + 4 <= state_size; state += 4) function(std::integral_constant<int, 4>{}, state);
  }
  for (; state < state_size; ++state) function(std::integral_constant<int, 1>{}, state);
}

template <typename Element> struct Rates {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  // The state matrix of every unit of a task, as lanes, and the same times log2(e) for exp2.
  Scratch<Vector> natural, binary;
  Rates(const Task<Element>& task) : natural(task.units() * task.scan.state_size), binary(task.units() * task.scan.state_size) {
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      Vector* rates = natural.data() + unit * task.scan.state_size;
      task.gather(task.scan.state_matrix, 0, unit, rates);
      for (int64_t state = 0; state < task.scan.state_size; ++state)
        binary[unit * task.scan.state_size + state] = rates[state] * static_cast<Real>(log2_of_e);
    }
  }
};

// One segment from its incoming states, which it replaces by its outgoing ones.

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
