"""Micro-batches on several replicas give the gradients of one model that takes them one after the other."""

import pytest
import torch

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from mambapipelines.training.replicas import Replicas


def build() -> SpeciesClassifier:
    torch.manual_seed(0)
    return SpeciesClassifier(
        SpeciesClassifierConfig(class_names=("a", "b"), model_width=16, layers=2, state_size=4, context_widths=(1, 2))
    )


def backward(model, tokens, labels):
    report = model.loss(tokens, labels)
    report["loss"].backward()
    return {"loss": float(report["loss"].detach())}


def micro_batches(count: int):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(7, 11, (1, 300), generator=generator), torch.randint(0, 2, (1,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize(("count", "batches"), [(1, 3), (2, 4), (3, 4), (3, 2)])
def test_gradients_are_those_of_one_model_taking_turns(count, batches):
    expected = build()
    for batch in micro_batches(batches):
        backward(expected, *batch)
    model = build()
    replicas = Replicas(model, count, threads=2)
    for _ in range(2):  # the second time starts afresh
        reports = replicas.accumulate(micro_batches(batches), backward)
    replicas.close()
    assert len(reports) == batches
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_replicas_follow_the_optimizer_and_repeat_bit_for_bit():
    results = []
    for _ in range(2):
        model = build()
        replicas = Replicas(model, 2, threads=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            replicas.accumulate(micro_batches(4), backward)
            optimizer.step()
        assert all(
            torch.equal(one, other)
            for one, other in zip(model.parameters(), replicas.models[1].parameters(), strict=True)
        )
        replicas.close()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_number_of_threads_is_put_back_and_errors_come_through():
    before = torch.get_num_threads()
    replicas = Replicas(build(), 2, threads=2)

    def failing(model, tokens, labels):
        raise ValueError("no gradient today")

    with pytest.raises(ValueError, match="no gradient today"):
        replicas.accumulate(micro_batches(2), failing)
    replicas.close()
    assert torch.get_num_threads() == before
