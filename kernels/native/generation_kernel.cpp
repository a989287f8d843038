// Many steps of a whole model in one call: a small program per step over the memory of each sequence, then the draw of
// the next token. What a step costs otherwise is calling; here nothing is called between the first sample and the last.
//
// Channels run along the lanes, so nothing is ever summed over lanes but a norm: products take one input after the other
// and add it, times its column, to all outputs. Each number is therefore summed in one order, whatever the batch is and
// however sequences are shared out: a sequence is the same alone, in a batch, and on any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

constexpr int64_t padding = 16;        // numbers; a whole number of vectors in every instruction set and type
constexpr int64_t panel_width = 128;   // outputs
constexpr int64_t items_at_once = 4;   // sequences that share a weight while it is in a register
#if defined(__AVX512F__)
constexpr int registers_for_sums = 16;
#else
constexpr int registers_for_sums = 8;
#endif

inline int64_t padded(int64_t width) { return (width + padding - 1) / padding * padding; }

template <typename Real> struct Steps {
  using Vector = Lanes<Real>;
  using Operation = MambacoreStepOperation;
  static constexpr int lanes = lane_count<Real>;
  static_assert(padding % lanes == 0, "padded widths are whole vectors");
  const MambacoreGeneration& work;

  static const Real* numbers(const void* data) { return static_cast<const Real*>(data); }
  static Vector whole(const Real* from) { return load(from, lanes); }
  static void keep(Real* to, Vector value) { store(to, value, lanes); }

  // Activations of a few sequences inside one operation.
  struct Room {
    std::vector<Scratch<Real>> rows;
    Room(int64_t items, int64_t width) {
      for (int64_t item = 0; item < items; ++item) rows.emplace_back(padded(width));
    }
    Real* operator[](int64_t item) { return rows[static_cast<size_t>(item)].data(); }
  };
  struct Rooms {
    Room normalised, inner, selected, step_size;
    std::vector<double> probabilities;
    std::vector<int64_t> order;
  };

  // ---- products ----

  template <int Items, int Vectors>
  static void panel(const Real* weight, const Real* bias, const Real* const* from, int64_t inputs, int64_t stride, Real* const* to) {
    Vector sums[Items][Vectors];
    for (int item = 0; item < Items; ++item)
      for (int part = 0; part < Vectors; ++part) sums[item][part] = bias != nullptr ? whole(bias + part * lanes) : Vector{};
    for (int64_t input = 0; input < inputs; ++input) {
      for (int part = 0; part < Vectors; ++part) {
        const Vector column = whole(weight + input * stride + part * lanes);
        for (int item = 0; item < Items; ++item) sums[item][part] += splat(from[item][input]) * column;
      }
    }
    for (int item = 0; item < Items; ++item)
      for (int part = 0; part < Vectors; ++part) keep(to[item] + part * lanes, sums[item][part]);
  }

  template <int Items>
  static void product(const void* packed, const void* offset, const Real* const* from, int64_t inputs, int64_t outputs, Real* const* to) {
    constexpr int vectors = registers_for_sums / Items;
    const Real *weight = numbers(packed), *bias = numbers(offset);
    Real* here[Items];
    for (int64_t first = 0; first < padded(outputs); first += panel_width) {
      const int64_t stride = std::min(panel_width, padded(outputs) - first), parts = stride / lanes;
      const auto move = [&](int64_t part) {
        for (int item = 0; item < Items; ++item) here[item] = to[item] + first + part * lanes;
        return bias != nullptr ? bias + first + part * lanes : nullptr;
      };
      int64_t part = 0;
      for (; part + vectors <= parts; part += vectors) {
        const Real* bias_here = move(part);
        panel<Items, vectors>(weight + part * lanes, bias_here, from, inputs, stride, here);
      }
      for (; part < parts; ++part) {
        const Real* bias_here = move(part);
        panel<Items, 1>(weight + part * lanes, bias_here, from, inputs, stride, here);
      }
      weight += inputs * stride;
    }
  }

  // to[item] = weight from[item] + bias, up to the padding, for at most `items_at_once` sequences.
  static void product(const void* weight, const void* bias, const Real* const* from, int64_t inputs, int64_t outputs, Real* const* to,
                      int64_t items) {
    if (items == 4) return product<4>(weight, bias, from, inputs, outputs, to);
    if (items >= 2) product<2>(weight, bias, from, inputs, outputs, to);
    if (items % 2 == 1) product<1>(weight, bias, from + items - 1, inputs, outputs, to + items - 1);
  }

  // ---- parts of blocks ----

  static void normalise(const Operation& operation, const Real* from, Real* to) {
    const Real* weight = numbers(operation.weights[0]);
    Real squares[padding] = {};
    for (int64_t channel = 0; channel < operation.width; ++channel) squares[channel % padding] += from[channel] * from[channel];
    const Real mean = std::accumulate(squares, squares + padding, Real(0)) / static_cast<Real>(operation.width);
    const Real inverse = Real(1) / std::sqrt(mean + static_cast<Real>(operation.epsilon));
    for (int64_t channel = 0; channel < operation.width; ++channel) to[channel] = from[channel] * inverse * weight[channel];
  }

  static void gelu(Real* values, int64_t count) {
    for (int64_t index = 0; index < count; ++index)
      values[index] *= Real(0.5) * (Real(1) + std::erf(values[index] * Real(0.70710678118654752440)));
  }

  static void add(Real* to, const Real* from, int64_t width) {
    for (int64_t channel = 0; channel < width; ++channel) to[channel] += from[channel];
  }

  // The causal convolution at this position, in place, and its history, oldest first.
  // weights: 3 taps (kernel_width, channels), 4 bias.
  static void convolve(const Operation& operation, Real* inputs, Real* history) {
    const int64_t width = padded(operation.inner_width), past = operation.kernel_width - 1;
    const Real *taps = numbers(operation.weights[3]), *bias = numbers(operation.weights[4]);
    for (int64_t channel = 0; channel < width; channel += lanes) {
      const Vector present = whole(inputs + channel);
      Vector sum = whole(taps + past * width + channel) * present;
      if (bias != nullptr) sum += whole(bias + channel);
      for (int64_t tap = 0; tap < past; ++tap) {
        const Vector earlier = whole(history + tap * width + channel);
        sum += whole(taps + tap * width + channel) * earlier;
        if (tap > 0) keep(history + (tap - 1) * width + channel, earlier);
      }
      if (past > 0) keep(history + (past - 1) * width + channel, present);
      keep(inputs + channel, sum * sigmoid_lanes<Real>(sum));
    }
  }

  // The scan at this position, gated, in place. Complex states: real parts, then imaginary parts, state by state.
  // weights: 8 log2 of the decay per unit of step size, 9 turns per unit of step size, 10 skip; (states, channels).
  static void scan(const Operation& operation, Real* inputs, const Real* gate, const Real* step_size, const Real* into,
                   const Real* out_of, Real* states) {
    const int64_t width = padded(operation.inner_width);
    const Real *rate = numbers(operation.weights[8]), *turns = numbers(operation.weights[9]), *skip = numbers(operation.weights[10]);
    for (int64_t channel = 0; channel < width; channel += lanes) {
      const Vector size = softplus_lanes<Real>(whole(step_size + channel)), present = whole(inputs + channel);
      const Vector drive = size * present;
      Vector sum = Vector{};
      if (operation.is_complex == 0) {
        for (int64_t state = 0; state < operation.state_size; ++state) {
          Real* held = states + state * width + channel;
          const Vector now = exp2_lanes(size * whole(rate + state * width + channel)) * whole(held) + drive * into[state];
          keep(held, now);
          sum += now * out_of[state];
        }
      } else {
        for (int64_t state = 0; state < operation.state_size; ++state) {
          Real *real = states + 2 * state * width + channel, *imaginary = real + width;
          Vector cosine, sine;
          cosine_and_sine(size * whole(turns + state * width + channel), cosine, sine);
          const Vector magnitude = exp2_lanes(size * whole(rate + state * width + channel));
          const Vector real_decay = magnitude * cosine, imaginary_decay = magnitude * sine;
          const Vector before = whole(real), imaginary_before = whole(imaginary);
          const Vector now = real_decay * before - imaginary_decay * imaginary_before + drive * into[2 * state];
          const Vector imaginary_now = real_decay * imaginary_before + imaginary_decay * before + drive * into[2 * state + 1];
          keep(real, now);
          keep(imaginary, imaginary_now);
          sum += now * out_of[2 * state] - imaginary_now * out_of[2 * state + 1];
        }
        sum += sum;
      }
      const Vector gate_here = whole(gate + channel);
      keep(inputs + channel, (sum + whole(skip + channel) * present) * gate_here * sigmoid_lanes<Real>(gate_here));
    }
  }

  // weights: 0 norm, 1 and 2 projection to (inputs, gate), each half padded, 5 selection, 6 and 7 step size,
  // 11 and 12 projection back.
  void selective(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const int64_t width = padded(operation.inner_width);
    const int64_t per_channel = operation.state_size * (operation.is_complex != 0 ? 2 : 1);
    const int64_t history = (operation.kernel_width - 1) * width;
    Real *normalised[items_at_once], *inner[items_at_once], *selected[items_at_once], *step_size[items_at_once];
    for (int64_t item = 0; item < items; ++item) {
      normalised[item] = rooms.normalised[item];
      inner[item] = rooms.inner[item];
      selected[item] = rooms.selected[item];
      step_size[item] = rooms.step_size[item];
      normalise(operation, memory[item] + operation.target, normalised[item]);
    }
    product(operation.weights[1], operation.weights[2], normalised, operation.width, 2 * width, inner, items);
    for (int64_t item = 0; item < items; ++item) convolve(operation, inner[item], memory[item] + operation.state);
    product(operation.weights[5], nullptr, inner, operation.inner_width, operation.step_rank + 2 * per_channel, selected, items);
    product(operation.weights[6], operation.weights[7], selected, operation.step_rank, operation.inner_width, step_size, items);
    for (int64_t item = 0; item < items; ++item) {
      const Real* into = selected[item] + operation.step_rank;
      scan(operation, inner[item], inner[item] + width, step_size[item], into, into + per_channel,
           memory[item] + operation.state + history);
    }
    product(operation.weights[11], operation.weights[12], inner, operation.inner_width, operation.width, normalised, items);
    for (int64_t item = 0; item < items; ++item) add(memory[item] + operation.target, normalised[item], operation.width);
  }

  // weights: 0 norm; 1 to 6 decay, input and output matrix, each a real and an imaginary part; 7 skip; 8 and 9 gated
  // projection, each half padded. Without imaginary parts the state is real.
  void s4d(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const int64_t width = padded(operation.width);
    const Real* matrix[7];
    for (int part = 1; part <= 6; ++part) matrix[part] = numbers(operation.weights[part]);
    Real *normalised[items_at_once], *inner[items_at_once];
    for (int64_t item = 0; item < items; ++item) {
      Real* inputs = normalised[item] = rooms.normalised[item];
      Real* states = memory[item] + operation.state;
      inner[item] = rooms.inner[item];
      normalise(operation, memory[item] + operation.target, inputs);
      for (int64_t channel = 0; channel < width; channel += lanes) {
        const Vector present = whole(inputs + channel);
        Vector sum = Vector{};
        for (int64_t state = 0; state < operation.state_size; ++state) {
          const int64_t here = state * width + channel;
          const auto at = [&](int part) { return whole(matrix[part] + here); };
          if (operation.is_complex == 0) {
            const Vector now = at(1) * whole(states + here) + at(3) * present;
            keep(states + here, now);
            sum += now * at(5);
          } else {
            Real *real = states + 2 * state * width + channel, *imaginary = real + width;
            const Vector before = whole(real), imaginary_before = whole(imaginary);
            const Vector now = at(1) * before - at(2) * imaginary_before + at(3) * present;
            const Vector imaginary_now = at(1) * imaginary_before + at(2) * before + at(4) * present;
            keep(real, now);
            keep(imaginary, imaginary_now);
            sum += now * at(5) - imaginary_now * at(6);
          }
        }
        if (operation.is_complex != 0) sum += sum;
        keep(inputs + channel, sum + whole(numbers(operation.weights[7]) + channel) * present);
      }
      gelu(inputs, operation.width);
    }
    product(operation.weights[8], operation.weights[9], normalised, operation.width, 2 * width, inner, items);
    for (int64_t item = 0; item < items; ++item) {
      for (int64_t channel = 0; channel < width; channel += lanes)
        keep(inner[item] + channel, whole(inner[item] + channel) * sigmoid_lanes<Real>(whole(inner[item] + width + channel)));
      add(memory[item] + operation.target, inner[item], operation.width);
    }
  }

  // weights: 0 norm, 1 and 2 projection to inner_width, 3 and 4 projection back.
  void feed_forward(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    Real *normalised[items_at_once], *inner[items_at_once];
    for (int64_t item = 0; item < items; ++item) {
      normalised[item] = rooms.normalised[item];
      inner[item] = rooms.inner[item];
      normalise(operation, memory[item] + operation.target, normalised[item]);
    }
    product(operation.weights[1], operation.weights[2], normalised, operation.width, operation.inner_width, inner, items);
    for (int64_t item = 0; item < items; ++item) gelu(inner[item], operation.inner_width);
    product(operation.weights[3], operation.weights[4], inner, operation.inner_width, operation.width, normalised, items);
    for (int64_t item = 0; item < items; ++item) add(memory[item] + operation.target, normalised[item], operation.width);
  }

  // ---- the program ----

  void run(int64_t position, const int64_t* tokens, Real* const* memory, int64_t items, Rooms& rooms) const {
    for (int64_t number = 0; number < work.operation_count; ++number) {
      const Operation& operation = work.operations[number];
      const int64_t phase = operation.factor > 0 ? position / operation.period % operation.factor : 0;
      switch (operation.kind) {
        case MAMBACORE_GROUP:
          if ((position + 1) % (operation.period * operation.factor) != 0) number += operation.skip;
          break;
        case MAMBACORE_SELECTIVE: selective(operation, memory, items, rooms); break;
        case MAMBACORE_S4D: s4d(operation, memory, items, rooms); break;
        case MAMBACORE_FEED_FORWARD: feed_forward(operation, memory, items, rooms); break;
        case MAMBACORE_LINEAR: {
          const Real* from[items_at_once];
          Real* to[items_at_once];
          for (int64_t item = 0; item < items; ++item) {
            from[item] = memory[item] + operation.source;
            to[item] = memory[item] + operation.target;
          }
          product(operation.weights[0], operation.weights[1], from, operation.width, operation.outputs, to, items);
          break;
        }
        default:
          for (int64_t item = 0; item < items; ++item) simple(operation, phase, tokens[item], memory[item]);
      }
    }
  }

  static void simple(const Operation& operation, int64_t phase, int64_t token, Real* memory) {
    const Real* source = memory + operation.source;
    Real* target = memory + operation.target;
    const int64_t width = operation.width;
    switch (operation.kind) {
      case MAMBACORE_EMBED: std::copy_n(numbers(operation.weights[0]) + token * width, width, target); break;
      case MAMBACORE_NORM: normalise(operation, source, target); break;
      case MAMBACORE_COPY: std::copy_n(source, width, target); break;
      case MAMBACORE_ADD: add(target, source, width); break;
      case MAMBACORE_FOLD: std::copy_n(source, width, target + phase * width); break;
      case MAMBACORE_UNFOLD: std::copy_n(source + phase * width, width, target); break;
      default: break;
    }
  }

  // ---- the draw ----

  // The first class, in their order, at which the probabilities add up to more than this share of their sum.
  int64_t draw(const Real* logits, double uniform, Rooms& rooms) const {
    const int64_t classes = work.classes;
    const int64_t likeliest = std::max_element(logits, logits + classes) - logits;
    if (work.temperature == 0) return likeliest;
    std::vector<double>& probabilities = rooms.probabilities;
    for (int64_t number = 0; number < classes; ++number)
      probabilities[number] = std::exp((double(logits[number]) - double(logits[likeliest])) / work.temperature);
    if (work.top_p < 1) {  // only the fewest classes that make up this share
      std::vector<int64_t>& order = rooms.order;
      std::iota(order.begin(), order.end(), int64_t(0));
      std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return probabilities[one] > probabilities[other]; });
      const double limit = work.top_p * std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
      double before = 0;
      for (int64_t number : order) {
        const double probability = probabilities[number];
        if (before >= limit) probabilities[number] = 0;
        before += probability;
      }
    }
    const double wanted = uniform * std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
    double sum = 0;
    int64_t last = likeliest;
    for (int64_t number = 0; number < classes; ++number) {
      if (probabilities[number] == 0) continue;
      sum += probabilities[number];
      last = number;
      if (sum > wanted) break;
    }
    return last;
  }

  double log_likelihood(const Real* logits, int64_t token) const {
    const double largest = double(*std::max_element(logits, logits + work.classes));
    double sum = 0;
    for (int64_t number = 0; number < work.classes; ++number) sum += std::exp(double(logits[number]) - largest);
    return double(logits[token]) - largest - std::log(sum);
  }

  // All steps of sequences `first` to `first + items - 1`.
  void walk(int64_t first, int64_t items, Rooms& rooms) const {
    Real* memory[items_at_once];
    for (int64_t item = 0; item < items; ++item) memory[item] = static_cast<Real*>(work.memory) + (first + item) * work.memory_size;
    for (int64_t step = 0; step < work.count; ++step) {
      run(work.position + step, work.tokens + first, memory, items, rooms);
      for (int64_t item = 0; item < items; ++item) {
        const int64_t here = (first + item) * work.count + step;
        const Real* logits = memory[item] + work.logits;
        const int64_t token = work.given != nullptr ? work.given[here] : draw(logits, work.uniforms[here], rooms);
        work.tokens[first + item] = work.drawn[here] = token;
        work.log_likelihoods[here] = log_likelihood(logits, token);
      }
    }
  }

  void all() const {
    int64_t widest = padding, inner = padding, selected = padding;
    for (int64_t number = 0; number < work.operation_count; ++number) {
      const Operation& operation = work.operations[number];
      widest = std::max(widest, operation.width);
      inner = std::max({inner, 2 * padded(operation.inner_width), 2 * padded(operation.width)});
      selected = std::max(selected, operation.step_rank + 4 * operation.state_size);
    }
    // Sequences that fill the threads come before sequences that share weights.
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(work.threads, work.batch));
    const int64_t together = std::min(items_at_once, (work.batch + threads - 1) / threads);
    const int64_t tasks = (work.batch + together - 1) / together;
    parallel_for(tasks, threads, [&](int64_t task) {
      Rooms rooms{Room(together, widest), Room(together, inner), Room(together, selected), Room(together, inner),
                  std::vector<double>(static_cast<size_t>(work.classes)), std::vector<int64_t>(static_cast<size_t>(work.classes))};
      walk(task * together, std::min(together, work.batch - task * together), rooms);
    });
  }
};

}  // namespace

void generate(const MambacoreGeneration& generation) {
  if (generation.element == MAMBACORE_FLOAT64) Steps<double>{generation}.all();
  else Steps<float>{generation}.all();
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
