// What the scan's two directions share: where a task's rows are, one interval widened to the compute type, and the
// look-ahead into memory.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// What one task works on, and where its rows are.
template <typename Kind> struct Task {
  using Element = typename Kind::Element;
  using Real = typename Kind::Real;
  using Vector = typename Kind::Vector;
  using Value = typename Kind::Value;
  static constexpr int lanes = Kind::lanes, parts = Kind::parts;

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

  int64_t intervals() const { return (scan.length + scan.boundary_interval - 1) / scan.boundary_interval; }
  int64_t units() const { return (channels + lanes - 1) / lanes; }
  int width(int64_t unit) const { return static_cast<int>(std::min<int64_t>(lanes, channels - unit * lanes)); }
  int64_t channel(int64_t unit) const { return first_channel + unit * lanes; }
  int64_t interval_length(int64_t interval) const {
    return std::min(scan.boundary_interval, scan.length - interval * scan.boundary_interval);
  }
  // The row in memory of the `offset`-th position of an interval in scan order.
  int64_t row(int64_t interval, int64_t offset) const {
    const int64_t position = interval * scan.boundary_interval + offset;
    return scan.reverse ? scan.length - 1 - position : position;
  }
  Element* at(const MambacoreSequence& sequence, int64_t row, int64_t channel) const {
    return static_cast<Element*>(sequence.data) + batch * sequence.batch_stride + row * sequence.row_stride + channel;
  }
  const typename Kind::Number* at(const MambacoreMatrix& matrix, int64_t row) const {
    return reinterpret_cast<const typename Kind::Number*>(static_cast<const Real*>(matrix.data) +
                                                          batch * matrix.batch_stride + row * matrix.row_stride +
                                                          group * matrix.group_stride);
  }
  // Per-channel parameters as lanes; absent ones read as zero.
  Vector parameter(const void* data, int64_t unit) const {
    return data == nullptr ? Vector{} : load(static_cast<const Real*>(data) + channel(unit), width(unit));
  }
  // (channels, state_size) numbers in memory <-> state_size values of lanes; the real and the imaginary part of a value
  // are vectors one behind the other.
  void gather(const void* data, int64_t outer, int64_t unit, Value* to) const {
    const int64_t row = parts * scan.state_size;
    const Real* from = static_cast<const Real*>(data) + (outer * scan.channels + channel(unit)) * row;
    Vector* vectors = reinterpret_cast<Vector*>(to);
    for (int64_t number = 0; number < row; ++number) {
      vectors[number] = Vector{};
      for (int lane = 0; lane < width(unit); ++lane) vectors[number][lane] = from[lane * row + number];
    }
  }
  void scatter(const Value* from, void* data, int64_t outer, int64_t unit) const {
    const int64_t row = parts * scan.state_size;
    Real* to = static_cast<Real*>(data) + (outer * scan.channels + channel(unit)) * row;
    const Vector* vectors = reinterpret_cast<const Vector*>(from);
    for (int64_t number = 0; number < row; ++number) {
      for (int lane = 0; lane < width(unit); ++lane) to[lane * row + number] = vectors[number][lane];
    }
  }
  // The states before an interval, kept for backward.
  void keep(int64_t interval, int64_t unit, const Value* states) const {
    const Vector* vectors = reinterpret_cast<const Vector*>(states);
    for (int64_t number = 0; number < parts * scan.state_size; ++number)
      store<Real>(boundary(interval, number, unit), vectors[number], width(unit));
  }
  void recall(int64_t interval, int64_t unit, Value* states) const {
    Vector* vectors = reinterpret_cast<Vector*>(states);
    for (int64_t number = 0; number < parts * scan.state_size; ++number)
      vectors[number] = load<Real>(boundary(interval, number, unit), width(unit));
  }

 private:
  Real* boundary(int64_t interval, int64_t number, int64_t unit) const {
    return static_cast<Real*>(scan.boundary_states) +
           ((batch * intervals() + interval) * parts * scan.state_size + number) * scan.channels + channel(unit);
  }
};

// The numbers of a matrix over an interval: rows in memory that the channels of a group share, or, of a fixed matrix, the
// lanes of the present unit.
template <typename Kind> struct MatrixNumbers {
  const typename Kind::Number** rows;
  const typename Kind::Value* fixed;  // null: rows

  // The `state`-th number at a position. Which of the two it is, is known to the compiler only if neither matrix is fixed.
  template <bool any_fixed> inline auto at(int64_t offset, int64_t state) const {
    if constexpr (any_fixed) return fixed != nullptr ? fixed[state] : Kind::everywhere(rows[offset][state]);
    else return rows[offset][state];
  }
};

// One unit over one interval: the rows of the sequence tensors, widened to the compute type.
template <typename Kind> struct Interval {
  using Real = typename Kind::Real;
  using Vector = typename Kind::Vector;
  Vector *inputs, *step, *drive, *outputs;
  MatrixNumbers<Kind> input_matrix, output_matrix;
  uint8_t* resets;

  void read(const Task<Kind>& task, int64_t interval, int64_t unit) {
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
  // What all units share: where the rows of matrices are, and where records begin. True if one does.
  bool find(const Task<Kind>& task, int64_t interval) {
    bool any = false;
    for (int64_t offset = 0; offset < task.interval_length(interval); ++offset) {
      const int64_t row = task.row(interval, offset);
      input_matrix.rows[offset] = task.at(task.scan.input_matrix, row);
      output_matrix.rows[offset] = task.at(task.scan.output_matrix, row);
      resets[offset] = task.scan.resets != nullptr ? task.scan.resets[task.batch * task.scan.length + row] : 0;
      any = any || resets[offset] != 0;
    }
    return any;
  }
};

// One unit takes a single cache line out of every row, a pattern that hardware prefetchers do not recognise. So while an interval is computed, the next one is asked for, line after line in the order of memory, which
// also sets the processor's own look-ahead going.
template <typename Kind> class Ahead {
 public:
  Ahead(const Task<Kind>& task, int64_t interval)
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
    const int64_t due = unit * task_.scan.boundary_interval + offset;
    const int64_t row = due / units_, place = due % units_ * Kind::lanes;
    if (row >= rows_) return;
    for (int index = 0; index < count_; ++index) __builtin_prefetch(first_[index] + row * stride_[index] + place, 0, 2);
  }

 private:
  const Task<Kind>& task_;
  int64_t interval_, units_, rows_;
  int count_ = 0;
  const typename Kind::Element* first_[7];
  int64_t stride_[7];
};
struct NothingAhead {
  void fetch(int64_t, int64_t) const {}
};

// Channels' own matrices and rates of decay as lanes, for every unit of a task.
template <typename Kind> struct Parameters {
  using Value = typename Kind::Value;
  Scratch<Value> rates, rates_in_powers, input_matrix, output_matrix;
  const bool any_fixed;

  explicit Parameters(const Task<Kind>& task)
      : rates(task.units() * task.scan.state_size), rates_in_powers(rates.size()),
        input_matrix(task.scan.input_matrix.fixed ? rates.size() : 0),
        output_matrix(task.scan.output_matrix.fixed ? rates.size() : 0),
        any_fixed(task.scan.input_matrix.fixed || task.scan.output_matrix.fixed), state_size_(task.scan.state_size) {
    for (int64_t unit = 0; unit < task.units(); ++unit) {
      const int64_t first = unit * state_size_;
      task.gather(task.scan.state_matrix, 0, unit, rates.data() + first);
      if (input_matrix.size()) task.gather(task.scan.input_matrix.data, 0, unit, input_matrix.data() + first);
      if (output_matrix.size()) task.gather(task.scan.output_matrix.data, 0, unit, output_matrix.data() + first);
      for (int64_t state = first; state < first + state_size_; ++state)
        rates_in_powers[state] = Kind::in_powers_and_turns(rates[state]);
    }
  }
  const Value* natural(int64_t unit) const { return rates.data() + unit * state_size_; }
  const Value* binary(int64_t unit) const { return rates_in_powers.data() + unit * state_size_; }
  void take_fixed(Interval<Kind>& interval, int64_t unit) const {
    interval.input_matrix.fixed = input_matrix.size() ? input_matrix.data() + unit * state_size_ : nullptr;
    interval.output_matrix.fixed = output_matrix.size() ? output_matrix.data() + unit * state_size_ : nullptr;
  }

 private:
  const int64_t state_size_;
};

template <typename Kind> class Workspace {
 public:
  using Vector = typename Kind::Vector;
  Workspace(const MambacoreScan& scan, int64_t vectors_per_position)
      : rows_(2 * scan.boundary_interval), vectors_((4 + vectors_per_position) * scan.boundary_interval),
        resets_(scan.boundary_interval) {
    const int64_t size = scan.boundary_interval;
    interval.inputs = vectors_.data();
    interval.step = interval.inputs + size;
    interval.drive = interval.step + size;
    interval.outputs = interval.drive + size;
    extra = interval.outputs + size;
    interval.input_matrix = {rows_.data(), nullptr};
    interval.output_matrix = {rows_.data() + size, nullptr};
    interval.resets = resets_.data();
  }
  Interval<Kind> interval;
  Vector* extra;

 private:
  std::vector<const typename Kind::Number*> rows_;
  Scratch<Vector> vectors_;
  std::vector<uint8_t> resets_;
};

// Calls function(integral constant of how many states, first state) until all states are done.
template <typename Kind, typename Function> inline void for_states(int64_t state_size, const Function& function) {
  int64_t state = 0;
  for (; state + Kind::states_at_once <= state_size; state += Kind::states_at_once)
    function(std::integral_constant<int, Kind::states_at_once>{}, state);
  if constexpr (Kind::states_at_once > 4) {
    for (; state + 4 <= state_size; state += 4) function(std::integral_constant<int, 4>{}, state);
  }
  for (; state < state_size; ++state) function(std::integral_constant<int, 1>{}, state);
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
