"""What is held out never touches what is trained on, and homologues of it are not trained on either."""

import numpy as np
import pytest

from genomamba.classification.holdouts import (
    DEFAULT_FRACTION,
    GAP_BP,
    HoldoutPlan,
    fold_parts,
    homology_groups,
    is_large_enough,
    plan_holdouts,
)
from genomamba.data.genomes import GenomeCollection
from genomamba.tokenizer import COMPLEMENT_IDS
from mambacore.errors import InputError


def random_bases(length: int, seed: int) -> np.ndarray:
    return (7 + np.random.default_rng(seed).integers(0, 4, length)).astype(np.uint8)


def mutated(tokens: np.ndarray, share: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.where(random.random(len(tokens)) < share, random.integers(7, 11, len(tokens)), tokens).astype(np.uint8)


def intervals(plan: HoldoutPlan, part: str) -> dict[tuple[str, str], list[tuple[int, int]]]:
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for class_name, _, name, _, start, end in plan.stretches[part]:
        found.setdefault((class_name, name), []).append((start, end))
    return found


def test_stretches_are_kept_apart_by_gaps_and_are_what_they_say():
    whole = {name: random_bases(200_000, seed) for seed, name in enumerate("ab")}
    genomes = GenomeCollection.from_tokens({name: {f"of_{name}": tokens} for name, tokens in whole.items()})
    plan = plan_holdouts(genomes, 0.1, seed=3)
    held, training = intervals(plan, "held_out"), intervals(plan, "training")
    assert set(held) == set(training) == {("a", "of_a"), ("b", "of_b")}
    for key in held:
        bases = sum(end - start for start, end in held[key])
        assert 0.05 * 200_000 < bases < 0.2 * 200_000
        gaps = [max(start, other) - min(end, last) for start, end in held[key] for other, last in training[key]]
        assert 0 < min(gaps) <= GAP_BP
    for sequence in (*plan.training.sequences, *plan.held_out.sequences):
        first, last = map(int, sequence.name.rpartition(":")[2].split("-"))
        expected = whole[sequence.class_name][first - 1 : last]
        assert np.array_equal(sequence.tokens(0, sequence.length), expected)
        assert np.array_equal(sequence.tokens(5, 9), expected[5:9])


def test_homologues_of_what_is_held_out_are_not_trained_on():
    """One class is the other's genome, rearranged, reversed and with every fifteenth base changed."""
    first = random_bases(160_000, 0)
    swapped = np.concatenate([first[100_000:], COMPLEMENT_IDS[first[:100_000][::-1]]])
    genomes = GenomeCollection.from_tokens({"a": {"x": first}, "b": {"y": mutated(swapped, 0.07, 1)}})
    plan = plan_holdouts(genomes, 0.1, seed=0)

    def places(part: str, name: str) -> set[int]:
        """Bases of `first`, in steps of 500."""
        spots = [place for start, end in intervals(plan, part)[name] for place in range(start, end, 500)]
        if name[0] == "b":
            spots = [place + 100_000 if place < 60_000 else 159_999 - place for place in spots]
        return {spot // 500 for spot in spots}

    names = [("a", "x"), ("b", "y")]
    for own, other in (names, names[::-1]):
        shared = places("held_out", own) & places("training", other)
        assert len(shared) <= 0.2 * len(places("held_out", own))
    # Both are held out at the same place, so that hardly anything is lost.
    assert len(places("training", names[0])) > 0.75 * 320


def test_sequences_of_one_name_are_held_out_together():
    genomes = GenomeCollection.from_tokens(
        {
            name: {f"chr{number}": random_bases(20_000, 10 * seed + number) for number in range(6)}
            for seed, name in enumerate("ab")
        }
    )
    plan = plan_holdouts(genomes, 0.15, seed=1)
    held = {name: {s.name for s in plan.held_out.sequences_of(name)} for name in "ab"}
    assert held["a"] == held["b"] and held["a"]
    assert not held["a"] & {sequence.name for sequence in plan.training.sequences}
    folds = list(fold_parts(genomes, 3))
    tested = [{(s.class_name, s.name) for s in part.sequences} for _, part in folds]
    assert sum(map(len, tested)) == 12 and len(set.union(*tested)) == 12
    for fitting, part in folds:
        assert not {s.name for s in fitting.sequences} & {s.name for s in part.sequences}


def test_groups_tell_what_names_do_not():
    genomes = GenomeCollection.from_tokens(
        {name: {f"{name}{number}": random_bases(5000, number) for number in range(4)} for name in "ab"}
    )
    assert homology_groups(genomes) is None
    groups = {f"{name}{number}": f"g{number}" for name in "ab" for number in range(4)}
    assert homology_groups(genomes, groups) == [f"g{number}" for number in range(4)] * 2
    held = {s.name[1:] for s in plan_holdouts(genomes, 0.25, 0, groups).held_out.sequences_of("a")}
    assert held == {s.name[1:] for s in plan_holdouts(genomes, 0.25, 0, groups).held_out.sequences_of("b")}


def test_contigs_and_folds_cover_every_class():
    random = np.random.default_rng(4)
    contigs = {
        name: {f"{name}{number}": random_bases(int(random.integers(500, 4000)), number) for number in range(60)}
        for name in "ab"
    }
    # The classes share their contigs' bases by the seed, so that all are homologous: nothing may leak.
    genomes = GenomeCollection.from_tokens(contigs)
    plan = plan_holdouts(genomes, 0.2, seed=0)
    for name in "ab":
        assert plan.training.sequences_of(name) and plan.held_out.sequences_of(name)
    for fitting, tested in fold_parts(genomes, 3):
        pairs = {(s.class_name, s.name) for s in fitting.sequences} & {(s.class_name, s.name) for s in tested.sequences}
        assert not pairs


def test_what_cannot_be_held_out_is_refused():
    tiny = GenomeCollection.from_tokens({name: {"x": random_bases(600, seed)} for seed, name in enumerate("ab")})
    assert not is_large_enough(tiny, DEFAULT_FRACTION)
    with pytest.raises(InputError, match="too small"):
        plan_holdouts(tiny, 0.1, seed=0)
    with pytest.raises(InputError, match=r"0 to 0\.5"):
        plan_holdouts(tiny, 0.7, seed=0)
    assert not plan_holdouts(tiny, 0.0, seed=0).held_out.sequences
