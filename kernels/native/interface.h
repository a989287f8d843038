// The C interface of the library: plain structures filled in by Python's ctypes. Every size and stride counts
// elements, not bytes, in 64 bits. Channels are always contiguous. `element` types: what inputs and outputs are kept
// in; everything else (matrices, states, parameter gradients) is in the compute type: double for double, else float.
#pragma once

#include <cstdint>

// Status that every kernel returns.
enum MambacoreStatus : int32_t { MAMBACORE_OK = 0, MAMBACORE_OUT_OF_MEMORY = 1, MAMBACORE_FAILED = 2 };

enum MambacoreElement : int32_t { MAMBACORE_FLOAT32 = 0, MAMBACORE_BFLOAT16 = 1, MAMBACORE_FLOAT64 = 2, MAMBACORE_INT8 = 3 };

extern "C" {

// A (batch, length, channels) tensor of elements.
struct MambacoreSequence {
  void* data;
  int64_t batch_stride, row_stride;
};
// A (batch, length, groups, state_size) tensor of states, whose numbers are contiguous; or, when `fixed`, one that does
// not depend on time: (channels, state_size), contiguous. Strides count real numbers.
struct MambacoreMatrix {
  void* data;
  int64_t batch_stride, row_stride, group_stride;
  int64_t fixed;
};

// How a scan is cut into tasks that threads take: each (batch item, group) into `ranges` of channels and `segments` of
// the length. A function of the sizes and the thread count alone, so results repeat for a given thread count.
struct MambacoreScanPlan {
  int64_t ranges, segments;
};

// States are real numbers of the compute type, or complex ones: pairs of them.
struct MambacoreScan {
  int64_t batch, length, channels, groups, state_size;
  int64_t boundary_interval;  // positions from one kept state to the next
  int32_t element, reverse, step_softplus, threads, is_complex, unused;
  MambacoreScanPlan plan;
  MambacoreSequence inputs, step_size, gate;  // gate.data may be null
  MambacoreMatrix input_matrix, output_matrix;
  const void *state_matrix, *skip_weight, *step_bias, *initial_state;  // all but the first may be null
  const uint8_t* resets;  // (batch, length): where the state that arrives counts as zero; may be null
  // forward
  MambacoreSequence outputs;
  void* final_state;    // (batch, channels, state_size)
  // (batch, intervals, numbers, channels): the state before each interval, numbers being the real and imaginary parts of
  // the states in turn; may be null.
  void* boundary_states;
  // backward
  MambacoreSequence grad_outputs, grad_inputs, grad_step_size, grad_gate;
  const void* grad_final_state;                     // may be null
  // (ranges, batch, length, groups, state_size), or, of a fixed matrix, (batch * segments, channels, state_size).
  void *grad_input_matrix, *grad_output_matrix;
  void* grad_state_matrix;                          // (batch * segments, channels, state_size)
  void *grad_skip_weight, *grad_step_bias;          // (batch * segments, channels)
  void* grad_initial_state;                         // (batch, channels, state_size)
};

// output_t = activation(bias + sum over taps of weight[tap] * input[t - (kernel_width - 1) + tap]).
struct MambacoreConvolution {
  int64_t batch, length, channels, kernel_width;
  int32_t element, reverse, silu, threads;
  MambacoreSequence inputs;
  const void *weight, *bias;  // (kernel_width, channels); (channels,) or null
  // (batch, kernel_width - 1, channels) of elements, in scan order, or null: the state is made of inputs.
  const void* initial_state;
  MambacoreSequence outputs;
  // backward
  MambacoreSequence grad_outputs, grad_inputs;
  void *grad_weight, *grad_bias;  // (batch * segments, kernel_width, channels); (batch * segments, channels)
  void* grad_initial_state;       // (batch, kernel_width - 1, channels) or null
  int64_t segments;               // stretches of the length that threads take
  const uint8_t* resets;          // (batch, length): where no tap reaches further back; may be null
};

// Root-mean-square normalisation of contiguous (rows, width) elements.
struct MambacoreNorm {
  int64_t rows, width;
  int32_t element, threads;
  double epsilon;
  const void *inputs, *weight;  // (rows, width) of elements; (width,) of the compute type
  void *outputs, *inverse;      // (rows, width); (rows,) of the compute type: forward writes it, backward reads it
  // backward
  const void* grad_outputs;
  void *grad_inputs, *grad_weight;  // (rows, width); (segments, width) of the compute type
  int64_t segments;                 // stretches of the rows that threads take
  // What is normalised is inputs * silu(gate) where there is a gate: (rows, width) with a stride between its rows.
  const void* gate;
  int64_t gate_stride;
  void* grad_gate;  // (rows, width)
};

// One position of `batch` sequences through a residual selective block. Parameters, the sequence and the convolution's
// state are elements; the scan's state is in the compute type. Weights are (outputs, inputs), as linear layers keep them.
struct MambacoreBlockStep {
  int64_t batch, model_width, inner_width, state_size, kernel_width, step_rank;
  int32_t element, threads;
  double epsilon;
  const void *norm_weight, *input_weight, *input_bias;       // input_bias may be null
  const void *convolution_weight, *convolution_bias;         // (inner_width, kernel_width); may be null
  const void *selection_weight, *step_weight, *step_bias;
  const void *log_decay_rate, *frequency, *skip_weight;      // frequency: null when the state is real
  const void *output_weight, *output_bias;                   // output_bias may be null
  const void *sequence, *convolution_state, *scan_state;     // the states may be null: zeros
  void *outputs, *new_convolution_state, *new_scan_state;
};

// `length` positions of `batch` sequences through a residual selective block with real states, all in float32; products in
// bfloat16 where that is asked for. Parameters are as in `MambacoreBlockStep`; biases and states that come in may be null.
struct MambacoreBlock {
  int64_t batch, length, model_width, inner_width, state_size, kernel_width, step_rank;
  int64_t batch_stride, row_stride;  // of the sequence
  int32_t bfloat16, threads;
  double epsilon;
  const float *norm_weight, *input_weight, *input_bias, *convolution_weight, *convolution_bias, *selection_weight;
  const float *step_weight, *step_bias, *log_decay_rate, *skip_weight, *output_weight, *output_bias;
  const float *sequence, *convolution_state, *scan_state;
  float *outputs, *new_convolution_state, *new_scan_state;  // outputs: (batch, length, model_width), contiguous
};

// One position of `batch` sequences through a residual Mamba-2 or Mamba-3 block. Parameters, the sequence and the states are
// elements; but the scan's state is in the compute type and angles are double. States may be null: zeros.
struct MambacoreDualStep {
  int64_t batch, model_width, projected_width, inner_width, state_size, heads, groups;
  int64_t kernel_width;  // of Mamba-2
  int64_t rank, angles;  // of Mamba-3
  int32_t element, threads, is_mamba3, is_trapezoidal;
  double epsilon, inner_epsilon, output_epsilon;  // of the norm before the mixer and of those within it
  double smallest_step, largest_step;             // of Mamba-2
  // Biases of projections may be null.
  const void *norm_weight, *input_weight, *input_bias, *step_bias, *skip_weight, *output_weight, *output_bias;
  const void *convolution_weight, *convolution_bias, *log_decay_rate, *gate_norm_weight;  // of Mamba-2; the bias may be null
  // Of Mamba-3: the norms' weights (state_size,), the biases (heads, rank, state_size); (heads, rank, head_width) or null
  // for rank 1; (inner_width,) or null.
  const void *input_norm_weight, *output_norm_weight, *input_matrix_bias, *output_matrix_bias;
  const void *rank_inputs, *rank_gates, *rank_outputs, *head_norm_weight;
  const void *sequence, *convolution_state, *scan_state, *angle_state, *key_state, *value_state;
  void *outputs, *new_convolution_state, *new_scan_state, *new_angle_state, *new_key_state, *new_value_state;
};

// What one operation of a program of steps does to the memory of a sequence. Offsets and sizes count numbers.
enum MambacoreOperationKind : int32_t {
  MAMBACORE_EMBED = 0,         // target = row of the token in weights[0] (tokens, width)
  MAMBACORE_NORM = 1,          // target = root-mean-square norm of source, weights[0]
  MAMBACORE_LINEAR = 2,        // target = weights[0] source + weights[1]
  MAMBACORE_COPY = 3,          // target = source
  MAMBACORE_ADD = 4,           // target += source
  MAMBACORE_SELECTIVE = 5,     // target += the selective mixer of its norm
  MAMBACORE_S4D = 6,           // target += the S4D mixer of its norm
  MAMBACORE_FEED_FORWARD = 7,  // target += linear(GELU(linear(norm(target))))
  MAMBACORE_FOLD = 8,          // a group's member: (target + phase * width) = source
  MAMBACORE_UNFOLD = 9,        // target = (source + phase * width)
  MAMBACORE_GROUP = 10,        // leave the next `skip` operations out unless this position completes a group
  MAMBACORE_MAMBA2 = 11,       // target += the Mamba-2 mixer of its norm
  MAMBACORE_MAMBA3 = 12,       // target += the Mamba-3 mixer of its norm
};

// phase = (position / period) modulo factor; a group is complete when position + 1 is a multiple of period * factor.
// Weights of linear layers are of the weight type and in panels (panels.h), those from a selective layer's step rank always of
// the compute type; their biases are of the compute type. All numbers per channel are padded with zeros to a multiple of 16 channels,
// in each half of a projection. Numbers per state lie as (channels / 16, states, 16) in selective layers and as (states,
// channels) in others: neighbouring channels in neighbouring lanes. Which weight is which, kind by kind, stands in
// generation_kernel.cpp.
struct MambacoreStepOperation {
  int32_t kind, is_complex;
  int64_t source, target, state;  // offsets into the sequence's memory
  int64_t width, outputs, inner_width, state_size, kernel_width, step_rank;
  int64_t period, factor, skip;
  int64_t heads, groups, rank, angles, is_trapezoidal;  // of Mamba-2 and Mamba-3, with outputs inner channels
  double epsilon, inner_epsilon, output_epsilon;        // of the norm before the mixer and of those within it
  int64_t weight_element;   // of linear layers: the compute type, or bfloat16 or int8 beside float32
  const void* weights[13];  // those that a kind does not need, and biases that are not there, are null
};

// `count` steps of `batch` sequences: each runs the program on its token, then draws the next one from the logits.
struct MambacoreGeneration {
  int64_t batch, count, operation_count, position, memory_size, logits, classes;
  int32_t element, threads;
  double temperature, top_p;
  const MambacoreStepOperation* operations;
  void* memory;             // (batch, memory_size): states and activations
  int64_t* tokens;          // (batch,): read, then the last ones
  const double* uniforms;   // (batch, count), from 0 to below 1; not read where `given` is
  const int64_t* given;     // (batch, count): tokens to take instead of drawing them; may be null
  int64_t* drawn;           // (batch, count)
  double* log_likelihoods;  // (batch, count): of what was drawn, by the logits as they are
  int64_t helped;  // not 0: threads beyond the sequences run groups of the program beside its other operations
  // Pairs: sequence `n` of the first half of the batch and sequence `n` of the second follow one token, drawn from
  // second + guidance (first - second) of their logits. Then uniforms, given, drawn and log_likelihoods (by the first's
  // logits) have half as many rows as the batch, which is even.
  int64_t paired;
  double guidance;
};

// A (batch, rows, heads, width) tensor of elements with contiguous widths; rows are positions, each `rank` times.
struct MambacoreHeads {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// The state space dual scan. States, decays, weights and their gradients are in the compute type.
struct MambacoreSsd {
  int64_t batch, length, heads, groups, head_width, state_size, rank;
  int64_t chunk;   // positions from one kept state to the next
  int64_t ranges;  // stretches of the heads of a group, one task each; they divide the heads of a group
  int32_t element, reverse, threads, unused;
  MambacoreHeads inputs, input_matrix, output_matrix;  // the matrices: groups instead of heads
  const void *log_decay, *input_weight, *own_weight;   // (batch, length, heads), contiguous; the last may be null
  const void *skip_weight, *initial_state;             // (heads,); (batch, heads, head_width, state_size); may be null
  const uint8_t* resets;  // (batch, length): where the state that arrives counts as zero; may be null
  // forward
  MambacoreHeads outputs;
  void* final_state;
  void* boundary_states;  // (batch, chunks, heads, head_width, state_size): before each chunk; may be null in forward
  // backward
  MambacoreHeads grad_outputs, grad_inputs;
  const void* grad_final_state;                                  // may be null
  void *grad_input_matrix, *grad_output_matrix;                  // (ranges, batch, rows, groups, state_size)
  void *grad_log_decay, *grad_input_weight, *grad_own_weight;    // as above; the last is null where own_weight is
  void *grad_skip_weight, *grad_initial_state;                   // (batch, heads); as initial_state
};

}  // extern "C"
