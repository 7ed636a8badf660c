"""Files from the Hugging Face Hub: cached, offline-aware, and never waiting long on a network that is not there.

`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and `HF_HOME` are read at each call. Imports no torch.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenfold.core.console import UserError
from tenfold.core.files import disk_error

# One request that asks "is the Hub there, does it have this file" must not hold up a user behind a firewall.
PROBE_SECONDS = 5.0

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a Hub repository id, `owner/name`."""
    return _REPO_ID.fullmatch(text) is not None


def is_offline() -> bool:
    """Whether the environment forbids network calls (`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`)."""
    switches = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any(value is not None and value.upper() in {"1", "ON", "YES", "TRUE"} for value in switches)


def cache_folder() -> str | None:
    """The Hub cache that the environment names, or None for the library's default."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return folder
    home = os.environ.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


class _UnreachableError(Exception):
    """The Hub gave no answer that tells whether the file exists; the message is the reason."""


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path | None:
    """Local path of one file of a Hub repository, downloaded if the cache does not hold its newest version.

    A file that is in the cache is used as it is when the Hub cannot be reached.

    Args:
        repo_id: `owner/name`.
        filename: path inside the repository.
        revision: branch, tag or commit; None is the main branch.

    Returns:
        The path, or None where the repository has no such file.

    Raises:
        UserError: no such repository, no access to it, or the Hub cannot be reached and the cache lacks the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with _plain_errors(repo_id, revision):
            with suppress(EntryNotFoundError):  # the download below meets it too, and notes it in the cache
                _ask(repo_id, filename, revision)
            path = hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                endpoint=_endpoint(),
                cache_dir=cache_folder(),
                etag_timeout=PROBE_SECONDS,
            )
            return Path(path)
    except EntryNotFoundError:
        return None
    except _UnreachableError as error:
        return _from_cache(repo_id, filename, revision, str(error))


def fetch_folder(repo_id: str, revision: str | None = None) -> Path:
    """Local folder with a repository's configuration, tokenizer and safetensors weights, as `transformers` reads it.

    Pickled weights are left out. A folder in the cache is used as it is when the Hub cannot be reached.

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: as for `fetch`, or the repository has no config.json.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    config: Path | None = None
    try:
        with _plain_errors(repo_id, revision):
            _ask(repo_id, "config.json", revision)
            path = snapshot_download(
                repo_id,
                revision=revision,
                endpoint=_endpoint(),
                cache_dir=cache_folder(),
                etag_timeout=PROBE_SECONDS,
                allow_patterns=["*.json", "*.txt", "*.safetensors"],
            )
            return Path(path)
    except EntryNotFoundError:
        pass
    except _UnreachableError as error:
        config = _from_cache(repo_id, "config.json", revision, str(error))
    if config is None:
        raise UserError(f"Hub model {repo_id} has no config.json: it is not a model that transformers can load")
    return config.parent


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _ask(repo_id: str, filename: str, revision: str | None) -> None:
    """One plain request: the download functions alone retry an unreachable host for 23 s."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if is_offline():
        raise _UnreachableError("HF_HUB_OFFLINE is set")
    get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision, endpoint=_endpoint()), timeout=PROBE_SECONDS)


@contextmanager
def _plain_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into UserError or _UnreachableError; EntryNotFoundError passes."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (EntryNotFoundError, _UnreachableError):
        raise
    except GatedRepoError:
        raise UserError(
            f"Hub model {repo_id} asks for its licence to be accepted: accept it on the model's page, "
            "then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"Hub model {repo_id} does not exist or is private: check the name, or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"Hub model {repo_id} has no revision {revision!r}: see its page for those it has") from None
    except HfHubHTTPError as error:
        raise _UnreachableError(f"the Hub answered with status {error.response.status_code}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise disk_error(Path(cache_folder() or "the Hub cache"), error) from error
        raise _UnreachableError(_first_line(error)) from error
    except Exception as error:  # huggingface_hub has changed its HTTP library twice: name none of that library's errors
        raise _UnreachableError(_first_line(error)) from error


def _from_cache(repo_id: str, filename: str, revision: str | None, reason: str) -> Path | None:
    """The cached file, or None where the cache knows that the repository lacks it; UserError where it knows nothing."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, filename, cache_dir=cache_folder(), revision=revision)
    if isinstance(found, str):
        return Path(found)
    if found is not None:
        return None
    raise UserError(
        f"Hub model {repo_id} ({filename}) is not in the local cache and cannot be downloaded ({reason}): "
        f"on a machine with network run `hf download {repo_id} --local-dir FOLDER`, then give that folder here"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
