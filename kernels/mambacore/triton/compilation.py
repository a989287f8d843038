"""Kernels compiled for a device that need not be there, and what the compiler made of them: registers and instructions.

A count of instructions is not a time: it says nothing about waiting for memory, nor about how many programs are in
flight. It shows what a change of a kernel does where nothing can be timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambacore.triton.launch import Kernel

OF_INPUTS: Final = {
    "inputs", "step_size", "gate", "grad_outputs", "outputs", "grad_inputs", "grad_step_size", "grad_gate", "state",
    "grad_state", "new_state", "matrices", "input_rows", "output_rows", "input_matrix", "output_matrix",
    "grad_scores", "sum_into", "sum_out_of", "branch", "sums", "grad_sums", "grad_branch",
}  # fmt: skip
"""Arguments of the kernels that are tensors in the inputs' dtype; matrices of complex states are in float32."""

FLAGS: Final = {"resets", "kept", "record"}
"""Arguments that are tensors of flags."""

FLOATS: Final = {
    "rates", "skip_weight", "step_bias", "chunk_states", "step_sums", "final_state",
    "boundaries", "scratch_states", "scratch_steps", "chunk_carries", "grad_into", "grad_out_of", "grad_rates",
    "grad_skip", "grad_bias", "grad_first_state", "first_state", "weight", "bias", "grads", "grad_weight",
    "scan_state", "new_scan_state", "log_decay_rate", "frequency", "written", "added", "chunk_decays", "states",
    "high", "low", "own", "to_end", "from_start", "grad_states", "grad_numbers", "grad_matrix", "inverse",
    "into", "out_of",
}  # fmt: skip
"""Arguments that are tensors in float32, whatever the inputs are."""

LONG: Final = {"length", "inputs_row"}
"""Sizes of 64 bits."""

NUMBERS: Final = {"epsilon"}
"""Arguments that are single numbers in float32."""

TOOLS: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""Where Triton keeps ptxas, cuobjdump and nvdisasm; empty on platforms without CUDA."""

SHORTEST_LOOP: Final = 20
"""Instructions; shorter loops wait for something and compute nothing."""


class Loop(NamedTuple):
    """A loop of a compiled kernel: its instructions, with those of loops inside it."""

    first: int
    instructions: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.instructions)

    @property
    def special(self) -> int:
        """How many of them use the special-function units (exponentials, reciprocals), a quarter as many as lanes."""
        return sum(text.split()[0].startswith("MUFU") for text in map(without_predicate, self.instructions))


class Compiled(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
        used: registers per thread (`REG`), bytes per thread that left the registers (`STACK`), and bytes of shared
            memory per program (`SHARED`).
        cubin: the machine code.
    """

    used: dict[str, int]
    cubin: bytes

    def loops(self) -> list[Loop]:
        """The loops of the machine code, the longest first."""
        return loops_of(disassembled(self.cubin))


def compiled(kernel: Kernel, switches: Mapping[str, Any], capability: int, dtype: str, warps: int) -> Compiled:
    """Compile a kernel for tensors that begin at multiples of 16 bytes and sizes that are multiples of 16.

    Args:
        kernel: of this package.
        switches: its upper-case arguments; others that it does not have are left out.
        capability: 80 for Ampere, 90 for Hopper.
        dtype: of the inputs, as Triton says it: fp32, bf16, fp16.
        warps: per program.
    """
    switches = {name: value for name, value in switches.items() if name in kernel.arg_names}
    signature = {name: _type_of(name, switches, dtype) for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=switches, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return Compiled(resource_usage(binary.asm["cubin"]), binary.asm["cubin"])


def _type_of(name: str, switches: Mapping[str, Any], dtype: str) -> str:
    if name in switches:
        return "constexpr"
    of_complex = name in ("input_matrix", "output_matrix") and switches.get("IS_COMPLEX")
    if name in OF_INPUTS and not of_complex:
        return f"*{dtype}"
    if name in FLAGS:
        return "*u8"
    if name in FLOATS or of_complex:
        return "*fp64" if name == "step_sums" and switches["IS_COMPLEX"] else "*fp32"
    return "fp32" if name in NUMBERS else "i64" if name in LONG else "i32"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory of machine code with one kernel."""
    told = _tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", told)}


def disassembled(cubin: bytes) -> str:
    """Machine code as text."""
    return _tool("nvdisasm", "-c", cubin=cubin)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops_of(text: str) -> list[Loop]:
    """The loops of disassembled code, found by their branches back, the longest first.

    Args:
        text: of `nvdisasm -c`.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: dict[int, int] = {}
    for line in text.splitlines():
        label = re.match(r"\.?(L_x_\d+):", line.strip())
        if label:
            labels[label.group(1)] = len(instructions)
        instruction = re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line)
        if not instruction:
            continue
        branch = re.search(r"\bBRA\b.*?(L_x_\d+)", instruction.group(1))
        if branch and branch.group(1) in labels:
            found[labels[branch.group(1)]] = len(instructions)
        instructions.append(instruction.group(1).strip())
    loops = [Loop(first, tuple(instructions[first : last + 1])) for first, last in found.items()]
    return sorted((loop for loop in loops if loop.size > SHORTEST_LOOP), key=lambda loop: -loop.size)


def without_predicate(instruction: str) -> str:
    """An instruction without the condition it depends on: `@P0 FADD R1, R2, R3` is an FADD."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction)
