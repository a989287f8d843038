"""Fit the counted parts and the calibration of a trained species classifier again, with the parts of today.

    python pipelines/refit_parts.py MODEL --output NEW_MODEL

The selective stack stays as it is. Sequences are those that the model itself was trained on and held out, at the paths
in its folder, and the fit is that of `genomamba train`. A model that was trained before a part existed gets that part;
what its recipe leaves out stays out.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from genomamba.classification.calibration import SHORT_LENGTHS_BP, calibrate, calibration_lengths, collect_evidence
from genomamba.classification.part_fit import fit_parts
from genomamba.data.genomes import load_genomes
from genomamba.models.species_classifier import load_classifier, save_classifier
from mambacore.errors import InputError
from mambapipelines.console import note, use_threads
from mambapipelines.species.evaluation_sequences import (
    find_training_sequences,
    genomes_of_model,
    in_class_order,
    select_test_sequences,
)
from mambapipelines.species.recipe import CalibrationRecipe, PartsRecipe
from mambapipelines.species.train import read_groups
from mambapipelines.training.progress import TrainingProgress


def refit(
    folder: Path, output: Path, bases_per_class: int, groups: Path | None = None, gate_steps: int | None = None
) -> None:
    """Write a model with the same stack, and new parts and calibration, to `output`.

    Args:
        folder: a trained model.
        output: the new model folder.
        bases_per_class: held-out bases of each class and length for the calibration.
        groups: as in training.
        gate_steps: as `parts.gate_steps` of the recipe, its default if None.

    Raises:
        InputError: if a sequence that the model was trained on is missing, or too short.
    """
    model, details = load_classifier(folder)
    seed = details["seed"]
    genomes = in_class_order(load_genomes(genomes_of_model(details)), model.config.class_names)
    training, held_out = find_training_sequences(genomes, (), details), select_test_sequences(genomes, details)
    # Parts that the recipe left out stay out; those that did not exist yet get their defaults.
    recipe = PartsRecipe(**details["recipe"].get("parts", {}))
    if gate_steps is not None:
        recipe = replace(recipe, gate_steps=gate_steps)
    with TrainingProgress() as progress:
        read = None if groups is None else read_groups(groups)
        fit = fit_parts(training, recipe.settings(), seed, read, progress.prepare)
    if fit is None:
        raise InputError(
            f"{folder} gets no counted parts: its recipe leaves them out, or its genomes are too small; "
            "nothing is written."
        )
    note(fit.summary())
    model.parts, model.combination = fit.parts, fit.combination
    lengths = calibration_lengths(held_out, details["training_length"], bases_per_class)
    evidence, short = (
        collect_evidence(
            model,
            held_out,
            wanted,
            bases_per_class=bases_per_class,
            maximum_windows_per_class=CalibrationRecipe().maximum_windows_per_class,
            seed=seed,
        )
        for wanted in (lengths, [length for length in SHORT_LENGTHS_BP if length not in lengths])
    )
    if evidence is None:
        raise InputError(f"the held-out sequences of {folder} are too short to calibrate: give more of them.")
    report = calibrate(model, evidence, short, use_stack=recipe.stack)
    note(report.summary())
    details = dict(details) | {"parts": fit.to_dict(), "calibrated": True, "calibration": report.to_dict()}
    details["recipe"] = details["recipe"] | {"parts": asdict(recipe)}
    save_classifier(output, model, details=details)


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description="Fit counted parts and calibration of a trained classifier again.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bases-per-class", type=int, default=CalibrationRecipe().bases_per_class)
    parser.add_argument("--groups", type=Path, help="homology groups given in training")
    parser.add_argument("--gate-steps", type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    use_threads(options.threads)
    try:
        refit(options.model, options.output, options.bases_per_class, options.groups, options.gate_steps)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
