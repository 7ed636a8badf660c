"""The tour: every room's station is run on its built-in input, and one page shows what came out.

A station is `tour(workdir) -> Station` in the room's `tour.py`. One that fails is shown as failed, and the rest go on.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tenfold.core import console, devices, results
from tenfold.core.config import near
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import disk_error, make_folder, write_bytes
from tenfold.core.report import Failure, Figure, Station, format_seconds, render_page

_INTRODUCTION = (
    "Published research systems, each run just now, on this machine, on an input that comes with the package. "
    "Every number below was measured in this run."
)


@dataclass(frozen=True)
class StationResult:
    """One station of a tour: whether it ran, its seconds, its figures, and the line that says why it failed."""

    room: str
    status: Literal["ok", "failed"]
    seconds: float
    error: str | None
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class TourResult:
    """A finished tour: `ok` when every station ran, else `partial`; the page; seconds in all; the stations."""

    status: Literal["ok", "partial"]
    path: Path
    seconds: float
    stations: tuple[StationResult, ...]


def run_tour(rooms: Positional[tuple[str, ...]] = (), output: Path = Path("tour")) -> TourResult:
    """Run every system on its built-in input and write one HTML page.

    The page is a single file that needs no network. A station that fails is shown on it, and the exit status is then 1.

    Args:
        rooms: rooms to visit; all by default.
        output: folder for the page, which is index.html.

    Returns:
        What ran, for how long, and where the page is.

    Raises:
        UserError: an unknown room, or a folder that cannot be written to.
        PartialFailure: some station failed; its `result` is the TourResult.

    Example:
        tenfold tour --output tour
    """
    from tenfold.cli import ROOMS

    for room in rooms:
        if room not in ROOMS:
            raise UserError(f"unknown room {room!r}: {near(room, list(ROOMS))} (tenfold --help lists them)")
    _check_writable(make_folder(output))
    devices.set_threads()
    names = tuple(dict.fromkeys(rooms)) or tuple(ROOMS)

    started = time.perf_counter()
    visited = []
    for number, room in enumerate(names, start=1):
        console.say(f"[{number}/{len(names)}] {room} ...")
        station = _visit(room)
        verdict = f"failed: {station.error}" if isinstance(station, Failure) else "done"
        console.say(f"[{number}/{len(names)}] {room} {verdict} ({format_seconds(station.seconds)})")
        visited.append(station)

    page = output / "index.html"
    write_bytes(page, render_page("The tenfold tour", visited, _facts(), _INTRODUCTION).encode())
    result = _result(page, time.perf_counter() - started, visited)
    console.say(f"{page} is written ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")
    failed = [station.room for station in visited if isinstance(station, Failure)]
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {len(names)} stations failed: {', '.join(failed)} ({page} says why)", result
        )
    return result


def _check_writable(folder: Path) -> None:
    """Find out now, and not after minutes of work, that the page cannot be written."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise disk_error(folder, error) from error


def _visit(room: str) -> Station | Failure:
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=f"tenfold-tour-{room}-") as workdir:
            station = importlib.import_module(f"tenfold.{room}.tour").tour(Path(workdir))
        return dataclasses.replace(station, room=room, seconds=time.perf_counter() - started)
    except Exception as error:  # whatever breaks one station must not end the tour
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Failure(room, " ".join(words.split()), traceback.format_exc(), time.perf_counter() - started)


def _result(page: Path, seconds: float, visited: Sequence[Station | Failure]) -> TourResult:
    stations = tuple(
        StationResult(station.room, "failed", station.seconds, station.error, ())
        if isinstance(station, Failure)
        else StationResult(station.room, "ok", station.seconds, None, tuple(station.figures))
        for station in visited
    )
    complete = all(station.status == "ok" for station in stations)
    return TourResult("ok" if complete else "partial", page, seconds, stations)


def _facts() -> dict[str, str]:
    """The machine and the versions, as the page shows them."""
    machine, versions, now = results.machine_facts(), results.versions(), datetime.now()
    cores = f"{machine['cpus']} core{'' if machine['cpus'] == 1 else 's'}"
    facts = {
        "Processor": f"{machine['processor']}, {cores}, {machine['memory_gib']} GiB",
        "System": machine["system"],
        "Threads": str(machine.get("threads", "")),
        "Accelerator": ", ".join(machine.get("gpus", ())),
        "Python": versions["python"],
        "PyTorch": versions.get("torch", ""),
        "tenfold": versions["tenfold"],
        "Made on": f"{now.day} {now:%B %Y, %H:%M}",
    }
    return {name: value for name, value in facts.items() if value}
