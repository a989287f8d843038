"""Simulated genomes have genes in frame with the species' codon usage, and repeats that the other species lack."""

import numpy as np
import pytest

from genomamba.data.gene_simulation import (
    Layout,
    _draw_layout,
    _with_genes,
    amino_acid_of_codons,
    simulate_genomes,
)
from genomamba.data.simulation import FIRST_BASE_TOKEN, Branch, stream_generator
from genomamba.tokenizer import COMPLEMENT_IDS
from mambacore.errors import InputError

SMALL = ((60_000,), (30_000,))
STOP, METHIONINE = 20, 10


def test_genomes_are_a_function_of_the_seed() -> None:
    first, second, other = simulate_genomes(1, *SMALL), simulate_genomes(1, *SMALL), simulate_genomes(2, *SMALL)
    for species in first.species_names:
        for name, tokens in first.chromosomes[species].items():
            assert (tokens == second.chromosomes[species][name]).all()
            assert (tokens != other.chromosomes[species][name]).mean() > 0.5
    assert [len(tokens) for tokens in first.chromosomes["alba"].values()] == [60_000, 30_000]
    assert (first.training_names, first.holdout_names) == (("chrI",), ("chrII",))


def test_the_genetic_code_is_the_standard_one() -> None:
    table = amino_acid_of_codons()
    letters = "ACDEFGHIKLMNPQRSTVWY*"

    def of(codon: str) -> str:
        return letters[table[sum("ACGT".index(base) << shift for base, shift in zip(codon, (4, 2, 0), strict=True))]]

    assert [of(codon) for codon in ("ATG", "TGG", "TAA", "TAG", "TGA", "GCT", "AGC", "CTG")] == list("MW***ASL")
    assert np.bincount(table).tolist() == [4, 2, 2, 2, 2, 4, 2, 3, 2, 6, 1, 2, 4, 2, 6, 6, 4, 4, 1, 2, 3]


def genes_of(layout: Layout, bases: np.ndarray) -> list[np.ndarray]:
    """The codons of every gene, read from the chromosome on the gene's strand."""
    codons = np.zeros(len(layout.first_base), dtype=np.int64)
    for place, shift in enumerate((4, 2, 0)):
        own = bases[layout.first_base + place * layout.step].astype(np.int64)
        codons += np.where(layout.step > 0, own, 3 - own) << shift
    ends = np.flatnonzero(layout.is_fixed)[1::2]
    return np.split(codons, ends[:-1] + 1)


def test_genes_are_open_reading_frames_on_both_strands() -> None:
    layout = _draw_layout(200_000, stream_generator(0, 0))
    assert {-1, 1} == set(layout.step.tolist())
    covered = np.zeros(200_000, dtype=int)
    for place in range(3):
        covered[layout.first_base + place * layout.step] += 1
    assert covered.max() == 1
    assert 0.4 < covered.mean() < 0.8
    for start, end in layout.islands:
        assert covered[start:end].sum() == 0
    random = np.random.default_rng(0)
    codons = random.integers(64, size=len(layout.first_base))
    read = np.concatenate(genes_of(layout, _with_genes(np.zeros(200_000, dtype=np.uint8), codons, layout)))
    assert (read == codons).all()


def test_every_species_has_whole_genes_with_its_own_codon_usage() -> None:
    genomes = simulate_genomes(0, (300_000,), (1_000,))
    layout = _draw_layout(300_000, stream_generator(0, 0, 11))
    amino_acids = amino_acid_of_codons()
    usage = {}
    for species in genomes.species_names:
        bases = np.maximum(genomes.chromosomes[species]["chrI"], FIRST_BASE_TOKEN) - FIRST_BASE_TOKEN
        bases = np.minimum(bases, 3)  # N becomes T: a gap may cut a gene
        genes = genes_of(layout, bases)
        whole = [gene for gene in genes if (amino_acids[gene[1:-1]] != STOP).all()]
        assert len(whole) >= len(genes) - 3
        assert np.mean([amino_acids[gene[0]] == METHIONINE for gene in genes]) > 0.95
        assert np.mean([amino_acids[gene[-1]] == STOP for gene in genes]) > 0.95
        counts = np.bincount(np.concatenate(genes), minlength=64)
        usage[species] = counts / np.bincount(amino_acids, counts)[amino_acids]
    difference = np.abs(usage["cinerea"] - usage["dorsalis"])
    # The standard error of a share of some hundred codons is a few percent.
    assert difference.max() > 0.15


def test_a_species_has_repeats_that_its_sister_lacks() -> None:
    tree = (Branch("a", "root", 0.1, 0.5, 1.0), Branch("b", "root", 0.1, 0.5, 1.0))
    genomes = simulate_genomes(3, (200_000,), (200_000,), tree=tree)

    def words(name: str, chromosome: str, length: int = 16) -> set[bytes]:
        tokens = genomes.chromosomes[name][chromosome]
        forward = {tokens[start : start + length].tobytes() for start in range(len(tokens) - length)}
        other = COMPLEMENT_IDS[tokens[::-1]].astype(np.uint8)
        return forward | {other[start : start + length].tobytes() for start in range(len(other) - length)}

    # chrI and chrII share no ancestor: only repeats have words of 16 bases in common, by far the most within a species.
    within = len(words("a", "chrI") & words("a", "chrII"))
    between = len(words("a", "chrI") & words("b", "chrII"))
    assert within > 500
    assert between < within / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((-1,), "negative seed"), ((0, (), ()), "at least one chromosome"), ((0, (10, 0)), "of 1 bp or more")],
)
def test_numbers_out_of_range_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        simulate_genomes(*arguments)
