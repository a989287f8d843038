// Threads are started per call: that costs microseconds where a call takes milliseconds, and a forked data worker can
// never inherit a pool whose threads are gone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace mambacore {

// Calls task(index) for every index in [0, tasks). Which thread takes which index is fixed by the counts.
template <typename Task> void parallel_for(int64_t tasks, int64_t threads, const Task& task) {
  threads = std::max<int64_t>(1, std::min(tasks, threads));
  auto work = [&](int64_t thread) {
    for (int64_t index = tasks * thread / threads; index < tasks * (thread + 1) / threads; ++index) task(index);
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

// Memory aligned for vectors, released with the object.
template <typename Vector> class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(Vector) + 64) {
    storage_.resize(bytes_);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = reinterpret_cast<Vector*>((address + 63) & ~uintptr_t(63));
  }
  Vector* data() { return data_; }
  Vector& operator[](int64_t index) { return data_[index]; }

 private:
  size_t bytes_;
  std::vector<char> storage_;  // zeroed: what a test reads before it is written is at least always the same
  Vector* data_;
};

}  // namespace mambacore
