"""How long the front door takes: `python -m benchmarks.house` writes results/benchmarks/house.json.

Every command is started in a process of its own, in turn with the others, so that a busy machine slows all alike. The
time of an empty Python process stands beside them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tenfold.cli import ROOMS
from tenfold.core import console
from tenfold.core.results import Table, write_results

REPEATS = 15
OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "house.json"

COMMANDS: dict[str, list[str]] = {
    "an empty Python process": ["-c", "pass"],
    "`import tenfold`": ["-c", "import tenfold"],
    "`tenfold --version`": ["-m", "tenfold", "--version"],
    "`tenfold --help`": ["-m", "tenfold", "--help"],
    "`tenfold models`": ["-m", "tenfold", "models"],
    **{f"`tenfold {room}`": ["-m", "tenfold", room] for room in ROOMS},
}


def main() -> None:
    """Time every command and write the table."""
    started = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder, console.progress("starting up", REPEATS) as bar:
        for repeat in range(REPEATS + 1):
            for name, arguments in COMMANDS.items():
                before = time.perf_counter()
                subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                if repeat:  # the first turn fills the disk cache
                    seconds[name].append(time.perf_counter() - before)
            bar.advance()
    table = Table(
        "startup",
        f"Seconds from start to end of a process, median and extremes of {REPEATS} interleaved runs",
        ("process", "median s", "min s", "max s"),
        [
            (name, *(f"{value:.3f}" for value in (statistics.median(times), min(times), max(times))))
            for name, times in seconds.items()
        ],
    )
    console.table(table.columns, table.rows, title=table.caption)
    write_results(
        OUTPUT,
        room="house",
        kind="benchmark",
        seconds=time.perf_counter() - started,
        tables=[table],
        config={"repeats": REPEATS},
        packages=["tyro", "rich"],
        samples=seconds,
    )
    console.say(f"{OUTPUT} is written")


if __name__ == "__main__":
    main()
