"""Model folders are found on the Hub by name, offline from the cache, and nothing is uploaded that is no model."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from mambacore.errors import InputError
from mambacore.hub import find_model_folder, push_model_folder
from mambacore.model_folder import write_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_in(folder: Path) -> Path:
    write_model_folder(folder, {"kind": "test"}, {"weight": torch.ones(2)}, "# Card\n")
    return folder


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the revision `v1` of me/model, and no network."""
    cache = tmp_path / "cache"
    repository = cache / "models--me--model"
    model_in(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("reference", ["hf://me/model@v1", Path("hf://me/model@v1"), f"hf://me/model@{COMMIT}"])
def test_a_pinned_revision_is_found_in_the_cache_without_a_network(reference, offline_cache):
    assert find_model_folder(reference).resolve() == offline_cache.resolve()


@pytest.mark.parametrize("reference", ["hf://me/model@v2", "hf://me/other"])
def test_what_is_not_in_the_cache_is_said_in_one_sentence(reference, offline_cache):
    with pytest.raises(InputError, match=f"{reference} cannot be downloaded and is not in the cache.*HF_HUB_OFFLINE"):
        find_model_folder(reference)


def test_a_local_folder_is_never_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert find_model_folder("me/model") == Path("me/model")


@pytest.mark.parametrize("reference", ["hf://model", "hf://me/model@", "hf://me/model/more", "hf://"])
def test_malformed_names_are_refused(reference):
    with pytest.raises(InputError, match="is not the name of a model: write hf://owner/name"):
        find_model_folder(reference)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.RepositoryNotFoundError, "does not exist, or is private"),
        (errors.HfHubHTTPError, "cannot be downloaded"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error("503: out of order", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        find_model_folder("hf://me/model@v9")


class Hub:
    """Stands in for HfApi and keeps what it was told."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.calls = refusal, []

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, options))
        if self.refusal:
            raise self.refusal

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_a_push_uploads_the_three_files_of_a_model(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    folder = model_in(tmp_path / "model")
    assert push_model_folder(folder, "me/model") == "https://hub/commit/1"
    (_, repository, options), (_, upload) = hub.calls
    assert repository == "me/model" and options == {"private": True, "exist_ok": True}
    assert sorted(upload["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
    assert upload["folder_path"] == folder


def test_nothing_is_pushed_that_is_no_model_or_by_nobody(tmp_path, monkeypatch):
    hub = Hub(errors.LocalTokenNotFoundError("no token"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(InputError, match="there is no model folder"):
        push_model_folder(tmp_path / "missing", "me/model")
    folder = model_in(tmp_path / "model")
    with pytest.raises(InputError, match="write owner/name"):
        push_model_folder(folder, "model")
    assert hub.calls == []
    with pytest.raises(InputError, match="not logged in"):
        push_model_folder(folder, "me/model")
