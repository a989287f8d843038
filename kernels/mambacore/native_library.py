"""The native CPU library (kernels/native): finds and opens it, once per process, and mirrors its C structures.

A missing library (the package was installed where there was no C++ compiler) is not an error: everything works through
PyTorch, slower, and one warning says so. A library that is there and cannot be used is an error.
"""

import ctypes
import functools
import importlib.resources
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERFACE_VERSION = 15
OK, OUT_OF_MEMORY = 0, 1  # MambacoreStatus
INSTRUCTION_SET_VARIABLE = "MAMBACORE_INSTRUCTION_SET"
# Path of another build of the library, such as one with sanitizers.
LIBRARY_VARIABLE = "MAMBACORE_NATIVE_LIBRARY"

_FILE_NAME = "libmambacore_native.dylib" if sys.platform == "darwin" else "libmambacore_native.so"


class Sequence(ctypes.Structure):
    """A (batch, length, channels) tensor: `MambacoreSequence`."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64))


class Matrix(ctypes.Structure):
    """A (batch, length, groups, state_size) tensor, or a fixed (channels, state_size) one: `MambacoreMatrix`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("group_stride", ctypes.c_int64),
        ("fixed", ctypes.c_int64),
    )


class ScanPlan(ctypes.Structure):
    """How a scan is cut into tasks: `MambacoreScanPlan`."""

    _fields_ = (("ranges", ctypes.c_int64), ("segments", ctypes.c_int64))


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Scan(ctypes.Structure):
    """The arguments of a scan: `MambacoreScan`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch length channels groups state_size boundary_interval"),
        *_fields(ctypes.c_int32, "element reverse step_softplus threads is_complex unused"),
        ("plan", ScanPlan),
        *_fields(Sequence, "inputs step_size gate"),
        *_fields(Matrix, "input_matrix output_matrix"),
        *_fields(ctypes.c_void_p, "state_matrix skip_weight step_bias initial_state resets"),
        ("outputs", Sequence),
        *_fields(ctypes.c_void_p, "final_state boundary_states"),
        *_fields(Sequence, "grad_outputs grad_inputs grad_step_size grad_gate"),
        *_fields(
            ctypes.c_void_p,
            "grad_final_state grad_input_matrix grad_output_matrix grad_state_matrix grad_skip_weight grad_step_bias "
            "grad_initial_state",
        ),
    )


class Convolution(ctypes.Structure):
    """The arguments of a causal convolution: `MambacoreConvolution`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch length channels kernel_width"),
        *_fields(ctypes.c_int32, "element reverse silu threads"),
        ("inputs", Sequence),
        *_fields(ctypes.c_void_p, "weight bias initial_state"),
        *_fields(Sequence, "outputs grad_outputs grad_inputs"),
        *_fields(ctypes.c_void_p, "grad_weight grad_bias grad_initial_state"),
        ("segments", ctypes.c_int64),
        ("resets", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    """The arguments of a root-mean-square normalisation: `MambacoreNorm`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "rows width"),
        *_fields(ctypes.c_int32, "element threads"),
        ("epsilon", ctypes.c_double),
        *_fields(ctypes.c_void_p, "inputs weight outputs inverse grad_outputs grad_inputs grad_weight"),
        ("segments", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("gate_stride", ctypes.c_int64),
        ("grad_gate", ctypes.c_void_p),
    )


class BlockStep(ctypes.Structure):
    """The arguments of one position through a residual selective block: `MambacoreBlockStep`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch model_width inner_width state_size kernel_width step_rank"),
        *_fields(ctypes.c_int32, "element threads"),
        ("epsilon", ctypes.c_double),
        *_fields(
            ctypes.c_void_p,
            "norm_weight input_weight input_bias convolution_weight convolution_bias selection_weight step_weight "
            "step_bias log_decay_rate frequency skip_weight output_weight output_bias sequence convolution_state "
            "scan_state outputs new_convolution_state new_scan_state",
        ),
    )


class Block(ctypes.Structure):
    """The arguments of many positions through a residual selective block: `MambacoreBlock`."""

    _fields_ = (
        *_fields(
            ctypes.c_int64,
            "batch length model_width inner_width state_size kernel_width step_rank batch_stride row_stride",
        ),
        *_fields(ctypes.c_int32, "bfloat16 threads"),
        ("epsilon", ctypes.c_double),
        *_fields(
            ctypes.c_void_p,
            "norm_weight input_weight input_bias convolution_weight convolution_bias selection_weight step_weight "
            "step_bias log_decay_rate skip_weight output_weight output_bias sequence convolution_state scan_state "
            "outputs new_convolution_state new_scan_state",
        ),
    )


class DualStep(ctypes.Structure):
    """The arguments of one position through a residual Mamba-2 or Mamba-3 block: `MambacoreDualStep`."""

    _fields_ = (
        *_fields(
            ctypes.c_int64,
            "batch model_width projected_width inner_width state_size heads groups kernel_width rank angles",
        ),
        *_fields(ctypes.c_int32, "element threads is_mamba3 is_trapezoidal"),
        *_fields(ctypes.c_double, "epsilon inner_epsilon output_epsilon smallest_step largest_step"),
        *_fields(
            ctypes.c_void_p,
            "norm_weight input_weight input_bias step_bias skip_weight output_weight output_bias convolution_weight "
            "convolution_bias log_decay_rate gate_norm_weight input_norm_weight output_norm_weight input_matrix_bias "
            "output_matrix_bias rank_inputs rank_gates rank_outputs head_norm_weight sequence convolution_state "
            "scan_state angle_state key_state value_state outputs new_convolution_state new_scan_state "
            "new_angle_state new_key_state new_value_state",
        ),
    )


class StepOperation(ctypes.Structure):
    """One operation of a program of steps: `MambacoreStepOperation`."""

    _fields_ = (
        *_fields(ctypes.c_int32, "kind is_complex"),
        *_fields(
            ctypes.c_int64,
            "source target state width outputs inner_width state_size kernel_width step_rank period factor skip heads "
            "groups rank angles is_trapezoidal",
        ),
        *_fields(ctypes.c_double, "epsilon inner_epsilon output_epsilon"),
        ("weight_element", ctypes.c_int64),
        ("weights", ctypes.c_void_p * 13),
    )


class Generation(ctypes.Structure):
    """The arguments of many steps in a row: `MambacoreGeneration`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch count operation_count position memory_size logits classes"),
        *_fields(ctypes.c_int32, "element threads"),
        *_fields(ctypes.c_double, "temperature top_p"),
        *_fields(ctypes.c_void_p, "operations memory tokens uniforms given drawn log_likelihoods"),
        *_fields(ctypes.c_int64, "helped paired"),
        ("guidance", ctypes.c_double),
    )


class Heads(ctypes.Structure):
    """A (batch, rows, heads, width) tensor: `MambacoreHeads`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class Ssd(ctypes.Structure):
    """The arguments of a state space dual scan: `MambacoreSsd`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch length heads groups head_width state_size rank chunk ranges"),
        *_fields(ctypes.c_int32, "element reverse threads unused"),
        *_fields(Heads, "inputs input_matrix output_matrix"),
        *_fields(ctypes.c_void_p, "log_decay input_weight own_weight skip_weight initial_state resets"),
        ("outputs", Heads),
        *_fields(ctypes.c_void_p, "final_state boundary_states"),
        *_fields(Heads, "grad_outputs grad_inputs"),
        *_fields(
            ctypes.c_void_p,
            "grad_final_state grad_input_matrix grad_output_matrix grad_log_decay grad_input_weight grad_own_weight "
            "grad_skip_weight grad_initial_state",
        ),
    )


class Library:
    """The opened library. Its functions take one structure by reference and release Python's lock while they run."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._library.mambacore_interface_version()
        except (OSError, AttributeError) as error:
            raise ImportError(
                f"The native library {path} is there but cannot be opened ({error}); reinstall the package."
            ) from error
        if version != INTERFACE_VERSION:
            raise ImportError(
                f"The native library {path} has interface {version} but this package needs {INTERFACE_VERSION}; "
                "reinstall the package."
            )
        self._library.mambacore_instruction_set.restype = ctypes.c_char_p
        self._library.mambacore_plan_scan.restype = ScanPlan
        self.use_team(process_team())
        if hasattr(os, "register_at_fork"):  # a forked child has no team
            os.register_at_fork(after_in_child=lambda: self.use_team(None))
        wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
        if wanted:
            self.use_instruction_set(wanted)

    def use_team(self, entry: ctypes.c_void_p | None) -> None:
        """Run tasks on this OpenMP team from now on; None starts threads per call."""
        self._library.mambacore_use_team(entry)

    @property
    def instruction_set(self) -> str:
        """The instruction set in use: `avx512`, `avx2` or `baseline`."""
        return self._library.mambacore_instruction_set().decode()

    def use_instruction_set(self, name: str) -> None:
        """Select another instruction set.

        Raises:
            ValueError: if this library or this processor does not support it.
        """
        if not self._library.mambacore_use_instruction_set(name.encode()):
            raise ValueError(
                f"instruction set {name!r} is not available here; choose avx512, avx2 or baseline as the processor "
                f"allows, or unset {INSTRUCTION_SET_VARIABLE}"
            )

    def plan_scan(self, scan: Scan) -> ScanPlan:
        """Return how the library will divide this scan into tasks, which determines the sizes of partial gradients."""
        return self._library.mambacore_plan_scan(ctypes.byref(scan))

    def scan_forward(self, scan: Scan) -> None:
        """Run the scan (`mambacore.scan.native`)."""
        self._run(self._library.mambacore_scan_forward, scan)

    def scan_backward(self, scan: Scan) -> None:
        """Compute the scan's gradients."""
        self._run(self._library.mambacore_scan_backward, scan)

    def convolution_forward(self, convolution: Convolution) -> None:
        """Run the convolution (`mambacore.convolution.native`)."""
        self._run(self._library.mambacore_convolution_forward, convolution)

    def convolution_backward(self, convolution: Convolution) -> None:
        """Compute the convolution's gradients."""
        self._run(self._library.mambacore_convolution_backward, convolution)

    def norm_forward(self, norm: Norm) -> None:
        """Run the normalisation (`mambacore.layers.norm`)."""
        self._run(self._library.mambacore_norm_forward, norm)

    def norm_backward(self, norm: Norm) -> None:
        """Compute the normalisation's gradients."""
        self._run(self._library.mambacore_norm_backward, norm)

    def block_step(self, step: BlockStep) -> None:
        """Run one position through a block (`mambacore.layers.step`)."""
        self._run(self._library.mambacore_block_step, step)

    @property
    def has_block_forward(self) -> bool:
        """Whether `block_forward` is there; a library that was built before it is used without it."""
        return hasattr(self._library, "mambacore_block_forward")

    def block_forward(self, block: Block) -> None:
        """Run many positions through a block (`mambacore.layers.selective_block`)."""
        self._run(self._library.mambacore_block_forward, block)

    @property
    def has_dual_step(self) -> bool:
        """Whether `dual_step` is there; a library that was built before it is used without it."""
        return hasattr(self._library, "mambacore_dual_step")

    def dual_step(self, step: DualStep) -> None:
        """Run one position through a block (`mambacore.layers.mamba2_step`, `mamba3_step`)."""
        self._run(self._library.mambacore_dual_step, step)

    def ssd_forward(self, scan: Ssd) -> None:
        """Run the state space dual scan (`mambacore.ssd.native`)."""
        self._run(self._library.mambacore_ssd_forward, scan)

    def ssd_backward(self, scan: Ssd) -> None:
        """Compute its gradients."""
        self._run(self._library.mambacore_ssd_backward, scan)

    def generate(self, generation: Generation) -> None:
        """Run a program of steps (`mambacore.layers.step_program`)."""
        self._run(self._library.mambacore_generate, generation)

    @staticmethod
    def _run(kernel: Callable[[Any], int], arguments: ctypes.Structure) -> None:
        """Call a kernel and raise an error according to its status.

        Raises:
            MemoryError: if there is no memory for the kernel's buffers.
            RuntimeError: if the kernel failed in any other way.
        """
        status = kernel(ctypes.byref(arguments))
        if status == OUT_OF_MEMORY:
            raise MemoryError(
                f"the native library had no memory left for the buffers of {kernel.__name__}; "
                "use fewer threads, a smaller batch or a smaller state"
            )
        if status != OK:
            raise RuntimeError(f"the native library failed in {kernel.__name__} with status {status}")


def process_team() -> ctypes.c_void_p | None:
    """Return the entry point of this process's OpenMP team (PyTorch's), or None if it is not GNU-compatible."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return ctypes.cast(entry, ctypes.c_void_p) if entry else None


def library_path() -> Path | None:
    """Return the library's file, or None if the package was installed without one.

    Raises:
        ImportError: if the environment variable for another build names a file that does not exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ImportError(
                f"{LIBRARY_VARIABLE} names {named}, which is not a file; unset it or build the library there"
            )
        return Path(named)
    for folder in importlib.resources.files("mambacore"), *_editable_folders():
        path = Path(str(folder / _FILE_NAME))
        if path.is_file():
            return path
    return None


def _editable_folders() -> list[Path]:
    """Return the folders of an editable install that may contain the build: the package's search path."""
    return [Path(folder) for folder in sys.modules["mambacore"].__path__]


@functools.cache
def native_library() -> Library | None:
    """Return the native library, or None, with a single warning, if the package was installed without it."""
    path = library_path()
    if path is None:
        warnings.warn(
            "mambacore was installed without its native library (no C++ compiler was found): scans run through "
            "PyTorch, many times slower. Install a C++ compiler and reinstall the package.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return Library(path)


def native_problem() -> str | None:
    """Return why the native library cannot be used, or None if it can."""
    return None if library_path() is not None else "the package was installed without its native library"
