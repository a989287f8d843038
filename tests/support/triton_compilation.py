"""Kernels compiled for a device that need not be there, and what ptxas made of them."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Arguments that are in the inputs' dtype, and flags; everything else that is a tensor is float32.
OF_INPUTS = {"inputs", "step_size", "gate", "grad_outputs", "outputs", "grad_inputs", "grad_step_size", "grad_gate",
             "state", "grad_state", "new_state", "matrices", "input_rows",
             "output_rows"}  # fmt: skip
FLAGS = {"resets", "kept", "record"}
FLOATS = {"input_matrix", "output_matrix", "rates", "skip_weight", "step_bias", "chunk_states", "step_sums",
          "final_state", "boundaries", "scratch_states", "chunk_carries", "grad_into", "grad_out_of", "grad_rates",
          "grad_skip", "grad_bias", "grad_first_state", "first_state", "weight", "bias", "grads",
          "grad_weight", "scan_state", "new_scan_state", "log_decay_rate", "frequency",
          "written", "added", "chunk_decays", "states", "high", "low", "own"}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, switches: dict, capability: int, dtype: str, warps: int) -> dict[str, int]:
    """Registers and bytes of stack per thread (what leaves the registers), bytes of shared memory per program.

    Args:
        kernel: of ``mambacore.triton``.
        switches: its upper-case arguments; others that it does not have are left out.
        capability: 80 for Ampere, 90 for Hopper.
        dtype: of the inputs, as Triton says it: fp32, bf16, fp16.
        warps: per program.
    """
    switches = {name: value for name, value in switches.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in switches:
            signature[name] = "constexpr"
        elif name in OF_INPUTS | FLAGS | FLOATS:
            signature[name] = "*" + (dtype if name in OF_INPUTS else "u8" if name in FLAGS else "fp32")
            if name == "step_sums" and switches["IS_COMPLEX"]:
                signature[name] = "*fp64"
        else:
            signature[name] = "i64" if name in ("length", "inputs_row") else "i32"
    # Tensors begin at multiples of 16 bytes, and sizes are multiples of 16: the case that is worth being fast.
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=switches, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", told)}
