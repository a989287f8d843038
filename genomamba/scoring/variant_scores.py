"""Scores of variants under a language model of DNA: a log-likelihood ratio and a distance of embeddings.

Causal models: sum of log p over the continuation of the alternative haplotype minus that of the reference haplotype,
each base given all before it; what both have in common is read once and its state handed on to both.

Masked models: where the allele replaces bases by as many others, log p(alternative) - log p(reference) of the replaced
bases, all hidden at once, in the reference window (Benegas et al., "GPN", PNAS 120, e2311219120, 2023). Otherwise the
difference of pseudo-log-likelihoods (Salazar et al., arXiv 1910.14659, equation 1) over a span of equally many bases
around the variant, each hidden in turn.

The distance of embeddings is the Euclidean one between the means over positions of what the head reads: over the
continuations of a causal model (before them both are the same), over whole windows of a masked one.

Everything is computed for each strand in its own direction; the score is the mean of the strands.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genomamba.io.reference import Reference
from genomamba.io.vcf import HaplotypeWindows, Status, Variant, allele_windows, check_allele, is_known
from genomamba.models.language_model import LanguageModel, base_log_probabilities
from genomamba.scoring.likelihood import base_log_likelihoods
from mambacore.devices import device_of, from_numpy, to_numpy, widened
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel, MaskedLanguageModel
from mambacore.state import map_state

DEFAULT_WINDOW_BP: Final = 1024
DEFAULT_SPAN_BP: Final = 5
SMALLEST_WINDOW_BP: Final = 16
ALLELE_COLUMNS: Final = (
    "chromosome",
    "position",
    "id",
    "reference",
    "alternative",
    "status",
    "log_likelihood_ratio",
    "log_likelihood_ratio_forward",
    "log_likelihood_ratio_reverse",
    "embedding_distance",
    "scored_bases",
    "unknown_bases",
)
LONGEST_ALLELE_SHARE: Final = 4
"""Alleles are scored up to one part in so many of the window: the rest is what they are judged by."""
_POSITIONS_AT_ONCE: Final = 1 << 15
_ALLELES_AT_ONCE: Final = 128
_BASES: Final = b"ACGT"


@dataclass(frozen=True)
class StrandScore:
    """Score of one allele on one strand; `scored_bases` of each haplotype are compared."""

    log_likelihood_ratio: float
    embedding_distance: float
    scored_bases: int


class VariantScorer:
    """Scores the windows of alleles, many at once.

    Args:
        language_model: causal or masked.
        span: bases on both sides of an indel that a masked model is scored on beside the allele itself, bp.

    Raises:
        InputError: a negative span.
    """

    def __init__(self, language_model: LanguageModel, span: int = DEFAULT_SPAN_BP) -> None:
        if span < 0:
            raise InputError(f"the span is {span} bp: use 0 or more.")
        self.language_model = language_model
        self.span = span

    @torch.no_grad()
    def score(self, windows: Sequence[HaplotypeWindows]) -> list[StrandScore | None]:
        """Score windows in any order and of any lengths; None where there is no base to compare."""
        scores: list[StrandScore | None] = [None] * len(windows)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, one in enumerate(windows):
            if one.known:
                alike[len(one.context), len(one.reference)].append(number)
        causal = self.language_model.objective == "causal"
        for (context, continuation), numbers in alike.items():
            # Rows of one length need no padding, so that nothing depends on what else is in the batch.
            rows = max(1, _POSITIONS_AT_ONCE // (2 * (context + continuation)))
            for begin in range(0, len(numbers), rows):
                some = numbers[begin : begin + rows]
                batch = [windows[number] for number in some]
                results = self._score_causal(batch) if causal else self._score_masked(batch)
                for number, result in zip(some, results, strict=True):
                    scores[number] = result
        return scores

    def _tokens(self, letters: Sequence[bytes]) -> Tensor:
        tokens = np.stack([self.language_model.tokens(one) for one in letters])
        return from_numpy(tokens, device_of(self.language_model.model)).long()

    def _score_causal(self, windows: Sequence[HaplotypeWindows]) -> list[StrandScore | None]:
        model = self.language_model.model
        assert isinstance(model, CausalLanguageModel)
        first, state = None, None
        if windows[0].context:
            hidden, state = model.hidden(self._tokens([one.context for one in windows]))
            first = hidden[:, -1:].repeat(2, 1, 1)
            state = map_state(lambda tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)), state)
        tokens = self._tokens([one.reference for one in windows] + [one.alternative for one in windows])
        hidden, _ = model.hidden(tokens, state)
        # The first base of a contig has nothing before it, so that the model says nothing about it.
        before = hidden[:, :-1] if first is None else torch.cat([first, hidden[:, :-1]], dim=1)
        predicted = tokens if first is not None else tokens[:, 1:]
        likelihoods = base_log_likelihoods(base_log_probabilities(model.logits(before)), predicted)
        known = torch.tensor([one.known for one in windows], device=tokens.device).repeat(2)
        if first is None:
            known = known - 1
        counted = torch.arange(predicted.shape[1], device=tokens.device) < known[:, None]
        sums = torch.where(counted, widened(likelihoods), 0.0).sum(1)
        ratios = (sums[len(windows) :] - sums[: len(windows)]).tolist()
        return [
            StrandScore(ratio, distance, bases) if bases else None
            for ratio, distance, bases in zip(ratios, _distances(hidden), known.tolist(), strict=False)
        ]

    def _score_masked(self, windows: Sequence[HaplotypeWindows]) -> list[StrandScore | None]:
        model = self.language_model.model
        assert isinstance(model, MaskedLanguageModel)
        references = [one.context + one.reference for one in windows]
        alternatives = [one.context + one.alternative for one in windows]
        distances = _distances(model.hidden(self._tokens(references + alternatives)))
        # What is hidden together, in which sequence.
        hidden: list[tuple[bytes, Sequence[int]]] = []
        for one, reference, alternative in zip(windows, references, alternatives, strict=True):
            if one.replaces:
                hidden.append((reference, _differing(one)))
            else:
                hidden += [(letters, (place,)) for letters in (alternative, reference) for place in self._span(one)]
        found = iter(self._log_probabilities(hidden))
        scores: list[StrandScore | None] = []
        for one, reference, alternative, distance in zip(windows, references, alternatives, distances, strict=True):
            if one.replaces:
                places: Sequence[int] = _differing(one)
                log_probabilities = next(found)
                ratio = sum(
                    log_probabilities[row, _BASES.index(alternative[place])]
                    - log_probabilities[row, _BASES.index(reference[place])]
                    for row, place in enumerate(places)
                )
            else:
                places = self._span(one)
                ratio = sum(next(found)[0, _BASES.index(alternative[place])] for place in places)
                ratio -= sum(next(found)[0, _BASES.index(reference[place])] for place in places)
            scores.append(StrandScore(float(ratio), distance, len(places)))
        return scores

    def _span(self, windows: HaplotypeWindows) -> range:
        """The positions of both windows on which a masked model's likelihood of an indel is summed."""
        unknown = np.flatnonzero(~is_known(windows.context))
        begin = max(int(unknown[-1]) + 1 if len(unknown) else 0, len(windows.context) - self.span)
        known_end = len(windows.context) + windows.known
        return range(begin, min(known_end, len(windows.context) + windows.longest_allele + self.span))

    def _log_probabilities(self, hidden: Sequence[tuple[bytes, Sequence[int]]]) -> Iterator[npt.NDArray[np.float64]]:
        """For each sequence, all of one length, the log-probabilities (places, 4) where it is hidden."""
        rows = max(1, _POSITIONS_AT_ONCE // max((len(letters) for letters, _ in hidden), default=1))
        for begin in range(0, len(hidden), rows):
            some = hidden[begin : begin + rows]
            tokens = self._tokens([letters for letters, _ in some])
            masked = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            for row, (_, places) in enumerate(some):
                masked[row, torch.tensor(places)] = True
            # Both strands are scored one by one already.
            log_probabilities = self.language_model.masked_base_log_probabilities(tokens, masked, both_strands=False)
            for row, (_, places) in enumerate(some):
                yield to_numpy(log_probabilities[row, torch.tensor(places)], torch.float64)


@dataclass(frozen=True)
class AlleleScore:
    """Result for one allele of a record; `alternative` is None for a record without one.

    `strands` has the given strand's score, and the other's when both were asked for; `score` is their mean, None unless
    the status is "scored". A strand without a base to compare is left out of the mean. `unknown_bases` are those of the
    reference window that are not A, C, G or T.
    """

    alternative: str | None
    status: Status
    strands: tuple[StrandScore | None, ...] = ()
    unknown_bases: int = 0

    @property
    def score(self) -> StrandScore | None:
        """The mean of the strands; the scored bases are the larger number."""
        present = [score for score in self.strands if score is not None]
        if not present:
            return None
        return StrandScore(
            float(np.mean([score.log_likelihood_ratio for score in present])),
            float(np.mean([score.embedding_distance for score in present])),
            max(score.scored_bases for score in present),
        )


def allele_values(variant: Variant, allele: AlleleScore) -> tuple[Any, ...]:
    """Return the values of one allele in the order of `ALLELE_COLUMNS`; None where there is no score."""
    score = allele.score
    of_strands = [None if one is None else one.log_likelihood_ratio for one in (*allele.strands, None, None)[:2]]
    return (
        variant.chromosome,
        variant.position,
        variant.identifier,
        variant.reference,
        allele.alternative or ".",
        allele.status,
        None if score is None else score.log_likelihood_ratio,
        *of_strands,
        None if score is None else score.embedding_distance,
        None if score is None else score.scored_bases,
        None if score is None else allele.unknown_bases,
    )


def require_window(length: int) -> None:
    """Refuse a window too short to compare anything in.

    Raises:
        InputError: it is shorter than `SMALLEST_WINDOW_BP`.
    """
    if length < SMALLEST_WINDOW_BP:
        raise InputError(f"the window is {length} bp: use {SMALLEST_WINDOW_BP} or more.")


def score_variants(
    variants: Iterable[Variant],
    genome: Reference,
    scorer: VariantScorer,
    length: int = DEFAULT_WINDOW_BP,
    both_strands: bool = True,
    chromosome_map: Mapping[str, str] | None = None,
) -> Iterator[tuple[Variant, list[AlleleScore]]]:
    """Yield every record in its order with what became of each of its alleles (of one `None` when it has none).

    Args:
        variants: in any order.
        genome: what the variants were called against.
        scorer: the model.
        length: bp of the windows.
        both_strands: average both strands.
        chromosome_map: the reference's names of chromosomes that have another name in the records.

    Raises:
        InputError: a window that is too short, and what the reference refuses.
    """
    require_window(length)
    names = chromosome_map or {}
    held: list[tuple[Variant, list[tuple[str | None, Status]]]] = []
    windows: list[HaplotypeWindows] = []
    strands = 2 if both_strands else 1
    for variant in variants:
        contig = names.get(variant.chromosome, variant.chromosome)
        alleles: list[tuple[str | None, Status]] = []
        for alternative in variant.alternatives or (None,):
            status = check_allele(variant, alternative, contig, genome, length // LONGEST_ALLELE_SHARE)
            alleles.append((alternative, status))
            if status == "scored" and alternative is not None:
                windows += allele_windows(variant, alternative, contig, genome, length, both_strands)
        held.append((variant, alleles))
        if len(windows) >= strands * _ALLELES_AT_ONCE or len(held) >= 8 * _ALLELES_AT_ONCE:
            yield from _with_scores(held, windows, scorer.score(windows), strands)
            held, windows = [], []
    yield from _with_scores(held, windows, scorer.score(windows), strands)


def _with_scores(
    held: Sequence[tuple[Variant, list[tuple[str | None, Status]]]],
    windows: Sequence[HaplotypeWindows],
    scores: Sequence[StrandScore | None],
    strands: int,
) -> Iterator[tuple[Variant, list[AlleleScore]]]:
    begin = 0
    for variant, alleles in held:
        results = []
        for alternative, status in alleles:
            if status != "scored":
                results.append(AlleleScore(alternative, status))
                continue
            of_strands = tuple(scores[begin : begin + strands])
            found: Status = "scored" if any(score is not None for score in of_strands) else "no_bases_to_compare"
            results.append(AlleleScore(alternative, found, of_strands, windows[begin].unknown_bases))
            begin += strands
        yield variant, results


def _distances(hidden: Tensor) -> list[float]:
    """Distances between the means over positions of the first half of the rows and of the second half."""
    first, second = widened(hidden).mean(1).chunk(2)
    return (first - second).norm(dim=1).tolist()


def _differing(windows: HaplotypeWindows) -> list[int]:
    pairs: Iterator[tuple[int, tuple[int, int]]] = enumerate(
        zip(windows.reference, windows.alternative, strict=True), len(windows.context)
    )
    return [place for place, (reference, alternative) in pairs if reference != alternative]
