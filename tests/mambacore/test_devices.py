"""The laws on every device: it computes what the CPU does, pieces equal the whole, nothing lies where it should not."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from mambacore.devices import from_numpy, to_numpy, wide_dtype, widened
from mambacore.layers import ResidualStack
from mambacore.longsequence import backward_in_pieces
from mambacore.longsequence.losses import TokenCrossEntropy
from mambacore.models.causal import CausalLanguageModel, CausalLanguageModelConfig
from mambacore.models.masked import MaskedLanguageModel, MaskedLanguageModelConfig
from mambacore.state import map_state
from tolerances import DEVICE_FLOAT32, relative_error

WIDTH, LENGTH, CUT = 8, 20, 13
MIXERS = {
    "selective": {"name": "selective", "state_size": 3},
    "selective complex": {"name": "selective", "state_size": 2, "complex_state": True},
    "s4d": {"name": "s4d", "state_size": 3, "convolution": False},
    "s4d convolution": {"name": "s4d", "state_size": 3, "convolution": True},
    "mamba2": {"name": "mamba2", "state_size": 4, "head_width": 4},
    "mamba3": {"name": "mamba3", "state_size": 4, "head_width": 4},
    "attention": {"name": "attention", "heads": 2},
    "linear_attention": {"name": "linear_attention", "heads": 2},
    "retention": {"name": "retention", "heads": 2},
    "rwkv": "rwkv",
    "gru": "gru",
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < DEVICE_FLOAT32, errors


@pytest.mark.parametrize("name", MIXERS)
def test_a_stack_is_the_one_on_the_cpu_and_pieces_equal_the_whole(name: str, device: torch.device) -> None:
    if name == "gru" and device.type == "pretend":
        pytest.skip("PyTorch's GRU is a fused operator on any device but the CPU, which has none to imitate it")
    torch.manual_seed(0)
    on_cpu = ResidualStack(WIDTH, [MIXERS[name]])
    sequence, weight = torch.randn(2, LENGTH, WIDTH), torch.randn(2, LENGTH, WIDTH)

    def computed(model: nn.Module, place: torch.device) -> dict[str, Tensor]:
        inputs = sequence.to(place).requires_grad_()
        outputs, state = model(inputs)
        (outputs * weight.to(place)).sum().backward()
        tensors: list[Tensor] = []
        map_state(lambda tensor: tensors.append(tensor.detach().cpu()) or tensor, state)
        states = {f"state {number}": tensor for number, tensor in enumerate(tensors) if tensor.numel()}
        assert inputs.grad is not None
        return {"outputs": outputs.detach().cpu(), "gradient": inputs.grad.cpu()} | states | gradients(model)

    on_device = copy.deepcopy(on_cpu).to(device)
    found = computed(on_device, device)
    assert_equal(found, computed(on_cpu, torch.device("cpu")))
    with torch.no_grad():
        first, state = on_device(sequence[:, :CUT].to(device))
        step, state = on_device(sequence[:, CUT : CUT + 1].to(device), state)
        last, _ = on_device(sequence[:, CUT + 1 :].to(device), state)
    assert relative_error(torch.cat([first, step, last], dim=1).cpu(), found["outputs"]) < DEVICE_FLOAT32


def test_training_in_pieces_has_the_gradients_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(1)
    on_cpu = CausalLanguageModel(
        CausalLanguageModelConfig(vocabulary_size=8, model_width=WIDTH, mixers=("selective", "s4d"))
    )
    tokens = torch.randint(0, 8, (2, LENGTH))

    def computed(model: nn.Module, place: torch.device) -> dict[str, Tensor]:
        loss = TokenCrossEntropy(tokens.roll(-1, 1).to(place))
        result = backward_in_pieces(model, tokens.to(place), loss, piece_length=7)
        return {"loss": result.loss.cpu().reshape(1)} | gradients(model)

    on_device = copy.deepcopy(on_cpu).to(device)
    assert_equal(computed(on_device, device), computed(on_cpu, torch.device("cpu")))


def test_a_masked_model_is_the_one_on_the_cpu(device: torch.device) -> None:
    torch.manual_seed(2)
    on_cpu = MaskedLanguageModel(MaskedLanguageModelConfig(vocabulary_size=8, model_width=WIDTH, layers=1)).eval()
    tokens = torch.randint(0, 8, (2, LENGTH))
    with torch.no_grad():
        found = copy.deepcopy(on_cpu).to(device)(tokens.to(device))
        assert relative_error(found.cpu(), on_cpu(tokens)) < DEVICE_FLOAT32


def test_numbers_leave_a_device_and_come_back(device: torch.device) -> None:
    array = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).numpy()[:, ::-1]
    tensor = from_numpy(array, device)
    assert tensor.device.type == device.type and tensor.dtype == wide_dtype(device)
    assert (to_numpy(tensor) == array).all()
    assert to_numpy(tensor.requires_grad_(), torch.float32).dtype == "float32"
    assert widened(tensor.float()).dtype == wide_dtype(device)
    assert widened(torch.ones(1, dtype=torch.complex64)).dtype == torch.complex128
    frozen = array.copy()
    frozen.flags.writeable = False
    from_numpy(frozen).add_(1)
    assert frozen[0, 0] == 2


@pytest.mark.skipif("TESTS_ON_PRETEND" in os.environ, reason="this is the process of its own")
def test_all_of_this_holds_on_the_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "pretend"]
    done = subprocess.run(
        command, env=os.environ | {"TESTS_ON_PRETEND": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    # All but the GRU, and three tests more.
    assert f"{len(MIXERS) + 2} passed" in done.stdout
