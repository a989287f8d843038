"""Names of strangers stay one cell of a table, one line of a terminal, and plain text in a card."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambacore.errors import InputError
from mambacore.safe_text import LONGEST_MESSAGE, LONGEST_WORD, safe_field, safe_for_terminal, safe_markdown, shortened


@given(st.text())
def test_a_field_is_one_printable_cell(text: str) -> None:
    cell = safe_field(text)
    assert cell.isprintable()
    cell.encode("utf-8")
    assert cell == text or not text.isprintable()


@given(st.text())
def test_a_terminal_receives_no_control_characters(text: str) -> None:
    shown = safe_for_terminal(text)
    assert shown.replace("\n", "").replace("\t", "").isprintable()
    assert shown.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("plain name", "plain name"),
        ("s__Escherichia coli é", "s__Escherichia coli é"),
        ("a\tb\nc\rd", "a\\tb\\nc\\rd"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb\u200bc\xa0", "a\\u202eb\\u200bc\\xa0"),
        ("caf\udce9.wav", "caf\\udce9.wav"),
    ],
)
def test_escapes_can_be_read(text: str, cell: str) -> None:
    assert safe_field(text) == cell


def test_a_card_has_no_html() -> None:
    assert safe_markdown("# A\n\n<script>x & y</script>\n") == "# A\n\n&lt;script>x &amp; y&lt;/script>\n"


def test_messages_are_sentences_whatever_a_file_holds() -> None:
    path = "/data" * (LONGEST_WORD // 6)
    for name in ("A" * 10**6, "word " * 10**6, "\0" * 10**6):
        message = str(InputError(f"{path} has the name '{name}': give another."))
        assert message.startswith(f"{path} has the name '{name[:50]}") and message.endswith("': give another.")
        assert "characters ...]" in message and len(message) < LONGEST_MESSAGE
        assert shortened(message) == message  # an error that becomes a part of another is not cut again
    assert str(InputError("a plain sentence")) == "a plain sentence"
