"""Meaning to passages: vectors of any embedding function in usearch's index, beside the index of words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.core.console import UserError
from tenfold.core.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

# Texts to vectors of equal length, one row each (float32, any scale: cosine is what counts).
Embed = Callable[[Sequence[str]], "np.ndarray"]

_BATCH = 32
_LONGEST_TOKENS = 256


class Dense:
    """Numbered vectors in a file.

    Args:
        path: the file; it need not exist yet.
        embed: what made, and makes, the vectors.
    """

    def __init__(self, path: Path, embed: Embed) -> None:
        from usearch.index import Index

        self._path, self._embed = path, embed
        self._index = None
        if path.exists():
            try:
                self._index = Index.restore(str(path))
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"{path}: damaged ({error}): delete it and run `tenfold agent index` again") from None
            if self._index is None:
                raise UserError(f"{path}: damaged: delete it and run `tenfold agent index` again")

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    def update(self, passages: Iterable[tuple[int, str]], save_every: int = 2_000) -> None:
        """Embed the passages that have no vector yet and forget those that are gone.

        The file is written anew every `save_every` passages, so that a build that was killed goes on from there.
        """
        import numpy as np
        from usearch.index import Index

        alive = set()

        def missing() -> Iterator[tuple[int, str]]:
            for number, text in passages:
                alive.add(number)
                if self._index is None or number not in self._index:
                    yield number, text

        waiting = missing()
        unsaved = 0
        while batch := list(islice(waiting, _BATCH)):
            vectors = self._embed([text for _, text in batch])
            if self._index is None:
                self._index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
            if vectors.shape[1] != self._index.ndim:
                raise UserError(
                    f"{self._path}: holds vectors of length {self._index.ndim}, the model gives {vectors.shape[1]}: "
                    "use the model that built the index, or delete the file"
                )
            self._index.add(np.array([number for number, _ in batch], dtype=np.uint64), vectors)
            unsaved += len(batch)
            if unsaved >= save_every:
                self._save()
                unsaved = 0
        gone = [] if self._index is None else [int(key) for key in self._index.keys if int(key) not in alive]
        if self._index is not None and gone:
            self._index.remove(gone)
        if unsaved or gone:
            self._save()

    def _save(self) -> None:
        assert self._index is not None
        with atomic_write(self._path) as temporary:
            self._index.save(str(temporary))

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """The nearest passages to a query as (number, cosine similarity), best first."""
        if self._index is None or len(self._index) == 0:
            return []
        found = self._index.search(self._embed([query])[0], count)
        return [(int(key), 1.0 - float(distance)) for key, distance in zip(found.keys, found.distances, strict=True)]


def sentence_embedder(model: str) -> Embed:
    """An embedding function from a BERT-like sentence encoder: mean of the last hidden states, unit length.

    Args:
        model: folder or hub name that `transformers` can load, such as sentence-transformers/all-MiniLM-L6-v2.

    Raises:
        UserError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no sentence encoder can be loaded from it ({str(error).splitlines()[0]})") from None

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> np.ndarray:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=_LONGEST_TOKENS, return_tensors="pt")
        hidden = network(**batch).last_hidden_state  # (texts, tokens, features)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1).float().numpy()

    return embed
