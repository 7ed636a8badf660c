"""Tensors out of a file that may be damaged or hostile: no code in it runs, and every failure is one line."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.core.console import UserError
from tenfold.core.files import read_json

# What names the shards of weights that are too large for one file.
INDEX_FILE = "model.safetensors.index.json"

# Where training programs put the state dict inside what they save. BasicSR: params_ema, params (its
# test code takes the averaged weights first); Lightning, mmengine: state_dict; others: model.
_CONTAINERS = ("params_ema", "params", "state_dict", "model_state_dict", "model")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the state dict of a safetensors file or of a PyTorch checkpoint, dtypes as stored, on the CPU.

    Returns:
        Name to tensor, and the text entries of a safetensors header (empty for other formats).

    Raises:
        UserError: missing, empty, truncated or of another kind; holds code; holds no tensors.
    """
    kind = _tell_format(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "zip":
        _refuse_compressed(path)
    return _state_dict(_read_pickle(path), path), {}


def read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors that an index names, in its order, and the metadata of the first shard."""
    names = weight_map(index)
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards are missing ({_some(missing)}): fetch them again"
        )
    found: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        tensors, header = read_tensors(index.parent / shard)
        expected = {name for name, file in names.items() if file == shard}
        absent, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        if absent or extra:
            what = (
                f"lacks {_some(absent)}"
                if absent
                else f"holds {_some(extra)}, which the index puts elsewhere or nowhere"
            )
            raise UserError(f"{index}: does not describe its shards: {shard} {what}: fetch the folder again")
        metadata = metadata or header
        found |= tensors
    return {name: found[name] for name in names}, metadata


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard, of an index; a shard is a file beside it and nothing further away."""
    names = read_json(index).get("weight_map")
    plain = isinstance(names, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in names.values()
    )
    if not names or not plain:
        raise UserError(
            f"{index}: not an index of shards (its `weight_map` should give each tensor the name of a file)"
        )
    return names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _tell_format(path: Path) -> str:
    """Tell `safetensors`, `zip` (torch.save) and `pickle` (torch.save before 1.6) by the first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        if header > size - 8:
            raise UserError(
                f"{path}: truncated or damaged (its header should take {header} bytes, the file has {size}): "
                "fetch it again"
            )
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "pickle"
    raise UserError(
        f"{path}: neither a safetensors file nor a PyTorch checkpoint (damaged, or another kind of file renamed): "
        "fetch it again, or give the weights file itself"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({_one_line(error)}): fetch it again") from None


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # An open file, not the path: torch.load takes the suffix .safetensors at its word.
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|got <class)\s+'?([\w.]+)", str(error))
        what = f"it refers to {found.group(1)}" if found else "it holds more than tensors and plain containers"
        raise UserError(
            f"{path}: refused, because loading it could run code ({what}): get the weights as safetensors, "
            "or save a plain state dict"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything: EOFError, IndexError, RuntimeError ...
        if "TorchScript" in str(error):
            raise UserError(f"{path}: refused, because it is a TorchScript program: get its state dict") from None
        raise _damaged(path, error) from None


def _refuse_compressed(path: Path) -> None:
    """torch.save does not compress: an archive that unpacks to more than its own size was made to exhaust memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if unpacked > path.stat().st_size:
        raise UserError(f"{path}: refused, because it would unpack to {unpacked} bytes, which torch.save never writes")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The innermost dictionary of tensors, looked for in the usual containers."""
    for _ in range(4):  # e.g. {"state_dict": {"model": {...}}}: nothing that exists nests deeper
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _CONTAINERS if _is_filled(content.get(key))), None)
        if inner is None:
            tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
            for key, value in tensors.items():
                _refuse_inflated(key, value, path)
            if tensors:
                return tensors
            break
        content = inner
    keys = f" (it has {', '.join(map(str, list(content)[:5]))})" if isinstance(content, Mapping) and content else ""
    raise UserError(f"{path}: holds no weights{keys}: expected a state dict, bare or under {', '.join(_CONTAINERS)}")


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _refuse_inflated(key: str, value: Tensor, path: Path) -> None:
    """A few stored bytes with zero strides can claim to be terabytes."""
    if value.layout == torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: refused, because {key} claims {value.numel()} values and the file stores fewer")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or damaged PyTorch checkpoint ({_one_line(error)}): fetch it again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
