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
#include "ssd_decays.h"
#include "ssd_pairs.h"

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
#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
    if constexpr (per_unit == 2) {
      if (scan_.rank == 1) return forward_in_pairs();
    }
#endif
    const int64_t chunks = chunk_count();
    Numbers into = matrix(rows_, size_), out_of = matrix(rows_, size_), scores = matrix(rows_, square_);
    Numbers inputs = matrix(rows_, width_), result = matrix(rows_, width_), mask = matrix(rows_, square_);
    Numbers states = matrix(heads_ * size_, width_);
    Units of_out = units(rows_, size_), of_into = units(rows_, size_), across = units(size_, square_);
    Units of_mask = units(rows_, square_), of_inputs = units(rows_, width_), of_state = units(size_, width_);
    Decays<Walk> decays(scan_.chunk, rows_);
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

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
  // As `forward`, for one position per row: products read bfloat16 numbers as they lie in memory (ssd_pairs.h).
  void forward_in_pairs() {
    const int64_t chunks = chunk_count(), in_state = size_ * width_, pairs_in_state = size_ / 2 * width_;
    Numbers scores = matrix(rows_, square_), states = matrix(heads_ * size_, width_);
    Units out_of = units(rows_, size_), into = units(rows_, size_), across = units(size_, square_);
    Units down_into = units(rows_, size_), mask = units(rows_, square_), inputs = units(rows_, width_);
    Units written = units(rows_, width_), pairs = units(heads_ * size_, width_);
    Numbers columns(square_);
    Decays<Walk> decays(scan_.chunk, rows_);
    for (int64_t head = 0; head < heads_; ++head) {
      Real* state = states.data() + head * in_state;
      read_state(scan_.initial_state, head, state);
      down_columns<Unit>(state, width_, size_, pairs.data() + head * pairs_in_state);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      begin_chunk(chunk);
      const PairRows of_into = pair_rows(scan_.input_matrix, group_, scan_.state_size);
      pairs_along(pair_rows(scan_.output_matrix, group_, scan_.state_size), here_, size_, out_of.data());
      pairs_along(of_into, here_, size_, into.data());
      pairs_down<false>(of_into, here_, size_, nullptr, down_into.data());
      transpose_units({into.data(), size_ / 2, 1}, here_, size_, across.data());
      for (int64_t row = 0; row < here_; row += lanes)  // what comes later does not count
        product<Unit>({out_of.data() + row * size_ / 2, size_ / 2, 1}, {across.data(), square_}, scores.data() + row * square_,
                      square_, std::min<int64_t>(lanes, here_ - row), row / lanes + 1, size_ / 2, Shape::full, Real(0));
      for (int64_t head = 0; head < heads_; ++head) {
        Real* state = states.data() + head * in_state;
        Unit* of_state = pairs.data() + head * pairs_in_state;
        if (scan_.boundary_states) write_state(boundary(chunk, head), state);
        decays.sum_up(*this, head);
        decays.fill_rows(*this);
        mask_scores(decays.for_pairs(), scores.data(), here_, square_, columns.data(), mask.data());
        const PairRows read = pair_rows(scan_.inputs, first_head_ + head, scan_.head_width);
        pairs_down<false>(read, here_, width_, nullptr, inputs.data());
        pairs_down<true>(read, here_, width_, decays.written_rows.data(), written.data());
        compute_outputs({here_, width_, size_, square_, out_of.data(), of_state, mask.data(), inputs.data(),
                         decays.from_rows.data(), skip_of(head), read,
                         pair_rows(scan_.outputs, first_head_ + head, scan_.head_width)});
        compute_state({here_, width_, size_, down_into.data(), written.data(), decays.kept, state, of_state});
      }
    }
    for (int64_t head = 0; head < heads_; ++head)
      write_state(static_cast<Real*>(scan_.final_state) + state_place(head), states.data() + head * in_state);
  }
#endif

  void backward() {
    Numbers into = matrix(rows_, size_), out_of = matrix(rows_, size_), scores = matrix(rows_, square_);
    Numbers grad_into = matrix(rows_, size_), grad_out_of = matrix(rows_, size_), grad_scores = matrix(rows_, square_);
    Numbers inputs = matrix(rows_, width_), grad = matrix(rows_, width_), result = matrix(rows_, width_);
    Numbers mask = matrix(rows_, square_), grad_mask = matrix(rows_, square_), read = matrix(rows_, size_);
    Numbers before = matrix(width_, size_), carries = matrix(heads_ * size_, width_), after = matrix(width_, size_);
    Units of_out = units(rows_, size_), of_into = units(rows_, size_), across = units(std::max(size_, width_), square_);
    Units down_out = units(rows_, size_), down_into = units(rows_, size_), of_mask = units(rows_, square_);
    Units of_rows = units(rows_, width_), down_rows = units(rows_, width_), of_state = units(std::max(size_, width_), std::max(size_, width_));
    Decays<Walk> decays(scan_.chunk, rows_);
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
  friend struct Decays<Walk>;
  using Numbers = Scratch<Real>;
  using Units = Scratch<Unit>;

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

#if defined(MAMBACORE_BFLOAT16_PRODUCTS)
  // The rows of the chunk in memory, of one position each.
  PairRows pair_rows(const MambacoreHeads& of, int64_t head, int64_t width) const {
    uint16_t* start = static_cast<uint16_t*>(of.data) + batch_ * of.batch_stride + head * of.head_stride;
    return {start + place_of(0) * of.row_stride, scan_.reverse ? -of.row_stride : of.row_stride, width};
  }
#endif
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
