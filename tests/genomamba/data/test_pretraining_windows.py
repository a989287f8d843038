"""Pretraining windows: letters and their policies, both strands, epochs in an order of their own, length warm-up."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.alphabet import IUPAC_CODES, reverse_complement
from genomamba.data.intervals import Interval, window_rule
from genomamba.data.pretraining_windows import PretrainingWindows, shuffled_position
from genomamba.io.reference import Reference
from genomamba.letter_policy import LETTER_POLICIES, PADDING_TOKEN, LetterPolicy, letter_policy
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

UNK, N, PAD = 6, 11, PADDING_TOKEN
LETTERS = np.random.default_rng(0).choice(np.frombuffer(b"ACGTacgtRyN", dtype=np.uint8), size=2000).tobytes()
ROWS = [Interval("a", start, start + 100, "train") for start in range(0, 1000, 100)] + [
    Interval("a", 1000, 1500, "valid"),
    Interval("gap", 0, 400, "test"),
]


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    path = tmp_path / "genome.fa"
    path.write_bytes(b">a\n" + LETTERS + b"\n>gap\n" + b"N" * 300 + b"ACGT" * 25 + b"\n>empty\n" + b"N" * 500 + b"\n")
    return Reference(path)


@pytest.mark.parametrize(
    ("policy", "tokens", "scored"),
    [
        ("bases", [7, 8, 9, 10, 10, 7, 8, N, N, UNK, UNK], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),
        ("hyenadna", [7, 8, 9, 10, 10, UNK, UNK, N, UNK, UNK, UNK], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("caduceus", [7, 8, 9, 10, 10, 7, 8, PAD, PAD, UNK, UNK], [1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_the_policies_by_name(policy: str, tokens: list[int], scored: list[int]) -> None:
    chosen = letter_policy(policy)
    found = chosen.tokens(b"ACGTUacNnRy")
    assert found.tolist() == tokens
    assert chosen.is_scored(found).tolist() == [bool(score) for score in scored]


def test_ambiguity_codes_can_be_treated_as_n() -> None:
    policy = LetterPolicy(ambiguous="any", any_base="padding")
    assert policy.tokens(b"RynNA").tolist() == [PAD, PAD, PAD, PAD, 7]
    assert not policy.is_scored(policy.tokens(b"Ry")).any()


@given(st.binary(max_size=40).map(lambda raw: bytes((IUPAC_CODES + IUPAC_CODES.lower()).encode()[b % 32] for b in raw)))
def test_every_policy_commutes_with_the_reverse_complement(letters: bytes) -> None:
    for policy in LETTER_POLICIES.values():
        expected = CharacterTokenizer().reverse_complement(policy.tokens(letters))
        np.testing.assert_array_equal(policy.tokens(reverse_complement(letters)), expected)


def test_wrong_policies_and_letters_are_refused() -> None:
    with pytest.raises(InputError, match="no letter policy 'x': use bases, hyenadna, caduceus"):
        letter_policy("x")
    with pytest.raises(InputError, match="soft_mask 'lower': use same or unknown"):
        LetterPolicy(soft_mask="lower")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'!' at position 3"):
        LetterPolicy().tokens(b"AC!")
    policy = LETTER_POLICIES["caduceus"]
    assert LetterPolicy(**policy.to_config()) == pickle.loads(pickle.dumps(policy)) == replace(policy)


def test_a_sample_is_its_place_in_the_file_on_its_strand(reference: Reference) -> None:
    windows = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 40, seed=1)
    strands = Counter[bool]()
    for index in range(200):
        tokens, scored, place, is_reverse = windows.sample(index)
        letters = LETTERS[place.start : place.end]
        expected = windows.policy.tokens(reverse_complement(letters) if is_reverse else letters)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(scored, np.isin(expected, [7, 8, 9, 10]))
        strands[is_reverse] += 1
    assert min(strands.values()) > 70


def test_a_sample_depends_on_seed_and_index_only(reference: Reference) -> None:
    windows = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 40, seed=1)
    forwards = [windows.sample(index) for index in range(50)]
    again = pickle.loads(pickle.dumps(windows))
    for index in reversed(range(50)):
        assert again.sample(index)[2:] == forwards[index][2:]
    tokens, scored = windows.sample_batch(7, 5)
    assert (tokens.shape, tokens.dtype, scored.shape, scored.dtype) == ((5, 40), np.uint8, (5, 40), np.bool_)
    np.testing.assert_array_equal(tokens[3], forwards[10].tokens)
    other = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 40, seed=2)
    assert [other.sample(index).place for index in range(20)] != [window.place for window in forwards[:20]]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_other_strand_has_the_asked_probability(reference: Reference, probability: float) -> None:
    windows = PretrainingWindows(
        reference, ROWS, "train", window_rule("mamba"), 40, reverse_complement_probability=probability
    )
    assert {windows.sample(index).is_reverse_complement for index in range(30)} == {bool(probability)}


def test_an_epoch_sees_every_window_once_in_an_order_of_its_own(reference: Reference) -> None:
    windows = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 20, seed=4)
    count = len(windows)
    assert count == 50
    epochs = [[windows.sample(epoch * count + number).place.start for number in range(count)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 1000, 20))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_the_order_is_one_to_one(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled_position(number, count, seed, epoch) for number in range(count)) == list(range(count))


def test_the_order_is_close_to_uniform() -> None:
    firsts = Counter(shuffled_position(0, 7, seed, 0) for seed in range(3500))
    assert max(abs(firsts[number] - 500) for number in range(7)) < 5 * np.sqrt(500)
    assert shuffled_position(3, 10**12, 0, 0) < 10**12


@pytest.mark.parametrize("policy", sorted(LETTER_POLICIES))
def test_no_window_is_without_scored_bases(reference: Reference, policy: str) -> None:
    windows = PretrainingWindows(reference, ROWS, "test", window_rule("mamba"), 100, policy=letter_policy(policy))
    assert all(windows.sample(index).scored.any() for index in range(40))
    evaluated = list(windows.evaluation())
    assert all(window.scored.any() for window in evaluated)
    assert len(evaluated) == (4 if policy == "hyenadna" else 1)  # three of the four lie in the gap


def test_a_gap_that_holds_all_windows_is_an_error_and_not_a_nan(reference: Reference) -> None:
    rows = [Interval("empty", 0, 500, "train")]
    windows = PretrainingWindows(reference, rows, "train", window_rule("mamba"), 100)
    with pytest.raises(InputError, match="hardly any train window of 100 bp"):
        windows.sample(0)
    assert list(windows.evaluation()) == []


def test_windows_with_too_few_scored_bases_can_be_left_out(reference: Reference) -> None:
    rows = [Interval("gap", 240, 400, "train")]
    windows = PretrainingWindows(reference, rows, "train", window_rule("mamba"), 80, minimum_scored_fraction=0.5)
    assert {windows.sample(index).place.start for index in range(10)} == {320}


def test_windows_beyond_a_contig_are_padded_with_n(reference: Reference) -> None:
    windows = PretrainingWindows(
        reference, ROWS[:1], "train", window_rule("hyenadna"), 160, reverse_complement_probability=0.0
    )
    tokens, scored, place, _ = windows.sample(0)
    assert (place.start, place.end) == (-30, 130)
    assert (tokens[:30] == N).all()
    assert not scored[:30].any()
    np.testing.assert_array_equal(tokens[30:], windows.policy.tokens(LETTERS[:130]))


def test_evaluation_is_fixed_on_the_forward_strand_and_spread(reference: Reference) -> None:
    windows = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 10, seed=1)
    everything = [window.place.start for window in windows.evaluation()]
    assert everything == list(range(0, 1000, 10))
    few = [window.place.start for window in windows.evaluation(at_most=20)]
    other_seed = PretrainingWindows(reference, ROWS, "train", window_rule("mamba"), 10, seed=2)
    assert few == [window.place.start for window in other_seed.evaluation(at_most=20)]
    assert len(set(few)) == 20
    assert min(few) < 250
    assert max(few) > 750
    assert not any(window.is_reverse_complement for window in windows.evaluation())


def test_mistakes_are_refused(reference: Reference) -> None:
    rule = window_rule("mamba")
    with pytest.raises(InputError, match="no rows for test"):
        PretrainingWindows(reference, ROWS[:3], "test", rule, 10)
    with pytest.raises(InputError, match="the seed is -1"):
        PretrainingWindows(reference, ROWS, "train", rule, 10, seed=-1)
    with pytest.raises(InputError, match=r"probability of the reverse strand is 1\.5"):
        PretrainingWindows(reference, ROWS, "train", rule, 10, reverse_complement_probability=1.5)
    with pytest.raises(InputError, match="beyond the 2000 bp of 'a'"):
        PretrainingWindows(reference, [Interval("a", 0, 2001, "train")], "train", rule, 10)
    with pytest.raises(InputError, match="window length is 0"):
        PretrainingWindows(reference, ROWS, "train", rule, 10).at_length(0)


def test_the_same_windows_at_another_length(reference: Reference) -> None:
    windows = PretrainingWindows(
        reference, ROWS, "train", window_rule("mamba"), 10, seed=1, policy=letter_policy("caduceus")
    )
    longer = windows.at_length(50)
    assert (longer.length, len(longer), longer.policy, longer.seed) == (50, 20, windows.policy, 1)
    assert longer.sample(0).tokens.shape == (50,)
