// Two threads share the steps of one sequence: under ThreadSanitizer, what they leave is what one thread leaves.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

std::atomic<mambacore::Team> mambacore::team{nullptr};

namespace {

constexpr int64_t classes = 16;

struct Program {
  std::vector<MambacoreStepOperation> operations;
  std::vector<std::unique_ptr<std::vector<float>>> weights;
  int64_t memory = 0;
  uint32_t state = 7;

  float random() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / static_cast<float>(1 << 24) - 0.5f;
  }
  int64_t place(int64_t width) {
    memory += width;
    return memory - width;
  }
  const void* numbers(int64_t count) {
    weights.emplace_back(new std::vector<float>(static_cast<size_t>(count)));
    for (float& number : *weights.back()) number = random();
    return weights.back()->data();
  }
  MambacoreStepOperation& add(int32_t kind, int64_t source, int64_t target, int64_t width) {
    MambacoreStepOperation operation;
    std::memset(&operation, 0, sizeof operation);
    operation.kind = kind, operation.source = source, operation.target = target, operation.width = width;
    operation.epsilon = 1e-5;
    operations.push_back(operation);
    return operations.back();
  }
  void linear(int64_t source, int64_t width, int64_t target, int64_t outputs) {
    auto& operation = add(MAMBACORE_LINEAR, source, target, width);
    operation.outputs = outputs, operation.weights[0] = numbers(width * outputs), operation.weights[1] = numbers(outputs);
  }
  void feed_forward(int64_t target, int64_t width) {
    auto& operation = add(MAMBACORE_FEED_FORWARD, 0, target, width);
    operation.inner_width = 2 * width, operation.weights[0] = numbers(width);
    operation.weights[1] = numbers(2 * width * width), operation.weights[2] = numbers(2 * width);
    operation.weights[3] = numbers(2 * width * width), operation.weights[4] = numbers(width);
  }
  // A scale of a U-Net of the widths from here on, in place on `hidden`.
  void scale(const std::vector<int64_t>& widths, const std::vector<int64_t>& factors, size_t depth, int64_t period, int64_t hidden) {
    const int64_t width = widths[depth];
    feed_forward(hidden, width);
    if (depth == factors.size()) return;
    const int64_t factor = factors[depth], below = widths[depth + 1];
    const int64_t skip = place(width), partial = place(factor * width), current = place(factor * width);
    const int64_t received = place(width), coarse = place(below);
    add(MAMBACORE_COPY, hidden, skip, width);
    for (const int32_t kind : {int32_t(MAMBACORE_UNFOLD), int32_t(MAMBACORE_FOLD)}) {
      auto& operation = kind == MAMBACORE_UNFOLD ? add(kind, current, received, width) : add(kind, hidden, partial, width);
      operation.period = period, operation.factor = factor;
    }
    const size_t group = operations.size();
    auto& opened = add(MAMBACORE_GROUP, 0, 0, 0);
    opened.period = period, opened.factor = factor;
    linear(partial, factor * width, coarse, below);
    scale(widths, factors, depth + 1, period * factor, coarse);
    linear(coarse, below, current, factor * width);
    operations[group].skip = static_cast<int64_t>(operations.size() - 1 - group);
    add(MAMBACORE_ADD, received, hidden, width);
    feed_forward(hidden, width);
    add(MAMBACORE_ADD, skip, hidden, width);
  }
};

struct Found {
  std::vector<float> memory;
  std::vector<int64_t> tokens, drawn;
};

Found generated(const Program& program, int64_t logits, int32_t threads, int64_t pieces, bool paired, int64_t steps, int64_t clips) {
  const int64_t rows = (paired ? 2 : 1) * clips;
  Found found{std::vector<float>(size_t(rows * program.memory)), std::vector<int64_t>(size_t(rows), 1), {}};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t count = steps / pieces;
    const auto numbers = static_cast<size_t>(count * clips);
    std::vector<double> uniforms(numbers), likelihoods(numbers);
    std::vector<int64_t> drawn(numbers);
    for (size_t number = 0; number < numbers; ++number)
      uniforms[number] = double((size_t(piece) * numbers + number) * 7919 % 10007) / 10007;
    MambacoreGeneration work;
    std::memset(&work, 0, sizeof work);
    work.batch = rows, work.count = count, work.operation_count = int64_t(program.operations.size());
    work.position = piece * count, work.memory_size = program.memory, work.logits = logits, work.classes = classes;
    work.element = MAMBACORE_FLOAT32, work.threads = threads, work.temperature = 1, work.top_p = 1;
    work.operations = program.operations.data(), work.memory = found.memory.data(), work.tokens = found.tokens.data();
    work.uniforms = uniforms.data(), work.drawn = drawn.data(), work.log_likelihoods = likelihoods.data();
    work.helped = 1, work.paired = paired, work.guidance = 1.5;
    mambacore::baseline::generate(work);
    found.drawn.insert(found.drawn.end(), drawn.begin(), drawn.end());
  }
  return found;
}

bool equal(const Program& program, int64_t logits, bool paired, int64_t steps, int64_t clips) {
  const Found one = generated(program, logits, 1, 1, paired, steps, clips);
  for (const int64_t pieces : {1, 40}) {
    if (clips > 1 && pieces > 1) continue;  // uniforms of several clips depend on the pieces
    const Found two = generated(program, logits, 2, pieces, paired, steps, clips);
    if (one.drawn != two.drawn || one.tokens != two.tokens || one.memory != two.memory) return false;
  }
  return true;
}

}  // namespace

int main() {
  bool same = true;
  for (const std::vector<int64_t>& factors : {std::vector<int64_t>{4, 4}, {2, 3, 2}, {3}}) {
    Program program;
    const int64_t hidden = program.place(16), logits = program.place(classes);
    auto& embed = program.add(MAMBACORE_EMBED, 0, hidden, 16);
    embed.weights[0] = program.numbers(classes * 16);
    program.scale({16, 32, 48, 64}, factors, 0, 1, hidden);
    program.linear(hidden, 16, logits, classes);
    for (const bool paired : {false, true}) same = same && equal(program, logits, paired, 2000, 1);
  }
  Program stack;  // whose weights two caches hold and one does not
  const int64_t hidden = stack.place(192), logits = stack.place(classes);
  stack.add(MAMBACORE_EMBED, 0, hidden, 192).weights[0] = stack.numbers(classes * 192);
  for (int layer = 0; layer < 2; ++layer) stack.feed_forward(hidden, 192);
  stack.linear(hidden, 192, logits, classes);
  for (const bool paired : {false, true}) same = same && equal(stack, logits, paired, 40, 3);
  Program beside;  // two groups side by side that touch the same memory: nothing is left to a second thread
  const int64_t shared = beside.place(16), found = beside.place(classes), between = beside.place(16);
  beside.add(MAMBACORE_EMBED, 0, shared, 16).weights[0] = beside.numbers(classes * 16);
  for (int group = 0; group < 2; ++group) {
    auto& opened = beside.add(MAMBACORE_GROUP, 0, 0, 0);
    opened.period = 1, opened.factor = 2, opened.skip = 2;
    beside.feed_forward(between, 16);
    beside.linear(shared, 16, between, 16);
  }
  beside.add(MAMBACORE_ADD, between, shared, 16);
  beside.linear(shared, 16, found, classes);
  for (const bool paired : {false, true}) same = same && equal(beside, found, paired, 400, 1);
  std::puts(same ? "equal" : "two threads leave something else than one");
  return same ? 0 : 1;
}
