"""Artifacts on the Hugging Face hub: a repository with the three files of an artifact's folder. Data, never code.

Three files are read, by their names; each is refused before it is loaded if it is too large. Cache, token, `HF_HUB_OFFLINE` and
`HF_ENDPOINT` are those of `huggingface_hub`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastfill.errors import UserError, quoted, reason

# name -> (bytes that are downloaded at most, whether there is no artifact without it)
FILES = {"config.json": (64 << 20, True), "weights.safetensors": (8 << 30, True), "README.md": (1 << 20, False)}
_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)


def split(name: str | Path) -> tuple[str, str | None] | None:
    """`org/name` or `org/name@revision` -> the two parts; None for what cannot be a repository's name, or is a local path."""
    found = _NAME.fullmatch(str(name)) if isinstance(name, str) else None
    return (found[1], found[2]) if found and not Path(name).exists() else None


def is_repository(name: str) -> bool:
    return (found := _NAME.fullmatch(name)) is not None and found[2] is None


def is_cached(folder: Path) -> bool:
    """Whether a folder is in the hub's cache: .../models--org--name/snapshots/COMMIT."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def fetch(repository: str, revision: str | None = None, cache_dir: str | Path | None = None, token: str | None = None) -> Path:
    """The folder in the hub's cache with the files of an artifact, downloaded where they are not there yet.

    revision: a branch, a tag or a commit; all files are of the one commit that it is now. Raises UserError with one sentence if
    there is no such repository or revision, no network, or no artifact in it.
    """
    import huggingface_hub

    folder: Path | None = None
    where: dict[str, Any] = {"repo_id": repository, "cache_dir": cache_dir, "token": token, "library_name": "fastfill"}
    for name, (most, needed) in FILES.items():
        commit = folder.name if folder else revision  # of what is in the cache by a commit the hub is not asked
        with _explained(repository, revision, name, needed):
            told: Any = huggingface_hub.hf_hub_download(**where, filename=name, revision=commit, dry_run=True)
            if told.file_size > most:
                raise UserError(
                    f"{name} in {repository} has {told.file_size:,} bytes, and {most:,} are the most; it is no artifact."
                )
            cached = not told.will_download
            file = told.local_path if cached else huggingface_hub.hf_hub_download(**where, filename=name, revision=commit)
            folder = Path(file).parent
    assert folder is not None  # config.json is needed
    return folder


@contextmanager
def _explained(repository: str, revision: str | None, name: str, needed: bool) -> Iterator[None]:
    """Inside, errors of the hub's client become one sentence; a file that may be missing is passed over."""
    from huggingface_hub import errors

    at = repository + (f" at {quoted(revision)}" if revision else "")
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"The artifact {at} is gated; ask for access on the hub, and log in with `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {repository}, and no repository of that name on the hub that you may read; check the name, or "
            "log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"The repository {at} is not on the hub: it has no such branch, tag or commit.") from error
    except errors.LocalEntryNotFoundError as error:  # offline, or no network, and not in the cache
        if needed:
            raise UserError(
                f"There is no folder {repository}, and {name} of {at} is not in the hub's cache, while the hub cannot be "
                "reached; name a local folder, or try again with a network and without HF_HUB_OFFLINE."
            ) from error
    except errors.EntryNotFoundError as error:
        if needed:
            raise UserError(f"{at} on the hub is not an artifact: {name} is missing.") from error
    except Exception as error:  # of the network there are many kinds
        raise UserError(f"{name} of {at} could not be downloaded ({reason(error)}); try again later.") from error


def push(
    folder: Path,
    repository: str,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a fastfill artifact",
) -> str:
    """Upload the files of a folder as one commit, and make the repository and the branch if they are not there. Returns the
    address of the commit. Raises UserError if the name is none, or the hub refuses."""
    from huggingface_hub import HfApi

    if not is_repository(repository):
        raise UserError(f"{quoted(repository)} is no repository's name; it must be like org/name.")
    try:
        api = HfApi(token=token, library_name="fastfill")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(FILES),
        )
    except Exception as error:
        raise UserError(
            f"The artifact could not be pushed to {repository} ({reason(error)}); log in with `hf auth login`, or give a token "
            "that may write there."
        ) from error
    return str(done.commit_url)
