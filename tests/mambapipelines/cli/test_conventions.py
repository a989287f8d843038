"""What all commands share: short options, how much they say, help topics, and completion in the shell."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mambapipelines import VERBOSITY_VARIABLE
from mambapipelines.cli.audiomamba import main as audio
from mambapipelines.cli.genomamba import main as dna
from mambapipelines.cli.topics import TOPICS
from tiny_species import bases, fasta, write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
SHELLS = ("bash", "zsh", "fish")


def commands(group: Any) -> Iterator[Any]:
    for command in group.commands.values():
        if hasattr(command, "commands"):
            yield from commands(command)
        else:
            yield command


def all_commands() -> list[Any]:
    return [one for main in (dna, audio) for one in commands(typer.main.get_command(main.application))]


def test_a_letter_means_one_option_in_every_command() -> None:
    meanings: dict[str, set[str]] = {}
    for command in all_commands():
        taken = [name for entry in command.params for name in entry.opts if name[:2] != "--" and name[0] == "-"]
        assert len(taken) == len(set(taken)), command.name
        for entry in command.params:
            long_names = [name for name in entry.opts if name.startswith("--")]
            for letter in set(entry.opts) - set(long_names):
                if letter.startswith("-"):
                    meanings.setdefault(letter, set()).add(long_names[0])
    assert all(len(names) == 1 for names in meanings.values()), meanings
    assert {"-o", "-t", "-l", "-r", "-s", "-q", "-v"} <= set(meanings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conventions")
    write_tiny_model(place / "model")
    (place / "contigs.fa").write_bytes(fasta({"first": bases(300), "second": bases(40, 1)}))
    return place


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_quiet_leaves_the_result_and_verbose_adds_to_it(
    place: Path, before: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for option in ("", "-q", "-v"):
        words = ["classify", str(place / "model"), str(place / "contigs.fa")]
        assert dna.main([option, *words] if option and before else [*words, *([option] if option else [])]) == 0
        said[option] = capsys.readouterr()
    assert said["-q"].out == said["-v"].out == said[""].out != ""
    assert said["-q"].err == ""
    assert "GiB of memory" in said["-v"].err
    assert "backend native" in said["-v"].err
    assert "GiB of memory" not in said[""].err
    assert VERBOSITY_VARIABLE not in os.environ


def test_verbose_says_where_an_error_comes_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dna.main(["classify", str(place / "absent"), str(place / "contigs.fa"), "--verbose"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("genomamba: error: ")
    assert "raised at" in said[1] and ".py:" in said[1]


def test_quiet_and_verbose_exclude_each_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dna.main(["classify", str(place / "model"), str(place / "contigs.fa"), "-q", "-v"]) == 2
    assert "--quiet and --verbose" in capsys.readouterr().err


@pytest.mark.parametrize("topic", TOPICS)
def test_help_explains_every_topic(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dna.main(["help", topic]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 3
    assert max(map(len, shown.splitlines())) <= 120


def test_help_explains_a_command_and_refuses_what_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert dna.main(["help", "intervals", "make"]) == 0
    assert "--max-unknown" in capsys.readouterr().out
    assert dna.main(["help"]) == 0
    listed = capsys.readouterr().out
    assert all(topic in listed for topic in TOPICS)
    assert dna.main(["help", "nonsense"]) == 2
    assert "no topic or command 'nonsense'" in capsys.readouterr().err


def run(environment: dict[str, str], program: str = "genomamba") -> str:
    code = f"import sys; from mambapipelines.cli.{program}.main import main; sys.exit(main())"
    folders = [str(REPOSITORY / name) for name in ("", "kernels", "pipelines")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_how_to_complete_and_gets_completions(shell: str) -> None:
    script = run({"_GENOMAMBA_COMPLETE": f"source_{shell}"})
    assert "genomamba" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)
    words = "genomamba cl"
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    completions = run({"_GENOMAMBA_COMPLETE": f"complete_{shell}", **asked})
    assert "classify" in completions
    assert "train" not in completions
