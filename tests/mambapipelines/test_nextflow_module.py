"""The nf-core style module: described as it is, and its script runs (rendered here where there is no Nextflow)."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tiny_species import bases, fasta, write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
NEXTFLOW = REPOSITORY / "pipelines" / "workflow" / "nf-core"
MODULE = NEXTFLOW / "genomamba" / "classify"
PROCESS = (MODULE / "main.nf").read_text(encoding="utf-8")
META = yaml.safe_load((MODULE / "meta.yml").read_text(encoding="utf-8"))
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def section(name: str) -> str:
    """The lines of a section of the process."""
    return re.search(rf"^    {name}:\n(.*?)(?=^    \w+:\n|^}})", PROCESS, re.MULTILINE | re.DOTALL)[1]


def rendered(name: str, values: dict[str, str]) -> str:
    """The shell script of a section, with Groovy's variables and backslashes replaced as Nextflow does."""
    text = section(name).split('"""')[1].replace("\\\\", "\\")
    return re.sub(r"\$\{?([a-z][\w.]*)\}?", lambda match: values[match[1]], text)


def test_the_description_names_the_channels_of_the_process() -> None:
    inputs = re.findall(r"(?:val|path)\(?\s*(\w+)\)?", section("input"))
    described = [
        name
        for channel in META["input"]
        for one in (channel if isinstance(channel, list) else [channel])
        for name in one
    ]
    assert described == inputs
    outputs = {
        emitted: pattern for pattern, emitted in re.findall(r'path\("([^"]+)"\).*emit: (\w+)', section("output"))
    }
    described_outputs = {name: [key for one in META["output"][name][0] for key in one][1] for name in META["output"]}
    versions = described_outputs.pop("versions_genomamba")
    assert described_outputs == outputs
    assert f"val('{versions}'), eval(" in section("output")
    assert META["topics"]["versions"] == META["output"]["versions_genomamba"]


def test_the_environment_and_the_container_are_of_this_version() -> None:
    environment = yaml.safe_load((MODULE / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == [f"bioconda::genomamba={VERSION}"]
    assert f'container "genomamba:{VERSION}"' in PROCESS
    assert f'"{VERSION}"' in (MODULE / "tests" / "main.nf.test").read_text(encoding="utf-8")


def test_the_script_writes_what_the_process_promises(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "one.fa").write_bytes(fasta({f"one_{number}": bases(60, number) for number in range(3)}))
    (tmp_path / "two.fa").write_bytes(fasta({"two": bases(90, 7)}))
    values = {"chosen": "model", "sequences": "one.fa two.fa", "paired": "", "args": "--min-length 10"}
    values |= {"task.cpus": "1", "prefix": "lake"}
    script = f"set -euo pipefail\ngenomamba() {{ '{sys.executable}' -m mambapipelines.cli.genomamba.main \"$@\"; }}\n"
    done = subprocess.run(
        ["bash", "-c", script + rendered("script", values)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    patterns = re.findall(r'path\("([^"]+)"\)', section("output"))
    written = [[path.name for path in tmp_path.glob(pattern)] for pattern in patterns]
    assert written == [["lake.calls.tsv"], ["lake.kreport"], ["lake.biom"], ["lake_mqc.tsv"]]
    assert len((tmp_path / "lake.calls.tsv").read_text().splitlines()) == 5
    stub = tmp_path / "stub"
    stub.mkdir()
    subprocess.run(["bash", "-c", rendered("stub", values)], cwd=stub, check=True)
    assert sorted(path.name for path in stub.iterdir()) == sorted(name for names in written for name in names)


@pytest.mark.slow
def test_nf_test_passes(tmp_path: Path) -> None:
    if shutil.which("nf-test") is None or shutil.which("nextflow") is None:
        pytest.skip("nf-test or Nextflow is not installed: see pipelines/workflow/README.md")
    shutil.copytree(NEXTFLOW, tmp_path / "nf-core")
    done = subprocess.run(
        ["nf-test", "test", "genomamba/classify/tests/main.nf.test"],
        cwd=tmp_path / "nf-core",
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
