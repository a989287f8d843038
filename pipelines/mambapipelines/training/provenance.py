"""Where a run comes from: versions, revision and machine, stored with every model."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mambacore import backends

PACKAGES = ("genomamba", "torch", "lightning", "numpy", "safetensors")


def provenance() -> dict[str, Any]:
    """JSON-able: versions of the packages that matter, git revision of the source if it is a checkout, and machine,
    with every backend of the kernels or the reason why it is not there.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": git_revision(Path(__file__).parent),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "backends": backends(),
        },
    }


def git_revision(folder: Path) -> str | None:
    """The commit that is checked out where the folder's source lies, with ``+changes`` if files differ from it; None
    for an installed package, which is in no checkout, and where there is no git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    # A package in somebody else's checkout, an environment inside it say, is not tracked by it.
    if commit is None or not _git(folder, "ls-files", "--", "."):
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None when it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
