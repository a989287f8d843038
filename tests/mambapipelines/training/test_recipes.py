"""Recipes: the packaged ones work, and every mistake in one's own is named."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from genomamba.models.species_classifier import SpeciesClassifierConfig
from mambacore.errors import InputError
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.recipe import (
    BatchRecipe,
    TrainingRecipe,
    load_task_recipe,
    recipe_names,
    recipe_text,
)


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_package_brings_the_promised_recipes() -> None:
    assert recipe_names(SpeciesRecipe.folder) == ["demo", "small", "tiny"]


@pytest.mark.parametrize("name", ["demo", "small", "tiny"])
def test_packaged_recipes_build_a_model_and_survive_being_stored(name: str) -> None:
    recipe = load_task_recipe(SpeciesRecipe, name)
    assert SpeciesRecipe.from_dict(recipe.to_dict()) == recipe
    assert SpeciesClassifierConfig.from_dict({"class_names": ["a", "b"], **recipe.model}).class_names == ("a", "b")


def test_what_a_recipe_leaves_out_has_defaults(tmp_path: Path) -> None:
    assert load_task_recipe(SpeciesRecipe, write_recipe(tmp_path, "minutes: 3\n")) == SpeciesRecipe(minutes=3.0)
    assert load_task_recipe(SpeciesRecipe, write_recipe(tmp_path, "")) == SpeciesRecipe()


def test_numbers_may_be_written_with_an_exponent_and_no_dot(tmp_path: Path) -> None:
    recipe = load_task_recipe(
        SpeciesRecipe, write_recipe(tmp_path, "optimizer: {learning_rate: 3e-3}\nbatch: {bases_per_step: 1e5}\n")
    )
    assert recipe.optimizer.learning_rate == 0.003
    assert recipe.batch.bases_per_step == 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("minuets: 3", "unknown key 'minuets' in recipe .*did you mean 'minutes'"),
        ("optimizer: {learnin_rate: 1}", "unknown key 'learnin_rate' in optimizer.*'learning_rate'"),
        ("model: {model_with: 8}", "unknown key 'model_with' in model.*'model_width'"),
        ("model: {class_names: [a, b]}", "unknown key 'class_names' in model"),
        ("batch: {zzz: 8}", "unknown key 'zzz' in batch.*valid keys are bases_per_step"),
        ("optimizer: {learning_rate: fast}", "learning_rate of optimizer.*must be a number, not 'fast'"),
        ("optimizer: {learning_rate: .nan}", "learning_rate of optimizer.*must be a number"),
        ("batch: {bases_per_step: 1.5}", "bases_per_step of batch.*an integer"),
        ("minutes: true", "minutes in .*must be a number"),
        ("minutes: 0", "minutes in .*greater than 0"),
        ("optimizer: {learning_rate: -1}", "optimizer.learning_rate.*greater than 0"),
        ("optimizer: {beta2: 1}", "optimizer.beta2.*below 1"),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay.*negative"),
        ("optimizer: 3", "optimizer in recipe.*mapping"),
        ("- minutes", "mapping"),
        ("minutes: 1\nmodel: {", "not valid YAML at line"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
        ("model: {layers: 2}\nmodel: {}", r"not valid YAML at line 2 \(the key 'model' twice\)"),
        ("model: {layers: 2, layers: 3}", "the key 'layers' twice"),
        ("[" * 5000, "nested too deeply"),
        ("model: {model_width: 8.5}", "model_width of model in .* must be an integer, not 8.5"),
        ("model: {model_width: wide}", "model_width of model in .* must be an integer, not 'wide'"),
        ("model: {model_width: true}", "model_width of model in .* must be an integer, not True"),
        ("model: {model_width: null}", "model_width of model in .* must be an integer, not None"),
        ("model: {layers: 2020-01-01}", "layers of model in .* must be an integer"),
        ("model: {likelihood_weight: .inf}", "likelihood_weight of model in .* must be a number, not inf"),
        ("model: {context_widths: 3}", "context_widths of model in .* must be a list, not 3"),
        ("model: {context_widths: [1, a]}", "entry 2 of context_widths of model in .* must be an integer, not 'a'"),
        ("model: {mixer: [selective, 2020-01-01]}", "mixer of model in .* must be a number, a word, a list or a mapp"),
        ("model: {mixer: {name: s4d, state_size: .nan}}", "state_size of mixer of model in .* not nan"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_task_recipe(SpeciesRecipe, write_recipe(tmp_path, text))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'huge'.*demo, small, tiny"):
        load_task_recipe(SpeciesRecipe, "huge")


@pytest.mark.parametrize("length", [1, 100, 1024, 8192, 1_048_576])
def test_one_recipe_serves_every_length(length: int) -> None:
    batch = BatchRecipe(bases_per_step=65_536, minimum_windows_per_step=8, bases_per_micro_batch=16_384)
    assert batch.windows_per_step(length) >= 8
    assert batch.windows_per_step(length) * length >= 65_536 - length
    assert 1 <= batch.windows_per_micro_batch(length) <= batch.windows_per_step(length)
    assert batch.windows_per_micro_batch(length) * length <= max(length, 16_384)


def test_a_precision_is_one_of_three() -> None:
    assert SpeciesRecipe.from_dict({"precision": "auto"}).precision == "auto"
    assert SpeciesRecipe.from_dict({"precision": "bfloat16"}).precision == "bfloat16"
    with pytest.raises(InputError, match="must be one of auto, float32, bfloat16, not 'half'"):
        SpeciesRecipe.from_dict({"precision": "half"})


def test_changes_replace_values_of_a_recipe() -> None:
    changes = ["model.layers=8", "optimizer.learning_rate=1e-3", "model.mixer=[selective, {name: s4d, state_size: 8}]"]
    recipe = load_task_recipe(SpeciesRecipe, "tiny", changes)
    assert recipe.model["layers"] == 8
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.model["mixer"] == ["selective", {"name": "s4d", "state_size": 8}]
    assert recipe.batch == load_task_recipe(SpeciesRecipe, "tiny").batch
    assert load_task_recipe(SpeciesRecipe, "tiny") != recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.layerz=8", "unknown key 'layerz' in model.*did you mean 'layers'"),
        ("modl.layers=8", "unknown key 'modl' in recipe tiny.*did you mean 'model'"),
        ("model.layers", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("minutes.x=3", "minutes is a value, not a section"),
        ("minutes=[", "not valid YAML"),
        ("batch.bases_per_step=1.5", "an integer"),
    ],
)
def test_a_change_that_makes_no_sense_is_named(change: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_task_recipe(SpeciesRecipe, "tiny", [change])


def test_a_printed_recipe_says_everything_and_is_read_back(tmp_path: Path) -> None:
    recipe = load_task_recipe(SpeciesRecipe, "tiny", ["model.mixer=gru"])
    printed = load_task_recipe(SpeciesRecipe, write_recipe(tmp_path, recipe_text(recipe)))
    assert printed.optimizer == recipe.optimizer and printed.model["mixer"] == "gru"
    assert printed.model["context_widths"] == [1, 3, 6]
    before = SpeciesClassifierConfig.from_dict({"class_names": ["a", "b"], **recipe.model})
    assert SpeciesClassifierConfig.from_dict({"class_names": ["a", "b"], **printed.model}) == before


@dataclass(frozen=True)
class ColoursRecipe:
    """A section as a task might have it."""

    paint: str = field(default="red", metadata={"choices": ("red", "blue")})
    title: str = "untitled"
    glossy: bool = False
    layers: tuple[int, ...] = (1, 2)
    edges: tuple[str, ...] = field(default=(), metadata={"entries": str, "choices": ("left", "right")})
    weight: float = 0.5


@dataclass(frozen=True)
class PaintingRecipe(TrainingRecipe):
    """A task's recipe with a section and a value of its own."""

    frame: str = field(default="oak", metadata={"choices": ("oak", "ash")})
    colours: ColoursRecipe = field(default_factory=ColoursRecipe)


def test_a_task_declares_words_flags_and_lists(tmp_path: Path) -> None:
    text = "frame: ash\ncolours: {paint: blue, title: sea, glossy: true, layers: [3], edges: [left], weight: 1}\n"
    recipe = load_task_recipe(PaintingRecipe, write_recipe(tmp_path, text))
    assert recipe.frame == "ash"
    assert recipe.colours == ColoursRecipe("blue", "sea", True, (3,), ("left",), 1.0)
    assert PaintingRecipe.from_dict(recipe.to_dict()) == recipe
    (tmp_path / "again").mkdir()
    assert load_task_recipe(PaintingRecipe, write_recipe(tmp_path / "again", recipe_text(recipe))) == recipe
    changed = load_task_recipe(PaintingRecipe, write_recipe(tmp_path, text), ["colours.layers=[]", "frame=oak"])
    assert (changed.colours.layers, changed.frame) == ((), "oak")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frame: pine", "frame in .*must be one of oak, ash, not 'pine'"),
        ("colours: {paint: green}", "paint of colours in .*must be one of red, blue, not 'green'"),
        ("colours: {paint: [red]}", "paint of colours in .*must be one of red, blue"),
        ("colours: {title: 3}", "title of colours in .*must be a word, not 3"),
        ("colours: {glossy: 1}", "glossy of colours in .*must be true or false, not 1"),
        ("colours: {layers: 3}", "layers of colours in .*must be a list, not 3"),
        ("colours: {layers: [1, 2.5]}", "entry 2 of layers of colours in .*an integer, not 2.5"),
        ("colours: {edges: [left, up]}", "entry 2 of edges of colours in .*one of left, right, not 'up'"),
        ("colours: {weight: [1]}", "weight of colours in .*must be a number"),
    ],
)
def test_mistakes_in_a_tasks_section_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_task_recipe(PaintingRecipe, write_recipe(tmp_path, text))


def test_a_recipe_may_merge_and_repeat_its_own_parts(tmp_path: Path) -> None:
    text = "model: &shape {layers: 2, model_width: 1e1}\noptimizer: {<<: {beta1: 0.5, beta2: 0.6}, beta1: 0.7}\n"
    recipe = load_task_recipe(SpeciesRecipe, write_recipe(tmp_path, text))
    assert recipe.model == {"layers": 2, "model_width": 10}
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2) == (0.7, 0.6)


def test_a_recipe_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("minutes: 1\n".encode("utf-16"))
    with pytest.raises(InputError, match="is not UTF-8 text: save it as UTF-8"):
        load_task_recipe(SpeciesRecipe, str(tmp_path / "mine.yaml"))
