"""Models by name, folder, file or Hub id; Hugging Face folders in and out.

    loaded = load_model("smollm2-135m")
    save_hf(loaded.model, "folder", loaded.tokenizer, family="llama")

What a checkpoint is follows from its config.json and, checked against it, from its keys: a sandwich checkpoint is never
read as a pre-norm one, though both have a `post_attention_layernorm`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.core import checkpoint as files
from tenfold.core import hub
from tenfold.core.config import from_mapping
from tenfold.core.console import UserError, to_jsonable, warn
from tenfold.core.files import make_folder, read_json, write_bytes, write_json
from tenfold.llm.config import MODELS, PRESETS, ModelConfig
from tenfold.llm.families import FAMILIES, Family, config_from_hf, config_to_hf, eos_ids, family_of
from tenfold.llm.key_tables import LAYOUTS, Layout, norms_in, to_ours, to_theirs, without_ignored
from tenfold.llm.model import Decoder
from tenfold.llm.tokenizer import Tokenizer

__all__ = [
    "Converted",
    "Loaded",
    "Source",
    "check_tokenizer",
    "config_from_hf",
    "config_to_hf",
    "convert",
    "load_model",
    "native_metadata",
    "read",
    "save_hf",
]

MAX_SHARD_BYTES = 5_000_000_000  # what transformers took for a shard until its version 5

# Where transformers and vLLM find our class when nothing has imported it: a file in the folder, read if they are told
# to trust it.
_CODE_FILE = "modeling_tenfold.py"
_CODE = b"""from tenfold.llm.transformers_model import TenfoldConfig, TenfoldForCausalLM, TenfoldModel

__all__ = ["TenfoldConfig", "TenfoldForCausalLM", "TenfoldModel"]
"""
_AUTO_MAP = {
    "AutoConfig": "modeling_tenfold.TenfoldConfig",
    "AutoModel": "modeling_tenfold.TenfoldModel",
    "AutoModelForCausalLM": "modeling_tenfold.TenfoldForCausalLM",
}

# What goes with the weights from one folder to the next.
_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    *(_TOKENIZER, "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint under our names, not yet in a model.

    Attributes:
        tensors: by the decoder's parameter names, dtype as stored.
        config: of the decoder.
        origin: for a person.
        family: a name in `FAMILIES`, or `native` for this library's own files.
        eos_ids: ids that end a text.
        folder: where the files beside the weights are.
        tokenizer_file: a tokenizer.json that goes with it, if it is not in `folder`.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig
    origin: str
    family: str
    eos_ids: tuple[int, ...]
    folder: Path | None
    tokenizer_file: Path | None = None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where there is one.

        Raises:
            UserError: it cannot be read, or is that of another model.
        """
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        beside = self.folder is not None and any((self.folder / name).is_file() for name in names)
        file = self.tokenizer_file or (self.folder if beside else None)
        if file is None:
            return None
        tokenizer = Tokenizer.load(file, self.config.eod)
        check_tokenizer(tokenizer, self.config, self.origin)
        return tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        model: in evaluation mode.
        tokenizer: that goes with it, or None.
        origin: where it came from, for a person.
        family: a name in `FAMILIES`, or `native`.
        eos_ids: ids that end a text.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    origin: str
    family: str
    eos_ids: tuple[int, ...]


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, origin: str) -> None:
    """Refuse a tokenizer that splits texts into ids which a model does not have.

    Raises:
        UserError: one line with both sizes.
    """
    if not tokenizer.fits(config.vocabulary):
        raise UserError(
            f"{origin}: the tokenizer has {tokenizer.size} ids and the model a vocabulary of {config.vocabulary}: they "
            "do not belong together"
        )


def load_model(
    name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """Build and fill a decoder.

    Args:
        name_or_path: a name of `tenfold models`; a folder in Hugging Face layout, of a training run or of one of its
            checkpoints; a .safetensors or .gguf file; `owner/name` on the Hub.
        device: where to put it.
        dtype: of the weights; None keeps what is stored, the widest of them if there are several.

    Raises:
        UserError: unknown name, unreadable or foreign file, keys or shapes that do not fit, NaN.
    """
    source = read(name_or_path)
    kind = dtype or reduce(torch.promote_types, {tensor.dtype for tensor in source.tensors.values()})
    with torch.device("meta"):
        model = Decoder(source.config)
    tensors = {name: tensor.to(device, kind) for name, tensor in source.tensors.items()}
    model.load_state_dict(tensors, strict=not source.config.tied, assign=True)
    if source.config.tied:
        model.lm_head.weight = model.embed.weight
    return Loaded(model.eval(), source.tokenizer(), source.origin, source.family, source.eos_ids)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(name_or_path: str | Path) -> Source:
    """Find a checkpoint, see what it is, check it, and give its tensors our names. Arguments as in `load_model`."""
    text = str(name_or_path)
    path = Path(text).expanduser()
    entry = next((model for model in MODELS if model.name == text), None)
    if not path.exists() and entry is not None and entry.source == "package":
        from tenfold.llm.gguf_file import carried_by, converted

        return replace(_read_file(converted(carried_by(entry))), origin=f"{text} (package {entry.location})")
    if path.is_file() and _is_gguf(path):
        from tenfold.llm.gguf_file import converted

        return replace(_read_file(converted(path)), origin=text)
    if not path.exists() and entry is None and hub.is_repo_id(text.partition("@")[0]) and not path.suffix:
        name, _, revision = text.partition("@")
        return replace(_read_file(hub.fetch_folder(name, revision or None)), origin=f"Hub model {text}")
    found = files.load(text, MODELS, "tenfold.llm")
    if entry is not None and not path.exists():
        beside = resources.files("tenfold.llm") / "weights" / Path(entry.location).with_suffix(".tokenizer.json").name
        return replace(_describe(found, None), tokenizer_file=Path(str(beside)) if beside.is_file() else None)
    return _read_file(path, found)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read_file(path: Path, found: files.Checkpoint | None = None) -> Source:
    folder = path if path.is_dir() else path.parent
    source = _describe(found or files.load(path), folder)
    own = path.with_suffix(".tokenizer.json")
    if own.is_file():
        return replace(source, tokenizer_file=own)
    # A run keeps its tokenizer once, above the checkpoints.
    runs = [parent / "tokenizer.json" for parent in (folder, folder.parent, folder.parent.parent)[: _depth(folder)]]
    return replace(source, tokenizer_file=next((file for file in runs if file.is_file()), None))


def _depth(folder: Path) -> int:
    return 3 if folder.parent.name == "checkpoints" else 1


def _describe(found: files.Checkpoint, folder: Path | None) -> Source:
    """What a checkpoint is, and its tensors under our names."""
    origin = found.origin
    theirs = without_ignored(found.tensors)
    if "embed.weight" in theirs:
        config = _native_config(found)
        family, layout = "native", LAYOUTS["native"]
        ids: tuple[int, ...] = () if config.eod is None else (config.eod,)
    else:
        raw = found.config or _beside(folder, "config.json") or _raw_from_shapes(theirs, origin)
        row = family_of(raw, f"{origin}: config.json")
        config = config_from_hf(raw, f"{origin}: config.json")
        family, layout = row.name, layout_of(row, config)
        check_norms(layout, theirs, row, origin)
        generation = folder / "generation_config.json" if folder is not None else None
        ids = (eos_ids(read_json(generation)) if generation is not None and generation.is_file() else ()) or eos_ids(
            raw
        )
    if config.tied:
        theirs = _without_tied_head(theirs, layout, origin)
    files.check_fits(expected(config, layout), theirs, origin, f"a decoder of the {family} layout")
    return Source(to_ours(layout, theirs), config, origin, family, ids, folder)


def layout_of(family: Family, config: ModelConfig) -> Layout:
    """The key layout of a family's checkpoints; Pangu's has two."""
    return LAYOUTS["pangu"] if family.name == "pangu" and config.has_post_norms else LAYOUTS[family.layout]


def expected(config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the layout's names, on the meta device."""
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    if config.tied:
        del state["lm_head.weight"]
    return to_theirs(layout, state)


def check_norms(layout: Layout, theirs: Mapping[str, Tensor], family: Family, origin: str) -> None:
    """Refuse norms of another layout: the same names stand in different places there.

    Raises:
        UserError: one line that says which layout the keys are of, and what to put into config.json.
    """
    norms = norms_in(theirs)
    if not norms or norms == layout.norms or family.name == "tenfold":
        return
    other = next((one for one in LAYOUTS.values() if one.norms == norms), None)
    if other is None:
        return  # the list of missing and unexpected keys says more
    advice = (
        'set "sandwich_norm": true and "model_type": "PanguEmbedded" there'
        if other is LAYOUTS["pangu"]
        else "give the config.json that belongs to these weights"
    )
    raise UserError(
        f"{origin}: config.json says {family.name} ({layout.summary}), but the norms are those of another layout "
        f"({', '.join(sorted(norms))}: {other.summary}): {advice}"
    )


def _without_tied_head(theirs: dict[str, Tensor], layout: Layout, origin: str) -> dict[str, Tensor]:
    """Leave out an output matrix that repeats the embedding."""
    names = {ours: name for name, ours in layout.top}
    head, embedding = theirs.get(f"{names['lm_head']}.weight"), theirs.get(f"{names['embed']}.weight")
    if head is None:
        return theirs
    if embedding is None or not torch.equal(head, embedding):
        raise UserError(
            f"{origin}: config.json ties lm_head to the embedding, but the file has another lm_head: "
            'set "tie_word_embeddings": false there'
        )
    return {key: tensor for key, tensor in theirs.items() if tensor is not head}


def _native_config(found: files.Checkpoint) -> ModelConfig:
    if found.config is None or "vocabulary" not in found.config:
        raise UserError(f"{found.origin}: has no configuration in its header: was it written by `tenfold llm`?")
    try:
        return from_mapping(ModelConfig, found.config)
    except UserError as error:
        raise UserError(f"{found.origin}: {error}") from None


def _beside(folder: Path | None, name: str) -> dict[str, Any] | None:
    path = folder / name if folder is not None else None
    return read_json(path) if path is not None and path.is_file() else None


def _raw_from_shapes(theirs: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """A description for weights without a config.json: shapes tell sizes, and only a known model tells the rest."""
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    for config in PRESETS.values():
        if shapes.get("model.embed_tokens.weight") != (config.vocabulary, config.width):
            continue
        family = FAMILIES["pangu" if config.has_post_norms or config.output_bias else "llama"]
        if {key: tuple(tensor.shape) for key, tensor in expected(config, layout_of(family, config)).items()} == shapes:
            return config_to_hf(config, family.name)
    layouts = sorted(name for name, layout in LAYOUTS.items() if layout.norms == norms_in(theirs))
    if not layouts or "model.embed_tokens.weight" not in shapes:
        some = ", ".join(list(shapes)[:3])
        raise UserError(f"{origin}: not a decoder that this library knows (its keys begin with {some})")
    vocabulary, width = shapes["model.embed_tokens.weight"]
    raise UserError(
        f"{origin}: has no config.json, and the keys (layout {' or '.join(layouts)}, width {width}, vocabulary "
        f"{vocabulary}) do not tell the number of heads and the rotary base: put the model's config.json beside it"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def native_metadata(config: ModelConfig) -> dict[str, str]:
    """Header entries of this library's own weights files: what the model is, beside its tensors."""
    return {"room": "llm", "config": json.dumps(to_jsonable(config))}


def save_hf(
    model: Decoder,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    family: str = "tenfold",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    eos: tuple[int, ...] = (),
) -> list[Path]:
    """Write a model as a Hugging Face folder: config.json, weights, tokenizer.

    Args:
        model: the decoder, dtype kept.
        folder: where to write.
        tokenizer: written beside the weights.
        family: key layout, a name in `FAMILIES`; `tenfold` holds every model, `llama` loads without this library.
        max_shard_bytes: largest weights file; what is larger is written in shards.
        eos: ids that end a text; by default the configuration's.

    Returns:
        The weights files.

    Raises:
        UserError: the family cannot hold this model, or the disk refuses.
    """
    tensors = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if model.config.tied:
        del tensors["lm_head.weight"]
    written = _write(folder, tensors, model.config, family, max_shard_bytes, eos)
    if tokenizer is not None:
        tokenizer.save(Path(folder))
    return written


def _write(
    folder: str | Path,
    ours: dict[str, Tensor],
    config: ModelConfig,
    family: str,
    max_shard_bytes: int,
    eos: tuple[int, ...],
) -> list[Path]:
    config, ours = rotated_as(family, config, ours)
    raw = config_to_hf(config, family)
    if eos:
        raw["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in ours.values()}
    raw["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    theirs = to_theirs(layout_of(FAMILIES[family], config), ours)
    folder = make_folder(Path(folder))
    written = files.save_sharded(folder, theirs, max_shard_bytes, {"format": "pt"})
    if family == "tenfold":
        raw["auto_map"] = _AUTO_MAP
        write_bytes(folder / _CODE_FILE, _CODE)
    write_json(folder / "config.json", raw)
    return written


def rotated_as(family: str, config: ModelConfig, ours: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Rows of queries and keys in the order of the family's rotation: the network computes the same.

    Half rotation turns channel i with i + r/2, interleaved rotation 2i with 2i + 1.
    """
    wanted = FAMILIES[family].fixed.get("rotation", "half") if family in FAMILIES else config.rotation
    if family == "tenfold" or wanted == config.rotation:
        return config, ours
    half, channels = config.rotary_channels // 2, config.head_dim
    pairs = torch.arange(2 * half).view(2, half).T.flatten()  # 0, r/2, 1, r/2 + 1, ...
    order = torch.cat([pairs if wanted == "interleaved" else pairs.argsort(), torch.arange(2 * half, channels)])
    moved = dict(ours)
    for key, tensor in ours.items():
        if key.rpartition(".")[0].endswith(("attention.q", "attention.k", "attention.q_norm", "attention.k_norm")):
            moved[key] = tensor.unflatten(0, (-1, channels))[:, order.to(tensor.device)].flatten(0, 1)
    return replace(config, rotation=wanted), moved


def _check_copied_tokenizer(source: Source) -> None:
    """Read the tokenizer that goes with a copy; one whose reader is not installed is copied all the same."""
    try:
        source.tokenizer()
    except UserError as error:
        if source.tokenizer_file is not None or (source.folder is not None and (source.folder / _TOKENIZER).is_file()):
            raise
        warn(f"the tokenizer is copied unread: {error}")


@dataclass(frozen=True)
class Converted:
    """A checkpoint in another layout.

    Attributes:
        path: the folder.
        source: where it came from.
        family: of the source, and of the result.
        parameters: numbers in it.
        bytes: size of its weights files.
        dtypes: of its tensors.
        files: its weights files.
    """

    path: str
    source: str
    family: tuple[str, str]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]


def convert(
    name_or_path: str | Path,
    folder: str | Path,
    family: str = "tenfold",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Write a checkpoint in another family's layout, tokenizer included, without building a model.

    Args:
        name_or_path: as in `load_model`.
        folder: where to write; not the source's own folder.
        family: the layout to write.
        dtype: of the result; None keeps every tensor as it is, bit for bit.
        max_shard_bytes: as in `save_hf`.

    Raises:
        UserError: as in `load_model` and `save_hf`; a tokenizer that is not the model's.
    """
    source = read(name_or_path)
    folder = Path(folder)
    _check_copied_tokenizer(source)
    if source.folder is not None and source.folder.resolve() == folder.resolve():
        raise UserError(f"{folder}: holds the source: write into another folder")
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in source.tensors.items()}
    written = _write(folder, tensors, source.config, family, max_shard_bytes, source.eos_ids)
    for name in TOKENIZER_FILES if source.folder is not None else ():
        if (source.folder / name).is_file():  # type: ignore[operator]
            shutil.copyfile(source.folder / name, folder / name)  # type: ignore[operator]
    if source.tokenizer_file is not None and not (folder / "tokenizer_config.json").is_file():
        Tokenizer.load(source.tokenizer_file, source.config.eod).save(folder)
    return Converted(
        path=str(folder),
        source=source.origin,
        family=(source.family, family),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(path.stat().st_size for path in written),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        files=tuple(path.name for path in written),
    )
