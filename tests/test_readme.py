"""Every Python block of the README runs, on tiny models under the names that it uses."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import audiomamba
from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, save_waveform_model
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from mambapipelines.cli.genomamba.main import COMMANDS as DNA_COMMANDS
from tiny_language_models import language_model, model_folder, random_letters, write_fasta
from tiny_species import bases, fasta, write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
GENOME = random_letters(600, 3)
LARGEST_PLOT_BYTES = 8_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model and file that the README names."""
    place = tmp_path_factory.mktemp("readme")
    write_tiny_model(place / "yeasts")
    model_folder(place / "pretrained", "causal")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    save_sequence_model(
        place / "promoters", sequence_model_on(language_model("causal"), targets, "mean", True).float(), {}
    )
    (place / "contigs.fa").write_bytes(fasta({"first": bases(300), "second": bases(40, 1)}))
    write_fasta(place / "genome.fa", {"chr1": GENOME})
    (place / "variants.vcf").write_bytes(
        b"##fileformat=VCFv4.2\n##contig=<ID=chr1,length=600>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        b"chr1\t300\t.\t" + GENOME[299:300] + b"\t" + (b"C" if GENOME[299:300] == b"A" else b"A") + b"\t.\t.\t.\n"
    )
    stages = (StageConfig(1, {"name": "selective", "state_size": 2}), StageConfig(1, {"name": "s4d", "state_size": 2}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        waveforms = WaveformModel(WaveformModelConfig(stages, 4, (2,), quantiser=Quantiser(sample_rate_hz=1000)))
    save_waveform_model(place / "digits", waveforms, details={})
    audiomamba.write_waveform(place / "zero.wav", torch.from_numpy(0.3 * np.sin(np.arange(200.0))).float(), 1000)
    return place


def test_the_readme_has_blocks_of_every_package() -> None:
    assert {"genomamba", "audiomamba", "mambacore"} <= {
        name for block in BLOCKS for name in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
    }


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{number}-{block.split()[1]}" for number, block in enumerate(BLOCKS)])
def test_a_python_block_of_the_readme_runs(block: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "path",
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("kernels/**/*.md")],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    generated = "reference/"  # pages that exist once the site is built, whose links `make docs` checks
    assert not [
        target for target in targets if not target.startswith(generated) and not (path.parent / target).exists()
    ]
    assert path != REPOSITORY / "README.md" or targets


def test_the_plot_shows_the_figures_of_the_shipped_card() -> None:
    place = REPOSITORY / "docs" / "site" / "accuracy_figure.py"
    specification = importlib.util.spec_from_file_location("accuracy_figure", place)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    rows, chance = script.read_rows(script.CARD)
    assert chance == 33
    assert all(row.low <= row.accuracy["genomamba (95 % interval)"] <= row.high for row in rows)
    drawn = script.FIGURE.read_text(encoding="utf-8")
    assert drawn == script.figure(rows, chance), "the card has changed: run python docs/site/accuracy_figure.py"
    assert len(drawn) < LARGEST_PLOT_BYTES
    for page, target in (("README.md", "docs/accuracy.svg"), ("docs/index.md", "accuracy.svg")):
        assert f"]({target})" in (REPOSITORY / page).read_text(encoding="utf-8")


def test_every_command_is_in_the_table_of_tasks() -> None:
    names = [
        module.__name__.rpartition(".")[2].replace("_", "-") for modules in DNA_COMMANDS.values() for module in modules
    ]
    absent = [
        name for name in names if not re.search(rf"`(?:genomamba |audiomamba )?{name}`", README) and name != "demo"
    ]
    assert not absent
