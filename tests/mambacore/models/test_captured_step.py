"""Generation by captured graphs equals the steps it captured, on devices where graphs are stood in for."""

import pytest
import torch

from fake_graphs import use_fake_graphs
from mambacore import use_backend
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig, captured_step
from mambacore.models.captured_step import CapturedStep
from mambacore.state import state_tensors
from on_pretend import first_process, passed_on_pretend
from tolerances import DEVICE_FLOAT32, relative_error

VOCABULARY, COUNT = 11, 40
STACKS = {
    "selective and s4d": ({"name": "selective", "state_size": 4}, {"name": "s4d", "state_size": 3}),
    "mamba2, mamba3 and rwkv": (
        {"name": "mamba2", "state_size": 4, "head_width": 4}, {"name": "mamba3", "state_size": 4, "head_width": 4},
        "rwkv",
    ),
}  # fmt: skip


def language_model(mixers, device):
    torch.manual_seed(0)
    config = CausalLanguageModelConfig(vocabulary_size=VOCABULARY, model_width=8, mixers=mixers)
    model = CausalLanguageModel(config).eval().to(device)
    torch.nn.init.normal_(model.embedding.weight, std=3.0)
    return model


def generated(model, **options):
    prompt = torch.arange(6).reshape(2, 3)
    return model.generate(prompt, COUNT, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7, "temperature": 0.8}], ids=["plain", "nucleus"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_generates_the_same_through_one_graph(stack, options, device, monkeypatch):
    with use_backend("torch"):
        model = language_model(STACKS[stack], device)
        expected = generated(model, **options)
        graphs = use_fake_graphs(monkeypatch, device)
        found = generated(model, **options)
    assert len(graphs) == 1 and graphs[0].replays == COUNT - 1  # the first step shows which shapes recur
    assert torch.equal(found.tokens.cpu(), expected.tokens.cpu())
    assert relative_error(found.log_likelihoods.cpu(), expected.log_likelihoods.cpu()) < DEVICE_FLOAT32
    for one, other in zip(state_tensors(found.state), state_tensors(expected.state), strict=True):
        assert relative_error(one.cpu(), other.cpu()) < DEVICE_FLOAT32


def test_what_cannot_be_captured_runs_as_it_is(device, monkeypatch):
    graphs = use_fake_graphs(monkeypatch, device)
    with use_backend("torch"):
        # The keys of attention grow, so no step is like an earlier one.
        model = language_model(("attention",), device)
        found = generated(model)
        assert not graphs
        monkeypatch.setattr(captured_step, "CAPTURING_DEVICES", set())
        assert torch.equal(found.tokens.cpu(), generated(model).tokens.cpu())
    use_fake_graphs(monkeypatch, device)

    def asks_the_device(given, state):
        return (given + state[0] * (1.0 if float(given.sum()) >= 0 else -1.0),), (state[0] + 1, state[1])

    step = CapturedStep(asks_the_device, (torch.zeros(2).to(device), 7), device)
    results = [step(torch.ones(2).to(device))[0].cpu() for _ in range(3)]
    assert torch.stack(results).tolist() == [[1, 1], [2, 2], [3, 3]]
    assert step.state[1] == 7 and step.state[0].cpu().tolist() == [3, 3]


def test_a_cycle_of_shapes_has_a_graph_for_each_and_states_are_handed_on(device, monkeypatch):
    graphs = use_fake_graphs(monkeypatch, device)

    def fold(given, state):
        """Sum up three inputs, as a pooling does: nothing comes out between."""
        parts, last = state
        parts = torch.cat([parts, given.unsqueeze(1)], dim=1)
        if parts.shape[1] == 3:
            parts, last = parts[:, :0], 0.5 * last + parts.sum(1)
        return (last + parts.sum(1),), (parts, last)

    start = (torch.zeros(2, 0).to(device), torch.zeros(2).to(device))
    plain, captured = CapturedStep(fold, start, device, capture=False), CapturedStep(fold, start, device)
    for number in range(14):
        given = torch.tensor([float(number), 1.0]).to(device)
        expected, found = plain(given)[0], captured(given)[0]
        assert torch.equal(found.cpu(), expected.cpu())
        if number == 9:
            kept, at_nine = captured.state, [tensor.cpu().clone() for tensor in state_tensors(plain.state)]
    assert [graph.replays for graph in graphs] == [4, 4, 3]
    assert all(torch.equal(one.cpu(), other) for one, other in zip(state_tensors(kept), at_nine, strict=True))


@first_process
def test_all_of_this_holds_on_the_pretended_device():
    assert passed_on_pretend(__file__) == 2 * len(STACKS) + 2
