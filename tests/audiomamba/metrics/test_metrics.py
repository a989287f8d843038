"""Scores against cases worked out by hand and against scipy's and scikit-learn's definitions."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from audiomamba.metrics.scores import (
    FrechetDistanceTo,
    am_score,
    feature_summary,
    frechet_distance,
    half_sample_interval,
    inception_score,
    likelihood_rejection,
    modified_inception_score,
)
from mambacore.errors import InputError

RANDOM = np.random.default_rng(0)


def probabilities(clips: int, classes: int) -> np.ndarray:
    return RANDOM.dirichlet(np.full(classes, 0.5), size=clips)


def test_frechet_distance_is_that_of_the_matrix_root():
    first, second = RANDOM.normal(size=(50, 6)), RANDOM.normal(size=(40, 6)) @ RANDOM.normal(size=(6, 6)) + 1
    one, other = np.cov(first.T), np.cov(second.T)
    shift = np.square(first.mean(0) - second.mean(0)).sum()
    expected = shift + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_one_number_is_that_of_means_and_deviations():
    # Means 1 and 4, deviations 1 and 3 (with N - 1): (1 - 4)^2 + (1 - 3)^2.
    assert frechet_distance([[0.0], [1.0], [2.0]], [[1.0], [4.0], [7.0]]) == pytest.approx(13.0, rel=1e-12)


def test_frechet_distance_is_sound_with_fewer_clips_than_features():
    first = RANDOM.normal(size=(5, 64))
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(first, first + 0.5) == pytest.approx(64 * 0.25, rel=1e-10)


def test_inception_score_of_sure_and_even_opinions_is_the_number_of_classes():
    assert inception_score(np.eye(4), held_out=False) == pytest.approx(4.0, rel=1e-12)
    assert inception_score(np.full((8, 4), 0.25)) == pytest.approx(1.0, rel=1e-12)


def test_inception_score_is_the_mean_divergence():
    table = probabilities(31, 5)
    expected = math.exp(np.mean([entropy(row, table.mean(0)) for row in table]))
    assert inception_score(table, held_out=False) == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_sure_opinions_is_the_mutual_information_of_clip_and_class():
    called = RANDOM.integers(3, size=30)
    expected = math.exp(mutual_info_score(np.arange(30), called))
    assert inception_score(np.eye(3)[called], held_out=False) == pytest.approx(expected, rel=1e-10)


def test_held_out_inception_score_compares_one_half_with_the_mean_of_the_other():
    table = probabilities(20, 3)
    order = np.random.default_rng(7).permutation(20)
    mean = table[order[:10]].mean(0)
    expected = math.exp(np.mean([entropy(row, mean) for row in table[order[10:]]]))
    assert inception_score(table, seed=7) == pytest.approx(expected, rel=1e-12)


def test_modified_inception_score_is_the_mean_over_all_pairs():
    table = probabilities(12, 4)
    pairs = [entropy(table[i], table[j]) for i in range(12) for j in range(12) if i != j]
    assert modified_inception_score(table) == pytest.approx(math.exp(np.mean(pairs)), rel=1e-12)


def test_am_score_is_a_divergence_and_an_entropy():
    training, generated = probabilities(20, 4), probabilities(15, 4)
    expected = entropy(training.mean(0), generated.mean(0)) + np.mean([entropy(row) for row in generated])
    assert am_score(training, generated) == pytest.approx(expected, rel=1e-12)
    assert am_score(np.eye(4), np.eye(4)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("clips", "width"), [(60, 8), (20, 40)])
def test_a_choice_of_clips_has_the_same_distance_the_fast_way(clips, width):
    summary = feature_summary(RANDOM.normal(size=(100, width)) @ RANDOM.normal(size=(width, width)))
    features = RANDOM.normal(size=(clips, width)) + 0.5
    chosen = RANDOM.permutation(clips)[: clips // 2]
    expected = frechet_distance(summary, features[chosen])
    assert FrechetDistanceTo(summary, features)(chosen) == pytest.approx(expected, rel=1e-6)


def test_intervals_hold_the_mean_as_often_as_they_say():
    held = 0
    for trial in range(200):
        values = np.random.default_rng(trial).normal(size=41)
        interval = half_sample_interval(
            lambda chosen, values=values: values[chosen].mean(), 41, trial, smallest=-math.inf
        )
        held += interval.low <= 0 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_intervals_of_frechet_distances_hold_those_of_as_many_other_clips():
    random, held, widths = np.random.default_rng(5), 0, []
    summary = feature_summary(random.normal(size=(1000, 12)))
    expected = [frechet_distance(summary, random.normal(size=(80, 12)) + 0.2) for _ in range(150)]
    for trial in range(60):
        features = random.normal(size=(80, 12)) + 0.2
        value = frechet_distance(summary, features)
        interval = half_sample_interval(FrechetDistanceTo(summary, features), 80, trial, 60, value=value)
        held += interval.low <= np.mean(expected) <= interval.high
        widths.append(interval.high - interval.low)
    assert held / 60 >= 0.88
    assert np.mean(widths) < 2 * (np.quantile(expected, 0.975) - np.quantile(expected, 0.025))


def test_no_interval_of_a_distance_reaches_below_zero():
    features = np.random.default_rng(1).normal(size=(40, 8))
    interval = half_sample_interval(FrechetDistanceTo(feature_summary(features), features), 40, resamples=40)
    assert interval.value == pytest.approx(0, abs=1e-5)
    assert 0 <= interval.low <= interval.high


def test_paper_rejection_leaves_out_forty_percent_below_and_five_above():
    values = RANDOM.permutation(100).astype(float)
    kept = likelihood_rejection(values).kept
    assert sorted(values[kept]) == list(range(40, 95))


def test_searched_rejection_finds_the_good_clips_and_keeps_only_those_of_the_other_half():
    values = RANDOM.permutation(400).astype(float)

    def score(chosen):
        return float(np.mean((values[chosen] >= 200) & (values[chosen] < 360)))

    found = likelihood_rejection(values, score, seed=3, mode="search")
    assert not set(found.kept) & set(found.tuned_on)
    assert found.bottom_fraction == pytest.approx(0.5, abs=0.1)
    assert found.top_fraction == pytest.approx(0.1, abs=0.06)
    assert score(found.kept) > 0.9 > score(np.arange(400))


@pytest.mark.parametrize(
    "broken",
    [
        lambda: inception_score([[0.5, 0.6]]),
        lambda: frechet_distance([[1.0]], [[1.0], [2.0]]),
        lambda: frechet_distance([[math.nan], [1.0]], [[1.0], [2.0]]),
        lambda: likelihood_rejection(np.arange(50.0), mode="search"),
        lambda: likelihood_rejection(np.arange(50.0), mode="other"),
    ],
)
def test_senseless_input_is_refused_in_a_sentence(broken):
    with pytest.raises(InputError):
        broken()
