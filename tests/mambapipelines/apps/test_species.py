"""The local page answers as `genomamba classify` does, shows where in a record a class speaks, and tells mistakes."""

import gzip
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from browser import NARROW_PX, WIDE_PX, assert_page_does_not_scroll_sideways, browser, watched_page
from genomamba.classification.class_track import class_track
from genomamba.io.compression import read_blocks
from genomamba.tokenizer import COMPLEMENT_IDS, CharacterTokenizer
from mambacore.errors import InputError
from mambapipelines.apps import species
from mambapipelines.apps.species import SpeciesPage
from mambapipelines.cli.genomamba.main import main
from tiny_species import CLASS_NAMES, bases, fasta, tiny_model, write_tiny_model

RECORDS = {"one": bases(1000), "two": bases(300, seed=1), "empty": b""}


@pytest.fixture
def page() -> SpeciesPage:
    return SpeciesPage(tiny_model(), most_bases=2000)


def tokens_of(letters: bytes) -> np.ndarray:
    return np.asarray(CharacterTokenizer().encode(letters.decode()), dtype=np.uint8)


def test_the_answer_is_the_one_of_classify(page, tmp_path, capsys):
    (tmp_path / "records.fa").write_bytes(fasta(RECORDS))
    assert main(["classify", str(write_tiny_model(tmp_path / "model")), str(tmp_path / "records.fa")]) == 0
    answer = page.answer(fasta(RECORDS).decode(), None)
    assert answer.table.read_text() == capsys.readouterr().out
    assert [row.name for row in answer.rows] == list(RECORDS)
    assert list(answer.tokens) == ["one", "two"]
    assert answer.summary().startswith("3 records: ")


def test_an_upload_may_be_gzipped_and_bare_bases_may_be_pasted(page, tmp_path):
    (tmp_path / "records.fa.gz").write_bytes(gzip.compress(fasta(RECORDS)))
    uploaded = page.answer("", str(tmp_path / "records.fa.gz"))
    assert uploaded.table.read_text() == page.answer(fasta(RECORDS).decode(), None).table.read_text()
    bare = page.answer(f"  {RECORDS['one'].decode().lower()}\n", None)
    assert [row.name for row in bare.rows] == ["pasted"]
    assert bare.rows[0].probability == uploaded.rows[0].probability


@pytest.mark.parametrize(
    ("text", "upload", "words"),
    [
        ("", None, "paste FASTA or upload"),
        ("ACGT", "records.fa", "not both"),
        (">x\nMKVLF", None, "the pasted text"),
        ("<html>", None, "the pasted text"),
        ("A" * 2001, None, "takes, 2,000"),
        ("", "missing.fa", "missing.fa"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(page, text, upload, words):
    with pytest.raises(InputError, match=words):
        page.answer(text, upload)


@pytest.mark.parametrize("content", [b"\n", b">x\n" + b"A" * 60, b">" + b"n" * 60 + b"\n", b"@r\nA\n+\nI\n"])
def test_a_small_upload_that_expands_is_refused_while_it_is_read(page, tmp_path, monkeypatch, content):
    read = 0

    def counted(source, label):
        nonlocal read
        for block in read_blocks(source, label):
            read += len(block)
            yield block

    monkeypatch.setattr(species, "read_blocks", counted)
    path = tmp_path / "bomb.fa.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(50):
            stream.write(content * (1_000_000 // len(content)))
    with pytest.raises(InputError, match=r"more than .* characters"):
        page.answer("", str(path))
    assert read < 5_000_000


def test_the_windows_of_a_track_add_up_to_the_record(page):
    tokens = tokens_of(RECORDS["one"])
    track = class_track(page.model, tokens, most_windows=7)
    assert track.boundaries[0] == 0
    assert track.boundaries[-1] == len(tokens)
    assert track.probabilities.shape == (7, len(CLASS_NAMES))
    np.testing.assert_allclose(track.probabilities.sum(axis=1), 1, atol=1e-6)
    whole = class_track(page.model, tokens, most_windows=1)
    np.testing.assert_allclose(
        whole.probabilities[0], page.answer(RECORDS["one"].decode(), None).rows[0].probabilities, atol=1e-6
    )
    # Evidence per base is the mean over the windows: it can be had back from probabilities up to a constant.
    widths = torch.from_numpy(np.diff(track.boundaries))
    factor = page.model.logits(torch.ones(7, 1, dtype=torch.float64), widths).detach().numpy()
    evidence = np.log(track.probabilities) / factor
    summed = (evidence * widths.numpy()[:, None]).sum(axis=0) / len(tokens)
    expected = (
        np.log(whole.probabilities[0]) / page.model.logits(torch.ones(1, 1, dtype=torch.float64), len(tokens)).item()
    )
    np.testing.assert_allclose(summed - summed.mean(), expected - expected.mean(), atol=1e-6)


def test_the_track_of_the_other_strand_is_the_mirror_image(page):
    tokens = tokens_of(RECORDS["one"])
    track = class_track(page.model, tokens)
    mirrored = class_track(page.model, COMPLEMENT_IDS[tokens[::-1]])
    np.testing.assert_allclose(mirrored.probabilities[::-1], track.probabilities, atol=1e-9)
    assert len(track.probabilities) == len(tokens) // 64
    assert len(class_track(page.model, tokens[:5]).probabilities) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--largest-upload", "0"], "--largest-upload"), (["--port", "{taken}"], "choose another --port")],
)
def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys, options, words):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = [option.format(taken=taken.getsockname()[1]) for option in options]
        assert main(["app", str(write_tiny_model(tmp_path / "model")), *options]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1


@pytest.fixture
def address(tmp_path: Path):
    from mambapipelines.apps.server import serve  # noqa: PLC0415
    from mambapipelines.apps.species import species_page  # noqa: PLC0415

    pytest.importorskip("gradio", reason="the test extra is not installed")
    blocks = species_page(write_tiny_model(tmp_path / "model"), most_bases=100_000, threads=1)
    yield serve(blocks, "127.0.0.1", 0, largest_upload_megabytes=0.01, wait=False)
    blocks.close(verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [NARROW_PX, WIDE_PX])
def test_a_reader_pastes_uploads_and_sees_calls_tracks_and_mistakes(address, tmp_path, width_px):
    (tmp_path / "upload.fa").write_bytes(fasta({"uploaded": bases(700, seed=4)}))
    (tmp_path / "large.fa").write_bytes(fasta({"large": bases(20_000, seed=5)}))
    with browser() as chromium, watched_page(chromium, width_px, offline=False) as (page, wrong):
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.fill("#fasta textarea", fasta(RECORDS).decode())
        page.click("#classify")
        page.wait_for_selector("#track img")
        assert "3 records" in page.inner_text("#summary")
        assert "one" in page.inner_text("#calls")
        box = page.locator("#track img").bounding_box()
        assert box["width"] > width_px / 3
        assert_page_does_not_scroll_sideways(page, width_px)

        page.fill("#fasta textarea", ">x\nMKVLF")
        page.click("#classify")
        page.wait_for_selector("#summary p[role=alert]")
        assert "the pasted text" in page.inner_text("#summary")
        assert not page.locator("#track img").is_visible()

        page.fill("#fasta textarea", "")
        page.set_input_files("#upload input[type=file]", tmp_path / "upload.fa")
        page.wait_for_selector("#upload >> text=upload")
        page.click("#classify")
        page.wait_for_selector("#track img")
        assert "uploaded" in page.inner_text("#calls")

        assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
        # The stream of answers of a finished run is ended by the page itself.
        assert [line for line in wrong if "ERR_ABORTED" not in line] == []


@pytest.mark.slow
def test_a_file_above_the_limit_is_refused_by_the_page(address, tmp_path):
    (tmp_path / "large.fa").write_bytes(fasta({"large": bases(20_000, seed=5)}))
    with browser() as chromium, watched_page(chromium, WIDE_PX, offline=False) as (page, _):
        page.goto(address)
        page.set_input_files("#upload input[type=file]", tmp_path / "large.fa")
        page.wait_for_selector("text=/exceeds the maximum|maximum allowed|too large/i")
