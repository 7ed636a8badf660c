"""Speed of the planner: `python -m benchmarks.planner` writes results/benchmarks/planner.json.

Processor seconds are reported beside wall seconds, because the machine may be shared. The published figure of a peer
(Calculon: 0.7 s wall, 0.34 s
processor for one Megatron-1T estimate with start-up) is set beside ours; the peer itself is not on the package index.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.planner import Cluster, Model, Plan, search, simulate
from tenfold.planner.placement import place_greedy
from tenfold.planner.reproduce import PUBLISHED

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "planner.json"
REPEATS = 9
ONE_TRILLION = Plan(
    tp=8, pp=64, gbs=512, seq=2048, recompute="full", precision="fp16", fsdp=0, stack="megatron-2021/22"
)


def _timed(run: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Median wall and processor seconds after one call to warm up."""
    run()
    wall, processor = [], []
    for _ in range(repeats):
        before, cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - before)
        processor.append(time.process_time() - cpu)
    return statistics.median(wall), statistics.median(processor)


def _started(code: str) -> tuple[float, float]:
    wall, processor = [], []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(REPEATS):
        before, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - before)
        processor.append(after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime)
    return statistics.median(wall), statistics.median(processor)


def main() -> None:
    """Measure and write."""
    started = time.perf_counter()
    pangu, ascend = Model.preset("pangu-ultra-moe"), Cluster.preset("ascend-800t-a2", 6144)
    trillion, a100 = Model.preset("gpt-1008b"), Cluster.preset("a100-80g", 512)
    loads = np.random.default_rng(0).lognormal(size=(58, 256))
    command = (
        "import tenfold.cli as c; c.ROOMS.setdefault('planner', ''); "
        "c.main(['planner', 'simulate', '--model', 'gpt-1008b', '--hardware', 'a100-80g', '--devices', '512', "
        "'--tp', '8', '--pp', '64', "
        "'--gbs', '512', '--seq', '2048', '--recompute', 'full'])"
    )
    rows: list[list[str | float | None]] = []
    measured = {
        "an empty Python process": _started("pass"),
        "one estimate from the command line, with start-up (Megatron-1T)": _started(command),
        "one estimate in a process (Megatron-1T)": _timed(lambda: simulate(trillion, a100, ONE_TRILLION)),
        "one estimate in a process (Pangu 718B, fine-grained recompute and swap)": _timed(
            lambda: simulate(pangu, ascend, PUBLISHED)
        ),
        "placing 58 layers of 256 experts": _timed(lambda: place_greedy(loads, 32)),
    }
    for name, (wall, processor) in measured.items():
        rows.append([name, wall, processor])
    before, cpu = time.perf_counter(), time.process_time()
    found = search(pangu, ascend, PUBLISHED)
    rows.append(["search of the 718B model on 6,144 devices", time.perf_counter() - before, time.process_time() - cpu])
    rows.append(["Calculon, one Megatron-1T estimate with start-up (its published figure)", 0.7, 0.34])
    table = Table(
        "speed",
        "seconds, median; the search scores plans at the speed given in the file",
        ("what", "wall s", "processor s"),
        rows,
    )
    console.table(
        list(table.columns), [[r[0], *(f"{c:.4g}" for c in r[1:] if isinstance(c, float))] for r in rows], table.caption
    )
    write_results(
        OUTPUT,
        room="planner",
        kind="benchmark",
        seconds=time.perf_counter() - started,
        tables=[table],
        packages=("tyro", "rich"),
        search={
            "candidates": found.candidates,
            "plans_per_second": found.plans_per_second,
            "score_seconds": found.score_seconds,
        },
    )


if __name__ == "__main__":
    main()
