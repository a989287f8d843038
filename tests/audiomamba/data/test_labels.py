"""Labels of clips: read by expressions and tables, numbered, and asked for."""

import pytest

from audiomamba.data.labels import (
    EVERY_VALUE,
    LabelSet,
    label_numbers,
    labels_of_clip,
    parse_labels,
    read_clip_labels,
)
from mambacore.errors import InputError

CLIPS = ("a/7_ann_1.wav", "a/7_bob_2.wav", "b/3_ann_1.wav", "noise.wav")
SETS = (LabelSet("digit", ("3", "7")), LabelSet("speaker", ("ann", "bob")))


def test_expressions_label_clips_by_their_names_or_their_paths():
    labels = read_clip_labels(["digit=^([0-9])_", "speaker=_([a-z]+)_", "folder=^([^/]+)/"], CLIPS)
    sets = labels.sets(CLIPS)
    assert [(one.name, one.values) for one in sets] == [
        ("digit", ("3", "7")),
        ("speaker", ("ann", "bob")),
        ("folder", ("a", "b")),
    ]
    assert [labels.numbers(clip, sets) for clip in CLIPS] == [(2, 1, 1), (2, 2, 1), (1, 1, 2), (0, 0, 0)]


def test_values_come_from_the_clips_to_train_on_alone():
    labels = read_clip_labels(["speaker=_([a-z]+)_"], CLIPS)
    sets = labels.sets([CLIPS[0]])
    assert sets == (LabelSet("speaker", ("ann",)),)
    assert labels.numbers(CLIPS[1], sets) == (0,)
    with pytest.raises(InputError, match="no training clip has a label 'speaker'"):
        labels.sets(["noise.wav"])


def test_a_table_labels_clips_by_path_or_name(tmp_path):
    table = tmp_path / "labels.tsv"
    table.write_text("clip\tdigit\tspeaker\n./a/7_ann_1.wav\tseven\tann\nnoise.wav\t\tnobody\nother.wav\t1\tx\n")
    labels = read_clip_labels([str(table)], CLIPS)
    sets = labels.sets(CLIPS)
    assert labels.numbers(CLIPS[0], sets) == (1, 1) and labels.numbers("noise.wav", sets) == (0, 2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("digit=^[0-9]_", "has no group"),
        ("digit=(", "is not valid"),
        ("digit=^(x)_", "matches no clip, such as a/7_ann_1"),
        ("^([0-9])_", "neither NAME=REGEX"),
        ("labels.tsv", "neither NAME=REGEX"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rule, message):
    with pytest.raises(InputError, match=message):
        read_clip_labels([rule], CLIPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip\tdigit\n", "is not a table of labels"),
        ("clip digit\na/7_ann_1.wav 7\n", "is not a table of labels"),
        ("clip\tdigit\na/7_ann_1.wav\t7\t8\n", "row 2 of .* has 3 columns"),
        ("clip\tdigit\nx.wav\t7\n", "labels none of the 4 clips"),
        ("clip\tdigit\na/7_ann_1.wav\t7\n7_ann_1.wav\t8\n", "labels a/7_ann_1.wav twice"),
        ("clip\tof what\na/7_ann_1.wav\t7\n", "cannot be the name"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, text, message):
    table = tmp_path / "labels.tsv"
    table.write_text(text)
    with pytest.raises(InputError, match=message):
        read_clip_labels([str(table)], CLIPS)


def test_labels_are_asked_for_by_value_or_in_turn():
    assert parse_labels(["digit=7"], SETS) == {"digit": "7"}
    assert label_numbers({"speaker": "bob"}, SETS) == (0, 2)
    each = {"digit": EVERY_VALUE, "speaker": EVERY_VALUE}
    found = [tuple(labels_of_clip(each, SETS, number).values()) for number in range(5)]
    assert found == [("3", "ann"), ("3", "bob"), ("7", "ann"), ("7", "bob"), ("3", "ann")]
    assert labels_of_clip({"speaker": "bob"}, SETS, 3) == {"speaker": "bob"}


@pytest.mark.parametrize(
    ("texts", "sets", "message"),
    [
        (["digit"], SETS, "not of the form NAME=VALUE"),
        (["digit=8"], SETS, "digit has no value '8'; choose 3, 7"),
        (["word=yes"], SETS, "no labels 'word'; it has digit, speaker"),
        (["digit=3", "digit=7"], SETS, "gives digit twice"),
        (["digit=3"], (), "trained without labels"),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused(texts, sets, message):
    with pytest.raises(InputError, match=message):
        parse_labels(texts, sets)
