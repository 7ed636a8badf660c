"""Weights by embedded name, Hub id or path: found, read without running code, checked, and written atomically.

    checkpoint = load("tenfold-x2", MODELS, "tenfold.superres")
    load_into(model, checkpoint.tensors, checkpoint.origin)

Reading keeps every dtype as stored, so that a file can be written back bit for bit; `load_into` casts to the dtype of
the module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.core import hub
from tenfold.core.console import UserError
from tenfold.core.files import read_json
from tenfold.core.safe_reading import INDEX_FILE, read_shards, read_tensors, weight_map
from tenfold.core.safe_writing import save, save_sharded

if TYPE_CHECKING:
    from tenfold.core.config import ModelEntry

# What a folder or a Hub repository calls its weights, the safe format first.
WEIGHT_FILES = ("model.safetensors", INDEX_FILE, "pytorch_model.bin")
WEIGHT_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt"})

# Wrappers that leave their attribute name in front of every key: DataParallel/DDP and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")

_NAMES_SHOWN = 5

__all__ = ["Checkpoint", "check_fits", "load", "load_file", "load_into", "save", "save_sharded"]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file and where it came from.

    Attributes:
        tensors: parameter name to CPU tensor, dtype as stored.
        metadata: the text entries of a safetensors header; empty for other formats.
        config: the model's description: the header's `config` entry, else `config.json` beside the weights, else None.
        origin: for a person: the path or the Hub id.
        entry: the table entry, when the weights were asked for by a known name.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    origin: str = ""
    entry: ModelEntry | None = None


# --- finding ---------------------------------------------------------------------------------------------------------


def load(name_or_path: str | Path, models: Sequence[ModelEntry] = (), package: str = "") -> Checkpoint:
    """Find and read weights. A path that exists comes first, then the room's own names, then any Hub repository.

    Args:
        name_or_path: a weights file; a folder that holds one, or shards and their index; a name in `models`;
            `owner/name` on the Hub, with an optional `/file` inside the repository and an optional `@revision`.
        models: the room's table of names.
        package: the room's package; its embedded weights lie in the `weights` folder there.

    Raises:
        UserError: nothing answers to the name (the nearest names are given), or the file cannot be read safely.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return load_file(_weights_in(path))
    if path.exists():
        return load_file(path)
    entry = next((model for model in models if model.name == text), None)
    if entry is not None and entry.source == "embedded":
        return _load_embedded(entry, package)
    if entry is not None:
        return _load_hub(entry.location, entry.revision, entry)
    if _looks_like_hub(name_or_path):
        location, _, revision = text.partition("@")
        return _load_hub(location, revision or None, None)
    raise UserError(_unknown(text, [model.name for model in models]))


def _weights_in(folder: Path) -> Path:
    """The weights file of a folder: a conventional name, else the only weights file there."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = _weight_files(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder}: holds {len(found)} weights files: name one of them ({_some([p.name for p in found])})"
        )
    raise UserError(f"{folder}: holds no weights file ({', '.join(WEIGHT_FILES)})")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())


def _looks_like_hub(name_or_path: str | Path) -> bool:
    """`owner/name[/file][@revision]`, and not something that a person meant as a path, such as `weights/x2.pth`."""
    parts = str(name_or_path).partition("@")[0].split("/")
    if isinstance(name_or_path, Path) or len(parts) < 2 or not hub.is_repo_id("/".join(parts[:2])):
        return False
    return all(parts) and not (len(parts) == 2 and Path(parts[1]).suffix in WEIGHT_SUFFIXES)


def _unknown(text: str, names: list[str]) -> str:
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4)
    if "/" in text or Path(text).suffix in WEIGHT_SUFFIXES:
        hint = "check the path"
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"known names: {', '.join(names)}"
    else:
        hint = "give a file, a folder or a Hub id (owner/name)"
    return f"no weights at {text!r}: it is no file here and no known name; {hint}"


def _load_embedded(entry: ModelEntry, package: str) -> Checkpoint:
    source = resources.files(package) / "weights" / entry.location
    if not source.is_file():
        raise UserError(
            f"the embedded weights of {entry.name} ({entry.location}) are missing from this installation: "
            "reinstall tenfold"
        )
    with resources.as_file(source) as path:
        read = load_file(path)
    return Checkpoint(read.tensors, read.metadata, read.config, f"{entry.name} (embedded)", entry)


def _load_hub(location: str, revision: str | None, entry: ModelEntry | None) -> Checkpoint:
    parts = location.split("/", 2)
    repo_id = "/".join(parts[:2])
    candidates = (parts[2],) if len(parts) == 3 else WEIGHT_FILES
    for name in candidates:
        path = hub.fetch(repo_id, name, revision)
        if path is not None:
            break
    else:
        named = " or ".join(name for name in candidates if name != INDEX_FILE)
        raise UserError(f"Hub model {repo_id} has no {named}: name a file as {repo_id}/FILE")
    if path.name == INDEX_FILE:
        for shard in sorted(set(weight_map(path).values())):
            hub.fetch(repo_id, shard, revision)  # each lands beside the index
    config = None
    with suppress(
        UserError
    ):  # weights that were cached without their config can still tell what they are by their keys
        config = hub.fetch(repo_id, "config.json", revision)
    read = load_file(path, config_file=config)
    origin = f"Hub model {location}" + (f"@{revision}" if revision else "")
    return Checkpoint(read.tensors, read.metadata, read.config, origin, entry)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_file(path: str | Path, config_file: Path | None = None) -> Checkpoint:
    """Read one weights file: safetensors, or what `torch.save` wrote, without running any code in it.

    The format is told from the content, not from the suffix. The state dict is taken out of the containers of the usual
    training programs, and prefixes that DistributedDataParallel and torch.compile leave are removed.

    Args:
        path: the file, or the index of shards that lie beside it.
        config_file: the model's description; without it, `config.json` beside the file if this is the folder's only
            weights file or has a conventional name.

    Raises:
        UserError: missing, empty, truncated or of another kind; holds code; holds no tensors.
    """
    path = Path(path)
    tensors, metadata = read_shards(path) if path.name == INDEX_FILE else read_tensors(path)
    config = _header_config(metadata)
    if config is None and config_file is None:
        beside = path.parent / "config.json"
        if beside.is_file() and (path.name in WEIGHT_FILES or _weight_files(path.parent) == [path]):
            config_file = beside
    if config is None and config_file is not None:
        config = read_json(config_file)
    return Checkpoint(_unwrap_names(tensors), metadata, config, str(path))


def _unwrap_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while tensors:
        prefix = next((wrapper for wrapper in _WRAPPERS if all(key.startswith(wrapper) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _header_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The `config` entry of a header if it is a JSON object; other programs may use the name for something else."""
    try:
        config = json.loads(metadata.get("config", ""))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


# --- into a module ---------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, path: Path | str) -> None:
    """`load_file`, then `load_into`: a run's own weights back into the module that it trained, strictly."""
    load_into(module, load_file(path).tensors, str(path))


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], origin: str, name_in_file: Callable[[str], str] = str
) -> None:
    """Copy weights into a module, strictly: every key there, none over, shapes equal, values finite.

    Floating-point values are cast to the module's dtype. Of tensors that the module shares (tied embeddings), one name
    is enough. The module is unchanged if anything is wrong.

    Args:
        module: the module to fill.
        tensors: name to tensor.
        origin: where the tensors came from, for the message.
        name_in_file: what the file calls a key of the module, where it was renamed on the way; for the message.

    Raises:
        UserError: one line that names missing and unexpected keys, shapes that differ, or values that are not finite.
    """
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    given_memory = {_memory(state[key]) for key in tensors if key in state}
    shared = [key for key in state if key not in tensors and _memory(state[key]) in given_memory]
    wanted = {key: state[key] for key in state if key not in shared}
    check_fits(wanted, tensors, origin, type(module).__name__, name_in_file)
    module.load_state_dict(dict(tensors), strict=False)


def check_fits(
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    origin: str,
    what_for: str,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """See that weights are what a module wants: every key there, none over, shapes equal, values finite.

    Args:
        state: what is wanted: name to a tensor of the shape and kind, which may be on the meta device.
        tensors: name to tensor.
        origin: where the tensors came from, for the message.
        what_for: what they should fit, for the message.
        name_in_file: from a name here to the one that the user's file has, for the message.

    Raises:
        UserError: one line that names missing and unexpected keys, shapes that differ, or values that are not finite.
    """
    missing = [name_in_file(key) for key in state if key not in tensors]
    unexpected = [name_in_file(key) for key in tensors if key not in state]
    common = [key for key in state if key in tensors]
    shapes = [
        f"{name_in_file(key)} (expected {_shape(state[key])}, found {_shape(tensors[key])})"
        for key in common
        if state[key].shape != tensors[key].shape
    ]
    kinds = [
        f"{name_in_file(key)} (expected {_dtype(state[key])}, found {_dtype(tensors[key])})"
        for key in common
        if state[key].is_floating_point() != tensors[key].is_floating_point()
    ]
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another type", kinds),
        )
        if found
    ]
    if problems:
        hint = _mismatch_hint(missing, unexpected, len(common), len(state))
        raise UserError(f"{origin}: does not fit {what_for}: {'; '.join(problems)}{hint}")
    broken = [name_in_file(key) for key in common if not _is_finite(tensors[key]) and _is_finite(state[key])]
    if broken:
        raise UserError(
            f"{origin}: holds NaN or infinite values in {len(broken)} tensors ({_some(broken)}): use another file"
        )


def _mismatch_hint(missing: list[str], unexpected: list[str], common: int, total: int) -> str:
    """What would explain a mismatch: a prefix on every key, or weights of a different network."""
    if missing and len(missing) == len(unexpected):
        for longer, shorter, verb in ((unexpected, missing, "remove"), (missing, unexpected, "add")):
            prefixes = {key[: -len(shorter[0])] for key in longer if key.endswith("." + shorter[0])}
            for prefix in prefixes:
                if {prefix + key for key in shorter} == set(longer):
                    return f"; {verb} the prefix {prefix!r} and all keys match"
    if 2 * common < total:
        return f"; only {common} of {total} keys are known, so these look like weights of another architecture"
    return ""


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What two names share if they are one tensor (an empty tensor shares nothing)."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:  # the 8-bit float types have no isfinite kernel
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown
