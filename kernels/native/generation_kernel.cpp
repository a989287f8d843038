// Many steps of a whole model in one call: a small program per step over the memory of each sequence, then the sampling
// of the next token. Without it, most of the cost of a step is the overhead of calling operators.
//
// Each number is summed in one order, whatever the batch is and however sequences are shared out: a sequence is the same
// alone, in a batch, and on any number of threads.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "draw.h"
#include "dual.h"
#include "kernels.h"
#include "panels.h"
#include "schedule.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {
namespace {

template <typename Real> struct Steps {
  using Vector = Lanes<Real>;
  using Operation = MambacoreStepOperation;
  using Layer = PanelLayer<Real>;
  using Block = Selective<Real, Layer>;
  static constexpr int lanes = lane_count<Real>;
  const MambacoreGeneration& work;

  // Activations within an operation, as large as the largest needs, and the numbers of a draw.
  struct Sizes {
    int64_t width = padding, inner = padding, selected = padding;
    explicit Sizes(const MambacoreGeneration& work) {
      for (int64_t number = 0; number < work.operation_count; ++number) {
        const Operation& operation = work.operations[number];
        width = std::max(width, operation.width);
        inner = std::max({inner, operation.inner_width, operation.width, operation.outputs});
        selected = std::max(selected, operation.step_rank + 4 * operation.state_size);
      }
    }
  };
  struct Rooms {
    Room<Real> normalised, inner, gate;
    typename Block::Rooms selective;
    RoundedInputs rounded;
    Draw<Real> draw;
    Rooms(const MambacoreGeneration& work, const Sizes& sizes, int64_t items)
        : normalised(items, sizes.width), inner(items, sizes.inner), gate(items, sizes.inner),
          selective(items, sizes.width, sizes.inner, sizes.selected), rounded(items, sizes.inner),
          draw(work.classes, work.temperature, work.top_p) {}
  };

  static const Real* numbers(const void* data) { return static_cast<const Real*>(data); }
  static Layer layer(const Operation& operation, int number, int64_t inputs, int64_t outputs, Rooms& rooms) {
    return {static_cast<const uint8_t*>(operation.weights[number]), operation.weight_element, inputs, outputs,
            numbers(operation.weights[number + 1]), &rooms.rounded};
  }
  // The second of two matrices with as many outputs each, which follows the first.
  static Layer second(const Layer& first) {
    Layer found = first;
    const int64_t outputs = padded(first.outputs);
    found.weight += outputs / panel * first.stride();
    if (first.bias != nullptr) found.bias += outputs;
    return found;
  }

  // ---- parts of blocks ----

  static void gelu(Real* values, int64_t count) {
    for (int64_t index = 0; index < count; ++index)
      values[index] *= Real(0.5) * (Real(1) + std::erf(values[index] * Real(0.70710678118654752440)));
  }

  // weights: 0 norm, 1 and 2 projection to (inputs, gate), 3 taps (kernel_width, channels), 4 convolution bias,
  // 5 selection, 6 and 7 step size, 8 log2 of the decay and 9 turns per unit of step size, 10 skip, 11 and 12 projection
  // back.
  static Block block_of(const Operation& operation, Rooms& rooms) {
    const auto& weights = operation.weights;
    const int64_t model = operation.width, inner = operation.inner_width;
    const Layer inputs = layer(operation, 1, model, inner, rooms);
    Block block{model, inner, operation.state_size, operation.kernel_width, operation.step_rank, operation.is_complex != 0,
                operation.epsilon, numbers(weights[0]), inputs, second(inputs), numbers(weights[3]), numbers(weights[4]),
                {}, layer(operation, 6, operation.step_rank, inner, rooms), numbers(weights[8]), numbers(weights[9]),
                numbers(weights[10]), layer(operation, 11, inner, model, rooms), true,
                operation.weight_element != work_element};
    block.selection = layer(operation, 5, inner, block.selected_width(), rooms);
    block.selection.bias = nullptr;
    block.step.element = work_element;  // few inputs, which decide how fast states fade: never rounded
    return block;
  }
  static constexpr int64_t work_element = sizeof(Real) == sizeof(double) ? MAMBACORE_FLOAT64 : MAMBACORE_FLOAT32;

  void selective(const Operation& operation, Real* const* memory, int64_t items, Rooms& rooms) const {
    const Block block = block_of(operation, rooms);
    const int64_t width = block.width(), history = (operation.kernel_width - 1) * width, numbers = block.numbers();
    const Real* sequence[items_at_once];
    for (int64_t item = 0; item < items; ++item) sequence[item] = memory[item] + operation.target;
    block.run(sequence, items, rooms.selective, 1, [&](int64_t item) { return memory[item] + operation.state; },
              [&](int64_t item, const auto& task) {
                Real* states = memory[item] + operation.state + history;  // (channels / 16, numbers, 16)
                if (item + 1 < items) {
                  const Real* next = memory[item + 1] + operation.state + history;
                  for (int64_t number = 0; number < numbers * padding; number += 64 / sizeof(Real)) __builtin_prefetch(next + number, 1);
                }
                for (int64_t channel = 0; channel < width; channel += lanes)
                  task(channel, states + channel / padding * padding * numbers + channel % padding, padding);
              });
    for (int64_t item = 0; item < items; ++item)
      add(memory[item] + operation.target, rooms.selective.normalised[item], operation.width);
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
    const Layer projection = layer(operation, 8, operation.width, operation.width, rooms);
    projection.all(normalised.of, inner.of, items);
    second(projection).all(normalised.of, gate.of, items);
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
    layer(operation, 1, operation.width, operation.inner_width, rooms).all(normalised.of, inner.of, items);
    for (int64_t item = 0; item < items; ++item) gelu(inner.of[item], operation.inner_width);
    layer(operation, 3, operation.inner_width, operation.width, rooms).all(inner.of, normalised.of, items);
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
    Layer come = layer(operation, 1, operation.width, operation.inner_width, rooms);
    Layer go = layer(operation, back, operation.outputs, operation.width, rooms);
    if (operation.kind == MAMBACORE_MAMBA3) come.bias = go.bias = nullptr;
    come.all(normalised.of, projected.of, items);
    for (int64_t item = 0; item < items; ++item)
      between(projected.of[item], memory[item] + operation.state, outputs.of[item]);
    go.all(outputs.of, normalised.of, items);
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

  // Sequences that go through the program together: their memories and the tokens that they read. With a schedule, groups
  // are left to whichever thread comes first.
  struct Walk {
    Real* memory[items_at_once];
    int64_t tokens[items_at_once];
    int64_t first, drawing, items;  // the first sequence, how many draw a token, and these with their partners
    const Schedule* schedule;
    Handover* handover;
    Rooms* rooms[2];  // of the first thread and of the second
  };

  void run_group(Walk& walk, int64_t group, int64_t position, bool helper) const {
    const Schedule::Group& found = walk.schedule->groups()[static_cast<size_t>(group)];
    run(walk, found.begin, found.end, position, helper);
  }
  auto group_runner(Walk& walk) const {
    return [this, &walk](int64_t group, int64_t position, bool helper) { run_group(walk, group, position, helper); };
  }

  // Operations from `begin` to `end` at this position.
  void run(Walk& walk, int64_t begin, int64_t end, int64_t position, bool helper) const {
    Rooms& rooms = *walk.rooms[helper ? 1 : 0];
    Real* const* memory = walk.memory;
    const int64_t items = walk.items;
    for (int64_t number = begin; number < end; ++number) {
      const Operation& operation = work.operations[number];
      const int64_t phase = operation.factor > 0 ? position / operation.period % operation.factor : 0;
      if (walk.handover != nullptr) {
        const uint64_t needed = walk.schedule->needed_by(number);
        if (needed != 0) walk.handover->need(needed, helper, group_runner(walk));
      }
      switch (operation.kind) {
        case MAMBACORE_GROUP:
          if ((position + 1) % (operation.period * operation.factor) != 0) {
            number += operation.skip;
          } else if (walk.handover != nullptr) {
            const int64_t group = walk.schedule->group_at(number);
            walk.handover->need(uint64_t(1) << group, helper, group_runner(walk));  // its last run
            walk.handover->post(group, position);
            number += operation.skip;
          }
          break;
        case MAMBACORE_SELECTIVE: selective(operation, memory, items, rooms); break;
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
          layer(operation, 0, operation.width, operation.outputs, rooms).all(from, to, items);
          break;
        }
        case MAMBACORE_EMBED:
          for (int64_t item = 0; item < items; ++item)
            std::copy_n(numbers(operation.weights[0]) + walk.tokens[item] * operation.width, operation.width,
                        memory[item] + operation.target);
          break;
        default:
          for (int64_t item = 0; item < items; ++item) simple(operation, phase, memory[item]);
      }
    }
  }

  static void simple(const Operation& operation, int64_t phase, Real* memory) {
    const Real* source = memory + operation.source;
    Real* target = memory + operation.target;
    const int64_t width = operation.width;
    switch (operation.kind) {
      case MAMBACORE_NORM: normalise(source, numbers(operation.weights[0]), width, operation.epsilon, target); break;
      case MAMBACORE_COPY: std::copy_n(source, width, target); break;
      case MAMBACORE_ADD: add(target, source, width); break;
      case MAMBACORE_FOLD: std::copy_n(source, width, target + phase * width); break;
      case MAMBACORE_UNFOLD: std::copy_n(source + phase * width, width, target); break;
      default: break;
    }
  }

  // ---- the steps ----

  // Sequences that draw a token: of a pair, which follows one drawn token, the first.
  int64_t drawing() const { return work.paired != 0 ? work.batch / 2 : work.batch; }

  int64_t row(const Walk& walk, int64_t item) const {
    return walk.first + item + (item < walk.drawing ? 0 : drawing() - walk.drawing);
  }
  // Sequences `first` to `first + count - 1`, and their partners.
  void begin(Walk& walk, int64_t first, int64_t count) const {
    walk.first = first, walk.drawing = count, walk.items = work.paired != 0 ? 2 * count : count;
    for (int64_t item = 0; item < walk.items; ++item) {
      walk.memory[item] = static_cast<Real*>(work.memory) + row(walk, item) * work.memory_size;
      walk.tokens[item] = work.tokens[row(walk, item)];
    }
  }
  void end(const Walk& walk) const {
    for (int64_t item = 0; item < walk.items; ++item) work.tokens[row(walk, item)] = walk.tokens[item];
  }

  // The tokens after a step.
  void choose(Walk& walk, int64_t step, Draw<Real>& draw) const {
    for (int64_t item = 0; item < walk.drawing; ++item) {
      const int64_t here = (walk.first + item) * work.count + step, partner = walk.drawing + item;
      const Real* logits = walk.memory[item] + work.logits;
      int64_t& token = walk.tokens[item];
      if (work.given != nullptr) token = work.given[here];
      else if (work.paired == 0) token = draw(logits, work.uniforms[here]);
      else token = draw(draw.guided(logits, walk.memory[partner] + work.logits, work.guidance), work.uniforms[here]);
      work.drawn[here] = token;
      work.log_likelihoods[here] = draw.log_likelihood(logits, token);
      if (work.paired != 0) walk.tokens[partner] = token;
    }
  }

  void walk_through(Walk& walk) const {
    for (int64_t step = 0; step < work.count; ++step) {
      run(walk, 0, work.operation_count, work.position + step, false);
      if (walk.handover != nullptr) walk.handover->need(walk.schedule->needed_by_draw(), false, group_runner(walk));
      choose(walk, step, walk.rooms[0]->draw);
    }
    if (walk.handover != nullptr) walk.handover->need_all(group_runner(walk));
    end(walk);
  }

  // Bytes of an operation's weights, about.
  static int64_t weight_bytes(const Operation& operation) {
    const int64_t number = operation.weight_element == MAMBACORE_INT8       ? 1
                           : operation.weight_element == MAMBACORE_BFLOAT16 ? 2
                                                                            : static_cast<int64_t>(sizeof(Real));
    const int64_t width = operation.width, inner = operation.inner_width;
    switch (operation.kind) {
      case MAMBACORE_LINEAR: return number * width * operation.outputs;
      case MAMBACORE_SELECTIVE: return number * inner * (3 * width + 2 * operation.step_rank + 2 * operation.state_size);
      case MAMBACORE_S4D: return number * 2 * width * width;
      case MAMBACORE_FEED_FORWARD: return number * 2 * width * inner;
      case MAMBACORE_MAMBA2:
      case MAMBACORE_MAMBA3: return number * width * (inner + operation.outputs);
      default: return 0;
    }
  }
  // Where the weights before come closest to half of all, which is returned in `total`.
  int64_t middle(int64_t& total) const {
    total = 0;
    for (int64_t number = 0; number < work.operation_count; ++number) total += weight_bytes(work.operations[number]);
    int64_t before = 0, number = 0;
    while (number < work.operation_count && 2 * before + weight_bytes(work.operations[number]) < total)
      before += weight_bytes(work.operations[number++]);
    return number;
  }

  void all() const {
    const Sizes sizes(work);
    // Sequences that fill the threads come before sequences that share weights; a pair stays together.
    const int64_t count = drawing(), each = work.paired != 0 ? 2 : 1;
    const int64_t threads = std::max<int64_t>(1, work.threads), walkers = std::max<int64_t>(1, std::min(threads, count));
    const int64_t together = std::max<int64_t>(1, std::min(walk_together / each, (count + walkers - 1) / walkers));
    const int64_t tasks = (count + together - 1) / together, rows = together * each;
    const Schedule schedule(work.operations, work.operation_count, work.logits, work.classes);
    struct Shared {
      Rooms first, second;
      Handover handover;
      Walk walk;
    };
    const auto shared_walk = [&](int64_t task) {
      std::unique_ptr<Shared> one(new Shared{Rooms(work, sizes, rows), Rooms(work, sizes, rows), Handover(schedule), {}});
      one->walk.rooms[0] = &one->first, one->walk.rooms[1] = &one->second;
      begin(one->walk, task * together, std::min(together, count - task * together));
      return one;
    };
    // Threads that are left over help with groups.
    if (work.helped != 0 && threads >= 2 * tasks && !schedule.groups().empty()) {
      std::vector<std::unique_ptr<Shared>> shared;
      for (int64_t task = 0; task < tasks; ++task) {
        shared.push_back(shared_walk(task));
        shared.back()->walk.schedule = &schedule, shared.back()->walk.handover = &shared.back()->handover;
      }
      parallel_for(2 * tasks, 2 * tasks, [&](int64_t index) {
        Shared& one = *shared[static_cast<size_t>(index / 2)];
        if (index % 2 == 1) return one.handover.help(group_runner(one.walk));
        struct Closing {
          Handover& handover;
          ~Closing() { handover.close(); }
        } closing{one.handover};
        walk_through(one.walk);
      });
      return;
    }
    int64_t bytes = 0;
    const int64_t cut = middle(bytes);
    if (work.helped != 0 && threads == 2 && tasks == 2 && schedule.is_plain() && bytes > cache_bytes && bytes <= 2 * cache_bytes) {
      const std::unique_ptr<Shared> walks[] = {shared_walk(0), shared_walk(1)};
      Relay relay(2 * work.count);
      parallel_for(2, 2, [&](int64_t half) {
        relay.take_part(static_cast<int>(half), [&](int number, int64_t stage) {
          Walk& walk = walks[number]->walk;
          const bool second = stage % 2 == 1;
          run(walk, second ? cut : 0, second ? work.operation_count : cut, work.position + stage / 2, half != 0);
          if (second) choose(walk, stage / 2, walk.rooms[half]->draw);
        });
      });
      for (const auto& one : walks) end(one->walk);
      return;
    }
    parallel_for(tasks, walkers, [&](int64_t task) {
      Rooms rooms(work, sizes, rows);
      Walk walk{};
      walk.rooms[0] = &rooms;
      begin(walk, task * together, std::min(together, count - task * together));
      walk_through(walk);
    });
  }
  // A core's own cache, about: weights that fit into it need no sharing, and more than two such caches cannot hold them.
  static constexpr int64_t cache_bytes = int64_t(1) << 20;
  // Enough to share what is read of the weights, few enough for their states to stay in a cache.
  static constexpr int64_t walk_together = 16;
};

}  // namespace

void generate(const MambacoreGeneration& generation) {
  if (generation.element == MAMBACORE_FLOAT64) Steps<double>{generation}.all();
  else Steps<float>{generation}.all();
}

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
