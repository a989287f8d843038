"""Baselines for species classification: k-mer spectra, Markov likelihoods and a composition-only negative control."""

from genomamba.baselines.composition import CompositionControl
from genomamba.baselines.fitting import BASELINE_NAMES, FittedBaselines, KmerChoice, MarkovChoice, fit_baselines
from genomamba.baselines.kmer_classifier import KmerBaseline
from genomamba.baselines.markov import MarkovBaseline

__all__ = [
    "BASELINE_NAMES",
    "CompositionControl",
    "FittedBaselines",
    "KmerBaseline",
    "KmerChoice",
    "MarkovBaseline",
    "MarkovChoice",
    "fit_baselines",
]
