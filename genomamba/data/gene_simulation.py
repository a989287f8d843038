"""Simulated genomes with what real ones have and Markov chains lack: genes in reading frames, and repeat families.

Chromosomes descend from ancestral ones along the tree of `genomamba.data.simulation`, without insertions or deletions
of single bases. On top of its substitution process:

1. **Genes** cover about half of a chromosome, on both strands: a start codon, amino acids at the frequencies of
   `AMINO_ACID_WEIGHTS`, a stop codon. Every branch has preferences of its own among synonymous codons, which drift from
   its parent's; synonymous changes are frequent along a branch, amino acids change rarely. So the species differ in
   their codon usage, in phase with the reading frame (codon usage bias: Sharp and Li 1987, Nucleic Acids Res. 15:1281).
2. **Repeat families.** Every branch has a family of transposons of its own, descended from its parent's. It jumps into
   the gaps between genes on all chromosomes, as truncated copies on either strand that have diverged from each other by
   the family's age. Families of inner branches are shared by the species below them.

A window has no tractable likelihood under this model, so there is no Bayes optimum to compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from genomamba.data.simulation import (
    DEFAULT_TREE,
    FIRST_BASE_TOKEN,
    ROOT,
    AncestralChain,
    Branch,
    SimulatedGenomes,
    categorical,
    chromosome_names,
    species_of,
    stream_generator,
    with_gaps,
)
from mambacore.errors import InputError

Bases = npt.NDArray[np.uint8]

# The standard genetic code in the order T, C, A, G of each position, and the numbers of these bases here.
_CODE: Final = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_CODE_ORDER: Final = (3, 1, 0, 2)
_AMINO_ACIDS: Final = "ACDEFGHIKLMNPQRSTVWY*"
AMINO_ACID_WEIGHTS: Final = (55, 13, 58, 65, 45, 50, 22, 66, 73, 96, 21, 61, 44, 39, 44, 90, 59, 56, 10, 34)
"""Of the amino acids in alphabetical order of their letters, about those of yeast proteins, per thousand."""

CONTEXT_ORDER: Final = 3
CONTEXT_CONCENTRATION: Final = 20.0
# bp between genes, mostly; every `ISLAND_SPACING_GENES`-th gap or so is an island that repeats jump into.
MEAN_GAP_BP: Final = 300
ISLAND_SPACING_GENES: Final = 5
ISLAND_BP: Final = (1_500, 5_000)
MEAN_GENE_CODONS: Final = 350
SHORTEST_GENE_CODONS: Final = 60
# Of codon preferences (natural logarithms): at the root, and along a branch per square root of a substitution per site.
ROOT_PREFERENCE: Final = 0.5
PREFERENCE_DRIFT: Final = 1.6
# Changes of a codon per substitution at a neutral site.
SYNONYMOUS_RATE: Final = 2.0
AMINO_ACID_RATE: Final = 0.3
FAMILY_BP: Final = (300, 2_500)
# Of a family from its parent's, and copies per 100,000 bp and substitution per site of the branch.
FAMILY_DIVERGENCE: Final = 0.12
COPIES_PER_BRANCH: Final = 60.0
MOST_COPIES: Final = 8.0
# Random streams, apart from those of the clade without genes.
_CHAIN, _LAYOUT, _ANCESTOR, _BRANCH, _USAGE, _FAMILY = range(10, 16)


@dataclass(frozen=True)
class Layout:
    """Where the codons of a chromosome are, and the islands between genes.

    Attributes:
        first_base: (codons,) position of each codon's first base, bp.
        step: (codons,) 1 on the forward strand, -1 on the other.
        is_fixed: (codons,) start and stop codons, which do not change.
        islands: (islands, 2) start and end of each, bp.
    """

    first_base: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    is_fixed: npt.NDArray[np.bool_]
    islands: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Family:
    """A repeat family: its sequence, its copies per 100,000 bp, and how far these have diverged from it."""

    consensus: Bases
    copies: float
    age: float


def simulate_genomes(
    seed: int,
    training_lengths_bp: Sequence[int] = (600_000, 600_000, 600_000),
    holdout_lengths_bp: Sequence[int] = (300_000, 300_000),
    *,
    tree: Sequence[Branch] = DEFAULT_TREE,
) -> SimulatedGenomes:
    """Simulate genomes with genes and repeats.

    Args:
        seed: Non-negative; the result is a function of it and of the other arguments.
        training_lengths_bp: Length of each chromosome to train on.
        holdout_lengths_bp: Length of each chromosome to hold out: its genes share no ancestor with the others, but the
            repeats of a species are on all its chromosomes.
        tree: Branches, each after the branch that leads to its parent.

    Raises:
        InputError: The seed is negative, there is no chromosome, or the tree has fewer than two species.
    """
    if seed < 0:
        raise InputError("the simulation got a negative seed: give 0 or more")
    lengths = (*training_lengths_bp, *holdout_lengths_bp)
    species_names, names = species_of(tree), chromosome_names(lengths)
    chain = AncestralChain.from_dirichlet(CONTEXT_ORDER, CONTEXT_CONCENTRATION, stream_generator(seed, 0, _CHAIN))
    usage = _codon_usage(seed, tree)
    families = _repeat_families(seed, tree, chain)
    chromosomes: dict[str, dict[str, Bases]] = {species: {} for species in species_names}
    for index, (name, length) in enumerate(zip(names, lengths, strict=True)):
        layout = _draw_layout(length, stream_generator(seed, index, _LAYOUT))
        generator = stream_generator(seed, index, _ANCESTOR)
        codons = _ancestral_codons(layout, usage[ROOT], generator)
        at_node = {ROOT: (_with_genes(chain.draw(length, generator), codons, layout), codons)}
        for number, branch in enumerate(tree):
            generator = stream_generator(seed, index, _BRANCH, number)
            bases, codons = at_node[branch.parent]
            thresholds = branch.substitution_matrix().cumsum(axis=1)[:, :3]
            bases = categorical(generator.random(length), thresholds, bases)
            _insert_repeats(bases, layout, families[branch.name], branch, generator)
            codons = _evolved_codons(codons, layout, usage[branch.name], branch, generator)
            at_node[branch.name] = (_with_genes(bases, codons, layout), codons)
            if branch.name in chromosomes:
                tokens = at_node[branch.name][0] + np.uint8(FIRST_BASE_TOKEN)
                chromosomes[branch.name][name] = with_gaps(tokens, generator)
    return SimulatedGenomes(
        seed=seed,
        species_names=species_names,
        training_names=names[: len(training_lengths_bp)],
        holdout_names=names[len(training_lengths_bp) :],
        chromosomes=chromosomes,
    )


def amino_acid_of_codons() -> npt.NDArray[np.int64]:
    """(64,) amino acid of each codon, 20 for a stop; codons are numbered 16 a + 4 b + c, with A C G T = 0 1 2 3."""
    table = np.zeros(64, dtype=np.int64)
    for place, letter in enumerate(_CODE):
        first, second, third = (_CODE_ORDER[place >> shift & 3] for shift in (4, 2, 0))
        table[16 * first + 4 * second + third] = _AMINO_ACIDS.index(letter)
    return table


def _codon_usage(seed: int, tree: Sequence[Branch]) -> dict[str, npt.NDArray[np.float64]]:
    """(21, 64) cumulative probability of the codons of each amino acid, at every node."""
    amino_acids = amino_acid_of_codons()
    preferences = {ROOT: ROOT_PREFERENCE * stream_generator(seed, 0, _USAGE).standard_normal(64)}
    ends_strong = np.isin(np.arange(64) % 4, (1, 2))
    for number, branch in enumerate(tree, 1):
        drift = PREFERENCE_DRIFT * np.sqrt(branch.substitutions_per_site)
        noise = stream_generator(seed, number, _USAGE).standard_normal(64)
        pull = np.log(branch.equilibrium_gc / (1 - branch.equilibrium_gc)) * branch.substitutions_per_site
        preferences[branch.name] = preferences[branch.parent] + drift * noise + pull * ends_strong
    usage = {}
    for name, values in preferences.items():
        table = np.where(amino_acids == np.arange(len(_AMINO_ACIDS))[:, None], np.exp(values), 0.0)
        usage[name] = (table / table.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return usage


def _repeat_families(seed: int, tree: Sequence[Branch], chain: AncestralChain) -> dict[str, _Family]:
    """The family of every branch; the first one's ancestor is the root's."""
    generator = stream_generator(seed, 0, _FAMILY)
    consensus = {ROOT: chain.draw(int(generator.integers(*FAMILY_BP)), generator)}
    families = {}
    for branch in tree:
        parent = consensus[branch.parent]
        changed = generator.random(len(parent)) < FAMILY_DIVERGENCE
        own = np.where(changed, generator.integers(4, size=len(parent)), parent).astype(np.uint8)
        # An unrelated family now and then, so that lengths differ.
        if generator.random() < 1 / 3:
            own = chain.draw(int(generator.integers(*FAMILY_BP)), generator)
        consensus[branch.name] = own
        copies = min(MOST_COPIES, COPIES_PER_BRANCH * branch.substitutions_per_site)
        families[branch.name] = _Family(own, copies, float(generator.uniform(0.01, 0.1)))
    return families


def _draw_layout(length: int, generator: np.random.Generator) -> Layout:
    """Genes and islands from the left end to the right."""
    first_base, step, fixed, islands = [], [], [], []
    cursor = 0
    while True:
        is_island = generator.random() < 1 / ISLAND_SPACING_GENES
        gap = int(generator.integers(*ISLAND_BP)) if is_island else 30 + int(generator.exponential(MEAN_GAP_BP))
        codons = SHORTEST_GENE_CODONS + int(generator.gamma(2.0, (MEAN_GENE_CODONS - SHORTEST_GENE_CODONS) / 2))
        start, end = cursor + gap, cursor + gap + 3 * codons
        if is_island:
            islands.append((cursor, min(start, length)))
        if end > length:
            break
        is_forward = generator.random() < 0.5
        positions = np.arange(start, end, 3)
        first_base.append(positions if is_forward else positions[::-1] + 2)
        step.append(np.full(codons, 1 if is_forward else -1))
        fixed.append(np.isin(np.arange(codons), (0, codons - 1)))
        cursor = end
    if not first_base:
        none = np.empty(0, dtype=np.int64)
        return Layout(none, none, none.astype(bool), np.array(islands, dtype=np.int64).reshape(-1, 2))
    return Layout(
        np.concatenate(first_base),
        np.concatenate(step),
        np.concatenate(fixed),
        np.array(islands, dtype=np.int64).reshape(-1, 2),
    )


def _codons_for(
    amino_acids: npt.NDArray[np.int64], usage: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """A codon for each amino acid."""
    uniforms = generator.random(len(amino_acids))
    return np.minimum((uniforms[:, None] >= usage[amino_acids]).sum(axis=1), 63)


def _amino_acids(count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    weights = np.array(AMINO_ACID_WEIGHTS, dtype=np.float64)
    return generator.choice(len(weights), size=count, p=weights / weights.sum())


def _ancestral_codons(
    layout: Layout, usage: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    amino_acids = _amino_acids(len(layout.first_base), generator)
    is_start = layout.is_fixed & np.roll(layout.is_fixed, 1)  # it follows the stop of the gene before
    amino_acids[layout.is_fixed] = _AMINO_ACIDS.index("*")
    amino_acids[is_start] = _AMINO_ACIDS.index("M")
    return _codons_for(amino_acids, usage, generator)


def _evolved_codons(
    codons: npt.NDArray[np.int64],
    layout: Layout,
    usage: npt.NDArray[np.float64],
    branch: Branch,
    generator: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """The codons at the end of a branch."""
    amino_acids = amino_acid_of_codons()[codons]
    chances = generator.random((2, len(codons)))
    length = branch.substitutions_per_site
    other = (chances[0] < -np.expm1(-AMINO_ACID_RATE * length)) & ~layout.is_fixed
    again = (chances[1] < -np.expm1(-SYNONYMOUS_RATE * length)) & ~layout.is_fixed
    amino_acids[other] = _amino_acids(int(other.sum()), generator)
    return np.where(other | again, _codons_for(amino_acids, usage, generator), codons)


def _with_genes(bases: Bases, codons: npt.NDArray[np.int64], layout: Layout) -> Bases:
    """The bases with those of the codons in their places."""
    for place, shift in enumerate((4, 2, 0)):
        own = (codons >> shift & 3).astype(np.uint8)
        bases[layout.first_base + place * layout.step] = np.where(layout.step > 0, own, 3 - own)
    return bases


def _insert_repeats(
    bases: Bases, layout: Layout, family: _Family, branch: Branch, generator: np.random.Generator
) -> None:
    """Overwrite parts of islands with copies of a family; they keep the length of the chromosome."""
    if not len(layout.islands):
        return
    for _ in range(generator.poisson(family.copies * len(bases) / 100_000)):
        start, end = layout.islands[generator.integers(len(layout.islands))]
        start = int(start + generator.integers(max(1, end - start - 100)))
        # Copies lack their beginning more often than their end.
        length = min(int(end - start), len(family.consensus), 100 + int(generator.exponential(len(family.consensus))))
        copy = family.consensus[len(family.consensus) - length :]
        changed = generator.random(length) < family.age
        copy = np.where(changed, generator.integers(4, size=length), copy).astype(np.uint8)
        bases[start : start + length] = copy if generator.random() < 0.5 else 3 - copy[::-1]
