"""A simulated clade: DNA of five related species with a known Bayes-optimal classification.

The model, from the root of the tree to the files:

1. **Ancestral chromosomes** come from a stationary Markov chain of order 2 (or any other order). Its conditional
   probabilities are sampled from a Dirichlet distribution, and the chain is made *strand-symmetric*: a word and its
   reverse complement are equally probable (Chargaff's second rule; Prabhu 1993, Nucleic Acids Res. 21:2797).
2. **Each branch** of the tree changes every site independently of the others by a continuous-time substitution process
   with its own rates: a GC content it drifts towards and a transition/transversion ratio (Tamura 1992, Mol. Biol. Evol.
   9:678, which is Hasegawa, Kishino and Yano 1985 with A = T and C = G; its own parameters on each branch: Galtier and
   Gouy 1998, Mol. Biol. Evol. 15:871). Over a branch of length d the probabilities are exp(Q d). These rates are
   strand-symmetric too. There are no insertions, deletions or rearrangements.
3. **Chromosomes.** chrI of all species descends from one ancestral chrI, and so on, so the chromosomes of the
   species are homologous. Each chromosome has its own ancestor: held-out chromosomes share no homology with training
   chromosomes, as in a real genome.
4. **Assembly gaps**, short runs of N, are equally frequent in all species.

Species differ in composition and in how far, and by which changes, the ancestral context has diverged. Given the
species, a window is a hidden Markov chain: the hidden state is the ancestral word, and the observed base is emitted by
the product of the branches' matrices from the root to the leaf. The forward algorithm (Rabiner 1989, Proc. IEEE 77:257,
eqs. 19-21, with the scaling of section V.A) sums over all ancestors, which gives the exact likelihood and the Bayes
optimum, which no classifier can beat on average without homology.

Accuracy of the Bayes optimum for seed 0 on the held-out chromosomes (chance 20 %, 3,000 to 200 windows per length), as
printed by `pytest -s` from `test_the_default_clade_is_hard_when_short_and_solvable_when_long`:

| window, bp | 256 | 1,024 | 4,096 | 16,384 | 32,768 |
| --- | --- | --- | --- | --- | --- |
| Bayes optimum, % | 35.2 | 52.3 | 79.4 | 97.3 | 100.0 |
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.linalg import expm

from genomamba.tokenizer import ANY_BASE_TOKEN, PADDED_VOCABULARY_SIZE, VOCABULARY
from mambacore.errors import InputError
from mambacore.files import replaced_when_whole

FIRST_BASE_TOKEN = VOCABULARY["A"]  # C, G, T follow
ROOT = "root"
GAP_SPACING_BP = 200_000
GAP_LENGTH_BP = 100
SOFT_MASK_SPACING_BP = 10_000
SOFT_MASK_LENGTH_BP = 400
FASTA_LINE_BP = 80
STEPS_PER_SCALING = 16


@dataclass(frozen=True)
class Branch:
    """One branch of the tree, named after the node at its end.

    Attributes:
        name: The node at the branch's end; a species if no other branch begins there.
        parent: The node at its beginning; `"root"` for the ancestor of all.
        substitutions_per_site: Length of the branch, expected substitutions per site at its equilibrium.
        equilibrium_gc: Fraction of G and C that the branch drifts towards, between 0 and 1.
        transition_ratio: Rate of transitions (A-G, C-T) over that of transversions (kappa), above 0.
    """

    name: str
    parent: str
    substitutions_per_site: float
    equilibrium_gc: float
    transition_ratio: float

    def substitution_matrix(self) -> np.ndarray:
        """Return probabilities (4, 4) of the base at the end (column) given that at the beginning (row), A C G T.

        exp(Q d), Tamura (1992).

        Raises:
            InputError: if a parameter is out of range.
        """
        if not (self.substitutions_per_site >= 0 and 0 < self.equilibrium_gc < 1 and self.transition_ratio > 0):
            raise InputError(
                f"branch {self.name!r} has parameters out of range: give a length of 0 or more, an equilibrium GC "
                "fraction between 0 and 1, and a transition ratio above 0"
            )
        strong, weak = self.equilibrium_gc / 2, (1 - self.equilibrium_gc) / 2
        frequencies = np.array([weak, strong, strong, weak])
        rates = np.tile(frequencies, (4, 1))
        for purine_or_pyrimidine in ([0, 2], [1, 3]):
            rates[np.ix_(purine_or_pyrimidine, purine_or_pyrimidine)] *= self.transition_ratio
        np.fill_diagonal(rates, 0.0)
        np.fill_diagonal(rates, -rates.sum(axis=1))
        substitutions_per_time = -frequencies @ rates.diagonal()
        return expm(rates * (self.substitutions_per_site / substitutions_per_time))


DEFAULT_TREE = (
    Branch("inner_1", ROOT, 0.03, 0.45, 2.0),
    Branch("inner_2", ROOT, 0.03, 0.45, 2.0),
    Branch("inner_3", "inner_2", 0.02, 0.45, 2.0),
    Branch("alba", "inner_1", 0.10, 0.52, 6.0),
    Branch("borealis", "inner_1", 0.10, 0.36, 1.0),
    Branch("cinerea", "inner_2", 0.28, 0.45, 1.0),
    Branch("dorsalis", "inner_3", 0.02, 0.45, 1.0),
    Branch("elegans", "inner_3", 0.13, 0.45, 14.0),
)


@dataclass(frozen=True)
class AncestralChain:
    """A stationary, strand-symmetric Markov chain over bases; contexts are numbered with the newest base last.

    Attributes:
        probabilities: (4**order, 4) probability of the next base given the `order` bases before it.
        stationary: (4**order,) probability of each context anywhere in the chain.
    """

    probabilities: np.ndarray
    stationary: np.ndarray

    @classmethod
    def from_dirichlet(cls, order: int, concentration: float, generator: np.random.Generator) -> "AncestralChain":
        """Sample every row from Dirichlet(concentration, ...), then average the chain with that of the other strand.

        Both strands of a stationary chain are stationary chains of the same order, and so is the chain whose word
        probabilities are the mean of theirs: that one is its own reverse complement.
        """
        context_count = 4**order
        sampled = generator.dirichlet(np.full(4, concentration), size=context_count)
        words = _stationary_contexts(sampled)[:, None] * sampled
        # One axis per base: flipping the axes complements (base b becomes 3 - b), transposing reverses.
        words = words.reshape((4,) * (order + 1))
        words = ((words + np.flip(words).T) / 2).reshape(context_count, 4)
        stationary = words.sum(axis=1)
        return cls(words / stationary[:, None], stationary)

    def draw(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """Sample bases 0-3, uint8 (length,), from the stationary chain.

        One uniform number per site determines its base for every context, so blocks can be sampled in parallel for all
        possible entering contexts; the actual context then selects one of them. This is exact.
        """
        context_count = len(self.stationary)
        block_length = max(1, int(np.sqrt(length)))
        block_count = -(-length // block_length)
        uniforms = generator.random((block_count, block_length))
        thresholds = self.probabilities.cumsum(axis=1)[:, :3]

        exits = np.tile(np.arange(context_count), (block_count, 1))
        for step in range(block_length):
            exits = _next_contexts(exits, categorical(uniforms[:, step, None], thresholds, exits), context_count)
        entries = np.empty(block_count, dtype=np.int64)
        entries[0] = generator.choice(context_count, p=self.stationary)
        for block in range(1, block_count):
            entries[block] = exits[block - 1, entries[block - 1]]

        bases = np.empty((block_count, block_length), dtype=np.uint8)
        contexts = entries
        for step in range(block_length):
            bases[:, step] = categorical(uniforms[:, step], thresholds, contexts)
            contexts = _next_contexts(contexts, bases[:, step], context_count)
        return bases.ravel()[:length]


@dataclass(frozen=True)
class SimulatedGenomes:
    """Species with their homologous chromosomes.

    Attributes:
        seed: The seed that, with the parameters, determines everything.
        species_names: Names in class order.
        training_names: Training chromosomes.
        holdout_names: Held-out chromosomes; they share no ancestor with the others.
        chromosomes: Species -> chromosome -> tokens, uint8 (length_bp,).
    """

    seed: int
    species_names: tuple[str, ...]
    training_names: tuple[str, ...]
    holdout_names: tuple[str, ...]
    chromosomes: dict[str, dict[str, np.ndarray]]

    def sequences(self, names: Sequence[str]) -> list[list[np.ndarray]]:
        """Return tokens of the named chromosomes, one list per species in class order."""
        return [[self.chromosomes[species][name] for name in names] for species in self.species_names]

    def write_fasta(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `SPECIES.fa` for each species, one record per chromosome; return the paths by species.

        Soft-masked (lower-case) runs have the same coordinates in all species, so case is uninformative. Each file
        is written under a temporary name and then renamed.

        Raises:
            InputError: if the folder cannot be created or written to.
        """
        folder = Path(folder)
        paths = {species: folder / f"{species}.fa" for species in self.species_names}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for species, path in paths.items():
                with replaced_when_whole(path) as stream:
                    for index, (name, tokens) in enumerate(self.chromosomes[species].items()):
                        letters = _soft_masked_letters(tokens, stream_generator(self.seed, index, _SOFT_MASK))
                        stream.write(f">{name} {species}, simulated\n".encode() + _fasta_lines(letters))
        except OSError as error:
            raise InputError(
                f"the simulated genomes cannot be written to {folder}: {error.strerror}; give a folder that can be "
                "written to"
            ) from error
        return paths


@dataclass(frozen=True)
class SimulatedClade(SimulatedGenomes):
    """Genomes, and the model they were sampled from.

    Attributes:
        chain: The ancestral chain.
        leaf_matrices: (species, 4, 4) base of a species (column) given the ancestral base (row).
    """

    chain: AncestralChain
    leaf_matrices: np.ndarray

    def log_likelihoods(self, windows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return the exact log-likelihood (nats) of each window under each species, float64 (windows, species).

        Both strands have the same likelihood, because chain and substitutions are strand-symmetric, so the strand need
        not be known. N and other unknown bases are summed over. Windows may differ in length; an empty one has
        likelihood 1.

        Args:
            windows: Tokens, uint8 (windows, length), or a list of arrays (length,).
        """
        columns = _padded_columns(windows)
        window_count = columns.shape[1]
        species_count, context_count = len(self.species_names), len(self.chain.stationary)
        # Emission of a token from the newest base of a context, 1 where the base is unknown.
        emissions = np.ones((PADDED_VOCABULARY_SIZE, species_count, context_count))
        emissions[FIRST_BASE_TOKEN : FIRST_BASE_TOKEN + 4] = np.moveaxis(
            self.leaf_matrices[:, np.arange(context_count) % 4, :], 2, 0
        )
        transitions = _context_transitions(self.chain.probabilities)
        # The state before the first base is a context from the stationary chain, so windows of any length are exact.
        forward = np.tile(self.chain.stationary, (window_count, species_count, 1))
        log_scale = np.zeros((window_count, species_count))
        for position, column in enumerate(columns):
            forward = (forward.reshape(-1, context_count) @ transitions).reshape(forward.shape)
            forward *= emissions[column]
            if position % STEPS_PER_SCALING == STEPS_PER_SCALING - 1:
                scale = forward.sum(axis=2)
                forward /= scale[:, :, None]
                log_scale += np.log(scale)
        return log_scale + np.log(forward.sum(axis=2))


def simulate_clade(
    seed: int,
    training_lengths_bp: Sequence[int] = (600_000, 600_000, 600_000),
    holdout_lengths_bp: Sequence[int] = (300_000, 300_000),
    *,
    tree: Sequence[Branch] = DEFAULT_TREE,
    context_order: int = 2,
    context_concentration: float = 7.0,
) -> SimulatedClade:
    """Simulate a clade; the module docstring describes the model.

    Args:
        seed: Non-negative; the result is a function of it and of the other arguments.
        training_lengths_bp: Length of each training chromosome.
        holdout_lengths_bp: Length of each held-out chromosome. Chromosomes are named chrI, chrII, ... across both.
        tree: Branches, each after the branch that leads to its parent.
        context_order: Order of the ancestral chain.
        context_concentration: Dirichlet parameter of its probabilities; smaller makes contexts more different.

    Raises:
        InputError: if a number is out of range, or the branches do not form a tree of at least two species.
    """
    if seed < 0 or context_order < 1 or context_concentration <= 0:
        raise InputError(
            "the simulation got a number out of range: give a seed of 0 or more, a context order of 1 or more and a "
            "concentration above 0"
        )
    lengths = (*training_lengths_bp, *holdout_lengths_bp)
    matrices = _matrices_from_root(tree)
    species_names, names = species_of(tree), chromosome_names(lengths)
    chain = AncestralChain.from_dirichlet(context_order, context_concentration, stream_generator(seed, 0, _CHAIN))
    chromosomes: dict[str, dict[str, np.ndarray]] = {species: {} for species in species_names}
    for index, (name, length) in enumerate(zip(names, lengths, strict=True)):
        bases_at = {ROOT: chain.draw(length, stream_generator(seed, index, _ANCESTOR))}
        for number, branch in enumerate(tree):
            generator = stream_generator(seed, index, _BRANCH, number)
            thresholds = branch.substitution_matrix().cumsum(axis=1)[:, :3]
            bases_at[branch.name] = categorical(generator.random(length), thresholds, bases_at[branch.parent])
            if branch.name in chromosomes:
                tokens = bases_at[branch.name] + np.uint8(FIRST_BASE_TOKEN)
                chromosomes[branch.name][name] = with_gaps(tokens, generator)
    return SimulatedClade(
        seed=seed,
        species_names=species_names,
        training_names=names[: len(training_lengths_bp)],
        holdout_names=names[len(training_lengths_bp) :],
        chromosomes=chromosomes,
        chain=chain,
        leaf_matrices=np.stack([matrices[species] for species in species_names]),
    )


def species_of(tree: Sequence[Branch]) -> tuple[str, ...]:
    """The leaves of a tree, in its order.

    Raises:
        InputError: There are fewer than two.
    """
    parents = {branch.parent for branch in tree}
    names = tuple(branch.name for branch in tree if branch.name not in parents)
    if len(names) < 2:
        raise InputError(f"the tree has {len(names)} species: give at least two terminal branches")
    return names


def chromosome_names(lengths_bp: Sequence[int]) -> tuple[str, ...]:
    """chrI, chrII and so on.

    Raises:
        InputError: There is no chromosome, or an empty one.
    """
    if not lengths_bp or min(lengths_bp) < 1:
        raise InputError("the simulation needs at least one chromosome, each of 1 bp or more")
    return tuple(f"chr{_roman_numeral(number)}" for number in range(1, len(lengths_bp) + 1))


# Random number streams, one per purpose.
_CHAIN, _ANCESTOR, _BRANCH, _SOFT_MASK = range(4)


def stream_generator(seed: int, *stream: int) -> np.random.Generator:
    """Random numbers that are a function of the seed and the numbers of a stream."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


def _matrices_from_root(tree: Sequence[Branch]) -> dict[str, np.ndarray]:
    """Return probabilities of the base at each node (column) given the root's (row): products along branches."""
    matrices = {ROOT: np.eye(4)}
    for branch in tree:
        if branch.name in matrices:
            raise InputError(f"the tree has two nodes named {branch.name!r}: give each branch its own name")
        if branch.parent not in matrices:
            raise InputError(
                f"branch {branch.name!r} begins at {branch.parent!r}, which no earlier branch leads to: list the "
                f"branches from {ROOT!r} outwards"
            )
        matrices[branch.name] = matrices[branch.parent] @ branch.substitution_matrix()
    return matrices


def _context_transitions(probabilities: np.ndarray) -> np.ndarray:
    """Return the chain's transition matrix (contexts, contexts)."""
    context_count = len(probabilities)
    contexts = np.arange(context_count)
    transitions = np.zeros((context_count, context_count))
    for base in range(4):
        transitions[contexts, _next_contexts(contexts, np.full(1, base), context_count)] += probabilities[:, base]
    return transitions


def _stationary_contexts(probabilities: np.ndarray) -> np.ndarray:
    """Solve p T = p with sum(p) = 1."""
    transitions = _context_transitions(probabilities)
    equations = np.vstack([transitions.T - np.eye(len(transitions)), np.ones(len(transitions))])
    right_side = np.append(np.zeros(len(transitions)), 1.0)
    return np.linalg.lstsq(equations, right_side, rcond=None)[0]


def _next_contexts(contexts: np.ndarray, bases: np.ndarray, context_count: int) -> np.ndarray:
    return (contexts * 4 + bases) % context_count


def categorical(uniforms: np.ndarray, thresholds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Bases, uint8: how many of the three cumulative probabilities of its row each uniform number reaches."""
    bases = np.zeros(rows.shape, dtype=np.uint8)
    for threshold in thresholds.T:
        bases += uniforms >= threshold[rows]
    return bases


def with_gaps(tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Put runs of N at random places, one for each `GAP_SPACING_BP`."""
    for start in generator.integers(0, len(tokens), size=len(tokens) // GAP_SPACING_BP):
        tokens[start : start + GAP_LENGTH_BP] = ANY_BASE_TOKEN
    return tokens


def _soft_masked_letters(tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return ASCII letters, uint8 (length,), with lower-case runs."""
    table = np.full(PADDED_VOCABULARY_SIZE, ord("N"), dtype=np.uint8)
    table[FIRST_BASE_TOKEN : FIRST_BASE_TOKEN + 4] = list(b"ACGT")
    letters = table[tokens]
    for start in generator.integers(0, len(tokens), size=len(tokens) // SOFT_MASK_SPACING_BP):
        letters[start : start + SOFT_MASK_LENGTH_BP] |= ord("a") ^ ord("A")
    return letters


def _fasta_lines(letters: np.ndarray) -> bytes:
    text = letters.tobytes()
    return b"".join(text[start : start + FASTA_LINE_BP] + b"\n" for start in range(0, len(text), FASTA_LINE_BP))


def _padded_columns(windows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return tokens, uint8 (longest, windows), padded with N, which does not change the likelihood."""
    longest = max((len(window) for window in windows), default=0)
    columns = np.full((longest, len(windows)), ANY_BASE_TOKEN, dtype=np.uint8)
    for index, window in enumerate(windows):
        columns[: len(window), index] = window
    return columns


def _roman_numeral(number: int) -> str:
    numeral = ""
    for value, letters in ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV")):
        count, number = divmod(number, value)
        numeral += letters * count
    return numeral + "I" * number
