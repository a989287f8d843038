"""Scores of variants against their definitions, and the laws: strands, batches, placement of indels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.alphabet import reverse_complement
from genomamba.io.reference import Reference
from genomamba.io.vcf import HaplotypeWindows, Variant, allele_windows, haplotype_windows
from genomamba.models.language_model import LanguageModel, build_language_model
from genomamba.scoring.variant_scores import AlleleScore, VariantScorer, score_variants
from genomamba.tokenizer import VOCABULARY
from mambacore.errors import InputError
from tiny_language_models import language_model, random_letters, write_fasta
from tolerances import FLOAT64, PIECES_FLOAT64

LENGTH = 32
LETTERS = random_letters(60, 1) + b"CACACACA" + random_letters(40, 2) + b"NN" + random_letters(60, 3).lower()
CAUSAL, MASKED = ["causal", "contexts", "hybrid"], ["masked", "equivariant"]


def letters_at(position: int, count: int) -> str:
    return LETTERS[position - 1 : position - 1 + count].decode()


def variants() -> list[Variant]:
    """Single bases, several at once, indels, at both ends of the contig, beside N, in a repeat."""
    return [
        Variant("c", position, str(position), letters_at(position, count), alternatives)
        for position, count, alternatives in [
            (30, 1, ("C", "A", "G", "T")),
            (30, 3, ("CCC", "ACTTA")),
            (61, 3, ("C",)),
            (50, 1, (letters_at(50, 1) + "ACC", "<DEL>")),
            (1, 1, ("A", "C", "G")),
            (2, 2, ("T", "GAA")),
            (len(LETTERS), 1, ("A", "C", "CC")),
            (107, 1, ("A", "C")),
            (130, 4, ("A", "GT")),
        ]
    ]


@pytest.fixture
def genome(tmp_path: Path) -> Reference:
    return Reference(write_fasta(tmp_path / "genome.fa", {"c": LETTERS}))


def score_all(model: LanguageModel, records: list[Variant], genome: Reference, both: bool = True) -> list[AlleleScore]:
    found = score_variants(records, genome, VariantScorer(model), LENGTH, both)
    return [allele for _, alleles in found for allele in alleles]


def windows_of(records: list[Variant], genome: Reference) -> list[HaplotypeWindows]:
    return [
        one
        for record in records
        for alternative in record.alternatives
        if set(alternative) <= set("ACGT") and alternative != record.reference.upper()
        for one in allele_windows(record, alternative, "c", genome, LENGTH)
    ]


def causal_definition(model: LanguageModel, windows: HaplotypeWindows) -> float:
    """Both windows whole, without a state between their parts."""
    sums = []
    for continuation in (windows.reference, windows.alternative):
        tokens = torch.from_numpy(model.tokens(windows.context + continuation)).long()
        predicted = model.next_base_log_probabilities(tokens[None])[0][0, :-1]
        likelihoods = []
        for place in range(1, len(tokens)):
            base = int(tokens[place]) - VOCABULARY["A"]
            likelihoods.append(float(predicted[place - 1, base]) if 0 <= base < 4 else 0.0)
        first = max(1, len(windows.context))
        sums.append(sum(likelihoods[first - 1 : len(windows.context) + windows.known - 1]))
    return sums[1] - sums[0]


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_ratio_is_that_of_whole_windows(genome: Reference, kind: str) -> None:
    model = language_model(kind)
    windows = windows_of(variants(), genome)
    scores = VariantScorer(model).score(windows)
    compared = 0
    for one, score in zip(windows, scores, strict=True):
        if score is None:
            assert one.known == 0 or (one.known == 1 and not one.context)
            continue
        compared += 1
        assert score.log_likelihood_ratio == pytest.approx(causal_definition(model, one), abs=PIECES_FLOAT64)
        assert score.scored_bases == one.known - (not one.context)
    assert compared > 20
    assert max(abs(score.log_likelihood_ratio) for score in scores if score is not None) > 0.1


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_ratio_of_a_replaced_base_is_that_of_its_hidden_position(genome: Reference, kind: str) -> None:
    model = language_model(kind)
    (windows, *_) = windows_of(
        [Variant("c", 30, ".", letters_at(30, 1), ("A" if letters_at(30, 1) != "A" else "C",))], genome
    )
    (score,) = VariantScorer(model).score([windows])
    tokens = torch.from_numpy(model.tokens(windows.context + windows.reference)).long()
    place = len(windows.context)
    tokens[place] = VOCABULARY["[MASK]"]
    logits = model.model(tokens[None])[0, place].detach()
    reference, alternative = (VOCABULARY[chr(one[0])] for one in (windows.reference, windows.alternative))
    assert score is not None
    assert score.log_likelihood_ratio == pytest.approx(
        float(logits[alternative] - logits[reference]), abs=PIECES_FLOAT64
    )
    assert score.scored_bases == 1


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_ratio_of_an_indel_is_that_of_equally_many_hidden_bases(kind: str) -> None:
    model = language_model(kind)
    windows = haplotype_windows(random_letters(40, 5), b"", b"ACG", b"T" + random_letters(40, 6), LENGTH)
    (score,) = VariantScorer(model, span=4).score([windows])
    sums = []
    for continuation in (windows.reference, windows.alternative):
        letters = windows.context + continuation
        places = range(len(windows.context) - 4, len(windows.context) + 3 + 4)
        total = 0.0
        for place in places:
            masked = torch.zeros(1, len(letters), dtype=torch.bool)
            masked[0, place] = True
            tokens = torch.from_numpy(model.tokens(letters))[None]
            found = model.masked_base_log_probabilities(tokens, masked, both_strands=False)
            total += float(found[0, place, b"ACGT".index(letters[place])])
        sums.append(total)
    assert score is not None
    assert score.scored_bases == 11
    assert score.log_likelihood_ratio == pytest.approx(sums[1] - sums[0], abs=PIECES_FLOAT64)


@pytest.mark.parametrize("kind", CAUSAL + MASKED)
def test_the_turned_reference_and_variants_have_the_same_scores(tmp_path: Path, genome: Reference, kind: str) -> None:
    model = language_model(kind)
    turned = Reference(write_fasta(tmp_path / "turned.fa", {"c": reverse_complement(LETTERS)}))
    records = variants()

    def turn(letters: str) -> str:
        return letters if letters.startswith("<") else reverse_complement(letters.encode()).decode()

    turned_records = [
        Variant("c", len(LETTERS) - (one.position - 1 + len(one.reference)) + 1, one.identifier, turn(one.reference),
                tuple(map(turn, one.alternatives)))
        for one in records
    ]  # fmt: skip
    given, other = score_all(model, records, genome), score_all(model, turned_records, turned)
    assert [one.status for one in given] == [one.status for one in other]
    assert sum(one.status == "scored" for one in given) > 12
    for first, second in zip(given, other, strict=True):
        if first.score is None or second.score is None:
            assert first.score is second.score
            continue
        ratio = second.score.log_likelihood_ratio
        assert first.score.log_likelihood_ratio == pytest.approx(ratio, abs=PIECES_FLOAT64)
        assert first.score.embedding_distance == pytest.approx(second.score.embedding_distance, abs=PIECES_FLOAT64)
        assert first.score.scored_bases == second.score.scored_bases


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(genome: Reference, kind: str) -> None:
    model = language_model(kind)
    windows = windows_of(variants(), genome)
    together = VariantScorer(model).score(windows)
    alone = [VariantScorer(model).score([one])[0] for one in windows]
    for first, second in zip(together, alone, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert first.log_likelihood_ratio == pytest.approx(second.log_likelihood_ratio, abs=FLOAT64 * 100)
            assert first.embedding_distance == pytest.approx(second.embedding_distance, abs=FLOAT64 * 100)


@pytest.mark.parametrize("kind", ["causal", "equivariant"])
def test_exchanging_the_alleles_turns_the_sign(genome: Reference, kind: str) -> None:
    model = language_model(kind)
    windows = [one for one in windows_of(variants(), genome) if one.known > 1]
    exchanged = [
        HaplotypeWindows(one.context, one.alternative, one.reference, one.known, one.longest_allele, one.replaces)
        for one in windows
        if kind == "causal" or not one.replaces
    ]
    windows = [one for one in windows if kind == "causal" or not one.replaces]
    for first, second in zip(VariantScorer(model).score(windows), VariantScorer(model).score(exchanged), strict=True):
        assert first is not None
        assert second is not None
        assert first.log_likelihood_ratio == pytest.approx(-second.log_likelihood_ratio, abs=PIECES_FLOAT64)


def test_a_model_without_opinions_finds_nothing_likelier_whatever_the_length(genome: Reference) -> None:
    model = build_language_model("causal", {"model_width": 8, "mixers": ["selective"]}).double()
    model.embedding.weight.data.zero_()  # the head is tied: every base has a quarter
    records = [Variant("c", 30, ".", letters_at(30, 5), (letters_at(30, 1), letters_at(30, 5) + "ACGTAC"))]
    for allele in score_all(LanguageModel(model), records, genome):
        assert allele.score is not None
        assert allele.score.log_likelihood_ratio == pytest.approx(0, abs=FLOAT64)


def test_every_record_comes_back_in_order_with_all_its_alleles(genome: Reference) -> None:
    records = [
        *variants(),
        Variant("c", 5, ".", "NNN", ("A",)),
        Variant("x", 5, ".", "A", ("C",)),
        Variant("c", 5, ".", letters_at(5, 1), ()),
    ]
    found = list(score_variants(records * 40, genome, VariantScorer(language_model("causal")), LENGTH))
    assert [record for record, _ in found] == records * 40
    for record, alleles in found:
        assert [one.alternative for one in alleles] == list(record.alternatives or (None,))
    assert [alleles[0].status for _, alleles in found[-3:]] == [
        "reference_mismatch",
        "missing_contig",
        "no_alternative",
    ]
    first = [alleles for _, alleles in found[: len(records)]]
    last = [alleles for _, alleles in found[-len(records) :]]
    for one, other in zip(first, last, strict=True):
        for allele, again in zip(one, other, strict=True):
            if allele.score is not None and again.score is not None:
                np.testing.assert_allclose(
                    allele.score.log_likelihood_ratio, again.score.log_likelihood_ratio, atol=1e-10
                )


def test_chromosomes_can_be_translated_and_one_strand_is_enough(genome: Reference) -> None:
    record = Variant("chrC", 30, ".", letters_at(30, 3), ("CCC",))
    scorer = VariantScorer(language_model("causal"))
    ((_, (allele,)),) = score_variants([record], genome, scorer, LENGTH, False, {"chrC": "c"})
    assert allele.status == "scored"
    assert len(allele.strands) == 1
    ((_, (allele,)),) = score_variants([record], genome, scorer, LENGTH, False)
    assert allele.status == "missing_contig"


def test_lengths_that_make_no_sense_are_refused(genome: Reference) -> None:
    scorer = VariantScorer(language_model("causal"))
    with pytest.raises(InputError, match="the window is 15 bp"):
        list(score_variants([], genome, scorer, 15))
    with pytest.raises(InputError, match="the span is -1 bp"):
        VariantScorer(scorer.language_model, -1)
