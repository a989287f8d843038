"""Windows: training windows are a function of (seed, index); evaluation windows are fixed, spread and honest."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import EvaluationWindows, WindowSampler, evaluation_windows
from genomamba.tokenizer import CharacterTokenizer, Tokens
from mambacore.errors import InputError

TOKENIZER = CharacterTokenizer()


def random_tokens(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(7, 11, size=length, dtype=np.uint8)


def collection_of(**lengths_by_class: list[int]) -> GenomeCollection:
    return GenomeCollection.from_tokens(
        {
            class_name: {f"chr{number}": random_tokens(length, number) for number, length in enumerate(lengths)}
            for class_name, lengths in lengths_by_class.items()
        }
    )


def intervals(windows: EvaluationWindows, label: int) -> list[tuple[str, int, int]]:
    return sorted(
        (window.sequence.name, window.start, window.start + window.length)
        for window in windows.windows
        if window.label == label
    )


def count_overlaps(places: list[tuple[str, int, int]]) -> int:
    return sum(
        name == next_name and end > next_start for (name, _, end), (next_name, next_start, _) in pairwise(places)
    )


def test_a_sample_depends_on_seed_and_index_only() -> None:
    collection = collection_of(a=[500, 300], b=[400])
    sampler, again = WindowSampler(collection, 50, seed=3), WindowSampler(collection, 50, seed=3)
    forwards = [sampler.sample(index) for index in range(20)]
    backwards = [again.sample(index) for index in reversed(range(20))][::-1]
    for (tokens, label), (same_tokens, same_label) in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(tokens, same_tokens)
        assert label == same_label
    other = WindowSampler(collection, 50, seed=4)
    assert any(not np.array_equal(other.sample(index)[0], forwards[index][0]) for index in range(5))
    assert len({tokens.tobytes() for tokens, _ in forwards}) > 15


def test_a_batch_is_its_samples() -> None:
    sampler = WindowSampler(collection_of(a=[500, 300], b=[400]), 50, seed=3)
    tokens, labels = sampler.sample_batch(7, 5)
    assert (tokens.shape, tokens.dtype, labels.shape, labels.dtype) == ((5, 50), np.uint8, (5,), np.int64)
    for row in range(5):
        expected, label = sampler.sample(7 + row)
        np.testing.assert_array_equal(tokens[row], expected)
        assert labels[row] == label


def test_every_sample_is_a_window_of_its_class_on_one_of_the_strands() -> None:
    collection = collection_of(a=[90, 80], b=[70])
    strands = Counter[str]()
    sampler = WindowSampler(collection, 20, seed=0)
    for index in range(200):
        tokens, label = sampler.sample(index)
        sources = [
            sequence.tokens(0, sequence.length).tobytes()
            for sequence in collection.sequences_of(collection.class_names[label])
        ]
        forward = any(tokens.tobytes() in source for source in sources)
        reverse = any(TOKENIZER.reverse_complement(tokens).tobytes() in source for source in sources)
        assert forward != reverse
        strands["+" if forward else "-"] += 1
    assert min(strands.values()) > 70


def test_classes_then_sequences_then_starts_are_uniform() -> None:
    marked = {  # the token tells the sequence, so that a window can be recognised; A and T are one another's complement
        "a": {"long": np.full(1000, 7, dtype=np.uint8), "short": np.full(12, 8, dtype=np.uint8)},
        "b": {"only": np.full(400, 7, dtype=np.uint8)},
    }
    sampler = WindowSampler(GenomeCollection.from_tokens(marked), 10, seed=1)
    counts = Counter((label, tokens[0] in (7, 10)) for tokens, label in map(sampler.sample, range(4000)))
    deviation = 4 * np.sqrt(4000 * 0.25)
    assert abs(counts[1, True] - 2000) < deviation
    assert abs(counts[0, True] - 1000) < deviation
    assert abs(counts[0, False] - 1000) < deviation
    ramp = GenomeCollection.from_tokens({"a": {"one": np.r_[np.full(3, 7), np.full(3, 8)].astype(np.uint8)}})
    starts = Counter(tokens.tobytes() for tokens, _ in map(WindowSampler(ramp, 3, seed=0).sample, range(4000)))
    assert len(starts) == 8  # four starts, two strands
    assert min(starts.values()) > 500 - 5 * np.sqrt(500)


@pytest.mark.parametrize("unknown", [6, 11], ids=["[UNK]", "N"])
def test_windows_with_many_unknown_bases_are_not_drawn(unknown: int) -> None:
    tokens = random_tokens(5000)
    tokens[::80] = unknown  # one or two in 100
    tokens[1000:3000] = unknown
    sampler = WindowSampler(GenomeCollection.from_tokens({"a": {"one": tokens}}), 100, seed=0)
    fractions = [np.mean(sampler.sample(index)[0] == unknown) for index in range(300)]
    assert max(fractions) == 0.01


@pytest.mark.parametrize("unknown", [6, 11], ids=["[UNK]", "N"])
def test_windows_without_a_gap_are_preferred(unknown: int) -> None:
    tokens = random_tokens(5000)
    tokens[::150] = unknown  # none or one in 100
    sampler = WindowSampler(GenomeCollection.from_tokens({"a": {"one": tokens}}), 100, seed=0)
    assert not any((sampler.sample(index)[0] == unknown).any() for index in range(300))


def test_the_limit_of_unknown_bases_can_be_chosen() -> None:
    collection = GenomeCollection.from_tokens({"a": {"one": np.tile(np.array([7, 11], dtype=np.uint8), 100)}})
    assert WindowSampler(collection, 10, seed=0, maximum_unknown_fraction=0.5).sample(0)[1] == 0
    with pytest.raises(InputError, match="class 'a' has hardly any window of 10 bp"):
        WindowSampler(collection, 10, seed=0).sample(0)


def test_redrawing_leaves_the_classes_equally_frequent() -> None:
    gappy = random_tokens(1000)
    gappy[100:] = 11
    collection = GenomeCollection.from_tokens({"gappy": {"one": gappy}, "whole": {"one": random_tokens(1000)}})
    _, labels = WindowSampler(collection, 20, seed=0).sample_batch(0, 1000)
    assert abs(labels.mean() - 0.5) < 0.07


def test_short_sequences_are_listed_and_never_drawn() -> None:
    sampler = WindowSampler(collection_of(a=[500, 49], b=[50, 10]), 50, seed=0)
    assert [(s.class_name, s.name) for s in sampler.short_sequences] == [("a", "chr1"), ("b", "chr1")]
    assert sampler.sample_batch(0, 20)[0].shape == (20, 50)


def test_a_class_without_a_long_enough_sequence_is_refused_with_its_longest() -> None:
    with pytest.raises(InputError, match="class 'b' has no training sequence of 50 bp, its longest has 49"):
        WindowSampler(collection_of(a=[500], b=[49, 10]), 50, seed=0)
    with pytest.raises(InputError, match="class 'b' has no training bases"):
        WindowSampler(collection_of(a=[500], b=[0]), 50, seed=0)


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_below_one_is_refused(length: int) -> None:
    with pytest.raises(InputError, match="window length"):
        WindowSampler(collection_of(a=[5]), length, seed=0)
    with pytest.raises(InputError, match="window length"):
        evaluation_windows(collection_of(a=[5]), length, per_class=1, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_64_bit_number_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        WindowSampler(collection_of(a=[5]), 5, seed=seed)


def test_evaluation_windows_do_not_overlap_while_the_material_lasts() -> None:
    collection = collection_of(a=[1050, 520], b=[930])
    windows = evaluation_windows(collection, 100, per_class=9, seed=0)
    assert windows.independent_per_class == {"a": 15, "b": 9}
    for label in (0, 1):
        assert len(intervals(windows, label)) == 9
        assert count_overlaps(intervals(windows, label)) == 0
    assert windows.missing_classes == ()


def test_evaluation_windows_continue_at_other_starts_when_the_material_is_used_up() -> None:
    windows = evaluation_windows(collection_of(a=[1050]), 100, per_class=40, seed=0)
    places = intervals(windows, 0)
    assert windows.independent_per_class == {"a": 10}
    assert len(places) == len(set(places)) == 40
    assert count_overlaps(sorted(intervals_of_first(windows, 10))) == 0


def intervals_of_first(windows: EvaluationWindows, count: int) -> list[tuple[str, int, int]]:
    return [(window.sequence.name, window.start, window.start + 100) for window in windows.windows[:count]]


def test_evaluation_windows_are_spread_over_the_sequences_by_length() -> None:
    windows = evaluation_windows(collection_of(a=[4000, 2000, 2000]), 10, per_class=80, seed=0)
    counts = Counter(window.sequence.name for window in windows.windows)
    assert abs(counts["chr0"] - 40) <= 2
    assert abs(counts["chr1"] - 20) <= 2
    middle = [window.start for window in windows.windows if window.sequence.name == "chr0"]
    assert min(middle) < 800
    assert max(middle) > 3200


def test_a_sequence_of_one_window_gives_one_window_however_many_are_asked_for() -> None:
    windows = evaluation_windows(collection_of(a=[100]), 100, per_class=50, seed=0)
    assert intervals(windows, 0) == [("chr0", 0, 100)]
    assert windows.independent_per_class == {"a": 1}


def test_evaluation_windows_alternate_strands_and_fetch_their_own_bases() -> None:
    windows = evaluation_windows(collection_of(a=[1000]), 50, per_class=6, seed=0)
    assert [window.strand for window in windows.windows] == ["+", "-"] * 3
    for window in windows.windows:
        expected = window.sequence.tokens(window.start, window.start + 50)
        if window.strand == "-":
            expected = TOKENIZER.reverse_complement(expected)
        np.testing.assert_array_equal(window.tokens(), expected)


def test_evaluation_windows_are_the_same_for_the_same_seed() -> None:
    collection = collection_of(a=[1000, 700], b=[600])
    first, second = (evaluation_windows(collection, 50, per_class=30, seed=5) for _ in range(2))
    assert first == second
    assert evaluation_windows(collection, 50, per_class=30, seed=6) != first


def test_gaps_are_kept_out_of_evaluation_windows_and_of_the_count() -> None:
    tokens = random_tokens(1000)
    tokens[200:500] = 11
    windows = evaluation_windows(GenomeCollection.from_tokens({"a": {"one": tokens}}), 100, per_class=30, seed=0)
    assert windows.independent_per_class == {"a": 7}
    assert len(windows.windows) == 30
    assert all(np.mean(window.tokens() == 11) <= 0.01 for window in windows.windows)


def test_a_window_between_gaps_that_spoil_every_tile_is_found() -> None:
    tokens = random_tokens(300)
    tokens[40:60] = tokens[240:260] = tokens[140:145] = 11
    tokens[160:165] = 7
    collection = GenomeCollection.from_tokens({"a": {"one": tokens}})
    windows = evaluation_windows(collection, 70, per_class=3, seed=0)
    assert windows.windows
    assert windows.independent_per_class["a"] >= 1


def test_classes_without_long_sequences_or_known_bases_are_reported_missing() -> None:
    collection = GenomeCollection.from_tokens(
        {
            "short": {"one": random_tokens(99)},
            "fine": {"one": random_tokens(1000)},
            "gap": {"one": np.full(1000, 11, dtype=np.uint8)},
            "none": {},
        }
    )
    windows = evaluation_windows(collection, 100, per_class=5, seed=0)
    assert windows.missing_classes == ("short", "gap", "none")
    assert windows.independent_per_class == {"short": 0, "fine": 10, "gap": 0, "none": 0}
    assert {window.label for window in windows.windows} == {1}


def test_by_length_every_base_counts_the_same_and_short_sequences_are_joined() -> None:
    collection = GenomeCollection.from_tokens(
        {
            "long": {"big": np.full(9000, 7, dtype=np.uint8), "plasmid": np.full(1000, 9, dtype=np.uint8)},
            "short": {"one": np.full(60, 7, dtype=np.uint8), "other": np.full(30, 9, dtype=np.uint8)},
        }
    )
    sampler = WindowSampler(collection, 100, seed=2, by_length=True)
    windows = [sampler.sample(index) for index in range(600)]
    assert all(len(tokens) == 100 for tokens, _ in windows)
    plasmid = [int(tokens[0]) in (8, 9) for tokens, label in windows if label == 0]
    assert 0.05 < np.mean(plasmid) < 0.15
    # Two contigs at least, of either strand: A or T of the one, G or C of the other.
    assert {int(base) for tokens, label in windows if label == 1 for base in tokens} == {7, 8, 9, 10}
    again, label = WindowSampler(collection, 100, seed=2, by_length=True).sample(5)
    assert np.array_equal(again, windows[5][0]) and label == windows[5][1]
    with pytest.raises(InputError, match="no training sequence of 100 bp"):
        WindowSampler(collection, 100, seed=2)


def test_overlapping_windows_are_not_counted_as_independent() -> None:
    """Two contigs of 400 bp give 32 windows of 300 bp, and two that do not overlap."""
    windows = evaluation_windows(collection_of(a=[400], b=[400]), 300, 16, seed=0)
    assert (len(windows.windows), windows.independent) == (32, 2)
    windows = evaluation_windows(collection_of(a=[4000], b=[4000, 900]), 300, 5, seed=0)
    assert (len(windows.windows), windows.independent) == (10, 10)
