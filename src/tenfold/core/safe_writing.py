"""Weights into safetensors files: atomically, equal bytes for equal content, in shards where one file is too large."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tenfold.core.files import atomic_write, disk_error, make_folder, write_json
from tenfold.core.safe_reading import INDEX_FILE

WHOLE_FILE = "model.safetensors"


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; equal content gives equal bytes.

    Args:
        path: the file to write.
        tensors: name to tensor, any device, dtype kept. Tensors that share memory are each written in full.
        metadata: text entries for the header; `config` should be a JSON object.

    Raises:
        UserError: the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # clone() gives each tensor its own contiguous memory: the format refuses views and shared storage.
    content = {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)
    }
    with atomic_write(path) as temporary:
        try:
            save_file(content, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found.group(1)), str(error)) from error
        _sort_header_metadata(temporary)


def save_sharded(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write weights as `model.safetensors`, or, where that would be too large, as shards and an index.

    The files take the place of weights that the folder held only when all of them are on the disk; a crash in that
    moment leaves a folder without an index, which is refused when read, and never a mixture.

    Args:
        folder: where to write; created where there is none, other files in it stay.
        tensors: name to tensor; they fill the shards in this order.
        max_shard_bytes: largest size of a shard; a tensor that is larger has a shard of its own.
        metadata: text entries for every header; transformers wants `format: pt`.

    Returns:
        The files that were written.

    Raises:
        UserError: the disk refuses.
    """
    folder = make_folder(Path(folder))
    parts: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if parts[-1] and size + bytes_ > max_shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size, total = size + bytes_, total + bytes_
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        files = [WHOLE_FILE]
    old = [folder / INDEX_FILE, folder / WHOLE_FILE, *folder.glob("model-*-of-*.safetensors")]
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            for file, part in zip(files, parts, strict=True):
                save(Path(temporary) / file, part, metadata)
            for path in old:
                path.unlink(missing_ok=True)
            for file in files:
                (Path(temporary) / file).replace(folder / file)
    except OSError as error:
        raise disk_error(folder, error) from error
    if len(parts) == 1:
        return [folder / files[0]]
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [*(folder / file for file in files), folder / INDEX_FILE]


def _sort_header_metadata(path: Path) -> None:
    """safetensors writes the metadata in a hash map's order, which changes from process to process."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(encoded) <= length
        file.seek(8)
        file.write(encoded.ljust(length))
