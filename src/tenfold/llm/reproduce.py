"""The paper's headline at the scale of the machine: which norm placement stays stable at a rate that is meant to hurt.

Three parts, each a list of small runs with a folder of their own, finished ones being skipped:

- `norms`: pre-norm, sandwich, depth-scaled sandwich and post-norm, 48 layers, with and without clipping (Figs. 7, 8).
- `init`: depth-scaled sandwich norm under TinyInit and small initialisation, by epsilon of the norms after sub-layers,
  and with c measured (Table 6).
- `map`: where spikes appear as depth, width, rate and precision change one at a time, and together.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from tenfold.core.console import UserError, progress, say, table
from tenfold.core.plots import plot_lines, save_plot
from tenfold.core.results import Table, write_results
from tenfold.llm import stability
from tenfold.llm.experiments import TEXT, Job, Outcome, run_job, split_text
from tenfold.llm.inspection import GAIN_NAMES, plot_stability

NORMS: dict[str, dict[str, Any]] = {
    "pre-norm": {"norm": "pre"},
    "sandwich": {"norm": "sandwich"},
    "DSSN": {"norm": "dssn"},
    "post-norm": {"norm": "post"},
}
INITS: dict[str, dict[str, Any]] = {
    "small init, eps 1e-5": {"norm": "dssn"},
    "TinyInit, eps 1e-5": {"norm": "dssn", "init": "tiny"},
    "TinyInit, eps 1e-8": {"norm": "dssn", "init": "tiny", "post_norm_eps": 1e-8},
    "small init, eps 1e-5, c measured": {"norm": "dssn", "c_attention": "measure", "c_mlp": "measure"},
}
PAPER = Table(
    name="paper",
    caption="The paper's ablations (Table 5: 13 B parameters, 300 B tokens; Table 6: 102 B tokens). Figs. 7 and 8: "
    "pre-norm (13 B) and plain sandwich norm (1.6 B, 94 layers) show loss and gradient spikes, DSSN none",
    columns=("arm", "EN basic", "ZH basic", "LAMBADA", "WPLC"),
    rows=[
        ["Table 5: pre-norm", "0.42", "0.52", "0.675", "0.194"],
        ["Table 5: DSSN", "0.45", "0.54", "0.693", "0.224"],
        ["Table 6: small init", "0.444", "0.538", "0.694", "0.229"],
        ["Table 6: TinyInit", "0.456", "0.537", "0.727", "0.257"],
    ],
)
# --- What is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        seeds: of every arm of `norms` and `init`; the first is that of the map.
        steps: of every run.
        layers: of `norms` and `init`.
        width: of `norms` and `init`.
        rate: of `norms` and `init`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    layers: int = 48
    width: int = 64
    rate: float = 3e-2


QUICK = Scale(seeds=(0,), steps=100)
PARTS: tuple[Literal["norms", "init", "map"], ...] = ("norms", "init", "map")


def jobs_of(part: str, scale: Scale) -> list[Job]:
    """The runs of a part, the most telling first.

    Raises:
        UserError: no such part.
    """
    common: dict[str, Any] = asdict(scale) | {"seeds": None}
    del common["seeds"]
    if part == "norms":
        return [
            Job(arm, changes, seed, clip=clip, **common)
            for clip in (1.0, 0.0)
            for seed in scale.seeds
            for arm, changes in NORMS.items()
        ]
    if part == "init":
        return [Job(arm, changes, seed, **common) for seed in scale.seeds for arm, changes in INITS.items()]
    if part == "map":
        return [
            Job(arm, NORMS[arm], scale.seeds[0], clip=0.0, **(common | place))
            for place in map_places(scale)
            for arm in ("pre-norm", "sandwich", "DSSN")
        ]
    raise UserError(f"--parts {part}: choose of {', '.join(PARTS)}")


def map_places(scale: Scale) -> list[dict[str, Any]]:
    """Places around the setting of `norms`: one change at a time, then changes together."""
    deep, wide, fast = 2 * scale.layers, 2 * scale.width, 1e-1
    return [
        {},
        {"rate": fast},
        {"rate": 3e-1},
        {"precision": "bf16"},
        {"layers": deep},
        {"width": wide},
        {"layers": deep, "rate": fast},
        {"rate": 1e-2},
        {"precision": "bf16", "rate": fast},
    ]


def run_all(jobs: Sequence[Job], runs: Path, text: Path | None, processes: int) -> dict[Job, Outcome]:
    """Run the jobs, several at a time; each has one thread."""
    unique = list({job.name: job for job in jobs}.values())
    found: dict[str, Outcome] = {}
    with progress("runs", len(unique)) as bar:

        def take(job: Job, outcome: Outcome) -> None:
            found[job.name] = outcome
            bar.advance(1, note=job.name)
            say(
                f"{job.name}: {outcome.validation:.3f} nat/byte, {outcome.spikes} spikes, gradient norm "
                f"{outcome.ratio:.3g} x the median{', given up' if outcome.diverged else ''}"
            )

        if processes == 1:
            for job in unique:
                take(job, run_job(job, runs, text))
        else:
            # spawn: a forked process would inherit torch's threads.
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                waiting = {pool.submit(run_job, job, runs, text): job for job in unique}
                try:
                    for future in as_completed(waiting):
                        take(waiting[future], future.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return {job: found[job.name] for job in jobs}


# --- Tables and plots -------------------------------------------------------------------------------------------------


def _each(values: Iterable[float], form: str) -> str:
    """Mean, spread and each value."""
    known = list(values)
    mean = fmean(known)
    if len(known) == 1:
        return format(mean, form)
    return f"{mean:{form}} ± {stdev(known):{form}} ({', '.join(format(value, form) for value in known)})"


def arm_table(name: str, caption: str, results: Sequence[tuple[Job, Outcome]]) -> Table:
    """One row an arm, over its seeds."""
    rows: list[list[Any]] = []
    for arm in dict.fromkeys(job.arm for job, _ in results):
        own = [outcome for job, outcome in results if job.arm == arm]
        highest = max(outcome.largest_spike for outcome in own)
        rows.append(
            [
                arm,
                _each((outcome.validation for outcome in own), ".3f"),
                _each((outcome.early for outcome in own), ".2f"),
                f"{sum(outcome.spikes for outcome in own)}" + (f" (up to {highest:.2f} nat)" if highest else ""),
                _each((outcome.ratio for outcome in own), ".1f"),
                _each((outcome.spread for outcome in own), ".3f"),
                sum(bool(outcome.diverged) for outcome in own),
            ]
        )
    return Table(
        name=name,
        caption=caption,
        columns=(
            "arm",
            "validation loss, nat/byte",
            "training loss at a quarter",
            "loss spikes, all seeds",
            "gradient norm, max/median",
            "its std of log10",
            "given up",
        ),
        rows=rows,
    )


def map_table(results: Sequence[tuple[Job, Outcome]]) -> Table:
    """One row a place, one column an arm."""
    arms = list(dict.fromkeys(job.arm for job, _ in results))
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for job, outcome in results:
        spikes = f"{outcome.spikes} spikes" + (f" (up to {outcome.largest_spike:.2f})" if outcome.spikes else "")
        state = "given up" if outcome.diverged else f"loss {outcome.validation:.2f}"
        place = (f"{job.layers} x {job.width}", job.rate, "bf16" if job.precision == "bf16" else "fp32")
        rows.setdefault(place, {})[job.arm] = f"{spikes}, max/median {outcome.ratio:.3g}, {state}"
    return Table(
        name="map",
        caption="Where spikes appear: layers x width, learning rate and precision, one seed, without clipping. Spikes "
        "(largest, in nats), gradient norm max/median, validation loss in nat/byte",
        columns=("layers x width", "rate", "precision", *arms),
        rows=[[*place, *(cells.get(arm) for arm in arms)] for place, cells in rows.items()],
    )


def tables_of(part: str, results: dict[Job, Outcome], scale: Scale) -> list[Table]:
    """The tables of one part."""
    pairs = list(results.items())
    what = (
        f"{scale.layers} layers, width {scale.width}, learning rate {scale.rate:g}, {scale.steps} steps of 512 bytes, "
        f"seeds {', '.join(map(str, scale.seeds))}: mean ± standard deviation (each seed)"
    )
    if part == "map":
        return [map_table(pairs)]
    if part == "init":
        return [arm_table("init", f"Initialisation of DSSN. {what}", pairs)]
    return [
        arm_table(
            f"norms_{name}", f"Norm placement, {words}. {what}", [(job, o) for job, o in pairs if job.clip == clip]
        )
        for clip, name, words in ((1.0, "clipped", "clipped at 1"), (0.0, "unclipped", "not clipped"))
    ]


def norm_plots(results: dict[Job, Outcome], output: Path) -> dict[str, Any]:
    """Loss and gradient norm of the first seed without clipping, gains by layer; and the curves that were drawn."""
    seed = min(job.seed for job in results)
    drawn = {job.arm: outcome for job, outcome in results.items() if job.seed == seed and job.clip == 0}
    spikes = {arm: stability.find_spikes(outcome.losses) for arm, outcome in drawn.items()}
    losses = {arm: outcome.losses for arm, outcome in drawn.items()}
    norms = {arm: outcome.norms for arm, outcome in drawn.items()}
    save_plot(plot_stability(losses, norms, spikes, "loss, nat per byte"), output.with_name("llm_stability.svg"))
    gains = {
        f"{arm} {GAIN_NAMES[kind]}": (list(range(1, len(values) + 1)), values)
        for arm, outcome in drawn.items()
        for kind, values in outcome.gains.items()
        if arm in ("sandwich", "DSSN") and "post" in kind
    }
    save_plot(plot_lines(gains, "layer", "mean gain"), output.with_name("llm_gains.svg"))
    job = next(job for job in results if job.seed == seed and job.clip == 0)
    record = {
        "caption": f"{job.layers} layers, width {job.width}, learning rate {job.rate:g}, no clipping, seed {seed}",
        "arms": {arm: {"loss": o.losses, "grad_norm": o.norms} for arm, o in drawn.items()},
    }
    return record


def reproduce(
    output: Path,
    runs: Path,
    scale: Scale,
    parts: Sequence[str] = PARTS,
    processes: int = 2,
    text: Path | None = None,
    run: Callable[..., dict[Job, Outcome]] = run_all,
) -> dict[str, Any]:
    """Do the runs that are not done yet, print the tables, write results and plots.

    Args:
        output: result file, for instance `results/reproduce/llm.json`; plots go beside it.
        runs: folder of the runs, each resumed where it stands.
        scale: how much is run.
        parts: of `PARTS`.
        processes: runs at a time, each with one thread.
        text: a UTF-8 file instead of the built-in one.
        run: does the jobs.

    Returns:
        The written object.

    Raises:
        UserError: no seed, no such part, a text that cannot be read.
    """
    if not scale.seeds:
        raise UserError("give at least one seed")
    by_part = {part: jobs_of(part, scale) for part in parts}
    started = time.time()
    split_text(text)  # a text that cannot be read is reported here, once
    results = run([job for jobs in by_part.values() for job in jobs], runs, text, processes)
    tables: list[Table] = []
    curves: dict[str, Any] = {}
    for part, jobs in by_part.items():
        own = {job: results[job] for job in jobs}
        tables += tables_of(part, own, scale)
        if part == "norms":
            curves = norm_plots(own, output)
    for item in tables:
        table(item.columns, item.rows, title=item.caption)
    short = ("losses", "norms", "gains")
    return write_results(
        output,
        room="llm",
        kind="reproduce",
        seconds=time.time() - started,
        tables=[*tables, PAPER],
        config=asdict(scale) | {"parts": list(parts), "text": text.name if text else TEXT},
        seeds=scale.seeds,
        runs=[
            asdict(job) | {name: value for name, value in asdict(outcome).items() if name not in short}
            for job, outcome in results.items()
        ],
        cpu_seconds=sum({job.name: outcome.cpu_seconds for job, outcome in results.items()}.values()),
        curves=curves,
    )
