"""What is remembered of tracks: parallel arrays, one row a track, in the order in which the tracks began."""

from __future__ import annotations

import numpy as np

# Columns of a memory and the type of each; the shape of a row follows from what is first appended.
_TYPES = {
    "ids": np.int64,
    "boxes": np.float32,
    "labels": np.int64,
    "embeds": np.float32,
    "frames": np.int64,
}


class TrackMemory:
    """Rows of ids, boxes, labels, embeddings and last frames, in arrays that grow by doubling.

    Attributes:
        count: number of tracks; the views below have as many rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.count

    def column(self, name: str) -> np.ndarray:
        """A view of one column's rows that are in use."""
        return self._columns[name][: self.count]

    @property
    def ids(self) -> np.ndarray:
        """Identity of each track, rising."""
        return self.column("ids")

    @property
    def boxes(self) -> np.ndarray:
        """Where each track was last seen, M x 4."""
        return self.column("boxes")

    @property
    def labels(self) -> np.ndarray:
        """Class of each track."""
        return self.column("labels")

    @property
    def embeds(self) -> np.ndarray:
        """Averaged embedding of each track, M x E."""
        return self.column("embeds")

    @property
    def frames(self) -> np.ndarray:
        """Frame in which each track was last seen."""
        return self.column("frames")

    def append(self, **rows: np.ndarray) -> None:
        """Add tracks; every column is to be given."""
        added = len(rows["ids"])
        if not added:
            return
        needed = self.count + added
        for name, kind in _TYPES.items():
            values = rows[name]
            old = self._columns.get(name)
            if old is None or len(old) < needed:
                grown = np.zeros((max(64, 2 * needed), *values.shape[1:]), kind)
                if old is not None:
                    grown[: self.count] = old[: self.count]
                self._columns[name] = grown
            self._columns[name][self.count : needed] = values
        self.count = needed

    def update(self, rows: np.ndarray, momentum: float, **values: np.ndarray) -> None:
        """See tracks again: embeddings are averaged, `momentum` being the weight of the new, the rest is replaced.

        Args:
            rows: K numbers of rows, all different.
            momentum: 0..1.
            values: boxes, labels, embeds, frames, K each.
        """
        for name, new in values.items():
            column = self._columns[name]
            column[rows] = (1 - momentum) * column[rows] + momentum * new if name == "embeds" else new

    def keep(self, which: np.ndarray) -> None:
        """Forget all tracks but those that a boolean mask picks; order is kept."""
        if which.all():
            return
        kept = int(which.sum())
        for name in self._columns:
            self._columns[name][:kept] = self._columns[name][: self.count][which]
        self.count = kept
