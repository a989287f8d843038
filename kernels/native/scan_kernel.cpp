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

#include "kernels.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

// The carry between segments: for every task the states of its units, forward or backward.
template <typename Kind> class Handover {
 public:
  using Value = typename Kind::Value;
  Handover(const MambacoreScan& scan, int64_t tasks)
      : units_(scan.channels / Kind::lanes + 1), state_size_(scan.state_size), values_(tasks * units_ * state_size_) {}
  Value* of(int64_t task) { return values_.data() + task * units_ * state_size_; }
  int64_t units() const { return units_; }

 private:
  int64_t units_, state_size_;
  Scratch<Value> values_;
};

// Runs every segment in scan order (forward) or against it (backward): first the summaries of all segments in parallel,
// then the short sequential pass that carries states from segment to segment, then all segments in parallel from the
// right state.
template <typename Kind, bool against, typename Summarise, typename Run>
void run_segments(const MambacoreScan& scan, const void* received, void* handed_out, const Summarise& summarise,
                  const Run& run) {
  using Value = typename Kind::Value;
  using StepSum = typename Kind::StepSum;
  const int64_t segments = scan.plan.segments;
  const int64_t tasks = scan.batch * scan.groups * scan.plan.ranges * segments;
  Handover<Kind> handover(scan, tasks);
  const int64_t first = against ? segments - 1 : 0, last = against ? 0 : segments - 1, towards = against ? -1 : 1;
  if (received != nullptr) {
    for (int64_t index = 0; index < tasks; ++index) {
      const Task<Kind> task(scan, index);
      if (task.segment != first) continue;
      for (int64_t unit = 0; unit < task.units(); ++unit)
        task.gather(received, task.batch, unit, handover.of(index) + unit * scan.state_size);
    }
  }
  if (segments > 1) {
    Handover<Kind> made(scan, tasks);
    Scratch<StepSum> step_sums(tasks * handover.units());
    std::vector<uint8_t> cut(tasks);
    parallel_for(tasks, scan.threads, [&](int64_t index) {
      const Task<Kind> task(scan, index);
      if (task.segment != last) cut[index] = summarise(task, made.of(index), step_sums.data() + index * handover.units());
    });
    for (int64_t chain = 0; chain < tasks / segments; ++chain) {
      for (int64_t segment = first; segment != last; segment += towards) {
        const int64_t index = chain * segments + segment;
        const Task<Kind> task(scan, index);
        const Parameters<Kind> parameters(task);
        for (int64_t at = 0; at < task.units() * scan.state_size; ++at) {
          Value& handed_on = handover.of(index + towards)[at];
          handed_on = made.of(index)[at];
          if (cut[index]) continue;
          const StepSum& step_sum = step_sums[index * handover.units() + at / scan.state_size];
          const Value decay = Kind::decay_over(step_sum, parameters.binary(0)[at]);
          if constexpr (against) handed_on += Kind::product_with_conjugate(handover.of(index)[at], decay);
          else handed_on += decay * handover.of(index)[at];
        }
      }
    }
  }
  parallel_for(tasks, scan.threads, [&](int64_t index) { run(Task<Kind>(scan, index), handover.of(index)); });
  if (handed_out != nullptr) {
    for (int64_t index = 0; index < tasks; ++index) {
      const Task<Kind> task(scan, index);
      if (task.segment != last) continue;
      for (int64_t unit = 0; unit < task.units(); ++unit)
        task.scatter(handover.of(index) + unit * scan.state_size, handed_out, task.batch, unit);
    }
  }
}

// Calls function(a value of the kind of scan that this is).
template <typename Function> void with_kind(const MambacoreScan& scan, const Function& function) {
  with_element(scan.element, [&](auto element) {
    if (scan.is_complex) function(Kind<decltype(element), true>{});
    else function(Kind<decltype(element), false>{});
  });
}

// Vectors of channels in a range at most: 256 channels of float32 with AVX-512, 64 KiB for each of the tensors.
constexpr int64_t units_at_once = 16;

}  // namespace

MambacoreScanPlan plan_scan(const MambacoreScan& scan) {
  const int64_t lanes = scan.element == MAMBACORE_FLOAT64 ? lane_count<double> : lane_count<float>;
  const int64_t rows = scan.batch * scan.groups;
  if (rows == 0) return {1, 1};
  const int64_t units = (scan.channels / scan.groups + lanes - 1) / lanes;
  // The interval being computed and the one being prefetched have to fit into the cache: for every channel of a range an
  // interval's rows of inputs, steps, gates and outputs, and, backward, of their gradients.
  const int64_t cached = (units + units_at_once - 1) / units_at_once;
  const int64_t ranges = std::max(cached, std::min(units, (scan.threads + rows - 1) / rows));
  const int64_t intervals = std::max<int64_t>(1, (scan.length + scan.boundary_interval - 1) / scan.boundary_interval);
  // Splitting the length costs a second walk over it, so it pays only if at least three threads would otherwise be idle.
  const int64_t idle = scan.threads / (rows * ranges);
  return {ranges, idle >= 3 ? std::min(intervals, idle) : 1};
}
void scan_forward(const MambacoreScan& scan) {
  with_kind(scan, [&](auto kind) {
    using Kind = decltype(kind);
    run_segments<Kind, false>(scan, scan.initial_state, scan.final_state, summarise_forward<Kind>, forward_task<Kind>);
  });
}
void scan_backward(const MambacoreScan& scan) {
  with_kind(scan, [&](auto kind) {
    using Kind = decltype(kind);
    run_segments<Kind, true>(scan, scan.grad_final_state, scan.grad_initial_state, summarise_backward<Kind>,
                             backward_task<Kind>);
  });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
