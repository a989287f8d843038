"""The scan and the Mamba-3 mixer agree in float64 with the references in the source of mamba_ssm.

    MAMBA_SOURCE=mamba python -m pytest tests/mambacore/ssd/test_peer_references.py

`mamba` is a checkout of github.com/state-spaces/mamba, and einops must be installed. Only the functions
named here are read from it; the rest of the package needs a GPU. Checked at commit e9594ce.
"""

import ast
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mambacore.layers import Mamba3Mixer
from mambacore.layers.mamba3 import Mamba3State
from mambacore.ssd import ssd_scan
from ssd_cases import ssd_arguments
from tolerances import FLOAT64, relative_error

FUNCTIONS = {
    "mamba_ssm/modules/ssd_minimal.py": ("segsum", "ssd_minimal_discrete"),
    "tests/ops/triton/test_mamba3_siso.py": ("mamba3_siso_step_ref",),
}


@pytest.fixture(scope="module")
def peer() -> dict[str, Any]:
    """The functions by name."""
    source = os.environ.get("MAMBA_SOURCE")
    if not source:
        pytest.skip("MAMBA_SOURCE does not name a checkout of mamba_ssm")
    einops = pytest.importorskip("einops")
    found: dict[str, Any] = {"torch": torch, "F": F, "math": math, "rearrange": einops.rearrange}
    found["repeat"] = einops.repeat
    exec("from typing import *", found)
    for name, functions in FUNCTIONS.items():
        tree = ast.parse((Path(source) / name).read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name in functions]
        assert len(tree.body) == len(functions), name
        exec(compile(tree, name, "exec"), found)
    return found


@pytest.mark.parametrize(("length", "heads"), [(16, 1), (192, 3)])
@pytest.mark.parametrize("chunk", [16, 64])
def test_the_scan_agrees_with_ssd_minimal(peer, length, heads, chunk):
    if length % chunk:
        pytest.skip("ssd_minimal needs whole chunks")
    arguments = ssd_arguments(2, length, heads=heads, head_width=5, state_size=7, groups=heads, everything=False)
    outputs, state = ssd_scan(**arguments, return_final_state=True)
    expected, final = peer["ssd_minimal_discrete"](
        arguments["inputs"], arguments["log_decay"], arguments["input_matrix"], arguments["output_matrix"],
        block_len=chunk,
    )  # fmt: skip
    assert relative_error(outputs, expected) < FLOAT64
    assert relative_error(state, final) < FLOAT64


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_mamba3_mixer_agrees_with_its_step_reference(peer, groups, share):
    torch.manual_seed(0)
    mixer = Mamba3Mixer(16, state_size=8, head_width=8, groups=groups, rotated_share=share).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    length, heads = 100, mixer.heads
    projected = torch.randn(2, length, sum(mixer.parts), dtype=torch.float64)
    gate, inputs, into, out_of, raw_step, raw_decay, raw_share, raw_turn = projected.split(mixer.parts, dim=-1)
    step = F.softplus(raw_step + mixer.step_bias)
    # The published module's own lines before the kernel (mamba_ssm/modules/mamba3.py), from its description.
    decay_rate = -torch.where(raw_decay >= 0, 1 + raw_decay, 1 / (1 - raw_decay)).clamp(min=1e-4)
    queries, keys = (
        norm(matrix.unflatten(-1, (groups, 8)))
        for norm, matrix in ((mixer.output_matrix_norm, out_of), (mixer.input_matrix_norm, into))
    )
    values, gates = (part.unflatten(-1, (heads, 8)) for part in (inputs, gate))
    expected, states = peer["mamba3_siso_step_ref"](
        queries, keys, values, (decay_rate * step).mT, step.mT, raw_share.mT,
        mixer.output_matrix_bias[:, 0], mixer.input_matrix_bias[:, 0],
        raw_turn.unsqueeze(2).expand(-1, -1, heads, -1), mixer.skip_weight, gates,
    )  # fmt: skip
    outputs, state = mixer.mix(projected, None, None, False)
    assert isinstance(state, Mamba3State)
    assert relative_error(outputs, expected.flatten(2)) < FLOAT64
    assert relative_error(torch.polar(torch.ones_like(state.angle), state.angle),
                          torch.polar(torch.ones_like(states[0].double()), states[0].double())) < FLOAT64  # fmt: skip
    for found, other in ((state.scan, states[1]), (state.key[:, 0], states[2]), (state.value, states[3])):
        assert relative_error(found, other) < FLOAT64
