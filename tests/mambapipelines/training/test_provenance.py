"""A model says which versions and which revision of the source it comes from."""

import json
import subprocess
from pathlib import Path

import torch

from mambacore import backends
from mambapipelines.training.provenance import git_revision, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_revision_of_a_checkout_and_of_one_with_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "source.py").write_text("one = 1\n")
    git(tmp_path, "add", "source.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path) == commit
    (tmp_path / "source.py").write_text("one = 2\n")
    assert git_revision(tmp_path) == commit + "+changes"
    installed = tmp_path / "environment"
    installed.mkdir()
    (installed / "package.py").write_text("")
    assert git_revision(installed) is None  # inside a checkout, but not of it


def test_no_checkout_has_no_revision(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "missing") is None


def test_provenance_is_json_and_names_the_versions() -> None:
    content = json.loads(json.dumps(provenance()))
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["backends"] == backends()
