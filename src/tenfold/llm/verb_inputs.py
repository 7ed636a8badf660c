"""What several verbs take: output paths, texts, NAME=VALUE pairs, numbers, changes of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from tyro.conf import arg

from tenfold.core.console import UserError

OutputFolder = Annotated[Path, arg(aliases=["-o"])]
OutputFile = OutputFolder
Config = TypeVar("Config")


def replaced(config: Config, **changes: object) -> Config:
    """`config` with those changes that are not None. Raises UserError where they do not fit together."""
    import dataclasses

    try:
        return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(f"these settings cannot be used: {error}") from None


def by_name(entries: tuple[str, ...], option: str) -> dict[str, list[str]]:
    """`NAME=VALUE` entries by name."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not (name and sign and value):
            raise UserError(f"{option} {entry}: expected NAME=VALUE")
        found.setdefault(name, []).append(value)
    return found


def number(text: str, option: str) -> float:
    """The number that an option's text is."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number") from None


def read_text(path: Path) -> str:
    """A text file. Raises UserError: no such file, or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
