// Chooses the instruction set once, at the first call, and hands each call on.

#include "interface.h"

#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>

#include "kernels.h"
#include "parallel.h"

std::atomic<mambacore::Team> mambacore::team{nullptr};

namespace {

struct InstructionSet {
  const char* name;
  MambacoreScanPlan (*plan_scan)(const MambacoreScan&);
  void (*scan_forward)(const MambacoreScan&);
  void (*scan_backward)(const MambacoreScan&);
  void (*convolution_forward)(const MambacoreConvolution&);
  void (*convolution_backward)(const MambacoreConvolution&);
  void (*norm_forward)(const MambacoreNorm&);
  void (*norm_backward)(const MambacoreNorm&);
  void (*block_step)(const MambacoreBlockStep&);
  void (*block_forward)(const MambacoreBlock&);
  void (*dual_step)(const MambacoreDualStep&);
  void (*generate)(const MambacoreGeneration&);
  void (*ssd_forward)(const MambacoreSsd&);
  void (*ssd_backward)(const MambacoreSsd&);
  bool (*supported)();
};

#define MAMBACORE_SET(set, test)                                                                              \
  {                                                                                                           \
    #set, mambacore::set::plan_scan, mambacore::set::scan_forward, mambacore::set::scan_backward,             \
        mambacore::set::convolution_forward, mambacore::set::convolution_backward,                            \
        mambacore::set::norm_forward, mambacore::set::norm_backward, mambacore::set::block_step,              \
        mambacore::set::block_forward, mambacore::set::dual_step, mambacore::set::generate,                   \
        mambacore::set::ssd_forward, mambacore::set::ssd_backward, [] { return bool(test); }                  \
  }

// Best first.
const InstructionSet instruction_sets[] = {
#if defined(MAMBACORE_HAS_AVX512)
    MAMBACORE_SET(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
#endif
#if defined(MAMBACORE_HAS_AVX2)
    MAMBACORE_SET(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    MAMBACORE_SET(baseline, true),
};

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load();
  if (set == nullptr) {
    for (const InstructionSet& candidate : instruction_sets) {
      if (candidate.supported()) {
        set = &candidate;
        break;
      }
    }
    chosen.store(set);
  }
  return *set;
}

}  // namespace

#define MAMBACORE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Runs a kernel and says how it ended: no exception may leave a C function.
template <typename Kernel> int32_t status_of(const Kernel& kernel) noexcept {
  try {
    kernel();
    return MAMBACORE_OK;
  } catch (const std::bad_alloc&) {
    return MAMBACORE_OUT_OF_MEMORY;
  } catch (const std::length_error&) {  // more than any vector may hold
    return MAMBACORE_OUT_OF_MEMORY;
  } catch (...) {
    return MAMBACORE_FAILED;
  }
}

}  // namespace

// The layout of the structures in interface.h; Python refuses a library whose number differs from its own. A function that
// is new needs no new number: Python asks whether it is there (`Library.has_dual_step`).
MAMBACORE_EXPORT int32_t mambacore_interface_version() { return 15; }

MAMBACORE_EXPORT const char* mambacore_instruction_set() { return current().name; }

// Returns 1 when this processor has the named set and it is now in use, else 0.
MAMBACORE_EXPORT int32_t mambacore_use_instruction_set(const char* name) {
  for (const InstructionSet& candidate : instruction_sets) {
    if (std::strcmp(candidate.name, name) == 0 && candidate.supported()) {
      chosen.store(&candidate);
      return 1;
    }
  }
  return 0;
}

// Runs tasks on this team (the entry GOMP_parallel of an OpenMP library) from now on; null: on threads of their own.
MAMBACORE_EXPORT void mambacore_use_team(void* team) { mambacore::team.store(reinterpret_cast<mambacore::Team>(team)); }

MAMBACORE_EXPORT MambacoreScanPlan mambacore_plan_scan(const MambacoreScan* scan) { return current().plan_scan(*scan); }

// Each of these returns a MambacoreStatus.
#define MAMBACORE_EXPORT_KERNEL(name, Arguments)                        \
  MAMBACORE_EXPORT int32_t mambacore_##name(const Arguments* arguments) { \
    return status_of([&] { current().name(*arguments); });              \
  }
MAMBACORE_EXPORT_KERNEL(scan_forward, MambacoreScan)
MAMBACORE_EXPORT_KERNEL(scan_backward, MambacoreScan)
MAMBACORE_EXPORT_KERNEL(convolution_forward, MambacoreConvolution)
MAMBACORE_EXPORT_KERNEL(convolution_backward, MambacoreConvolution)
MAMBACORE_EXPORT_KERNEL(norm_forward, MambacoreNorm)
MAMBACORE_EXPORT_KERNEL(norm_backward, MambacoreNorm)
MAMBACORE_EXPORT_KERNEL(block_step, MambacoreBlockStep)
MAMBACORE_EXPORT_KERNEL(block_forward, MambacoreBlock)
MAMBACORE_EXPORT_KERNEL(dual_step, MambacoreDualStep)
MAMBACORE_EXPORT_KERNEL(generate, MambacoreGeneration)
MAMBACORE_EXPORT_KERNEL(ssd_forward, MambacoreSsd)
MAMBACORE_EXPORT_KERNEL(ssd_backward, MambacoreSsd)
