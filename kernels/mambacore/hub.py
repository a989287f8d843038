"""Model folders on the Hugging Face Hub, given as `hf://owner/name@revision` wherever a folder is accepted.

Local folders need no network and are never mistaken for names on the Hub. Downloads go through huggingface_hub's cache;
with `HF_HUB_OFFLINE=1` only the cache is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from mambacore.errors import InputError
from mambacore.model_folder import CARD_NAME, CONFIG_NAME, TENSORS_NAME, read_model_folder

# A single slash is accepted, because `Path` collapses two.
_ON_THE_HUB = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
MODEL_FILES = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)


def find_model_folder(reference: str | Path) -> Path:
    """Return a model's folder: a path itself, or the download of a model on the Hub.

    Args:
        reference: a path, or `hf://owner/name`, followed by `@` and a branch, tag or commit for a pinned revision.

    Raises:
        InputError: no such model or revision, no connection and nothing in the cache, or a malformed name.
    """
    return download(reference, MODEL_FILES) if is_on_hub(reference) else Path(reference)


def is_on_hub(reference: str | Path) -> bool:
    """Return whether this is a name on the Hub, well-formed or not, rather than a path."""
    return str(reference).startswith("hf:/")


def download(reference: str | Path, patterns: Sequence[str]) -> Path:
    """Return the local folder of a model on the Hub with its matching files, downloaded unless cached.

    Args:
        reference: a name on the Hub, as in `find_model_folder`.
        patterns: file name patterns with `*`.

    Raises:
        InputError: see `find_model_folder`.
    """
    found = _ON_THE_HUB.fullmatch(str(reference))
    if found is None:
        raise InputError(
            f"{str(reference)!r} is not the name of a model: write hf://owner/name or hf://owner/name@revision."
        )
    repository, revision = found["repository"], found["revision"]
    name = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name} does not exist: the model has no revision {revision!r}; name another one.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name} does not exist, or is private: check the name, or log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} cannot be downloaded and is not in the cache: connect to the network once, unset HF_HUB_OFFLINE, "
            "or give a local folder."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InputError(
            f"{name} cannot be downloaded ({_first_line(error)}): try again or give a local folder."
        ) from error
    return Path(folder)


def push_model_folder(folder: Path, repository: str, private: bool = True, message: str | None = None) -> str:
    """Upload a model folder (only its three files) as one commit; return the commit's address.

    Args:
        folder: the model folder; it is read and checked first.
        repository: `owner/name`; created if it does not exist.
        private: whether a newly created repository is private.
        message: commit message.

    Raises:
        InputError: if the model folder is incomplete, the name malformed, or login, permission or connection is
            missing.
    """
    read_model_folder(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{repository!r} is not a repository name on the Hub: write owner/name.")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(MODEL_FILES),
            commit_message=message or f"Upload {folder.name}",
        )
    except errors.LocalTokenNotFoundError as error:
        raise InputError("not logged in to the Hub: run `hf auth login` first.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InputError(
            f"{folder} cannot be uploaded to {repository} ({_first_line(error)}): check the name, the permission to "
            "write there, and the connection."
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
