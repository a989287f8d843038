// Threads for the tasks of one call.
//
// When the process already has a team of threads (PyTorch's OpenMP team; Python hands its entry over), the tasks run on
// it: its members wait for work by spinning, so threads of our own would share their cores and take about twice as long.
// Otherwise threads are started per call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mambacore {

// Calls member(argument) on every one of `threads` members of a team and returns when all are done: GOMP_parallel.
using Team = void (*)(void (*member)(void*), void* argument, unsigned threads, unsigned flags);
extern std::atomic<Team> team;  // null: none

// Calls task(index) for every index in [0, tasks). Threads take the indices as they come free, so results may not depend
// on which thread ran which task.
template <typename Task> void parallel_for(int64_t tasks, int64_t threads, const Task& task) {
  threads = std::max<int64_t>(1, std::min(tasks, threads));
  struct Shared {
    const Task& task;
    const int64_t tasks;
    std::atomic<int64_t> next;
    static void work(void* argument) {
      Shared& shared = *static_cast<Shared*>(argument);
      for (int64_t index = shared.next++; index < shared.tasks; index = shared.next++) shared.task(index);
    }
  } shared{task, tasks, {0}};
  if (threads == 1) return Shared::work(&shared);
  if (const Team run = team.load()) return run(Shared::work, &shared, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(Shared::work, &shared);
  Shared::work(&shared);
  for (std::thread& other : others) other.join();
}

// Memory aligned for vectors, released with the object.
template <typename Vector> class Scratch {
 public:
  explicit Scratch(int64_t count) : size_(count) {
    storage_.resize(static_cast<size_t>(count) * sizeof(Vector) + 64);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = reinterpret_cast<Vector*>((address + 63) & ~uintptr_t(63));
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
