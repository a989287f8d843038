"""One rule for class names: a class is one cell of a table and one file in its folder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genomamba.class_names import check_class_name, check_class_names
from genomamba.data.genome_lists import parse_genome_option
from genomamba.models.species_classifier import SpeciesClassifierConfig
from mambacore.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        "cow",
        "s__Escherichia coli",
        "Salmonella enterica subsp. enterica",
        "Candida_auris-B8441.v2",
        "酵母",
        "x (y) [z]",
    ],
)
def test_names_of_species_and_taxonomies_are_classes(name: str) -> None:
    assert check_class_name(name, "here") == name
    assert parse_genome_option(f"{name}=x.fa").name == name


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "...", "../../victim", "a/b", "a\\b", "a\tb", "a\nb", "a  b", " a", "a ", "\x1b[31m"],
        *["a\u200bb", "a\u202eb", "<b>", "x" * 121, "unclassified", "a\0", 7, None, ["a"]],
    ],
)
def test_other_names_are_refused_wherever_they_come_from(name: object) -> None:
    with pytest.raises(InputError, match="class name") as refused:
        SpeciesClassifierConfig.from_dict({"class_names": ["cow", name]})
    assert str(refused.value).isprintable()


@given(st.text())
def test_a_class_is_a_file_name_and_a_cell(name: str) -> None:
    try:
        check_class_name(name, "here")
    except InputError:
        return
    assert name.isprintable()
    assert not set(name) & set("/\\\t\n\0<>")
    assert name.strip(". ") or "." not in name


def test_a_class_is_named_once() -> None:
    with pytest.raises(InputError, match="twice"):
        check_class_names(["a", "b", "a"], "here")
    with pytest.raises(InputError, match="must be a list"):
        SpeciesClassifierConfig.from_dict({"class_names": "ab"})
