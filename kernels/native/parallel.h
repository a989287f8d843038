// Threads for the tasks of one call.
//
// When the process already has a team of threads (PyTorch's OpenMP team; Python hands its entry over), the tasks run on
// it: its members wait for work by spinning, so threads of our own would share their cores and take about twice as long.
// Otherwise threads are started per call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace mambacore {

// Calls member(argument) on every one of `threads` members of a team and returns when all are done: GOMP_parallel.
using Team = void (*)(void (*member)(void*), void* argument, unsigned threads, unsigned flags);
extern std::atomic<Team> team;  // null: none

// Calls task(index) for every index in [0, tasks). Threads take the indices as they come free, so results may not depend
// on which thread ran which task. An exception of a task (memory ran out) ends the loop and is thrown to the caller once
// every thread has stopped: one that left a thread, or a member of a team, would end the process.
template <typename Task> void parallel_for(int64_t tasks, int64_t threads, const Task& task) {
  threads = std::max<int64_t>(1, std::min(tasks, threads));
  struct Shared {
    const Task& task;
    const int64_t tasks;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
    std::exception_ptr error;  // written by the one thread that sets `failed`
    static void work(void* argument) noexcept {
      Shared& shared = *static_cast<Shared*>(argument);
      try {
        for (int64_t index = shared.next++; index < shared.tasks; index = shared.next++) shared.task(index);
      } catch (...) {
        shared.next = shared.tasks;
        if (!shared.failed.exchange(true)) shared.error = std::current_exception();
      }
    }
  } shared{task, tasks, {0}, {false}, nullptr};
  if (threads == 1) {
    for (int64_t index = 0; index < tasks; ++index) task(index);
    return;
  }
  if (const Team run = team.load()) {
    run(Shared::work, &shared, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      others.reserve(static_cast<size_t>(threads));
      for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(Shared::work, &shared);
    } catch (const std::exception&) {
      // No further thread can be had; those that started share the work.
    }
    Shared::work(&shared);
    for (std::thread& other : others) other.join();
  }
  if (shared.failed) std::rethrow_exception(shared.error);
}

// Memory aligned for vectors, released with the object.
template <typename Vector> class Scratch {
 public:
  explicit Scratch(int64_t count) : size_(count) {
    constexpr size_t alignment = std::max<size_t>(64, alignof(Vector));
    storage_.resize(static_cast<size_t>(count) * sizeof(Vector) + alignment);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = reinterpret_cast<Vector*>((address + alignment - 1) & ~uintptr_t(alignment - 1));
  }
  Vector* data() { return data_; }
  const Vector* data() const { return data_; }
  int64_t size() const { return size_; }
  Vector& operator[](int64_t index) { return data_[index]; }

 private:
  int64_t size_;
  std::vector<char> storage_;  // zeroed: what a test reads before it is written is at least always the same
  Vector* data_;
};

}  // namespace mambacore
