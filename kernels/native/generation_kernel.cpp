// Many steps of a whole model in one call: a small program per step over the memory of each sequence, then the sampling
// of the next token. Without it, most of the cost of a step is the overhead of calling operators.
//
// Each number is summed in one order, whatever the batch is and however sequences are shared out: a sequence is the same
// alone, in a batch, and on any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dual.h"
#include "kernels.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Real, typename Weight> struct Steps {
  using Vector = Lanes<Real>;
  using Operation = MambacoreStepOperation;
  using Block = Selective<Real, Weight>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreGeneration& work;

  static const Real* numbers(const void* data) { return static_cast<const Real*>(data); }
  static Linear<Real, Weight> linear(const void* weight, const void* bias, int64_t inputs, int64_t outputs) {
    return {static_cast<const Weight*>(weight), inputs, outputs, numbers(bias)};
  }
  // The second half of a linear layer that has twice as many outputs.
  static Linear<Real, Weight> second_half(const void* weight, const void* bias, int64_t inputs, int64_t outputs) {
    return {static_cast<const Weight*>(weight) + outputs * Linear<Real, Weight>::row_stride(inputs), inputs, outputs,
            bias == nullptr ? nullptr : numbers(bias) + outputs};
  }

  struct Rooms {
    Room<Real> normalised, inner, gate;
    std::vector<double> probabilities, guided;
    std::vector<int64_t> order;
    std::vector<typename Block::Rooms> selective;  // one for each such operation
  };

  // ---- parts of blocks ----

  static void gelu(Real* values, int64_t count) {
    for (int64_t index = 0; index < count; ++index)
      values[index] *= Real(0.5) * (Real(1) + std::erf(values[index] * Real(0.70710678118654752440)));
  }

  // weights: 0 norm, 1 and 2 projection to (inputs, gate), 3 taps (kernel_width, channels), 4 convolution bias,
  // 5 selection, 6 and 7 step size, 8 log2 of the decay and 9 turns per unit of step size, 10 skip, 11 and 12 projection
  // back.
  static Block block_of(const Operation& operation) {
    const auto& weights = operation.weights;
    const int64_t model = operation.width, inner = operation.inner_width;
    Block block{model, inner, operation.state_size, operation.kernel_width, operation.step_rank, operation.is_complex != 0,
                operation.epsilon, numbers(weights[0]),
                linear(weights[1], weights[2], model, inner), second_half(weights[1], weights[2], model, inner),
                numbers(weights[3]), numbers(weights[4]), {}, linear(weights[6], weights[7], operation.step_rank, inner),
                numbers(weights[8]), numbers(weights[9]), numbers(weights[10]), linear(weights[11], weights[12], inner, model)};
    block.selection = linear(weights[5], nullptr, inner, block.selected_width());
    return block;
  }

  void selective(const Operation& operation, Real* const* memory, int64_t items, typename Block::Rooms& rooms) const {
    const Block block = block_of(operation);
    const int64_t width = block.width(), history = (operation.kernel_width - 1) * width;
    const Real* sequence[items_at_once];
    for (int64_t item = 0; item < items; ++item) sequence[item] = memory[item] + operation.target;
    block.run(sequence, items, rooms, 1, [&](int64_t item) { return memory[item] + operation.state; },
              [&](int64_t item, const auto& task) {
                Real* states = memory[item] + operation.state + history;
                for (int64_t channel = 0; channel < width; channel += lanes) task(channel, states + channel, width);
              });
    for (int64_t item = 0; item < items; ++item) add(memory[item] + operation.target, rooms.normalised[item], operation.width);
  }

  // weights: 0 norm; 1 to 6 decay, input and output matrix, each a real and an imaginary part; 7 skip; 8 and 9 gated
  // projection. Without imaginary parts the state is real.
  void s4d(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const int64_t width = padded(operation.width);
    const Real* matrix[7];
    for (int part = 0; part <= 6; ++part) matrix[part] = numbers(operation.weights[part]);
    const Pointers<Real> normalised(rooms.normalised, items), inner(rooms.inner, items), gate(rooms.gate, items);
    for (int64_t item = 0; item < items; ++item) {
      Real *inputs = normalised.of[item], *states = memory[item] + operation.state;
      normalise(memory[item] + operation.target, matrix[0], operation.width, operation.epsilon, inputs);
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
    linear(operation.weights[8], operation.weights[9], operation.width, operation.width).all(normalised.of, inner.of, items);
    second_half(operation.weights[8], operation.weights[9], operation.width, operation.width).all(normalised.of, gate.of, items);
    for (int64_t item = 0; item < items; ++item) {
      Real *here = inner.of[item], *open = gate.of[item];
      for (int64_t channel = 0; channel < width; channel += lanes)
        keep(here + channel, whole(here + channel) * sigmoid_lanes<Real>(whole(open + channel)));
      add(memory[item] + operation.target, here, operation.width);
    }
  }

  // weights: 0 norm, 1 and 2 projection to inner_width, 3 and 4 projection back.
  void feed_forward(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const auto& weights = operation.weights;
    const Pointers<Real> normalised(rooms.normalised, items), inner(rooms.inner, items);
    for (int64_t item = 0; item < items; ++item)
      normalise(memory[item] + operation.target, numbers(weights[0]), operation.width, operation.epsilon, normalised.of[item]);
    linear(weights[1], weights[2], operation.width, operation.inner_width).all(normalised.of, inner.of, items);
    for (int64_t item = 0; item < items; ++item) gelu(inner.of[item], operation.inner_width);
    linear(weights[3], weights[4], operation.inner_width, operation.width).all(inner.of, normalised.of, items);
    for (int64_t item = 0; item < items; ++item) add(memory[item] + operation.target, normalised.of[item], operation.width);
  }

  // What Mamba-2 and Mamba-3 share: `inner_width` numbers of the projection, `between(item, projected, outputs)`, and the
  // projection back of `outputs` channels.
  template <typename Between>
  void dual(const Operation& operation, int back, Real* const* memory, int64_t items, Rooms& rooms, const Between& between) const {
    const auto& weights = operation.weights;
    const Pointers<Real> normalised(rooms.normalised, items), projected(rooms.inner, items), outputs(rooms.gate, items);
    for (int64_t item = 0; item < items; ++item)
      normalise(memory[item] + operation.target, numbers(weights[0]), operation.width, operation.epsilon, normalised.of[item]);
    const void* bias = operation.kind == MAMBACORE_MAMBA2 ? weights[2] : nullptr;
    linear(weights[1], bias, operation.width, operation.inner_width).all(normalised.of, projected.of, items);
    for (int64_t item = 0; item < items; ++item)
      between(projected.of[item], memory[item] + operation.state, outputs.of[item]);
    bias = operation.kind == MAMBACORE_MAMBA2 ? weights[back + 1] : nullptr;
    linear(weights[back], bias, operation.outputs, operation.width).all(outputs.of, normalised.of, items);
    for (int64_t item = 0; item < items; ++item) add(memory[item] + operation.target, normalised.of[item], operation.width);
  }
  static Dual<Real> heads_of(const Operation& operation, int64_t rank) {
    return {operation.heads, operation.outputs / operation.heads, operation.state_size, operation.groups, rank};
  }

  // weights: 0 norm, 1 and 2 projection, 3 taps (kernel_width, channels), 4 convolution bias, 5 step bias, 6 decay rates,
  // 7 skip, 8 norm after the gate, 9 step limits, 10 and 11 projection back.
  void mamba2(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const auto of = [&](int number) { return numbers(operation.weights[number]); };
    const Mamba2<Real> mixer{heads_of(operation, 1), operation.kernel_width, of(3), of(4), of(5), of(6), of(7), of(8), of(9),
                             operation.inner_epsilon};
    dual(operation, 10, memory, items, rooms,
         [&](Real* projected, Real* state, Real* outputs) { mixer.run(projected, state, state + mixer.history(), outputs); });
  }

  // weights: 0 norm, 1 projection, 2 step bias, 3 and 4 norms and 5 and 6 biases of the input and output matrices, 7 to 9
  // inputs, gates and outputs of a rank above 1, 10 skip, 11 projection back, 12 norm of a head's outputs.
  void mamba3(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const auto of = [&](int number) { return numbers(operation.weights[number]); };
    const Mamba3<Real> mixer{heads_of(operation, operation.rank), operation.angles, operation.is_trapezoidal != 0, of(2),
                             of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(12),
                             operation.inner_epsilon, operation.output_epsilon};
    Scratch<Real> room(mixer.room_numbers());
    dual(operation, 11, memory, items, rooms,
         [&](Real* projected, Real* state, Real* outputs) { mixer.run(projected, mixer.state_at(state), outputs, room.data()); });
  }

  // ---- the program ----

  void run(int64_t position, const int64_t* tokens, Real* const* memory, int64_t items, Rooms& rooms) const {
    size_t blocks = 0;  // selective ones that came before, run or not
    for (int64_t number = 0; number < work.operation_count; ++number) {
      const Operation& operation = work.operations[number];
      const int64_t phase = operation.factor > 0 ? position / operation.period % operation.factor : 0;
      switch (operation.kind) {
        case MAMBACORE_GROUP:
          if ((position + 1) % (operation.period * operation.factor) == 0) break;
          for (const int64_t end = number + operation.skip; number < end;)
            blocks += work.operations[++number].kind == MAMBACORE_SELECTIVE;
          break;
        case MAMBACORE_SELECTIVE: selective(operation, memory, items, rooms.selective[blocks++]); break;
        case MAMBACORE_S4D: s4d(operation, memory, items, rooms); break;
        case MAMBACORE_MAMBA2: mamba2(operation, memory, items, rooms); break;
        case MAMBACORE_MAMBA3: mamba3(operation, memory, items, rooms); break;
        case MAMBACORE_FEED_FORWARD: feed_forward(operation, memory, items, rooms); break;
        case MAMBACORE_LINEAR: {
          const Real* from[items_at_once];
          Real* to[items_at_once];
          for (int64_t item = 0; item < items; ++item) {
            from[item] = memory[item] + operation.source;
            to[item] = memory[item] + operation.target;
          }
          linear(operation.weights[0], operation.weights[1], operation.width, operation.outputs).all(from, to, items);
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
      case MAMBACORE_NORM: normalise(source, numbers(operation.weights[0]), width, operation.epsilon, target); break;
      case MAMBACORE_COPY: std::copy_n(source, width, target); break;
      case MAMBACORE_ADD: add(target, source, width); break;
      case MAMBACORE_FOLD: std::copy_n(source, width, target + phase * width); break;
      case MAMBACORE_UNFOLD: std::copy_n(source + phase * width, width, target); break;
      default: break;
    }
  }

  // ---- the draw ----

  // The first class, in their order, at which the probabilities add up to more than this share of their sum.
  template <typename Number> int64_t draw(const Number* logits, double uniform, Rooms& rooms) const {
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

  // Classifier-free guidance: from the logits of the sequence without labels towards, and past, those of the one with them.
  const double* guided(const Real* labelled, const Real* unlabelled, Rooms& rooms) const {
    for (int64_t number = 0; number < work.classes; ++number) {
      const double without = double(unlabelled[number]);
      rooms.guided[number] = without + work.guidance * (double(labelled[number]) - without);
    }
    return rooms.guided.data();
  }

  // Sequences that draw a token: of a pair, which follows one drawn token, the first.
  int64_t drawing() const { return work.paired != 0 ? work.batch / 2 : work.batch; }

  // All steps of sequences `first` to `first + items - 1`, and of their partners.
  void walk(int64_t first, int64_t items, Rooms& rooms) const {
    const int64_t partners = work.paired != 0 ? items : 0;
    Real* memory[items_at_once];
    int64_t tokens[items_at_once];
    const auto row = [&](int64_t item) { return first + item + (item < items ? 0 : drawing() - items); };
    for (int64_t item = 0; item < items + partners; ++item) {
      memory[item] = static_cast<Real*>(work.memory) + row(item) * work.memory_size;
      tokens[item] = work.tokens[row(item)];
    }
    for (int64_t step = 0; step < work.count; ++step) {
      run(work.position + step, tokens, memory, items + partners, rooms);
      for (int64_t item = 0; item < items; ++item) {
        const int64_t here = (first + item) * work.count + step;
        const Real* logits = memory[item] + work.logits;
        int64_t& token = tokens[item];
        if (work.given != nullptr) token = work.given[here];
        else if (partners == 0) token = draw(logits, work.uniforms[here], rooms);
        else token = draw(guided(logits, memory[items + item] + work.logits, rooms), work.uniforms[here], rooms);
        work.drawn[here] = token;
        work.log_likelihoods[here] = log_likelihood(logits, token);
        if (partners != 0) tokens[items + item] = token;
      }
    }
    for (int64_t item = 0; item < items + partners; ++item) work.tokens[row(item)] = tokens[item];
  }

  void all() const {
    int64_t widest = padding, inner = padding;
    for (int64_t number = 0; number < work.operation_count; ++number) {
      widest = std::max(widest, work.operations[number].width);
      inner = std::max({inner, work.operations[number].inner_width, work.operations[number].width});
    }
    // Sequences that fill the threads come before sequences that share weights; a pair stays together.
    const int64_t count = drawing(), each = work.paired != 0 ? 2 : 1;
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(work.threads, count));
    const int64_t together = std::min(items_at_once / each, (count + threads - 1) / threads);
    const int64_t tasks = count == 0 ? 0 : (count + together - 1) / together;
    parallel_for(tasks, threads, [&](int64_t task) {
      const auto classes = static_cast<size_t>(work.classes);
      const int64_t rows = together * each;
      Rooms rooms{Room<Real>(rows, widest),     Room<Real>(rows, inner),       Room<Real>(rows, inner),
                  std::vector<double>(classes), std::vector<double>(classes), std::vector<int64_t>(classes), {}};
      for (int64_t number = 0; number < work.operation_count; ++number) {
        if (work.operations[number].kind == MAMBACORE_SELECTIVE)
          rooms.selective.emplace_back(block_of(work.operations[number]), rows);
      }
      walk(task * together, std::min(together, count - task * together), rooms);
    });
  }
};

}  // namespace

void generate(const MambacoreGeneration& generation) {
  if (generation.element == MAMBACORE_FLOAT64) Steps<double, double>{generation}.all();
  else if (generation.weight_element == MAMBACORE_BFLOAT16) Steps<float, BFloat16>{generation}.all();
  else if (generation.weight_element == MAMBACORE_INT8) Steps<float, Int8>{generation}.all();
  else Steps<float, float>{generation}.all();
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
