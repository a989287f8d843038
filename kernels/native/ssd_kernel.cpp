// The state space dual scan on a CPU (mambacore/ssd/chunked.py has the same in PyTorch, with the derivation): chunk by
// chunk, everything a chunk needs staying in the cache. A task takes a stretch of the heads of one group of one batch
// item through the whole sequence, so that what the heads share (the scores) is computed once.
//
// Names as there: `fading` exp(c_i - c_j) for positions i > j of one record, `mask` what scores are multiplied with,
// `from_state` and `to_state` what a position sees of the state that arrives and leaves in the one that is handed on.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "matrix_product.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

// A task's view of the scan. `Unit` is what products are made of (matrix_product.h).
template <typename Element, typename Unit> class Walk {
 public:
  using Real = typename ComputeType<Element>::type;
  using Vector = Lanes<Real>;
  static constexpr int lanes = lane_count<Real>;
  static constexpr int per_unit = ProductTraits<Unit>::numbers;

  Walk(const MambacoreSsd& scan, int64_t task)
      : scan_(scan),
        rows_(scan.chunk * scan.rank),
        width_(whole(scan.head_width)),
        size_(whole(scan.state_size)),
        square_(whole(rows_)),
        batch_(task / (scan.groups * scan.ranges)),
        group_(task / scan.ranges % scan.groups),
        range_(task % scan.ranges) {
    const int64_t in_group = scan.heads / scan.groups, in_range = in_group / scan.ranges;
    first_head_ = group_ * in_group + range_ * in_range;
    heads_ = in_range;
  }

  void forward() {
    const int64_t chunks = chunk_count();
    Numbers into = matrix(rows_, size_), out_of = matrix(rows_, size_), scores = matrix(rows_, square_);
    Numbers inputs = matrix(rows_, width_), result = matrix(rows_, width_), mask = matrix(rows_, square_);
    Numbers states = matrix(heads_ * size_, width_);
    Units of_out = units(rows_, size_), of_into = units(rows_, size_), across = units(size_, square_);
    Units of_mask = units(rows_, square_), of_inputs = units(rows_, width_), of_state = units(size_, width_);
    Decays decays(scan_.chunk, rows_);
    for (int64_t head = 0; head < heads_; ++head) read_state(scan_.initial_state, head, states.data() + head * size_ * width_);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      begin_chunk(chunk);
      load_rows(scan_.input_matrix, group_, scan_.state_size, size_, into.data());
      load_rows(scan_.output_matrix, group_, scan_.state_size, size_, out_of.data());
      const auto left = along_rows<Unit>(out_of.data(), size_, here_, of_out.data());
      multiply_scores(left, into.data(), of_into.data(), across.data(), scores.data());
      for (int64_t head = 0; head < heads_; ++head) {
        Real* state = states.data() + head * size_ * width_;
        if (scan_.boundary_states) write_state(boundary(chunk, head), state);
        load_rows(scan_.inputs, first_head_ + head, scan_.head_width, width_, inputs.data());
        decays.compute(*this, head);
        decays.fill_mask(*this, mask.data());
        for (int64_t place = 0; place < here_ * square_; place += lanes)
          put(mask.data() + place, get(mask.data() + place) * get(scores.data() + place));
        const Real skip = skip_of(head);
        for (int64_t place = 0; place < here_ * width_; place += lanes)
          put(result.data() + place, splat(skip) * get(inputs.data() + place));
        product<Unit>(along_rows<Unit>(mask.data(), square_, here_, of_mask.data()),
                      down_columns<Unit>(inputs.data(), width_, here_, of_inputs.data()), result.data(), width_, here_,
                      width_ / lanes, in_units(here_), below(), Real(1));
        product<Unit>(left, down_columns<Unit>(state, width_, scan_.state_size, of_state.data()), result.data(), width_,
                      here_, width_ / lanes, in_units(scan_.state_size), Shape::full, Real(1), decays.from_rows.data());
        store_rows(scan_.outputs, first_head_ + head, result.data());
        scale_rows(inputs.data(), width_, decays.written_rows.data());
        product<Unit>(transposed(down_columns<Unit>(into.data(), size_, here_, of_into.data())),
                      down_columns<Unit>(inputs.data(), width_, here_, of_inputs.data()), state, width_, scan_.state_size,
                      width_ / lanes, in_units(here_), Shape::full, decays.kept);
      }
    }
    for (int64_t head = 0; head < heads_; ++head)
      write_state(static_cast<Real*>(scan_.final_state) + state_place(head), states.data() + head * size_ * width_);
  }

  void backward() {
    Numbers into = matrix(rows_, size_), out_of = matrix(rows_, size_), scores = matrix(rows_, square_);
    Numbers grad_into = matrix(rows_, size_), grad_out_of = matrix(rows_, size_), grad_scores = matrix(rows_, square_);
    Numbers inputs = matrix(rows_, width_), grad = matrix(rows_, width_), result = matrix(rows_, width_);
    Numbers mask = matrix(rows_, square_), grad_mask = matrix(rows_, square_), read = matrix(rows_, size_);
    Numbers before = matrix(width_, size_), carries = matrix(heads_ * size_, width_), after = matrix(width_, size_);
    Units of_out = units(rows_, size_), of_into = units(rows_, size_), across = units(std::max(size_, width_), square_);
    Units down_out = units(rows_, size_), down_into = units(rows_, size_), of_mask = units(rows_, square_);
    Units of_rows = units(rows_, width_), down_rows = units(rows_, width_), of_state = units(std::max(size_, width_), std::max(size_, width_));
    Decays decays(scan_.chunk, rows_);
    std::vector<double> grad_skip(static_cast<size_t>(heads_), 0.0);
    for (int64_t head = 0; head < heads_; ++head) read_state(scan_.grad_final_state, head, carries.data() + head * size_ * width_);
    for (int64_t chunk = chunk_count() - 1; chunk >= 0; --chunk) {
      begin_chunk(chunk);
      load_rows(scan_.input_matrix, group_, scan_.state_size, size_, into.data());
      load_rows(scan_.output_matrix, group_, scan_.state_size, size_, out_of.data());
      const auto left_out = along_rows<Unit>(out_of.data(), size_, here_, of_out.data());
      multiply_scores(left_out, into.data(), of_into.data(), across.data(), scores.data());
      const auto left_into = along_rows<Unit>(into.data(), size_, here_, of_into.data());
      const auto right_out = down_columns<Unit>(out_of.data(), size_, here_, down_out.data());
      const auto right_into = down_columns<Unit>(into.data(), size_, here_, down_into.data());
      zero(grad_scores.data(), here_ * square_);
      zero(grad_into.data(), here_ * size_);
      zero(grad_out_of.data(), here_ * size_);
      for (int64_t head = 0; head < heads_; ++head) {
        Real* carry = carries.data() + head * size_ * width_;  // of the state after this chunk, (state_size, width)
        load_rows(scan_.inputs, first_head_ + head, scan_.head_width, width_, inputs.data());
        load_rows(scan_.grad_outputs, first_head_ + head, scan_.head_width, width_, grad.data());
        read_boundary(boundary(chunk, head), before.data());
        decays.compute(*this, head);
        decays.fill_mask(*this, mask.data());
        const Real skip = skip_of(head);
        Vector skip_sum = Vector{};
        for (int64_t place = 0; place < here_ * width_; place += lanes) {
          skip_sum += get(grad.data() + place) * get(inputs.data() + place);
          put(result.data() + place, splat(skip) * get(grad.data() + place));
        }
        grad_skip[static_cast<size_t>(head)] += sum_of_lanes<Real>(skip_sum);

        // Of the masked scores: grad_i . inputs_j.
        const auto left_inputs = along_rows<Unit>(inputs.data(), width_, here_, of_rows.data());
        transpose_units(left_inputs, here_, width_, across.data());
        const auto left_grad = along_rows<Unit>(grad.data(), width_, here_, down_rows.data());
        product<Unit>(left_grad, {across.data(), square_}, grad_mask.data(), square_, here_, square_ / lanes,
                      in_units(scan_.head_width), Shape::full, Real(0));
        // Gradients of the arriving state, and of the output matrix through it.
        product<Unit>(left_grad, down_columns<Unit>(before.data(), size_, scan_.head_width, of_state.data()), read.data(),
                      size_, here_, size_ / lanes, in_units(scan_.head_width), Shape::full, Real(0));
        for (int64_t row = 0; row < here_; ++row) {
          const Real seen = decays.from_rows[row];
          decays.of_from[row] = seen * dot(read.data() + row * size_, out_of.data() + row * size_, size_);
          add_scaled(grad_out_of.data() + row * size_, read.data() + row * size_, seen, size_);
        }
        // Gradients of the inputs, and of the input matrix, through the state after the chunk.
        transpose(carry, width_, size_, width_, after.data(), size_);
        product<Unit>(left_inputs, down_columns<Unit>(after.data(), size_, scan_.head_width, of_state.data()), read.data(),
                      size_, here_, size_ / lanes, in_units(scan_.head_width), Shape::full, Real(0));
        for (int64_t row = 0; row < here_; ++row) {
          decays.of_to[row] = dot(read.data() + row * size_, into.data() + row * size_, size_);
          add_scaled(grad_into.data() + row * size_, read.data() + row * size_, decays.written_rows[row], size_);
        }
        const Real of_kept = decays.kept * dot(before.data(), after.data(), width_ * size_);
        decays.write_gradients(*this, head, scores.data(), grad_mask.data(), of_kept);

        for (int64_t place = 0; place < here_ * square_; place += lanes) {
          const Vector weight = get(mask.data() + place);
          put(grad_scores.data() + place, get(grad_scores.data() + place) + weight * get(grad_mask.data() + place));
          put(mask.data() + place, weight * get(scores.data() + place));
        }
        product<Unit>(transposed(down_columns<Unit>(mask.data(), square_, here_, of_mask.data())),
                      down_columns<Unit>(grad.data(), width_, here_, down_rows.data()), result.data(), width_, here_,
                      width_ / lanes, in_units(here_), above(), Real(1));
        product<Unit>(left_into, down_columns<Unit>(carry, width_, scan_.state_size, of_state.data()), result.data(), width_,
                      here_, width_ / lanes, in_units(scan_.state_size), Shape::full, Real(1), decays.written_rows.data());
        store_rows(scan_.grad_inputs, first_head_ + head, result.data());
        scale_rows(grad.data(), width_, decays.from_rows.data());
        product<Unit>(transposed(right_out), down_columns<Unit>(grad.data(), width_, here_, down_rows.data()), carry, width_,
                      scan_.state_size, width_ / lanes, in_units(here_), Shape::full, decays.kept);
      }
      const auto left_scores = along_rows<Unit>(grad_scores.data(), square_, here_, of_mask.data());
      product<Unit>(left_scores, right_into, grad_out_of.data(), size_, here_, size_ / lanes, in_units(here_),
                    below(), Real(1));
      write_partial(scan_.grad_output_matrix, grad_out_of.data());
      product<Unit>(transposed(down_columns<Unit>(grad_scores.data(), square_, here_, of_mask.data())), right_out,
                    grad_into.data(), size_, here_, size_ / lanes, in_units(here_), above(), Real(1));
      write_partial(scan_.grad_input_matrix, grad_into.data());
    }
    for (int64_t head = 0; head < heads_; ++head) {
      write_state(static_cast<Real*>(scan_.grad_initial_state) + state_place(head), carries.data() + head * size_ * width_);
      static_cast<Real*>(scan_.grad_skip_weight)[batch_ * scan_.heads + first_head_ + head] =
          static_cast<Real>(grad_skip[static_cast<size_t>(head)]);
    }
  }

 private:
  using Numbers = Scratch<Real>;
  using Units = Scratch<Unit>;

  // The masks of a chunk that decays and weights give one head, and their gradients.
  struct Decays {
    int64_t chunk;
    std::vector<double> total;      // c, and as the sum of two numbers, of which differences are as exact
    std::vector<Real> high, low;
    std::vector<int64_t> record;    // 0 for the record that comes into the chunk
    std::vector<Real> weight, own, fading, pairs, columns;
    std::vector<Real> from_rows, to_rows, written_rows, of_from, of_to;
    Real kept = 0;

    Decays(int64_t chunk_positions, int64_t rows)
        : chunk(chunk_positions), total(size(chunk)), high(size(padded(chunk))), low(size(padded(chunk))), record(size(chunk)), weight(size(chunk)), own(size(chunk)),
          fading(size(chunk * padded(chunk))), pairs(size(chunk * padded(chunk))), columns(size(padded(chunk))),
          from_rows(size(rows)), to_rows(size(rows)), written_rows(size(rows)), of_from(size(rows)), of_to(size(rows)) {}
    static size_t size(int64_t count) { return static_cast<size_t>(count); }
    static int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

    void compute(const Walk& walk, int64_t head) {
      const MambacoreSsd& scan = walk.scan_;
      const int64_t positions = walk.positions_;
      double sum = 0;
      int64_t records = 0;
      for (int64_t position = 0; position < positions; ++position) {
        const int64_t place = walk.weight_place(position, head);
        const bool start = scan.resets && scan.resets[walk.batch_ * scan.length + walk.place_of(position)];
        sum = start ? 0.0 : sum + static_cast<double>(static_cast<const Real*>(scan.log_decay)[place]);
        records += start;
        total[size(position)] = sum;
        record[size(position)] = records;
        high[size(position)] = static_cast<Real>(sum);
        low[size(position)] = static_cast<Real>(sum - static_cast<double>(high[size(position)]));
        weight[size(position)] = static_cast<const Real*>(scan.input_weight)[place];
        own[size(position)] = scan.own_weight ? static_cast<const Real*>(scan.own_weight)[place] : weight[size(position)];
      }
      const int64_t stride = padded(positions);
      for (int64_t position = 0; position < positions; ++position) {
        Real* row = fading.data() + position * stride;
        const Vector above = splat(high[size(position)]), rest = splat(low[size(position)]);
        int64_t other = 0;
        for (; other < position; other += lanes)
          put(row + other, exp_lanes<Real>((above - get(high.data() + other)) + (rest - get(low.data() + other))));
        std::fill(row + position, row + stride, Real(0));
        if (records == 0) continue;
        for (other = 0; other < position; ++other)
          if (record[size(other)] != record[size(position)]) row[other] = 0;
      }
      const int64_t last = record[size(positions - 1)];
      const double end = total[size(positions - 1)];
      for (int64_t row = 0; row < walk.here_; ++row) {
        const size_t position = size(row / scan.rank);
        from_rows[size(row)] = record[position] == 0 ? static_cast<Real>(std::exp(total[position])) : Real(0);
        to_rows[size(row)] = record[position] == last ? static_cast<Real>(std::exp(end - total[position])) : Real(0);
        written_rows[size(row)] = to_rows[size(row)] * weight[position];
      }
      kept = last == 0 ? static_cast<Real>(std::exp(end)) : Real(0);
    }

    // fading * weight of the earlier position, and `own` for positions themselves; in rows.
    void fill_mask(const Walk& walk, Real* mask) const {
      const int64_t rank = walk.scan_.rank, stride = padded(walk.positions_);
      for (int64_t row = 0; row < walk.here_; ++row) {
        const int64_t position = row / rank;
        const Real* faded = fading.data() + position * stride;
        Real* to = mask + row * walk.square_;
        if (rank == 1) {
          for (int64_t other = 0; other < position; ++other) to[other] = faded[other] * weight[size(other)];
          to[position] = own[size(position)];
          std::fill(to + position + 1, to + walk.square_, Real(0));
          continue;
        }
        for (int64_t other = 0; other < walk.here_; ++other) to[other] = faded[other / rank] * weight[size(other / rank)];
        for (int64_t other = position * rank; other < (position + 1) * rank; ++other) to[other] = own[size(position)];
        for (int64_t other = walk.here_; other < walk.square_; ++other) to[other] = 0;
      }
    }

    // Of decays and weights, from the gradient of the masked scores and what `backward` has put into of_from and of_to.
    void write_gradients(const Walk& walk, int64_t head, const Real* scores, const Real* grad_mask, Real of_kept) {
      const MambacoreSsd& scan = walk.scan_;
      const int64_t positions = walk.positions_, rank = scan.rank, stride = padded(positions);
      std::fill(pairs.begin(), pairs.begin() + positions * stride, Real(0));
      for (int64_t row = 0; row < walk.here_; ++row) {
        const Real *left = scores + row * walk.square_, *right = grad_mask + row * walk.square_;
        Real* sums = pairs.data() + row / rank * stride;
        const int64_t end = (row / rank + 1) * rank;
        if (rank == 1) {
          for (int64_t other = 0; other < end; ++other) sums[other] = left[other] * right[other];
          continue;
        }
        for (int64_t other = 0; other < end; ++other) sums[other / rank] += left[other] * right[other];
      }
      Real* grad_weight = static_cast<Real*>(scan.grad_input_weight);
      Real* grad_own = static_cast<Real*>(scan.grad_own_weight);
      Real* grad_decay = static_cast<Real*>(scan.grad_log_decay);
      std::fill(columns.begin(), columns.end(), Real(0));
      // The decay of a position stands between all i from it on and all j before it: from the last position to the
      // first, `columns` sums the pairs of each j with all i so far.
      Real following = 0;  // sum of of_from from here on
      std::vector<Real> earlier(size(positions));
      Real so_far = 0;
      for (int64_t position = 0; position < positions; ++position) {
        Real left = 0;
        for (int64_t row = position * rank; row < (position + 1) * rank; ++row) left += of_to[size(row)] * to_rows[size(row)];
        earlier[size(position)] = so_far;
        so_far += left * weight[size(position)];
        Real sum = left;
        const int64_t place = walk.weight_place(position, head);
        const Real of_own = pairs[size(position * stride + position)];
        pairs[size(position * stride + position)] = 0;
        if (grad_own) grad_own[place] = of_own;
        else sum += of_own;
        grad_weight[place] = sum;
      }
      std::vector<Real> of_weight(size(stride), Real(0));
      for (int64_t position = positions - 1; position >= 0; --position) {
        Real* row = pairs.data() + position * stride;
        const Real* faded = fading.data() + position * stride;
        for (int64_t other = 0; other < position; ++other) {
          const Real pair = row[other] * faded[other];
          of_weight[size(other)] += pair;
          columns[size(other)] += pair * weight[size(other)];
        }
        for (int64_t line = position * rank; line < (position + 1) * rank; ++line) following += of_from[size(line)];
        Vector sums = Vector{};
        int64_t begin = 0;
        for (; begin + lanes <= position; begin += lanes) sums += get(columns.data() + begin);
        Real spanning = sum_of_lanes<Real>(sums);
        for (int64_t other = begin; other < position; ++other) spanning += columns[size(other)];
        grad_decay[walk.weight_place(position, head)] = spanning + following + earlier[size(position)] + of_kept;
      }
      for (int64_t position = 0; position < positions; ++position)
        grad_weight[walk.weight_place(position, head)] += of_weight[size(position)];
    }
  };

  static int64_t whole(int64_t count) { return (count + lanes - 1) / lanes * lanes; }
  static int64_t in_units(int64_t numbers) { return (numbers + per_unit - 1) / per_unit; }
  static Numbers matrix(int64_t rows, int64_t columns) { return Numbers((rows + rows % 2) * columns); }
  static Units units(int64_t rows, int64_t columns) { return Units((rows + rows % 2) * columns); }
  static Vector get(const Real* from) { return load(from, lanes); }
  static void put(Real* to, Vector value) { store(to, value, lanes); }
  static void zero(Real* to, int64_t count) { std::fill(to, to + count, Real(0)); }
  static Real dot(const Real* left, const Real* right, int64_t count) {
    Vector sum = Vector{};
    for (int64_t place = 0; place < count; place += lanes) sum += get(left + place) * get(right + place);
    return sum_of_lanes<Real>(sum);
  }
  static void add_scaled(Real* to, const Real* from, Real factor, int64_t count) {
    for (int64_t place = 0; place < count; place += lanes) put(to + place, get(to + place) + splat(factor) * get(from + place));
  }
  void scale_rows(Real* values, int64_t width, const Real* factors) const {
    for (int64_t row = 0; row < here_; ++row)
      for (int64_t place = 0; place < width; place += lanes)
        put(values + row * width + place, splat(factors[row]) * get(values + row * width + place));
  }

  // The masks are triangles, but for the members of a rank, which all see each other.
  Shape below() const { return scan_.rank == 1 ? Shape::lower : Shape::full; }
  Shape above() const { return scan_.rank == 1 ? Shape::upper : Shape::full; }

  int64_t chunk_count() const { return (scan_.length + scan_.chunk - 1) / scan_.chunk; }
  void begin_chunk(int64_t chunk) {
    begin_ = chunk * scan_.chunk;
    positions_ = std::min(scan_.chunk, scan_.length - begin_);
    here_ = positions_ * scan_.rank;
  }
  // Where a position of the chunk lies in memory: the walk may be from the last position to the first.
  int64_t place_of(int64_t position) const {
    return scan_.reverse ? scan_.length - 1 - begin_ - position : begin_ + position;
  }
  int64_t row_of(int64_t row) const { return place_of(row / scan_.rank) * scan_.rank + row % scan_.rank; }
  int64_t weight_place(int64_t position, int64_t head) const {
    return (batch_ * scan_.length + place_of(position)) * scan_.heads + first_head_ + head;
  }
  int64_t state_place(int64_t head) const {
    return (batch_ * scan_.heads + first_head_ + head) * scan_.head_width * scan_.state_size;
  }
  Real* boundary(int64_t chunk, int64_t head) const {
    return static_cast<Real*>(scan_.boundary_states) +
           ((batch_ * chunk_count() + chunk) * scan_.heads + first_head_ + head) * scan_.head_width * scan_.state_size;
  }
  Real skip_of(int64_t head) const {
    return scan_.skip_weight ? static_cast<const Real*>(scan_.skip_weight)[first_head_ + head] : Real(0);
  }

  void load_rows(const MambacoreHeads& from, int64_t head, int64_t width, int64_t padded, Real* to) const {
    const Element* start = static_cast<const Element*>(from.data) + batch_ * from.batch_stride + head * from.head_stride;
    for (int64_t row = 0; row < here_; ++row) {
      const Element* line = start + row_of(row) * from.row_stride;
      for (int64_t place = 0; place < padded; place += lanes)
        put(to + row * padded + place, load<Real>(line + place, static_cast<int>(std::min<int64_t>(lanes, width - place))));
    }
  }
  void store_rows(const MambacoreHeads& to, int64_t head, const Real* from) const {
    Element* start = static_cast<Element*>(to.data) + batch_ * to.batch_stride + head * to.head_stride;
    for (int64_t row = 0; row < here_; ++row) {
      Element* line = start + row_of(row) * to.row_stride;
      for (int64_t place = 0; place < scan_.head_width; place += lanes)
        store(line + place, get(from + row * width_ + place),
              static_cast<int>(std::min<int64_t>(lanes, scan_.head_width - place)));
    }
  }
  // (heads, head_width, state_size) of memory to (state_size, width) here, zero where there is none; and back.
  void read_state(const void* from, int64_t head, Real* to) const {
    zero(to, size_ * width_);
    if (from)
      transpose(static_cast<const Real*>(from) + state_place(head), scan_.state_size, scan_.head_width, scan_.state_size, to,
                width_);
  }
  void write_state(Real* to, const Real* from) const {
    transpose(from, width_, scan_.state_size, scan_.head_width, to, scan_.state_size);
  }
  void read_boundary(const Real* from, Real* to) const {
    zero(to, width_ * size_);
    for (int64_t row = 0; row < scan_.head_width; ++row)
      std::copy(from + row * scan_.state_size, from + (row + 1) * scan_.state_size, to + row * size_);
  }
  // (rows, units) to (units, rows), which a product sums over from the right.
  void transpose_units(LeftMatrix<Unit> from, int64_t rows, int64_t columns, Unit* to) const {
    std::fill(to, to + columns / per_unit * square_, Unit{});
    transpose(from.data, from.row, rows, columns / per_unit, to, square_);
  }
  void multiply_scores(LeftMatrix<Unit> left, const Real* into, Unit* of_into, Unit* across, Real* scores) const {
    transpose_units(along_rows<Unit>(into, size_, here_, of_into), here_, size_, across);
    product<Unit>(left, {across, square_}, scores, square_, here_, square_ / lanes, in_units(scan_.state_size), Shape::full,
                  Real(0));
  }
  // This range's part of the gradient of a matrix: (ranges, batch, rows, groups, state_size).
  void write_partial(void* to, const Real* from) const {
    const int64_t all_rows = scan_.length * scan_.rank;
    for (int64_t row = 0; row < here_; ++row) {
      const int64_t place = ((range_ * scan_.batch + batch_) * all_rows + row_of(row)) * scan_.groups + group_;
      std::copy(from + row * size_, from + row * size_ + scan_.state_size,
                static_cast<Real*>(to) + place * scan_.state_size);
    }
  }

  const MambacoreSsd& scan_;
  const int64_t rows_, width_, size_, square_, batch_, group_, range_;
  int64_t first_head_, heads_;
  int64_t begin_ = 0, positions_ = 0, here_ = 0;
};

}  // namespace

void ssd_forward(const MambacoreSsd& scan) {
  with_units(scan.element, [&](auto element, auto unit) {
    parallel_for(scan.batch * scan.groups * scan.ranges, scan.threads,
                 [&](int64_t task) { Walk<decltype(element), decltype(unit)>(scan, task).forward(); });
  });
}

void ssd_backward(const MambacoreSsd& scan) {
  with_units(scan.element, [&](auto element, auto unit) {
    parallel_for(scan.batch * scan.groups * scan.ranges, scan.threads,
                 [&](int64_t task) { Walk<decltype(element), decltype(unit)>(scan, task).backward(); });
  });
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
