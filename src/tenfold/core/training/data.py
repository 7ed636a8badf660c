"""The sample stream: sample i of a run is a pure function of i, so that the position in the data is just the step.

Step s of a run takes the samples with the numbers s*batch_size ... (s+1)*batch_size - 1 (or those that the run's own
function of the step gives), in this order over the processes and, inside a process, over its micro-batches. No sampler
has a state that a checkpoint would have to hold, and the stream is the same for any number of processes and workers.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tenfold.core.console import UserError

GRACE_S = 30  # what Slurm leaves between SIGTERM and SIGKILL, unless it is configured otherwise


class Samples(Protocol):
    """A dataset that makes one sample at a time; samples are stacked by `torch.utils.data.default_collate`."""

    def sample(self, index: int) -> Any:
        """Sample number `index` >= 0 of the endless stream, say a dict of equally shaped tensors."""


@runtime_checkable
class Batches(Protocol):
    """A dataset that builds a batch itself: packed tokens, point clouds of different sizes, vectorised augmentation."""

    def batch(self, indices: Sequence[int]) -> Any:
        """The batch of the samples with these numbers: a pure function of `indices`."""


class Shuffled:
    """Endless passes over `size` items, each in its own random order.

    Args:
        size: number of items.
        seed: of the orders.

    Example:
        >>> order = Shuffled(3, seed=0)
        >>> sorted(order(i) for i in range(3)), sorted(order(i) for i in range(3, 6))
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self._order = lru_cache(maxsize=4)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def __call__(self, index: int) -> int:
        """The item that is number `index` of the stream."""
        epoch, position = divmod(index, self.size)
        return int(self._order(epoch)[position])


SamplesOfStep = Callable[[int], range]
"""From the number of steps done to the numbers of the samples of the next step."""


def micro_batches(step: int, batch_size: int, accumulate: int, rank: int, processes: int) -> list[range]:
    """The numbers of the samples that process `rank` takes in a step of a run whose batches are equally large.

    Raises:
        UserError: the batch cannot be cut into equal parts.
    """
    return share(range(step * batch_size, (step + 1) * batch_size), accumulate, rank, processes)


def share(numbers: range, accumulate: int, rank: int, processes: int) -> list[range]:
    """Those of a step's samples that process `rank` takes, as `accumulate` consecutive ranges.

    Raises:
        UserError: the batch cannot be cut into equal parts.
    """
    size, rest = divmod(len(numbers), processes * accumulate)
    if rest:
        raise UserError(
            f"training: batch_size {len(numbers)} cannot be shared equally by {processes} process(es) x {accumulate} "
            f"micro-batch(es): choose a multiple of {processes * accumulate}"
        )
    first = rank * size * accumulate
    return [numbers[first + part * size : first + (part + 1) * size] for part in range(accumulate)]


def build_batch(dataset: Samples | Batches, indices: Sequence[int]) -> Any:
    """One batch, from `dataset.batch` where it exists, else from single samples."""
    if isinstance(dataset, Batches):
        return dataset.batch(indices)
    return default_collate([dataset.sample(index) for index in indices])


class _BatchDataset(Dataset):
    """Makes workers build whole batches. A UserError travels as a value: torch would wrap it in a traceback."""

    def __init__(self, dataset: Samples | Batches) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> Any:
        try:
            return build_batch(self.dataset, indices)
        except UserError as error:
            return error


class _IndexRanges(Sampler):
    """The index ranges of all remaining micro-batches, in order."""

    def __init__(self, ranges: Iterator[range]) -> None:
        self.ranges = ranges

    def __iter__(self) -> Iterator[range]:
        return self.ranges


def _outlive_signals(worker: int) -> None:
    """A signal to the whole process group must not kill the workers under a step that the parent still finishes.

    They do end some time after SIGTERM: Python sends it, too, to workers that are left over when the parent exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def stream(
    dataset: Samples | Batches,
    steps: range,
    batch_size: int,
    accumulate: int,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
    samples: SamplesOfStep | None = None,
) -> Generator[list[Any]]:
    """Yield the micro-batches of every step in `steps` for one process; the same ones for any number of `workers`.

    `samples` gives the numbers of a step's samples, where batches are not all of `batch_size`.
    """

    def ranges() -> Iterator[range]:
        for step in steps:
            if samples:
                yield from share(samples(step), accumulate, rank, processes)
            else:
                yield from micro_batches(step, batch_size, accumulate, rank, processes)

    if workers == 0:
        batches: Iterator[Any] = (build_batch(dataset, indices) for indices in ranges())
    else:
        loader = DataLoader(
            _BatchDataset(dataset),
            batch_size=None,
            sampler=_IndexRanges(ranges()),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # its own, so that starting workers leaves the training's generator alone
        )
        batches = iter(loader)
    try:
        for _ in steps:
            parts = []
            for _ in range(accumulate):
                part = next(batches)
                if isinstance(part, UserError):
                    raise part
                parts.append(part)
            yield parts
    finally:
        # Ends the workers now, though a traceback may hold on to this frame.
        del batches
