"""The gate on evidence: pieces are the whole, it begins as the plain sum, and a small run has a whole table."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from genomamba.classification import part_fit
from genomamba.data.genomes import GenomeCollection
from tests.support.tiny_species import random_bases

EXPERIMENTS = Path(__file__).resolve().parents[1] / "pipelines" / "experiments"
CLASSES, LENGTH = 3, 512


@pytest.fixture
def evidence_gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return pytest.importorskip("evidence_gate")


def inputs(evidence_gate: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    evidence = torch.randn(2, LENGTH, len(evidence_gate.ORDERS), CLASSES)
    return evidence, torch.randint(7, 11, (2, LENGTH), dtype=torch.uint8)


def test_a_gate_begins_as_the_plain_sum_and_its_pieces_are_the_whole(evidence_gate: ModuleType):
    evidence, tokens = inputs(evidence_gate)
    gate = evidence_gate.EvidenceGate(len(evidence_gate.ORDERS)).eval()
    plain = evidence_gate.FIRST_WEIGHT * (evidence - evidence.mean(-1, keepdim=True)).sum(2)
    torch.testing.assert_close(gate(evidence, tokens)[0], plain, atol=1e-5, rtol=1e-4)
    torch.nn.init.normal_(gate.gate.weight)
    whole, _ = gate(evidence, tokens)
    assert (whole - plain).abs().max() > 0.1
    state, pieces = None, []
    for start in range(0, LENGTH, 100):
        piece, state = gate(evidence[:, start : start + 100], tokens[:, start : start + 100], state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    # Classes are interchangeable: the gate does not know which is which.
    torch.testing.assert_close(gate(evidence.flip(-1), tokens)[0], whole.flip(-1), atol=1e-4, rtol=1e-4)


def test_a_small_run_has_a_row_for_every_length_with_windows(
    evidence_gate: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evidence_gate, "ORDERS", (1, 3))
    monkeypatch.setattr(part_fit, "KMERS", part_fit.KMERS[:1])
    genomes = {name: {"chr": random_bases(110_000, seed)} for seed, name in enumerate(("a", "b"))}
    pieces = evidence_gate.read_pieces(GenomeCollection.from_tokens(genomes), 400_000, seed=0)
    assert pieces.evidence.shape[1:] == (evidence_gate.PIECE_BP, 2, 2) and set(pieces.folds) == set(range(5))
    # The sum along a piece is the evidence that the combination gets for it.
    sums = pieces.evidence.astype(np.float64).sum(axis=1)
    inside = [pieces.part_names.index(f"markov {order}") for order in (1, 3)]
    first = np.flatnonzero(np.diff(pieces.sequences, prepend=-1))
    np.testing.assert_allclose(sums[first], pieces.blocks[first][:, :, inside].sum(axis=1), rtol=1e-3)
    gate = evidence_gate.EvidenceGate(2, stateless=True)
    assert evidence_gate.train(gate, pieces, 0.2, 4, seed=0) >= 1
    rows = evidence_gate.compare(gate, pieces, 4, seed=0)
    assert [row.split("\t")[0] for row in rows[1:4]] == ["256", "1024", "4096"]
    assert all(0 <= float(row.split("\t")[3]) <= 1 for row in rows[1:])
