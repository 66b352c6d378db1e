"""Artifacts on the hub, without it: a server on this machine that speaks the endpoints of the hub's client."""

import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from conftest import logits, one_sentence, snapshot, tiny_artifact, token_ids, user_error
from huggingface_hub import close_session, constants

from fastfill import artifact as artifacts
from fastfill import attach, hub
from fastfill.errors import UserError

NAME = "org/tiny"


class Hub:
    """Repositories on 127.0.0.1. commits: (repository, revision or commit) -> (commit, folder)."""

    def __init__(self):
        self.commits: dict[tuple[str, str], tuple[str, Path]] = {}
        self.asked: list[str] = []
        self.sizes: dict[str, int] = {}  # what is said of a file in place of the truth
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, whole):
                hub.asked.append(f"{self.command} {self.path}")
                repository, _, rest = urllib.parse.unquote(self.path).lstrip("/").partition("/resolve/")
                revision, _, name = rest.partition("/")
                known = {repository for repository, _ in hub.commits}
                commit, folder = hub.commits.get((repository, revision), (None, Path("nowhere")))
                error = "RepoNotFound" if repository not in known else "RevisionNotFound" if commit is None else None
                if error is None and not (folder / name).is_file():
                    error = "EntryNotFound"
                content = b"" if error else (folder / name).read_bytes()
                self.send_response(404 if error else 200)
                if error:
                    self.send_header("X-Error-Code", error)
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", str(len(content) if whole else hub.sizes.get(name, len(content))))
                self.end_headers()
                if whole:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, folder, revision="main", repository=NAME):
        commit = hashlib.sha1(repr(snapshot(folder)).encode()).hexdigest()
        self.commits[repository, revision] = self.commits[repository, commit] = commit, Path(folder)
        return commit

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        close_session()  # connections that are open


@pytest.fixture
def online(monkeypatch, tmp_path):
    there = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", there.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    close_session()
    yield there
    there.stop()
    close_session()


@pytest.fixture
def offline(monkeypatch):
    def go():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()

    return go


def test_attached_by_name_from_the_hub_and_again_without_it(model, artifact_folder, online, offline):
    commit, ids = online.put(artifact_folder), token_ids(1, 45)
    with attach(model, artifact_folder):
        expected = logits(model, ids)
    with attach(model, NAME) as attachment:
        assert torch.equal(logits(model, ids), expected) and attachment.stats.sparse_tokens
    folder = artifacts.folder_of(NAME)
    assert folder.name == commit and sorted(p.name for p in folder.iterdir()) == sorted(hub.FILES)
    assert sum("GET /org" in line for line in online.asked) == 3  # each file once
    online.stop()
    offline()
    assert artifacts.load(NAME).tensors.keys() == artifacts.load(artifact_folder).tensors.keys()
    assert artifacts.load(f"{NAME}@main").folder == folder


def test_revisions_and_a_cache_of_ones_own(model, artifact_folder, tmp_path, online):
    artifacts.save(tiny_artifact(model, seed=1), tmp_path / "other")
    online.put(artifact_folder)
    commit = online.put(tmp_path / "other", "v2")
    key, second = "layers.0.predictor.bias", tiny_artifact(model, seed=1).tensors
    mine = artifacts.load(NAME, revision="v2", cache_dir=tmp_path / "mine")
    for found in (mine, artifacts.load(f"{NAME}@v2"), artifacts.load(f"{NAME}@{commit}")):
        assert torch.equal(found.tensors[key], second[key])
    assert not torch.equal(artifacts.load(NAME).tensors[key], second[key])
    assert any((tmp_path / "mine").iterdir())
    with attach(model, NAME, revision="v2", cache_dir=tmp_path / "mine") as attachment:
        assert attachment._artifact.folder.name == commit


def test_all_files_are_of_one_commit(model, artifact_folder, tmp_path, online, monkeypatch):
    """Somebody pushes between two downloads: what is loaded is the commit that the first file was of."""
    artifacts.save(tiny_artifact(model, seed=1), tmp_path / "other")
    commit, download = online.put(artifact_folder), huggingface_hub.hf_hub_download

    def slow(*args, **kwargs):
        found = download(*args, **kwargs)
        if not kwargs.get("dry_run"):
            online.put(tmp_path / "other")
        return found

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    assert artifacts.load(NAME).folder.name == commit


def test_a_local_folder_comes_before_the_hub(artifact_folder, tmp_path, online):
    (tmp_path / "org").mkdir()
    artifact_folder.rename(tmp_path / "org" / "tiny")
    assert artifacts.load(NAME).folder == Path(NAME) and not any("/org" in line for line in online.asked)
    with pytest.raises(UserError, match="local folder, which has no revision"):
        artifacts.load(NAME, revision="v2")


def refused(*args, **kwargs):
    with pytest.raises(UserError) as error:
        artifacts.load(*args, **kwargs)
    return one_sentence(error)


def test_what_is_no_artifact_is_told_in_a_sentence(artifact_folder, tmp_path, online, offline, monkeypatch):
    assert "no repository of that name" in refused("org/nothing")
    online.put(artifact_folder, repository="org/good")
    good = artifacts.load("org/good").folder
    online.put(artifact_folder)
    assert "'v9'" in (told := refused(NAME, revision="v9")) and "no such branch" in told
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    online.put(tmp_path / "model", repository="org/model")
    assert "not an artifact: weights.safetensors is missing" in refused("org/model")
    (artifact_folder / "config.json").write_text("{}")
    online.put(artifact_folder, repository="org/bad")
    assert "not a fastfill artifact" in refused("org/bad")
    for name in ("a/b/c", "./a/b", "/a/b", "~/a", "a/", "a//b", "-a/b"):  # no repositories: nobody is asked
        online.asked.clear()
        assert "config.json is missing" in refused(name) and not any("/org" in line for line in online.asked)
    online.stop()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries five times
    assert "cannot be reached" in refused("org/other")
    assert artifacts.load("org/good").folder == good  # which is in the cache
    offline()
    assert "not in the hub's cache" in refused("org/other")


def test_a_file_that_is_too_large_is_not_downloaded(artifact_folder, online):
    online.put(artifact_folder)
    online.sizes["config.json"] = 1 << 40
    assert "1,099,511,627,776 bytes" in refused(NAME)
    assert not any("GET /org" in line for line in online.asked)


def test_a_page_is_not_needed(artifact_folder, online):
    (artifact_folder / "README.md").unlink()
    online.put(artifact_folder)
    folder = artifacts.load(NAME).folder
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "weights.safetensors"]


def test_the_hubs_copy_is_not_written_to(model, artifact_folder, online):
    online.put(artifact_folder)
    folder = artifacts.folder_of(NAME)
    before = snapshot(folder)
    artifact = artifacts.load(NAME)
    for write in (lambda: artifacts.record(artifact, folder, {"kl": 1}), lambda: artifacts.add_samples(NAME, model)):
        with user_error("must stay as it is"):
            write()
    assert snapshot(folder) == before


class Api:
    """Stands in for `HfApi`: keeps what it is told, and the folder's files."""

    calls: ClassVar[list] = []

    def __init__(self, token=None, library_name=None):
        self.token = token

    def create_repo(self, repository, private=None, exist_ok=False):
        assert exist_ok
        if self.token == "bad":
            raise huggingface_hub.errors.HFValidationError("401 Unauthorized")
        Api.calls.append(("repo", repository, private))

    def create_branch(self, repository, branch, exist_ok=False):
        assert exist_ok
        Api.calls.append(("branch", branch))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns):
        Api.calls.append(("upload", repo_id, revision, commit_message, snapshot(folder_path), allow_patterns))

        class Done:
            commit_url = f"https://hub/{repo_id}/commit/1"

        return Done


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    return Api


def test_pushed_and_loaded_again(model, artifact_folder, tmp_path, online, api):
    (artifact_folder / "notes.txt").write_text("mine")
    artifact = artifacts.load(artifact_folder)
    url = artifact.push_to_hub(NAME, revision="v1", private=True, token="t", commit_message="first")
    assert url == "https://hub/org/tiny/commit/1"
    repo, branch, (_, name, revision, message, content, patterns) = api.calls
    assert repo == ("repo", NAME, True) and branch == ("branch", "v1")
    assert (name, revision, message) == (NAME, "v1", "first") and patterns == list(hub.FILES)
    assert sorted(content) == sorted(hub.FILES)  # nothing else of the user's
    assert content["README.md"] == (artifact_folder / "README.md").read_bytes()
    (tmp_path / "there").mkdir()
    for file, data in content.items():
        (tmp_path / "there" / file).write_bytes(data)
    online.put(tmp_path / "there", "v1")
    back = artifacts.load(f"{NAME}@v1")
    assert back.checksums == artifact.checksums and back.base_model == artifact.base_model


def test_a_push_that_fails_is_one_sentence(model, api):
    artifact = tiny_artifact(model)
    cases = ((NAME, "bad", "401 Unauthorized"), ("tiny", None, "like org/name"), ("a/b@c", None, "like org/name"))
    for name, token, words in cases:
        with user_error(words):
            artifact.push_to_hub(name, token=token)
    assert not api.calls


@pytest.mark.parametrize(
    ("name", "base"), [("org/base", "org/base"), ("models/x.gguf", None), ("tiny", None), ("Org/Base (GGUF)", None)]
)
def test_the_page_is_a_model_card(model, name, base):
    content = huggingface_hub.ModelCard(tiny_artifact(model, name=name).card())
    data = content.data.to_dict()
    assert data["library_name"] == "fastfill" and data.get("base_model") == base and "license" not in data
    assert content.text.startswith(f"# fastfill artifact for {name}") or f"# fastfill artifact for {name}" in content.text
