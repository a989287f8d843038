"""The simulated clade follows its model, and its likelihood is the model's."""

import itertools

import numpy as np
import pytest

from genomamba.baselines import KmerBaseline
from genomamba.baselines.sampling import draw_windows
from genomamba.data.simulation import DEFAULT_TREE, ROOT, AncestralChain, Branch, SimulatedClade, simulate_clade
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

BASES = np.arange(7, 11, dtype=np.uint8)


@pytest.fixture(scope="module")
def clade() -> SimulatedClade:
    return simulate_clade(3, training_lengths_bp=(250_000, 250_000), holdout_lengths_bp=(200_000,))


def all_sequences(length: int) -> np.ndarray:
    return np.array(list(itertools.product(BASES, repeat=length)), dtype=np.uint8)


def known_bases(clade: SimulatedClade, species: str, name: str) -> np.ndarray:
    tokens = clade.chromosomes[species][name]
    return np.where(tokens <= 10, tokens - np.uint8(7), 255)


def test_the_likelihoods_of_all_sequences_of_a_length_sum_to_one(clade: SimulatedClade) -> None:
    for length in (1, 4):
        totals = np.exp(clade.log_likelihoods(all_sequences(length))).sum(axis=0)
        np.testing.assert_allclose(totals, 1.0, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_likelihood_is_the_sum_over_all_ancestral_sequences(order: int) -> None:
    clade = simulate_clade(1, (500,), (), context_order=order)
    length = 5
    window = clade.chromosomes["elegans"]["chrI"][100 : 100 + length]
    expected = np.zeros(len(clade.species_names))
    for ancestor in itertools.product(range(4), repeat=length):
        first = sum(base * 4**place for place, base in enumerate(reversed(ancestor[:order])))
        probability = clade.chain.stationary[first]
        for position in range(order, length):
            context = ancestor[position - order : position]
            row = sum(base * 4**place for place, base in enumerate(reversed(context)))
            probability *= clade.chain.probabilities[row, ancestor[position]]
        expected += probability * clade.leaf_matrices[:, ancestor, window - 7].prod(axis=1)
    np.testing.assert_allclose(clade.log_likelihoods([window])[0], np.log(expected), rtol=1e-12)


def test_both_strands_have_the_same_likelihood(clade: SimulatedClade) -> None:
    window = clade.chromosomes["alba"]["chrI"][:3_001]
    strands = [window, CharacterTokenizer().reverse_complement(window)]
    forward, reverse = clade.log_likelihoods(strands)
    np.testing.assert_allclose(forward, reverse, rtol=1e-11)


def test_an_unknown_base_is_summed_over(clade: SimulatedClade) -> None:
    window = np.array([7, 8, 11, 10], dtype=np.uint8)
    filled = np.repeat(window[None], 4, axis=0)
    filled[:, 2] = BASES
    expected = np.logaddexp.reduce(clade.log_likelihoods(filled), axis=0)
    np.testing.assert_allclose(clade.log_likelihoods([window])[0], expected, rtol=1e-12)


def test_windows_of_different_lengths_score_as_each_does_alone(clade: SimulatedClade) -> None:
    tokens = clade.chromosomes["cinerea"]["chrII"]
    windows = [tokens[:40], tokens[40:57], tokens[:0]]
    together = clade.log_likelihoods(windows)
    for window, scores in zip(windows, together, strict=True):
        np.testing.assert_allclose(clade.log_likelihoods([window])[0], scores, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(together[2], 0.0, atol=1e-12)


def test_no_classifier_beats_the_exact_likelihood_on_average(clade: SimulatedClade) -> None:
    generator = np.random.default_rng(0)
    training = draw_windows(clade.sequences(clade.training_names), 4_096, 150, generator)
    test = draw_windows(clade.sequences(clade.holdout_names), 4_096, 60, generator)
    optimum = (clade.log_likelihoods(test.windows).argmax(axis=1) == test.labels).mean()
    model = KmerBaseline(4).fit(training.windows, training.labels)
    kmer = (model.predict_proba(test.windows).argmax(axis=1) == test.labels).mean()
    shuffled_species = clade.log_likelihoods(test.windows)[:, [1, 2, 3, 4, 0]].argmax(axis=1)
    assert optimum >= kmer - 0.02  # two standard errors of the difference; both see the same windows
    assert kmer > 0.4 > (shuffled_species == test.labels).mean()


def test_the_default_clade_is_hard_when_short_and_solvable_when_long() -> None:
    """The figures in the module's text; they are printed with `pytest -s`."""
    clade = simulate_clade(0)
    accuracy = {}
    for length, per_class in ((256, 600), (1_024, 300), (4_096, 200), (16_384, 60), (32_768, 40)):
        held_out = clade.sequences(clade.holdout_names)
        test = draw_windows(held_out, length, per_class, np.random.default_rng(length))
        accuracy[length] = (clade.log_likelihoods(test.windows).argmax(axis=1) == test.labels).mean()
    print({length: f"{value:.1%}" for length, value in accuracy.items()})
    assert 0.30 < accuracy[256] < 0.45
    assert 0.70 < accuracy[4_096] < 0.85
    assert accuracy[16_384] > 0.95
    assert accuracy[32_768] > 0.98


def test_the_ancestral_chain_is_stationary_and_strand_symmetric() -> None:
    chain = AncestralChain.from_dirichlet(2, 0.5, np.random.default_rng(0))
    words = (chain.stationary[:, None] * chain.probabilities).reshape(4, 4, 4)
    np.testing.assert_allclose(words.sum(axis=0), words.sum(axis=2), atol=1e-14)
    np.testing.assert_allclose(words, words[::-1, ::-1, ::-1].transpose(2, 1, 0), atol=1e-14)
    np.testing.assert_allclose(words.sum(), 1.0)


def test_drawn_words_are_as_frequent_as_the_chain_says() -> None:
    chain = AncestralChain.from_dirichlet(2, 2.0, np.random.default_rng(1))
    bases = chain.draw(300_000, np.random.default_rng(2)).astype(int)
    words = bases[:-2] * 16 + bases[1:-1] * 4 + bases[2:]
    expected = (chain.stationary[:, None] * chain.probabilities).ravel()
    np.testing.assert_allclose(np.bincount(words, minlength=64) / len(words), expected, atol=0.003)


@pytest.mark.parametrize("length", [1, 2, 3, 10, 997])
def test_a_chain_of_any_length_can_be_drawn(length: int) -> None:
    chain = AncestralChain.from_dirichlet(3, 2.0, np.random.default_rng(1))
    bases = chain.draw(length, np.random.default_rng(2))
    assert bases.shape == (length,)
    assert bases.max() <= 3


def test_branch_probabilities_keep_their_equilibrium_and_treat_the_strands_alike() -> None:
    branch = Branch("species", ROOT, 0.2, 0.3, 4.0)
    matrix = branch.substitution_matrix()
    equilibrium = np.array([0.35, 0.15, 0.15, 0.35])
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    np.testing.assert_allclose(equilibrium @ matrix, equilibrium)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1])
    short = Branch("species", ROOT, 1e-5, 0.3, 4.0).substitution_matrix()
    np.testing.assert_allclose(equilibrium @ (1 - short.diagonal()), 1e-5, rtol=1e-3)


def test_species_differ_by_as_many_substitutions_as_the_tree_says(clade: SimulatedClade) -> None:
    first, second = (clade.species_names.index(name) for name in ("alba", "dorsalis"))
    root = clade.chain.stationary.reshape(-1, 4).sum(axis=0)
    expected = (root[:, None] * clade.leaf_matrices[first] * clade.leaf_matrices[second]).sum()
    alba, dorsalis = (known_bases(clade, name, "chrI") for name in ("alba", "dorsalis"))
    known = (alba < 4) & (dorsalis < 4)
    assert abs((alba == dorsalis)[known].mean() - expected) < 0.01


def test_held_out_chromosomes_share_no_homology_with_training_ones(clade: SimulatedClade) -> None:
    def words(name: str) -> set[bytes]:
        text = clade.chromosomes["dorsalis"][name].tobytes()
        return {text[start : start + 21] for start in range(100_000)} - {bytes([11]) * 21}

    training = words("chrI")
    assert not training & words(clade.holdout_names[0])
    sister = clade.chromosomes["cinerea"]["chrI"].tobytes()
    assert any(sister[start : start + 21] in training for start in range(50_000))


def test_a_seed_determines_the_clade_and_another_seed_another() -> None:
    first, again, other = (simulate_clade(seed, (2_000,), (1_000,)) for seed in (5, 5, 6))
    for species in first.species_names:
        for name in ("chrI", "chrII"):
            np.testing.assert_array_equal(first.chromosomes[species][name], again.chromosomes[species][name])
            assert (first.chromosomes[species][name] != other.chromosomes[species][name]).mean() > 0.5


def test_fasta_files_hold_the_chromosomes_and_nothing_else_is_left(clade: SimulatedClade, tmp_path) -> None:
    paths = clade.write_fasta(tmp_path / "genomes")
    assert sorted(tmp_path.glob("genomes/*")) == sorted(paths.values())
    for species, path in paths.items():
        records = path.read_text().split(">")[1:]
        assert [record.split()[0] for record in records] == ["chrI", "chrII", "chrIII"]
        for record, tokens in zip(records, clade.chromosomes[species].values(), strict=True):
            letters = "".join(record.split("\n")[1:])
            assert letters != letters.upper()
            np.testing.assert_array_equal(CharacterTokenizer().encode(letters), tokens)
    assert clade.holdout_names == ("chrIII",)


def test_gaps_are_equally_long_in_all_species(clade: SimulatedClade) -> None:
    gaps = {sum(int((tokens == 11).sum()) for tokens in clade.chromosomes[name].values()) for name in clade.chromosomes}
    assert gaps == {300}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed of 0 or more"),
        ({"context_order": 0}, "context order"),
        ({"training_lengths_bp": (0,)}, "1 bp or more"),
        ({"tree": DEFAULT_TREE[:1]}, "1 species"),
        ({"tree": DEFAULT_TREE[3:]}, "'inner_1'"),
        ({"tree": (*DEFAULT_TREE, DEFAULT_TREE[0])}, "two nodes named 'inner_1'"),
        ({"tree": (Branch("one", ROOT, 0.1, 1.0, 2.0), DEFAULT_TREE[0])}, "'one'"),
    ],
)
def test_impossible_parameters_are_refused_with_a_remedy(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_clade(**{"seed": 0, "training_lengths_bp": (10,), "holdout_lengths_bp": (10,), **arguments})


def test_a_folder_that_cannot_be_written_is_refused_by_name(clade: SimulatedClade, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        clade.write_fasta(tmp_path / "file")
