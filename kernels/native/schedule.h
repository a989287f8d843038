// Who runs which operations of a program of steps, when two threads share the steps of one sequence.
//
// The operations of a group, which a pooling runs once in so many steps, read and write little that others do. So the thread
// that walks through the program may leave them to a second one, and needs them done no sooner than before the first
// operation that touches their memory: of a U-Net, before what the group found is handed to the finer positions. Groups
// inside of a group are left in the same way. All of this follows from which memory each operation touches.
//
// A group that nobody has begun when it is needed is run by the thread that needs it, so nothing ever waits for a thread that
// does not run: on a busy machine, or where no second thread could be had, the first does all the work. What is computed is the
// same whoever does it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "interface.h"

namespace mambacore {
namespace MAMBACORE_INSTRUCTION_SET {

// The groups of a program, and which of them each operation needs done. Offsets count numbers.
class Schedule {
 public:
  static constexpr int64_t most_groups = 64;  // as many as bits

  struct Group {
    int64_t begin, end, period;  // its operations; positions from one run to the next
  };

  Schedule(const MambacoreStepOperation* operations, int64_t count, int64_t logits, int64_t classes) : needs_(size_t(count), 0) {
    for (int64_t number = 0; number < count; ++number) {
      const auto& operation = operations[number];
      if (operation.kind != MAMBACORE_GROUP) continue;
      group_at_.push_back(number);
      groups_.push_back({number + 1, number + 1 + operation.skip, operation.period * operation.factor});
    }
    bool fit = static_cast<int64_t>(groups_.size()) <= most_groups;
    for (const Group& group : groups_)  // the tokens belong to the thread that draws them
      for (int64_t number = group.begin; number < group.end; ++number) fit = fit && operations[number].kind != MAMBACORE_EMBED;
    if (!fit) groups_.clear();
    for (size_t group = 0; group < groups_.size(); ++group) {
      std::vector<Touched> inside;
      for (int64_t number = groups_[group].begin; number < groups_[group].end; ++number) touch(operations[number], inside);
      for (int64_t number = 0; number < count; ++number) {
        if (number >= groups_[group].begin && number < groups_[group].end) continue;
        std::vector<Touched> here;
        touch(operations[number], here);
        if (meet(inside, here)) needs_[size_t(number)] |= uint64_t(1) << group;
      }
      if (meet(inside, {{logits, classes, false}})) draw_needs_ |= uint64_t(1) << group;
    }
    if (groups_wait_for_each_other()) {
      groups_.clear();
      draw_needs_ = 0;
    }
  }

  // The groups that may be left to another thread: all, or none.
  const std::vector<Group>& groups() const { return groups_; }
  // Whether the program may be cut anywhere.
  bool is_plain() const { return group_at_.empty(); }
  uint64_t needed_by(int64_t operation) const { return needs_[size_t(operation)]; }
  uint64_t needed_by_draw() const { return draw_needs_; }
  int64_t group_at(int64_t operation) const {
    for (size_t group = 0; group < groups_.size(); ++group)
      if (group_at_[group] == operation) return static_cast<int64_t>(group);
    return -1;
  }

 private:
  struct Touched {
    int64_t first, count;
    bool written;
  };

  // Whether groups that lie side by side touch the same memory. Of nested ones only the outer waits for the inner.
  bool groups_wait_for_each_other() const {
    for (size_t group = 0; group < groups_.size(); ++group) {
      for (const Group& other : groups_) {
        if (other.begin <= groups_[group].begin && groups_[group].end <= other.end) continue;  // itself, or around it
        for (int64_t number = other.begin; number < other.end; ++number)
          if ((needs_[size_t(number)] >> group & 1) != 0) return true;
      }
    }
    return false;
  }

  // Activations. A state is touched by its own operation alone.
  static void touch(const MambacoreStepOperation& operation, std::vector<Touched>& found) {
    const int64_t width = operation.width;
    switch (operation.kind) {
      case MAMBACORE_EMBED: found.push_back({operation.target, width, true}); break;
      case MAMBACORE_NORM:
      case MAMBACORE_COPY:
        found.push_back({operation.source, width, false});
        found.push_back({operation.target, width, true});
        break;
      case MAMBACORE_LINEAR:
        found.push_back({operation.source, width, false});
        found.push_back({operation.target, operation.outputs, true});
        break;
      case MAMBACORE_ADD:
        found.push_back({operation.source, width, false});
        found.push_back({operation.target, width, true});
        break;
      case MAMBACORE_FOLD:
        found.push_back({operation.source, width, false});
        found.push_back({operation.target, width * operation.factor, true});
        break;
      case MAMBACORE_UNFOLD:
        found.push_back({operation.source, width * operation.factor, false});
        found.push_back({operation.target, width, true});
        break;
      case MAMBACORE_GROUP: break;
      default: found.push_back({operation.target, width, true});
    }
  }
  static bool meet(const std::vector<Touched>& some, const std::vector<Touched>& others) {
    for (const Touched& one : some)
      for (const Touched& other : others)
        if ((one.written || other.written) && one.first < other.first + other.count && other.first < one.first + one.count) return true;
    return false;
  }

  std::vector<Group> groups_;
  std::vector<int64_t> group_at_;
  std::vector<uint64_t> needs_;
  uint64_t draw_needs_ = 0;
};

// Waits a little longer each time: at first on the core, then handing it to whoever wants it, then asleep.
class Patience {
 public:
  explicit Patience(bool may_sleep) : may_sleep_(may_sleep) {}
  void wait() {
    constexpr int on_the_core = 64, before_sleep = 4000;
    ++times_;
    if (times_ <= on_the_core) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } else if (!may_sleep_ || times_ <= before_sleep) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
  void renew() { times_ = 0; }

 private:
  bool may_sleep_;
  int times_ = 0;
};

// Two threads that relay two walks through a program without groups: each prefers one half of the operations, whose weights
// then stay in its own cache, and passes the walk on. A walk is a function of its own steps alone, so it does not matter who
// runs what; a thread that finds nothing of its half for a while, or is alone, takes the other half too.
class Relay {
 public:
  // `stages` of both halves, in turn, make up a walk.
  explicit Relay(int64_t stages) : stages_(stages) {}

  // Runs stages until both walks are over: run(walk, stage), of which the even ones are of the first half.
  template <typename Run> void take_part(int half, const Run& run) {
    constexpr int waits_for_own_half = 256;
    threads_.fetch_add(1, std::memory_order_relaxed);
    Patience patience(false);
    int waited = 0, next = half;  // the walk to look at
    while (!failed_.load(std::memory_order_acquire)) {
      if (walks_[0].stage.load(std::memory_order_acquire) == stages_ && walks_[1].stage.load(std::memory_order_acquire) == stages_) return;
      const bool any = waited >= waits_for_own_half || threads_.load(std::memory_order_relaxed) == 1;
      bool found = false;
      for (int tried = 0; tried < 2 && !found; ++tried, next = 1 - next) {
        Walk& walk = walks_[next];
        const auto fits = [&] {
          const int64_t stage = walk.stage.load(std::memory_order_acquire);
          return stage < stages_ && (any || stage % 2 == half);
        };
        if (!fits() || walk.busy.exchange(true, std::memory_order_acquire)) continue;
        if (fits()) {
          found = true;
          try {
            run(next, walk.stage.load(std::memory_order_relaxed));
          } catch (...) {
            failed_.store(true, std::memory_order_release);
            walk.busy.store(false, std::memory_order_release);
            throw;
          }
          walk.stage.fetch_add(1, std::memory_order_release);
        }
        walk.busy.store(false, std::memory_order_release);
      }
      if (found) {
        waited = 0;
        patience.renew();
      } else {
        ++waited;
        patience.wait();
      }
    }
  }

 private:
  struct alignas(64) Walk {
    std::atomic<int64_t> stage{0};
    std::atomic<bool> busy{false};
  };
  const int64_t stages_;
  Walk walks_[2];
  std::atomic<int> threads_{0};
  std::atomic<bool> failed_{false};
};

// The groups of one walk through the steps that wait for a thread, or are being run. `Run` is called as
// run(group, position, helper).
class Handover {
 public:
  explicit Handover(const Schedule& schedule) : schedule_(schedule), posts_(new Post[schedule.groups().size()]) {}

  // Leaves a group at this position to whoever comes first. It is not waiting or running already.
  void post(int64_t group, int64_t position) {
    posts_[group].position = position;
    posts_[group].state.store(waiting, std::memory_order_release);
  }

  // Returns when these groups are done, by running those that no thread has begun.
  template <typename Run> void need(uint64_t groups, bool helper, const Run& run) {
    for (int64_t group = 0; groups != 0; ++group, groups >>= 1) {
      if ((groups & 1) == 0 || posts_[group].state.load(std::memory_order_acquire) == idle) continue;
      if (take(group)) {
        run_taken(group, helper, run);
      } else {
        Patience patience(false);
        while (posts_[group].state.load(std::memory_order_acquire) != idle) patience.wait();
      }
      if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
    }
  }
  template <typename Run> void need_all(const Run& run) {
    const size_t count = schedule_.groups().size();
    need(count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1, false, run);
  }

  // The second thread: runs groups as they are left, the soonest needed first, until the walk is over.
  template <typename Run> void help(const Run& run) noexcept {
    Patience patience(true);
    const auto count = static_cast<int64_t>(schedule_.groups().size());
    while (!closed_.load(std::memory_order_acquire)) {
      bool found = false;
      for (int64_t group = 0; group < count && !found; ++group) {
        if (!take(group)) continue;
        found = true;
        try {
          run_taken(group, true, run);
        } catch (...) {
          // Kept for the first thread, which finds it when it needs the group.
        }
      }
      if (found) patience.renew();
      else patience.wait();
    }
  }
  void close() { closed_.store(true, std::memory_order_release); }

 private:
  enum State : int { idle, waiting, taken };
  struct alignas(64) Post {
    std::atomic<int> state{idle};
    int64_t position = 0;
  };

  bool take(int64_t group) {
    int expected = waiting;
    return posts_[group].state.load(std::memory_order_relaxed) == waiting &&
           posts_[group].state.compare_exchange_strong(expected, taken, std::memory_order_acquire, std::memory_order_relaxed);
  }
  template <typename Run> void run_taken(int64_t group, bool helper, const Run& run) {
    try {
      run(group, posts_[group].position, helper);
    } catch (...) {
      if (!failing_.exchange(true)) {
        error_ = std::current_exception();
        failed_.store(true, std::memory_order_release);
      }
      posts_[group].state.store(idle, std::memory_order_release);
      throw;
    }
    posts_[group].state.store(idle, std::memory_order_release);
  }

  const Schedule& schedule_;
  std::unique_ptr<Post[]> posts_;
  std::atomic<bool> closed_{false}, failing_{false}, failed_{false};
  std::exception_ptr error_;
};

}  // namespace MAMBACORE_INSTRUCTION_SET
}  // namespace mambacore
