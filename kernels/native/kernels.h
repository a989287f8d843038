// What every instruction set's translation units provide, each in a namespace of its own.
#pragma once

#include "interface.h"

#define MAMBACORE_DECLARE_KERNELS(instruction_set)                    \
  namespace mambacore {                                               \
  namespace instruction_set {                                         \
  MambacoreScanPlan plan_scan(const MambacoreScan& scan);             \
  void scan_forward(const MambacoreScan& scan);                       \
  void scan_backward(const MambacoreScan& scan);                      \
  void convolution_forward(const MambacoreConvolution& convolution);  \
  void convolution_backward(const MambacoreConvolution& convolution); \
  void norm_forward(const MambacoreNorm& norm);                       \
  void norm_backward(const MambacoreNorm& norm);                      \
  void block_step(const MambacoreBlockStep& step);                    \
  void block_forward(const MambacoreBlock& block);                    \
  void dual_step(const MambacoreDualStep& step);                      \
  void generate(const MambacoreGeneration& generation);               \
  void ssd_forward(const MambacoreSsd& scan);                         \
  void ssd_backward(const MambacoreSsd& scan);                        \
  }                                                                   \
  }

MAMBACORE_DECLARE_KERNELS(baseline)
MAMBACORE_DECLARE_KERNELS(avx2)
MAMBACORE_DECLARE_KERNELS(avx512)
