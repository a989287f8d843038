"""Tracks: each base's log-likelihood by its definition, whatever the pieces; both strands; gaps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.alphabet import reverse_complement
from genomamba.data.bed import Region
from genomamba.io.reference import Reference
from genomamba.models.language_model import FIRST_BASE_TOKEN, LanguageModel
from genomamba.scoring.tracks import TrackMaker, TrackPiece, runs
from mambacore.errors import InputError
from tiny_language_models import language_model, random_letters, write_fasta
from tolerances import FLOAT32

LETTERS = random_letters(70, 1) + b"NNRN" + random_letters(80, 2).lower()


@pytest.fixture
def genome(tmp_path: Path) -> Reference:
    return Reference(write_fasta(tmp_path / "genome.fa", {"other": b"ACGTT", "c": LETTERS}))


def values_of(maker: TrackMaker, region: Region) -> np.ndarray:
    pieces = list(maker.pieces(region))
    found = [piece for piece in pieces if isinstance(piece, TrackPiece)]
    assert sum(piece for piece in pieces if isinstance(piece, int)) == maker.readings * (region.end - region.start)
    starts = np.cumsum([region.start, *(len(piece.values) for piece in found)])
    assert [piece.start for piece in found] == starts[:-1].tolist()
    assert starts[-1] == region.end
    return np.concatenate([piece.values for piece in found])


def one_strand(model: LanguageModel, letters: bytes) -> np.ndarray:
    """The definition: read at once; the first base and what is no base have no value."""
    letters = letters.upper()
    tokens = torch.from_numpy(model.tokens(letters)).long()
    found, _ = model.next_base_log_probabilities(tokens[None])
    values = np.full(len(letters), np.nan)
    for place in range(1, len(letters)):
        if letters[place] in b"ACGT":
            values[place] = float(found[0, place - 1, tokens[place] - FIRST_BASE_TOKEN])
    return values


@pytest.mark.parametrize("piece_length", [1, 37, 10_000])
@pytest.mark.parametrize("kind", ["causal", "contexts"])
def test_values_are_those_of_reading_the_contig_at_once(genome: Reference, kind: str, piece_length: int) -> None:
    model, whole = language_model(kind), Region("c", 0, len(LETTERS))
    given = one_strand(model, LETTERS)
    other = one_strand(model, reverse_complement(LETTERS))[::-1]
    found = values_of(TrackMaker(model, genome, both_strands=False, piece_length=piece_length), whole)
    np.testing.assert_allclose(found, given, rtol=FLOAT32)
    assert np.isnan(found).sum() == 5
    both = values_of(TrackMaker(model, genome, piece_length=piece_length), whole)
    expected = np.where(np.isnan(given), other, np.where(np.isnan(other), given, (given + other) / 2))
    np.testing.assert_allclose(both, expected, rtol=FLOAT32)
    assert np.isnan(both).sum() == 4


def test_a_region_is_read_with_its_context_on_both_strands(genome: Reference) -> None:
    model, region = language_model("causal"), Region("c", 20, 140)
    given = one_strand(model, LETTERS[10:140])[10:]
    other = one_strand(model, reverse_complement(LETTERS[20:150]))[10:][::-1]
    both = values_of(TrackMaker(model, genome, context=10, piece_length=7), region)
    np.testing.assert_allclose(both, (given + other) / 2, rtol=FLOAT32)
    alone = values_of(TrackMaker(model, genome, both_strands=False, context=0), region)
    np.testing.assert_allclose(alone, one_strand(model, LETTERS[20:140]), rtol=FLOAT32)


@pytest.mark.parametrize("kind", ["causal", "masked", "equivariant"])
def test_the_turned_genome_has_the_turned_track(tmp_path: Path, genome: Reference, kind: str) -> None:
    model, window = language_model(kind), 4 * 154
    turned = Reference(write_fasta(tmp_path / "turned.fa", {"c": reverse_complement(LETTERS)}))
    whole = Region("c", 0, len(LETTERS))
    found = values_of(TrackMaker(model, genome, window=window), whole)
    other = values_of(TrackMaker(model, turned, window=window), whole)
    if kind == "causal":
        np.testing.assert_allclose(found, other[::-1], rtol=FLOAT32)
        return
    # Which bases are hidden together depends on where a contig begins.
    np.testing.assert_array_equal(np.isnan(found), np.isnan(other[::-1]))
    assert np.corrcoef(found[~np.isnan(found)], other[::-1][~np.isnan(found)])[0, 1] > 0.9


def test_a_masked_value_is_that_of_a_hidden_base_whatever_the_region(genome: Reference) -> None:
    model = language_model("masked")
    maker = TrackMaker(model, genome, window=32)
    whole = values_of(maker, Region("c", 0, len(LETTERS)))
    np.testing.assert_array_equal(values_of(maker, Region("c", 21, 100)), whole[21:100])
    place, start, end = 41, 24, 56  # the window of the step [32, 48) with a quarter on both sides
    letters = LETTERS[start:end].upper()
    masked = torch.tensor([[(start + offset - place) % 8 == 0 for offset in range(end - start)]])
    found = model.masked_base_log_probabilities(torch.from_numpy(model.tokens(letters))[None], masked)
    expected = float(found[0, place - start, b"ACGT".index(letters[place - start])])
    assert whole[place] == pytest.approx(expected, rel=FLOAT32)
    assert np.isnan(whole).sum() == 4


def test_stretches_without_a_gap_are_found() -> None:
    values = np.array([np.nan, 1, 2, np.nan, np.nan, 3], dtype=np.float32)
    assert list(runs(values)) == [(1, 3), (5, 6)]
    assert list(runs(values[:0])) == []
    assert list(runs(values[1:3])) == [(0, 2)]


@pytest.mark.parametrize("settings", [{"context": -1}, {"window": 30}, {"window": 28}, {"piece_length": 0}])
def test_lengths_that_make_no_sense_are_refused(genome: Reference, settings: dict[str, int]) -> None:
    with pytest.raises(InputError):
        TrackMaker(language_model("causal"), genome, **settings)
