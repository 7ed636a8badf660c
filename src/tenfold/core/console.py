"""What a person sees: messages, tables, progress bars, and the errors that are theirs to mend.

Human-readable text goes to standard output, except under `--json`, when it goes to standard error so that standard
output carries exactly one JSON object. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_json_mode = False


class UserError(Exception):
    """Something that the user can put right: one line that says what is wrong and what to do. Exit status 2."""

    exit_status = 2


class PartialFailure(UserError):
    """Some items of a batch failed, and the others were done. Exit status 1.

    Args:
        message: one line that names what failed.
        result: the machine-readable result of the whole batch, printed under `--json` all the same.
    """

    exit_status = 1

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


def set_json_mode(enabled: bool) -> None:
    """Send everything but the final JSON object to standard error."""
    global _json_mode
    _json_mode = enabled


def get_console() -> Console:
    """The console for human-readable output."""
    from rich.console import Console

    # Names of files are shown as they are: no `[bold]` or `:smile:` in them means anything.
    return Console(stderr=_json_mode, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(message: str, end: str = "\n") -> None:
    """Print one line for a person; with another `end`, a part of one."""
    print(message, end=end, file=sys.stderr if _json_mode else sys.stdout, flush=True)


def warn(message: str) -> None:
    """Print a warning on standard error, in one line."""
    print(f"warning: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; every column but the first is right-aligned."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    get_console().print(grid)


class ProgressBar:
    """A bar with count, speed and time left; `advance` moves it. Made by `progress`."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps` and show `note` beside the bar."""
        self._bar.update(self._task, advance=steps, note=note)


@contextmanager
def progress(title: str, total: int | None, start: int = 0) -> Iterator[ProgressBar]:
    """Show a progress bar on standard error (a terminal only; elsewhere it is silent).

    Args:
        title: what is being done.
        total: number of steps, or None when it is not known.
        start: steps that are done already (a resumed run).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield ProgressBar(bar, bar.add_task(title, total=total, completed=start, note=""))


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses, paths, enums, NumPy scalars and arrays into what `json` can write; NaN and inf become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if isinstance(value, Enum):
        return to_jsonable(value.value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(value: object) -> None:
    """Write the one JSON object of a `--json` run to standard output."""
    json.dump(to_jsonable(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
