"""Variant scores from a DNA language model: a log-likelihood ratio and a distance of embeddings.

Causal models: sum of log p over the continuation of the alternative haplotype minus that of the reference haplotype,
each base given all before it; the shared context is processed once and its state used for both.

Masked models: for substitutions of equal length, log p(alternative) - log p(reference) of the replaced bases, all
hidden at once, in the reference window (Benegas et al., "GPN", PNAS 120, e2311219120, 2023). Otherwise the difference
of pseudo-log-likelihoods (Salazar et al., arXiv 1910.14659, equation 1) over spans of equally many bases around the
variant, each hidden in turn.

The distance of embeddings is the Euclidean distance between the means over positions of the final hidden states: over
the continuations for a causal model (before them both are the same), over whole windows for a masked one.

Everything is computed for each strand in its own direction; the score is the mean over strands.
"""

import itertools
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
from mambacore.devices import device_of, from_numpy, in_fitting_batches, positions_at_once, to_numpy, widened
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
"""Alleles may take up to one part in so many of the window; the rest is context."""
_POSITIONS_AT_ONCE: Final = 1 << 15
_ALLELES_AT_ONCE: Final = 128
_BASES: Final = b"ACGT"


@dataclass(frozen=True)
class StrandScore:
    """Score of one allele on one strand, based on `scored_bases` of each haplotype."""

    log_likelihood_ratio: float
    embedding_distance: float
    scored_bases: int


class VariantScorer:
    """Scores the windows of alleles in batches.

    Args:
        language_model: a causal or masked model.
        span: for masked models: bases on both sides of an indel that are scored along with the allele, bp.

    Raises:
        InputError: if the span is negative.
    """

    def __init__(self, language_model: LanguageModel, span: int = DEFAULT_SPAN_BP) -> None:
        if span < 0:
            raise InputError(f"the span is {span} bp: use 0 or more.")
        self.language_model = language_model
        self.span = span

    @torch.no_grad()
    def score(self, windows: Sequence[HaplotypeWindows]) -> list[StrandScore | None]:
        """Score windows in any order and of any lengths; None if there are no bases to compare."""
        scores: list[StrandScore | None] = [None] * len(windows)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, one in enumerate(windows):
            if one.known:
                alike[len(one.context), len(one.reference)].append(number)
        causal = self.language_model.objective == "causal"
        for (context, continuation), numbers in alike.items():
            # Rows of equal length need no padding, so results do not depend on the rest of the batch.

            def compute(rows: slice, numbers: Sequence[int] = numbers) -> list[StrandScore | None]:
                batch = [windows[number] for number in numbers[rows]]
                return self._score_causal(batch) if causal else self._score_masked(batch)

            device, positions = device_of(self.language_model.model), 2 * (context + continuation)
            batches = in_fitting_batches(compute, len(numbers), positions, device, _POSITIONS_AT_ONCE)
            for number, result in zip(numbers, itertools.chain.from_iterable(batches), strict=True):
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
        # The first base of a contig has no context, so the model has no prediction for it.
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
        # Positions hidden together, and their sequence.
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
        """Return the positions of both windows over which a masked model's likelihood of an indel is summed."""
        unknown = np.flatnonzero(~is_known(windows.context))
        begin = max(int(unknown[-1]) + 1 if len(unknown) else 0, len(windows.context) - self.span)
        known_end = len(windows.context) + windows.known
        return range(begin, min(known_end, len(windows.context) + windows.longest_allele + self.span))

    def _log_probabilities(self, hidden: Sequence[tuple[bytes, Sequence[int]]]) -> Iterator[npt.NDArray[np.float64]]:
        """Yield for each sequence, all of equal length, the log-probabilities (positions, 4) of its hidden bases."""
        longest = max((len(letters) for letters, _ in hidden), default=1)
        rows = max(1, positions_at_once(device_of(self.language_model.model), _POSITIONS_AT_ONCE) // longest)
        for begin in range(0, len(hidden), rows):
            some = hidden[begin : begin + rows]
            tokens = self._tokens([letters for letters, _ in some])
            masked = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            for row, (_, places) in enumerate(some):
                masked[row, torch.tensor(places)] = True
            # Both strands are already scored separately.
            log_probabilities = self.language_model.masked_base_log_probabilities(tokens, masked, both_strands=False)
            for row, (_, places) in enumerate(some):
                yield to_numpy(log_probabilities[row, torch.tensor(places)], torch.float64)


@dataclass(frozen=True)
class AlleleScore:
    """Result for one allele of a record; `alternative` is None for a record without one.

    `strands` has the given strand's score, and the other's if both are requested; `score` is their mean, None unless
    the status is "scored". A strand without bases to compare is excluded from the mean. `unknown_bases` is the number
    of letters in the reference window that are not A, C, G or T.
    """

    alternative: str | None
    status: Status
    strands: tuple[StrandScore | None, ...] = ()
    unknown_bases: int = 0

    @property
    def score(self) -> StrandScore | None:
        """Mean over the strands; its `scored_bases` is the larger of the two."""
        present = [score for score in self.strands if score is not None]
        if not present:
            return None
        return StrandScore(
            float(np.mean([score.log_likelihood_ratio for score in present])),
            float(np.mean([score.embedding_distance for score in present])),
            max(score.scored_bases for score in present),
        )


def allele_values(variant: Variant, allele: AlleleScore) -> tuple[Any, ...]:
    """Return the values of one allele in the order of `ALLELE_COLUMNS`; None without a score."""
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
    """Check that a window is long enough for a comparison.

    Raises:
        InputError: if it is shorter than `SMALLEST_WINDOW_BP`.
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
    """Yield every record in order with the results of its alleles (a single `None` allele if it has none).

    Args:
        variants: records in any order.
        genome: reference that the variants were called against.
        scorer: scorer of the model.
        length: window length, bp.
        both_strands: average both strands.
        chromosome_map: maps chromosome names in the records to different ones in the reference.

    Raises:
        InputError: if the window is too short, or as `Reference`.
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
    """Return distances between the position means of the first and the second half of the rows."""
    first, second = widened(hidden).mean(1).chunk(2)
    return (first - second).norm(dim=1).tolist()


def _differing(windows: HaplotypeWindows) -> list[int]:
    pairs: Iterator[tuple[int, tuple[int, int]]] = enumerate(
        zip(windows.reference, windows.alternative, strict=True), len(windows.context)
    )
    return [place for place, (reference, alternative) in pairs if reference != alternative]
