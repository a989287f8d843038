// Many positions of a batch through one residual selective block, without gradients:
//
//     sequence + output_projection(scan(silu(convolution(inputs))) * silu(gate)),  (inputs, gate) = projection(norm(sequence))
//
// Operator by operator, every intermediate tensor goes through memory, and calling the operators costs as much as some
// hundred positions. Here a task takes one sequence of the batch, a few positions at a time, through the whole block, and
// what lies between sequence and outputs stays in the cache. Sums are float32; products take float32 or bfloat16 numbers.

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "matrix_product.h"
#include "scan_forward.h"
#include "widened.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

constexpr int64_t positions_at_once = 32;

// The weight of a linear layer, (outputs, inputs), as the right matrix of a product; rows of outputs are padded.
template <typename Unit> class Packed {
 public:
  Packed(int64_t inputs, int64_t columns)
      : inputs_(inputs), columns_(columns), numbers_(inputs * columns),
        units_(ProductTraits<Unit>::numbers == 1 ? 0 : (inputs + 1) / 2 * columns), matrix_{nullptr, columns} {}
  // Puts `outputs` rows of a weight into the columns from `first` on.
  void add(const float* weight, int64_t outputs, int64_t first) {
    transpose_matrix(weight, inputs_, outputs, inputs_, numbers_.data() + first, columns_);
  }
  void finish() { matrix_ = down_columns<Unit>(numbers_.data(), columns_, inputs_, units_.data()); }

  // to = keep * to + from weight, for so many rows, all padded.
  void multiply(const float* from, int64_t from_row, Unit* left, float* to, int64_t to_row, int64_t rows, float keep) const {
    constexpr int numbers = ProductTraits<Unit>::numbers;
    product<Unit>(along_rows<Unit>(from, from_row, rows, left), matrix_, to, to_row, rows, columns_ / lane_count<float>,
                  (inputs_ + numbers - 1) / numbers, Shape::full, keep);
  }

 private:
  int64_t inputs_, columns_;
  Scratch<float> numbers_;
  Scratch<Unit> units_;
  RightMatrix<Unit> matrix_;
};

template <typename Unit> class Block {
  using Vector = Lanes<float>;
  using Real = Kind<float, false>;
  static constexpr int lanes = lane_count<float>;

 public:
  explicit Block(const MambacoreBlock& block)
      : block_(block), model_(padded(block.model_width)), inner_(padded(block.inner_width)),
        chosen_(padded(block.step_rank + 2 * block.state_size)), units_(inner_ / lanes),
        input_(block.model_width, 2 * inner_), selection_(block.inner_width, chosen_), step_(block.step_rank, inner_),
        output_(block.inner_width, model_), input_bias_(block.input_bias ? 2 * inner_ : 0),
        output_bias_(block.output_bias, block.model_width), convolution_bias_(block.convolution_bias, block.inner_width),
        step_bias_(block.step_bias, block.inner_width), skip_weight_(block.skip_weight, block.inner_width),
        taps_(turned<float, float>(block.convolution_weight, block.inner_width, block.kernel_width)),
        rates_(units_ * block.state_size) {
    const int64_t inner = block.inner_width;
    input_.add(block.input_weight, inner, 0);
    input_.add(block.input_weight + inner * block.model_width, inner, inner_);
    selection_.add(block.selection_weight, block.step_rank + 2 * block.state_size, 0);
    step_.add(block.step_weight, inner, 0);
    output_.add(block.output_weight, block.model_width, 0);
    for (auto* weight : {&input_, &selection_, &step_, &output_}) weight->finish();
    if (block.input_bias) {
      convert<float>(block.input_bias, input_bias_.data(), inner);
      convert<float>(block.input_bias + inner, input_bias_.data() + inner_, inner);
    }
    gather(block.log_decay_rate, rates_);
    for (int64_t number = 0; number < rates_.size(); ++number)
      rates_[number] = exp_lanes<float>(rates_[number]) * float(-log2_of_e);
  }

  void run() const {
    const int64_t tasks = std::min<int64_t>(block_.batch, block_.threads);
    parallel_for(tasks, tasks, [&](int64_t task) {
      Rooms rooms(*this);
      for (int64_t item = block_.batch * task / tasks; item < block_.batch * (task + 1) / tasks; ++item) walk(rooms, item);
    });
  }

 private:
  // What a task keeps while it walks.
  struct Rooms {
    Scratch<float> sequence, normalised, projected, mixed, selected, step_size;  // so many positions each
    Scratch<Unit> left;
    Scratch<Vector> states, vectors;
    std::vector<const float*> rows;
    std::vector<uint8_t> resets;
    Interval<Real> interval;

    explicit Rooms(const Block& of)
        : sequence(positions_at_once * of.model_), normalised(positions_at_once * of.model_),
          projected((of.past() + positions_at_once) * 2 * of.inner_), mixed(positions_at_once * of.inner_),
          selected(positions_at_once * of.chosen_), step_size(positions_at_once * of.inner_),
          left(positions_at_once * std::max({of.model_, of.inner_, of.chosen_})), states(of.rates_.size()),
          vectors(4 * positions_at_once), rows(2 * positions_at_once), resets(positions_at_once) {
      interval.inputs = vectors.data();
      interval.step = interval.inputs + positions_at_once;
      interval.drive = interval.step + positions_at_once;
      interval.outputs = interval.drive + positions_at_once;
      interval.input_matrix = {rows.data(), nullptr};
      interval.output_matrix = {rows.data() + positions_at_once, nullptr};
      interval.resets = resets.data();
      for (int64_t offset = 0; offset < positions_at_once; ++offset) {
        rows[offset] = selected.data() + offset * of.chosen_ + of.block_.step_rank;
        rows[positions_at_once + offset] = rows[offset] + of.block_.state_size;
      }
    }
  };

  int64_t past() const { return block_.kernel_width - 1; }
  int here(int64_t unit) const { return count_at<float>(block_.inner_width, unit * lanes); }

  // (channels, states) of memory <-> for every vector of channels its states as lanes.
  void gather(const float* from, Scratch<Vector>& to) const {
    const int64_t states = block_.state_size;
    for (int64_t unit = 0; unit < units_; ++unit)
      transpose_matrix(from + unit * lanes * states, states, here(unit), states,
                       reinterpret_cast<float*>(to.data() + unit * states), lanes);
  }
  void scatter(const Scratch<Vector>& from, float* to) const {
    const int64_t states = block_.state_size;
    for (int64_t unit = 0; unit < units_; ++unit)
      transpose_matrix(reinterpret_cast<const float*>(from.data() + unit * states), lanes, states, here(unit),
                       to + unit * lanes * states, states);
  }

  void walk(Rooms& rooms, int64_t item) const {
    const int64_t inner = block_.inner_width, row = 2 * inner_;
    std::fill_n(rooms.projected.data(), past() * row, 0.0f);
    if (block_.convolution_state)
      for (int64_t tap = 0; tap < past(); ++tap)
        convert<float>(block_.convolution_state + (item * past() + tap) * inner, rooms.projected.data() + tap * row, inner);
    std::fill_n(rooms.states.data(), rooms.states.size(), Vector{});
    if (block_.scan_state) gather(block_.scan_state + item * inner * block_.state_size, rooms.states);
    for (int64_t first = 0; first < block_.length; first += positions_at_once) {
      const int64_t length = std::min(positions_at_once, block_.length - first);
      advance(rooms, item, first, length);
      // The last inputs of the convolution come before those of the next positions.
      std::memmove(rooms.projected.data(), rooms.projected.data() + length * row, size_t(past() * row) * sizeof(float));
    }
    for (int64_t tap = 0; tap < past(); ++tap)
      convert<float>(rooms.projected.data() + tap * row, block_.new_convolution_state + (item * past() + tap) * inner, inner);
    scatter(rooms.states, block_.new_scan_state + item * inner * block_.state_size);
  }

  void advance(Rooms& rooms, int64_t item, int64_t first, int64_t length) const {
    const int64_t width = block_.model_width;
    const float* from = block_.sequence + item * block_.batch_stride + first * block_.row_stride;
    float *projected = rooms.projected.data() + past() * 2 * inner_, *mixed = rooms.mixed.data();
    for (int64_t offset = 0; offset < length; ++offset) {
      const float* present = from + offset * block_.row_stride;
      normalise(present, block_.norm_weight, width, block_.epsilon, rooms.normalised.data() + offset * model_);
      float* kept = rooms.sequence.data() + offset * model_;
      convert<float>(present, kept, width);
      if (block_.output_bias) add(kept, output_bias_.data(), width);
      if (block_.input_bias) std::memcpy(projected + offset * 2 * inner_, input_bias_.data(), size_t(2 * inner_) * sizeof(float));
    }
    Unit* left = rooms.left.data();
    input_.multiply(rooms.normalised.data(), model_, left, projected, 2 * inner_, length, block_.input_bias ? 1.0f : 0.0f);
    for (int64_t unit = 0; unit < units_; ++unit) convolve(rooms, unit * lanes, length);
    selection_.multiply(mixed, inner_, left, rooms.selected.data(), chosen_, length, 0);
    step_.multiply(rooms.selected.data(), chosen_, left, rooms.step_size.data(), inner_, length, 0);
    for (int64_t unit = 0; unit < units_; ++unit) scan(rooms, unit, length);
    output_.multiply(mixed, inner_, left, rooms.sequence.data(), model_, length, 1);
    for (int64_t offset = 0; offset < length; ++offset)
      convert<float>(rooms.sequence.data() + offset * model_, block_.outputs + (item * block_.length + first + offset) * width,
                     width);
  }

  // One vector of channels through the convolution and SiLU.
  void convolve(Rooms& rooms, int64_t channel, int64_t length) const {
    const Vector bias = block_.convolution_bias ? whole(convolution_bias_.data() + channel) : Vector{};
    const float *inputs = rooms.projected.data() + channel, *taps = taps_.data() + channel;
    float* mixed = rooms.mixed.data() + channel;
    const int64_t row = 2 * inner_;
    if (block_.kernel_width == 4) {  // of every published model
      const Vector weights[4] = {whole(taps), whole(taps + inner_), whole(taps + 2 * inner_), whole(taps + 3 * inner_)};
      Vector before[3] = {whole(inputs), whole(inputs + row), whole(inputs + 2 * row)};
      for (int64_t offset = 0; offset < length; ++offset) {
        const Vector present = whole(inputs + (offset + 3) * row);
        const Vector sum = bias + weights[0] * before[0] + weights[1] * before[1] + weights[2] * before[2] + weights[3] * present;
        before[0] = before[1], before[1] = before[2], before[2] = present;
        keep(mixed + offset * inner_, sum * sigmoid_lanes<float>(sum));
      }
      return;
    }
    for (int64_t offset = 0; offset < length; ++offset) {
      Vector sum = bias;
      for (int64_t tap = 0; tap <= past(); ++tap) sum += whole(taps + tap * inner_) * whole(inputs + (offset + tap) * row);
      keep(mixed + offset * inner_, sum * sigmoid_lanes<float>(sum));
    }
  }

  // One vector of channels through the scan and the gate.
  void scan(Rooms& rooms, int64_t unit, int64_t length) const {
    Interval<Real>& interval = rooms.interval;
    const int64_t channel = unit * lanes, states = block_.state_size;
    const Vector bias = whole(step_bias_.data() + channel), skip_weight = whole(skip_weight_.data() + channel);
    float* mixed = rooms.mixed.data() + channel;
    for (int64_t offset = 0; offset < length; ++offset) {
      const Vector inputs = whole(mixed + offset * inner_);
      interval.step[offset] = softplus_lanes<float>(whole(rooms.step_size.data() + offset * inner_ + channel) + bias);
      interval.drive[offset] = interval.step[offset] * inputs;
      interval.outputs[offset] = skip_weight * inputs;
    }
    for_states<Real>(states, [&](auto count, int64_t first_state) {
      advance_states<Real, count(), true, false, false>(interval, length, first_state, rates_.data() + unit * states,
                                                        rooms.states.data() + unit * states, nullptr, NothingAhead{}, unit);
    });
    const float* gates = rooms.projected.data() + past() * 2 * inner_ + inner_ + channel;
    for (int64_t offset = 0; offset < length; ++offset) {
      const Vector gate = whole(gates + offset * 2 * inner_);
      keep(mixed + offset * inner_, interval.outputs[offset] * (gate * sigmoid_lanes<float>(gate)));
    }
  }

  const MambacoreBlock& block_;
  const int64_t model_, inner_, chosen_, units_;  // padded widths, and vectors of inner channels
  Packed<Unit> input_, selection_, step_, output_;
  Scratch<float> input_bias_;
  Widened<float, float> output_bias_, convolution_bias_, step_bias_, skip_weight_;
  Scratch<float> taps_;
  Scratch<Vector> rates_;
};

}  // namespace

void block_forward(const MambacoreBlock& block) {
  if (block.batch == 0 || block.length == 0) return;
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
  if (block.bfloat16 && multiplies_bfloat16()) return Block<BFloat16Pair>(block).run();
#endif
  Block<float>(block).run();
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
