// The selective scan on a CPU, vectorised over channels.
//
// Per position t, channel c and state n (kernels/README.md derives these lines from the paper):
//     decay   = exp(step_t * A_n)                    state_n = decay * state_n + step_t * x_t * B_tn
//     y_t     = sum_n C_tn * state_n + D * x_t       output  = y_t * silu(gate_t)
// A task owns a stretch of the length and a range of channels of one batch item and group. It walks the length in
// intervals; within one, it takes one vector of channels ("unit") after the other, so that everything an interval
// needs stays in the cache, and within a unit a few states after the other, so that those stay in registers.
// Nothing of size length x channels x state is ever written but, for backward, the state before each interval.

#include <algorithm>

#include "lanes.h"
#include "parallel.h"
#include "kernels.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Element> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };

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

// ---- forward ----

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

// ---- backward ----
// With g_t the gradient of the state after position t and carry = decay_{t+1} g_{t+1}:
//     g_t = C_t dy_t + carry        dB_t += g_t (step x)_t       dC_t += dy_t state_t
//     d(step x)_t = sum_n g_t B_t   d(step A) = g_t decay_t state_{t-1}, which goes to dstep_t (times A) and dA (times step)

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

// ---- driving ----

// What is handed from segment to segment: for every task the lanes of its units' states, forward or backward.
template <typename Element> class Handover {
 public:
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  Handover(const MambacoreScan& scan, int64_t tasks) : scan_(scan), units_(scan.channels / lane_count<Real> + 1), values_(tasks * units_ * scan.state_size) {}
  Vector* of(int64_t task) { return values_.data() + task * units_ * scan_.state_size; }
  int64_t units() const { return units_; }

 private:
  const MambacoreScan& scan_;
  int64_t units_;
  Scratch<Vector> values_;
};

// Runs every segment in scan order (forward) or against it (backward): first all summaries at once, then the
// handing on, which is short, then all segments at once from the right state.
template <typename Element, typename Summarise, typename Run>
void run_segments(const MambacoreScan& scan, bool against, const void* received, void* handed_out,
                  const Summarise& summarise, const Run& run) {
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  const int64_t segments = scan.plan.segments;
  const int64_t tasks = scan.batch * scan.groups * scan.plan.ranges * segments;
  Handover<Element> handover(scan, tasks);
  const int64_t first = against ? segments - 1 : 0, last = against ? 0 : segments - 1, towards = against ? -1 : 1;
  if (received != nullptr) {
    for (int64_t index = 0; index < tasks; ++index) {
      const Task<Element> task(scan, index);
      if (task.segment != first) continue;
      for (int64_t unit = 0; unit < task.units(); ++unit)
        task.gather(received, task.batch, unit, handover.of(index) + unit * scan.state_size);
    }
  }
  if (segments > 1) {
    Handover<Element> made(scan, tasks);
    Scratch<Vector> step_sums(tasks * handover.units());
    parallel_for(tasks, scan.threads, [&](int64_t index) {
      const Task<Element> task(scan, index);
      if (task.segment != last) summarise(task, made.of(index), step_sums.data() + index * handover.units());
    });
    for (int64_t chain = 0; chain < tasks / segments; ++chain) {
      for (int64_t segment = first; segment != last; segment += towards) {
        const int64_t index = chain * segments + segment;
        const Task<Element> task(scan, index);
        Rates<Element> rates(task);
        for (int64_t unit = 0; unit < task.units(); ++unit) {
          for (int64_t state = 0; state < scan.state_size; ++state) {
            const int64_t at = unit * scan.state_size + state;
            const Vector decay = exp2_lanes(step_sums[index * handover.units() + unit] * rates.binary[at]);
            handover.of(index + towards)[at] = decay * handover.of(index)[at] + made.of(index)[at];
          }
        }
      }
    }
  }
  parallel_for(tasks, scan.threads, [&](int64_t index) { run(Task<Element>(scan, index), handover.of(index)); });
  if (handed_out != nullptr) {
    for (int64_t index = 0; index < tasks; ++index) {
      const Task<Element> task(scan, index);
      if (task.segment != last) continue;
      for (int64_t unit = 0; unit < task.units(); ++unit)
        task.scatter(handover.of(index) + unit * scan.state_size, handed_out, task.batch, unit);
    }
  }
}

template <typename Element> void forward(const MambacoreScan& scan) {
  run_segments<Element>(scan, false, scan.initial_state, scan.final_state, summarise_forward<Element>, forward_task<Element>);
}
template <typename Element> void backward(const MambacoreScan& scan) {
  run_segments<Element>(scan, true, scan.grad_final_state, scan.grad_initial_state, summarise_backward<Element>,
                        backward_task<Element>);
}

}  // namespace

MambacoreScanPlan plan_scan(const MambacoreScan& scan) {
  const int64_t lanes = scan.element == MAMBACORE_FLOAT64 ? lane_count<double> : lane_count<float>;
  const int64_t units = (scan.channels / scan.groups + lanes - 1) / lanes;
  const int64_t rows = scan.batch * scan.groups;
  const int64_t ranges = std::max<int64_t>(1, std::min(units, (scan.threads + rows - 1) / rows));
  const int64_t intervals = std::max<int64_t>(1, (scan.length + scan.border_interval - 1) / scan.border_interval);
  // Splitting the length costs a second walk over it, so it pays from three threads' worth of idle hands.
  const int64_t idle = scan.threads / (rows * ranges);
  return {ranges, idle >= 3 ? std::min(intervals, idle) : 1};
}
void scan_forward(const MambacoreScan& scan) {
  if (scan.element == MAMBACORE_FLOAT64) forward<double>(scan);
  else if (scan.element == MAMBACORE_BFLOAT16) forward<BFloat16>(scan);
  else forward<float>(scan);
}
void scan_backward(const MambacoreScan& scan) {
  if (scan.element == MAMBACORE_FLOAT64) backward<double>(scan);
  else if (scan.element == MAMBACORE_BFLOAT16) backward<BFloat16>(scan);
  else backward<float>(scan);
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
