"""Records without evidence, and records that come in pieces."""

import io

import numpy as np
import pytest

from genomamba.classification.records import Groups, RecordClassifier, Share
from tiny_species import bases, fasta, tiny_model


@pytest.mark.parametrize("piece_length", [16, 16_384])
def test_a_record_without_a_known_base_is_unclassified(piece_length: int) -> None:
    records = {"masked": b"N" * 50, "iupac": b"RYKM" * 20, "real": bases(60), "empty": b"", "one": b"N" * 40 + b"A"}
    classifier = RecordClassifier(tiny_model(), piece_length=piece_length)
    rows = {row.name: row for row in classifier.classify(io.BytesIO(fasta(records)))}
    assert [name for name, row in rows.items() if row.call == "unclassified"] == ["masked", "iupac", "empty"]
    assert all((row.probabilities is None) == (row.call == "unclassified") for row in rows.values())


def test_records_without_a_known_base_add_nothing_to_their_group() -> None:
    classifier = RecordClassifier(tiny_model())
    groups = Groups(lambda name: "all")
    for _, record in classifier.evidence([io.BytesIO(fasta({"a": bases(60), "b": b"N" * 600}))], Share()):
        groups.add(record)
    group = groups.by_name["all"]
    assert (group.records, group.classified_records, group.bases) == (2, 1, 60)
    alone = next(classifier.classify(io.BytesIO(fasta({"a": bases(60)}))))
    np.testing.assert_allclose(classifier.answer_group("all", group).probabilities, alone.probabilities, atol=1e-6)
