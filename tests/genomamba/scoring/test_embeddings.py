"""Embeddings: what is pooled, and that a vector depends on its own sequence alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genomamba.scoring.embeddings import Embedder, Piece, as_the_model_reads, embed_pieces, require_windows, windows_of
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from tiny_language_models import language_model, random_letters

TOKENIZER = CharacterTokenizer()
SEQUENCES = [TOKENIZER.encode(random_letters(length, length)) for length in (50, 1, 33, 50, 7, 33, 50)]
# The vectors are float32 of sums in float64.
ROUNDING = 1e-6


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@pytest.mark.parametrize("kind", ["causal", "contexts", "masked", "equivariant"])
def test_a_vector_is_what_was_asked_for_pooled_over_positions(kind: str, pooling: str) -> None:
    model = language_model(kind)
    found = Embedder(model, pooling).embed(SEQUENCES)
    for tokens, vector in zip(SEQUENCES, found, strict=True):
        hidden = model.model.hidden(torch.from_numpy(tokens).long()[None])
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0].detach()
        expected = {"mean": hidden.mean(0), "last": hidden[-1], "max": hidden.amax(0)}[pooling]
        np.testing.assert_allclose(vector, expected.numpy(), atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@pytest.mark.parametrize("kind", ["causal", "contexts", "hybrid", "masked"])
def test_neither_the_batch_nor_the_size_of_pieces_matters(kind: str, pooling: str) -> None:
    model = language_model(kind)
    together = Embedder(model, pooling).embed(SEQUENCES)
    alone = [Embedder(model, pooling).embed([tokens])[0] for tokens in SEQUENCES]
    np.testing.assert_allclose(together, np.stack(alone), atol=ROUNDING, rtol=ROUNDING)
    for piece_length in (1, 8, 49):
        in_pieces = Embedder(model, pooling, piece_length=piece_length).embed(SEQUENCES)
        np.testing.assert_allclose(in_pieces, together, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("kind", ["causal", "masked", "equivariant"])
def test_with_both_strands_a_sequence_and_its_reverse_complement_have_one_vector(kind: str) -> None:
    embedder = Embedder(language_model(kind), both_strands=True)
    turned = [TOKENIZER.reverse_complement(tokens) for tokens in SEQUENCES]
    np.testing.assert_allclose(embedder.embed(SEQUENCES), embedder.embed(turned), atol=ROUNDING, rtol=ROUNDING)
    one_strand = Embedder(language_model(kind))
    assert np.abs(one_strand.embed(SEQUENCES) - one_strand.embed(turned)).max() > 1e-3


@pytest.mark.parametrize("kind", ["causal", "contexts", "masked", "equivariant"])
def test_layers_are_the_first_ones_under_the_last_norm(kind: str) -> None:
    model = language_model(kind)
    layers = len(model.model.stack.blocks)
    whole = Embedder(model).embed(SEQUENCES)
    np.testing.assert_array_equal(Embedder(model, layer=layers).embed(SEQUENCES), whole)
    for layer in (0, -1, layers + 1):
        with pytest.raises(InputError, match=f"no layer {layer}: use 1 to {layers}"):
            Embedder(model, layer=layer)
    if layers > 1:
        first = Embedder(model, layer=1).embed(SEQUENCES)
        assert np.abs(first - whole).max() > 1e-3
        other = language_model(kind)
        for parameter in other.model.stack.blocks[1].parameters():
            parameter.data.zero_()
        np.testing.assert_allclose(first, Embedder(other).embed(SEQUENCES), atol=ROUNDING, rtol=ROUNDING)
    assert len(model.model.stack.blocks) == layers


def test_a_sequence_without_bases_has_no_vector_and_disturbs_none() -> None:
    embedder = Embedder(language_model("causal"))
    found = embedder.embed([SEQUENCES[0], SEQUENCES[0][:0], SEQUENCES[1]])
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], embedder.embed(SEQUENCES[:2]), atol=ROUNDING)
    assert embedder.embed([]).shape == (0, embedder.width)


def test_vectors_come_in_the_order_of_the_sequences() -> None:
    embedder = Embedder(language_model("causal"))
    pieces = [Piece(str(number), 0, len(tokens), tokens) for number, tokens in enumerate(SEQUENCES * 60)]
    found = list(embed_pieces(embedder, iter(pieces)))
    assert [piece for some, _ in found for piece in some] == pieces
    vectors = np.concatenate([some for _, some in found])
    np.testing.assert_allclose(vectors, np.tile(embedder.embed(SEQUENCES), (60, 1)), atol=ROUNDING, rtol=ROUNDING)


@given(length=st.integers(1, 60), window=st.integers(1, 20), data=st.data())
def test_windows_cover_every_base_and_begin_at_every_stride(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, window))
    tokens = np.arange(length, dtype=np.uint8)
    pieces = list(windows_of("c", tokens, 100, window, stride))
    assert {place for piece in pieces for place in range(piece.start, piece.end)} == set(range(100, 100 + length))
    assert [piece.start - 100 for piece in pieces] == [(stride or window) * number for number in range(len(pieces))]
    assert all(piece.end - piece.start == window for piece in pieces[:-1])
    for piece in pieces:
        np.testing.assert_array_equal(piece.tokens, tokens[piece.start - 100 : piece.end - 100])


def test_n_is_read_as_the_model_was_trained_to() -> None:
    tokens = TOKENIZER.encode("ACNGRT")
    assert as_the_model_reads(language_model("causal"), tokens).tolist() == tokens.tolist()
    assert as_the_model_reads(language_model("masked", "caduceus"), tokens).tolist() == [7, 8, 4, 9, 6, 10]


def test_options_that_make_no_sense_are_refused() -> None:
    model = language_model("causal")
    for build in (
        lambda: Embedder(model, "sum"),
        lambda: Embedder(model, piece_length=0),
        lambda: require_windows(0, None),
        lambda: require_windows(None, 5),
        lambda: require_windows(5, 6),
        lambda: require_windows(5, 0),
    ):
        with pytest.raises(InputError):
            build()
    require_windows(5, 5)
