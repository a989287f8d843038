"""The demo's contigs are described and small; its page opens in a browser without an error, narrow and wide."""

import subprocess
import sys
from pathlib import Path

import pytest

import audiomamba.weights
import genomamba.weights
from browser import (
    NARROW_PX,
    WIDE_PX,
    assert_page_does_not_scroll_sideways,
    assert_pictures_are_seen,
    browser,
    watched_page,
)
from genomamba.io.sources import read_sequences

DEMO = Path(__file__).resolve().parents[1] / "demo"
LARGEST_FILE_BYTES = 1_000_000


def test_every_contig_says_where_it_is_from_and_how_long_it_is() -> None:
    assert (DEMO / "contigs.fa.gz").stat().st_size <= LARGEST_FILE_BYTES
    names = set()
    for contig in read_sequences(str(DEMO / "contigs.fa.gz")):
        place = contig.description.split()[1] if "chrVII" in contig.description else contig.description.split()[0]
        start, end = map(int, place.rpartition(":")[2].split("-"))
        assert end - start + 1 == len(contig.tokens)
        names.add(contig.name)
    assert {"escherichia_coli", "cerevisiae_long", "paradoxus_1024_1", "arboricola_65536_2"} <= names


def test_contigs_are_of_chromosomes_that_the_shipped_models_were_not_trained_on() -> None:
    held_out = {"yeasts": ("holdout", "held_out"), "yeast-lm": ("test_chromosomes", "held_out")}
    for name, keys in held_out.items():
        if name in genomamba.weights.MODELS.table:
            text = (genomamba.weights.MODELS.table[name].folder / "config.json").read_text(encoding="utf-8")
            assert "chrVII" in text, f"{name} names none of {keys} with chrVII"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "index.html"
    command = [sys.executable, str(DEMO / "run.py"), "--output", str(path), "--minutes", "0.1", "--length", "65536"]
    finished = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("width_px", [NARROW_PX, WIDE_PX])
def test_the_page_opens_without_an_error(page: Path, width_px: int) -> None:
    text = page.read_text(encoding="utf-8")
    shipped = {**genomamba.weights.MODELS.table, **audiomamba.weights.MODELS.table}
    for name, heading in (("yeasts", "Classify:"), ("digits", "Generate:"), ("yeast-lm", "Pretrain:")):
        assert (heading in text) is (name in shipped)
    assert "Train: a classifier of simulated species" in text
    with browser() as chromium, watched_page(chromium, width_px, offline=True) as (opened, wrong):
        opened.goto(page.as_uri())
        assert_pictures_are_seen(opened, width_px)
        assert_page_does_not_scroll_sideways(opened, width_px)
        assert wrong == []
