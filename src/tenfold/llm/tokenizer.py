"""Text to token ids and back, and vocabularies trained domain by domain (paper section 2.3).

Everything that splits text is the `tokenizers` library; this file says what is trained, merged, loaded and saved.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.core.console import UserError
from tenfold.core.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_DOCUMENT = "<|endoftext|>"
BYTES = 256

# What published tokenizers call the token that ends a document, where no configuration beside them says.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>")


class Tokenizer:
    """A vocabulary of the `tokenizers` library with the id that ends a document.

    Args:
        backend: the library's tokenizer.
        eod: id of the token that ends a document.
        settings: content of `tokenizer_config.json` (special tokens, chat template), kept for `save`.
    """

    def __init__(self, backend: Backend, eod: int, settings: Mapping[str, Any] | None = None) -> None:
        # Text that spells a special token is text: it must not end a document.
        backend.encode_special_tokens = True
        # Some files carry the padding and the longest length of the script that wrote them.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.eod = eod
        self.settings = dict(settings or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.backend.to_str(), self.eod, self.settings)

    @cached_property
    def size(self) -> int:
        """Number of ids: the largest one plus 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids that its own post-processor puts before a text, as Llama 3 and Gemma do; most have none."""
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        places = range(len(whole) - len(plain) + 1)
        start = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:start])

    def fits(self, vocabulary: int) -> bool:
        """Whether a model of so many ids can read every text that it splits.

        Special tokens that begin and end no text do not count, since no text is split into them: Gemma 3's text models
        have none of the id that their tokenizer keeps for pictures.
        """
        special = {token for token, entry in self.backend.get_added_tokens_decoder().items() if entry.special}
        ids = set(self.backend.get_vocab(with_added_tokens=True).values()) - special
        named = [self.backend.token_to_id(str(_name(self.settings.get(key)))) for key in ("bos_token", "eos_token")]
        return max((*ids, *self.opening, self.eod, *(token for token in named if token is not None))) < vocabulary

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides how text is split, and of `eod`."""
        return sha256(f"{self.backend.to_str()} {self.eod}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added before or after it. Lone surrogates count as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on all processors."""
        whole = [_without_surrogates(text) for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch_fast(whole, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        if self._is_byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        wrong = next((i for i in ids if not 0 <= i < self.size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is not in the vocabulary of {self.size}")
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; an id without a token (a gap) stands for none.

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        if not 0 <= token < self.size:
            raise UserError(f"token id {token} is not in the vocabulary of {self.size}")
        return self._bytes[token]

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {token: entry.content.encode() for token, entry in self.backend.get_added_tokens_decoder().items()}
        table = [b""] * self.size
        for text, token in self.backend.get_vocab(with_added_tokens=True).items():
            if token in added:
                table[token] = added[token]
            elif self._is_byte_level:
                table[token] = bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else text.encode()
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                table[token] = bytes([int(text[3:5], 16)])
            else:
                table[token] = text.replace("\u2581", " ").encode()  # SentencePiece writes spaces as that
        return table

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write a `tokenizer.json`, or into a folder also the `tokenizer_config.json` that transformers wants."""
        path = Path(path)
        if path.suffix == ".json":
            write_bytes(path, self.backend.to_str().encode())
            return
        write_bytes(path / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        write_json(path / "tokenizer_config.json", self._transformers_settings())

    def _transformers_settings(self) -> dict[str, Any]:
        end = self.backend.id_to_token(self.eod)
        plain = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        return plain | self.settings

    def to_transformers(self) -> Any:
        """The same as a transformers tokenizer, for libraries that take those."""
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        left_out = ("tokenizer_class", "auto_map", "added_tokens_decoder", "backend")
        options = {key: _name(value) for key, value in self._transformers_settings().items() if key not in left_out}
        return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(self.backend.to_str()), **options)

    @staticmethod
    def load(path: Path | str, eod: int | None = None) -> Tokenizer:
        """Read a `tokenizer.json`, or the tokenizer of a folder in Hugging Face layout.

        Args:
            path: the file or folder.
            eod: id that ends a document; None takes it from the configuration beside the file, else from the name.

        Raises:
            UserError: no such file, not a tokenizer, or no token that ends a document.
        """
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if path.is_dir() and not file.is_file():
            return _load_through_transformers(folder, eod)
        if not file.is_file():
            raise UserError(f"{path}: no such tokenizer (a tokenizer.json, or a folder that holds one)")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file}: not a tokenizer.json ({' '.join(str(error).split())})") from None
        beside = folder / "tokenizer_config.json"
        settings = read_json(beside) if file.name == "tokenizer.json" and beside.is_file() else {}
        template = folder / "chat_template.jinja"
        if template.is_file():  # where transformers 5 puts it
            settings = {"chat_template": template.read_text(encoding="utf-8")} | settings
        return Tokenizer(backend, _end_of_document(backend, settings, eod, file), settings)

    @staticmethod
    def from_transformers(tokenizer: Any, eod: int | None = None) -> Tokenizer:
        """The tokenizer inside one of transformers'.

        Raises:
            UserError: it is not built on the `tokenizers` library, or names no token that ends a document.
        """
        from tokenizers import Tokenizer as Backend

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UserError(f"{type(tokenizer).__name__}: is not built on the tokenizers library: convert it first")
        settings = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if isinstance(getattr(tokenizer, "chat_template", None), str):
            settings["chat_template"] = tokenizer.chat_template
        copied = Backend.from_str(backend.to_str())
        return Tokenizer(copied, _end_of_document(copied, settings, eod, type(tokenizer).__name__), settings)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and id 256 at the end of a document."""

    def __init__(self) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE(vocab=dict(_BYTE_OF), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
        super().__init__(backend, BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        return ByteTokenizer, ()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts: their bytes, which need no library."""
        return [list(_without_surrogates(text).encode()) for text in texts]


def _byte_characters() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write for the 256 bytes (GPT-2's convention).

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(BYTES + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()


def _restored(content: str, eod: int, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(content), eod, settings)


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which JSON files may hold and UTF-8 cannot, joined or replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _name(token: Any) -> Any:
    """The text of a special token, which older configurations write as an object; anything else as it is."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _end_of_document(backend: Backend, settings: Mapping[str, Any], eod: int | None, where: object) -> int:
    if eod is not None:
        if backend.id_to_token(eod) is None:
            raise UserError(f"{where}: has no token with the id {eod}, which should end documents")
        return eod
    for name in (_name(settings.get("eos_token")), *_KNOWN_ENDS):
        found = backend.token_to_id(name) if isinstance(name, str) else None
        if found is not None:
            return found
    raise UserError(f"{where}: names no token that ends a document (eos_token in tokenizer_config.json)")


def _load_through_transformers(folder: Path, eod: int | None) -> Tokenizer:
    """Vocabularies in other files (SentencePiece, vocab.json with merges.txt) by transformers' converters."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise UserError(f"{folder}: holds no such tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    from transformers import AutoTokenizer, PreTrainedTokenizerBase
    from transformers.models.llama import LlamaTokenizer

    # openPangu names a class of its own whose code would have to be run; its SentencePiece file is like Llama's.
    loaders: list[Any] = [AutoTokenizer, LlamaTokenizer]
    reason = ""
    for loader in loaders:
        try:
            loaded: PreTrainedTokenizerBase = loader.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # converters raise anything on what they do not know
            reason = reason or " ".join(str(error).split())[:200]
        else:
            return Tokenizer.from_transformers(loaded, eod)
    raise UserError(f"{folder}: its tokenizer cannot be read by transformers ({reason}); pip install sentencepiece")


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedTokenizer:
    """A vocabulary merged from domains.

    Attributes:
        tokenizer: ready to use; eod is id 0, bytes are 1 to 256, then tokens by rank.
        shares: domain to the number of tokens that it ranked best.
        shared: number of tokens that at least two domains had found.
        unreachable: tokens that were left out since no text would be split into them after merging, see `train`.
    """

    tokenizer: Tokenizer
    shares: dict[str, int]
    shared: int
    unreachable: int


def train(
    domains: Mapping[str, Iterable[str]], size: int, weights: Mapping[str, float] | None = None
) -> TrainedTokenizer:
    """Train a byte-level BPE vocabulary for each domain and merge them (paper section 2.3).

    The paper gives the vocabularies per domain, their union and its shares; how tokens are ranked is not stated. Here a
    token's rank is the best that any domain gives it, and the merge rules of all domains for the tokens that are kept
    are applied in the order of their ranks, so that the final tokenizer is again an exact BPE. Rules of one domain may
    hide a token of another (`th` + `e` keeps `t` + `he` from happening): then a rule is added that joins the two parts
    into which its text is split, and where there are more parts the token is left out and the next takes its place.

    Args:
        domains: name to texts; long texts are best given in pieces.
        size: number of ids, with the end of documents and the 256 bytes.
        weights: domain to importance: ranks are divided by it; 1 where nothing is said.

    Raises:
        UserError: a size below 257, texts too short for it, a weight that is not positive.
    """
    if size < BYTES + 1:
        raise UserError(f"size: {size} ids are fewer than the 256 bytes and the end of documents ({BYTES + 1})")
    weights = weights or {}
    unknown = [name for name in weights if name not in domains]
    if unknown:
        raise UserError(f"weights: {unknown[0]!r} is not a domain ({', '.join(domains)})")
    wrong = [name for name, weight in weights.items() if not 0 < weight < float("inf")]
    if wrong:
        raise UserError(f"weights: that of {wrong[0]} is {weights[wrong[0]]}, which is not a positive number")
    ranked: list[tuple[float, int, str, str]] = []
    names = list(domains)
    for number, name in enumerate(names):
        merges = _train_domain(domains[name], size)
        ranked += [(rank / weights.get(name, 1.0), number, a, b) for rank, (a, b) in enumerate(merges, 1)]
    ranked.sort()
    found_by: dict[str, set[int]] = {}  # insertion order is that of the best ranks
    for _, number, a, b in ranked:
        found_by.setdefault(a + b, set()).add(number)
    rules = {(a, b): rank for rank, _, a, b in reversed(ranked)}
    rank_of = {a + b: rank for rank, _, a, b in reversed(ranked)}
    bridged: set[str] = set()
    left_out: set[str] = set()
    while True:
        kept = [token for token in found_by if token not in left_out][: size - BYTES - 1]
        if len(kept) < size - BYTES - 1:
            raise UserError(
                f"size: the texts give {len(kept) + BYTES + 1} different tokens, not {size}: "
                "give more text or a smaller size"
            )
        backend = _merged(kept, sorted(rules, key=rules.__getitem__))
        splits = {token: [part.value for part in backend.model.tokenize(token)] for token in kept}
        hidden = [token for token in kept if len(splits[token]) > 1]
        if not hidden:
            break
        for token in hidden:
            if len(splits[token]) == 2 and token not in bridged:
                rules[splits[token][0], splits[token][1]] = rank_of[token]
                bridged.add(token)
            else:
                left_out.add(token)
    best = {a + b: number for _, number, a, b in reversed(ranked)}
    counts = Counter(best[token] for token in kept)
    return TrainedTokenizer(
        Tokenizer(backend, 0),
        {name: counts[number] for number, name in enumerate(names)},
        sum(len(found_by[token]) > 1 for token in kept),
        len(left_out),
    )


def _pre_tokenizer() -> Any:
    """Digits one by one, then words with the space before them, as bytes."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _train_domain(texts: Iterable[str], size: int) -> list[tuple[str, str]]:
    """The merge rules of one domain, best first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=list(_BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator(map(_without_surrogates, texts), trainer)
    return [(a, b) for a, b in json.loads(backend.to_str())["model"]["merges"]]


def _merged(tokens: Sequence[str], rules: Iterable[tuple[str, str]]) -> Backend:
    """The tokenizer of the bytes and `tokens`, with those of `rules` (best first) that speak of them only."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    ordered = [END_OF_DOCUMENT, *sorted(_BYTE_OF, key=_BYTE_OF.__getitem__), *tokens]
    vocabulary = {token: number for number, token in enumerate(ordered)}
    merges = [(a, b) for a, b in rules if {a, b, a + b} <= vocabulary.keys()]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return backend


# --- inspection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DomainStatistics:
    """How a vocabulary fits one domain's text.

    Attributes:
        bytes: length of the text in UTF-8.
        tokens: length in tokens.
        bytes_per_token: their ratio: higher is a better fit.
        used: share of the vocabulary that occurs in the text.
    """

    bytes: int
    tokens: int
    bytes_per_token: float
    used: float


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> DomainStatistics:
    """Count bytes and tokens of a domain's texts."""
    length, tokens = 0, 0
    seen: set[int] = set()
    for text in texts:
        ids = tokenizer.encode(text)
        length += len(_without_surrogates(text).encode())
        tokens += len(ids)
        seen.update(ids)
    return DomainStatistics(length, tokens, length / max(tokens, 1), len(seen) / tokenizer.size)


def scripts(tokenizer: Tokenizer) -> dict[str, int]:
    """Number of tokens by writing system, most frequent first: what the paper reports of its vocabulary."""
    counts = Counter(_script(tokenizer.token_bytes(token)) for token in range(tokenizer.size))
    return dict(counts.most_common())


_SCRIPTS = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def _script(content: bytes) -> str:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return "part of a character"
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return "digits, signs, spaces"
    if all(char.isascii() for char in letters):
        return "Latin (ASCII)"
    word = unicodedata.name(next(char for char in letters if not char.isascii()), "OTHER").split()[0]
    return _SCRIPTS.get(word, word.capitalize())
