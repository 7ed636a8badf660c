"""Results that are kept: one JSON layout for every `reproduce` and benchmark, and the documents filled from it.

A result file holds `room`, `kind`, `config`, `seeds`, `versions`, `machine`, `seconds`, `date` and `tables`, and
whatever else its writer finds worth keeping. A document asks for a figure with a marker, and never has one typed in:

    <!-- results: benchmarks/superres.json#speed --> <!-- /results -->                  a table, by its name
    <!-- value: benchmarks/superres.json#seconds .1f -->12.3<!-- /value --> seconds     one value, by its place

Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tenfold import __version__
from tenfold.core.console import UserError, to_jsonable
from tenfold.core.devices import memory_bytes, usable_cpus
from tenfold.core.files import read_json, write_json

# Packages whose version changes figures; those that are not installed are left out.
_TELLING_PACKAGES = ("torch", "torchvision", "numpy", "accelerate", "pillow", "opencv-python-headless")

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of a result file.

    Args:
        name: what a document's marker calls it.
        caption: one line that says what is measured, in which units.
        columns: column titles; the first column names the rows.
        rows: cells; a float is shown with four significant digits unless its writer formats it, None as a dash.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, tenfold, the packages that change figures, and the `packages` asked for beside them."""
    found = {"python": platform.python_version(), "tenfold": __version__}
    for package in dict.fromkeys((*_TELLING_PACKAGES, *packages)):
        version = installed_version(package)
        if version is not None:
            found[package] = version
    return found


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge a time: system, processor, cores, memory, threads, accelerators."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cpus": usable_cpus(),
        "memory_gib": round(memory_bytes()[0] / 2**30, 1),
    }
    torch = sys.modules.get("torch")  # whoever measures with torch has imported it; nobody else should pay for it
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def _processor_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or "unknown"


def write_results(
    path: Path | str,
    *,
    room: str,
    kind: Literal["reproduce", "benchmark"],
    seconds: float,
    tables: Sequence[Table],
    config: object = None,
    seeds: Sequence[int] = (),
    packages: Iterable[str] = (),
    **more: object,
) -> dict[str, Any]:
    """Write a result file, atomically.

    Args:
        path: where to, for instance `results/benchmarks/superres.json`.
        room: the room that was measured.
        kind: `reproduce` or `benchmark`.
        seconds: time of the whole run.
        tables: what documents show of it.
        config: the settings of the run (a dataclass or a dict).
        seeds: every seed that was used.
        packages: packages whose versions matter here, such as the peers that were measured.
        more: further entries, for instance the samples behind the tables.

    Returns:
        the written object.
    """
    content = {
        "room": room,
        "kind": kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "machine": machine_facts(),
        "versions": versions(packages),
        "seeds": list(seeds),
        "config": config,
        **more,
        "tables": list(tables),
    }
    written = to_jsonable(content)
    write_json(path, written)
    return written


def table_markdown(table: Mapping[str, Any]) -> str:
    """A table of a result file as GitHub-flavoured Markdown; its first column is left-aligned, the others right."""
    columns, rows = table["columns"], table["rows"]
    lines = [
        "| " + " | ".join(map(_cell, columns)) + " |",
        "| " + " | ".join(["---"] + ["---:"] * (len(columns) - 1)) + " |",
        *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _results_block(argument: str, folder: Path) -> str:
    path, _, name = argument.partition("#")
    content = _read(folder, path)
    for table in content.get("tables", ()):
        if table["name"] == name:
            machine = content["machine"]
            origin = (
                f"measured on {content['date']} on {machine['cpus']} cores of {machine['processor']}; "
                f"source: `results/{path}`"
            )
            return f"\n{table_markdown(table)}\n\n*{table['caption'].rstrip('.')} ({origin}).*\n"
    raise UserError(f"results/{path} has no table {name!r}: it has {', '.join(t['name'] for t in content['tables'])}")


def _value(argument: str, folder: Path) -> str:
    place, _, form = argument.partition(" ")
    path, _, keys = place.partition("#")
    value: Any = _read(folder, path)
    for key in keys.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise UserError(f"results/{path} has nothing at {keys!r}: {key!r} is not there") from None
    return format(value, form)


def _read(folder: Path, path: str) -> dict[str, Any]:
    if not (folder / path).is_file():
        raise UserError(f"results/{path}: no such file, although a document shows it")
    return read_json(folder / path)


Builder = Callable[[str], str]

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def fill_markdown(text: str, results: Path, builders: Mapping[str, Builder] | None = None) -> str:
    """Replace what stands between a marker and its end by what it asks for. A marker in a code block is left alone.

    Args:
        text: a Markdown document.
        results: the folder that holds the result files.
        builders: further kinds of marker; each turns the marker's argument into text.

    Raises:
        UserError: a marker without its end, of an unknown kind, or one that asks for what is not there.
    """
    known: dict[str, Builder] = {
        "results": lambda argument: _results_block(argument, results),
        "value": lambda argument: _value(argument, results),
        **(builders or {}),
    }
    marker = re.compile(rf"<!-- ({'|'.join(known)}): (.+?) -->(.*?)<!-- /\1 -->", re.DOTALL)

    code = [match.span() for match in _CODE.finditer(text)]

    def replaced(match: re.Match[str]) -> str:
        if any(start <= match.start() < end for start, end in code):
            return match[0]
        kind, argument, inside = match.groups()
        # An opening marker inside means that the end of this one is missing, and that it would swallow the next.
        if f"<!-- {kind}:" in inside:
            raise UserError(f"the marker {kind}: {argument} has no end (<!-- /{kind} -->)")
        return f"<!-- {kind}: {argument} -->{known[kind](argument)}<!-- /{kind} -->"

    filled = marker.sub(replaced, text)
    prose = _CODE.sub("", filled)
    for kind in known:
        opened, closed = prose.count(f"<!-- {kind}:"), prose.count(f"<!-- /{kind} -->")
        if opened != closed:
            raise UserError(f"{opened} markers `{kind}` are opened and {closed} closed")
    return filled
