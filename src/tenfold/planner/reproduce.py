"""The published claims of Pangu Ultra MoE, predicted: optimised against baseline, 61 layers in 64 slots against 66,
the layout's rank in a search.

What the paper's readers could not recover is assumed and said: sequence length 8192, 64 micro-batches, both runs with
the published layout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.layout_search import SearchResult, search, simulated_place
from tenfold.planner.predictor import Estimate, simulate
from tenfold.planner.scoring import closed_form_score
from tenfold.planner.shape_search import shape_candidates

PUBLISHED = Plan(
    tp=8,
    pp=16,
    vpp=2,
    ep=4,
    tp_extend_ep=True,
    mbs=2,
    gbs=6144,
    seq=8192,
    schedule="adaptive",
    recompute="fine-grained",
    swap=True,
    dispatch="hierarchical",
)
DEVICES, BASELINE_DEVICES = 6144, 4096
# tokens/s of the whole cluster over devices: 1.46M on 6,144 and 0.61M on 4,096 (arXiv 2505.04519, as read by two
# independent notes).
PUBLISHED_TOKENS = {"baseline": 0.61e6 / 4096, "optimised": 1.46e6 / 6144}
PUBLISHED_RATIO = PUBLISHED_TOKENS["optimised"] / PUBLISHED_TOKENS["baseline"]
PUBLISHED_SLOT_GAIN = 0.15


def baseline_plan() -> Plan:
    """The published layout before the paper's techniques: flat exposed all-to-all, whole-layer recompute, plain
    interleaving."""
    return PUBLISHED.replace(gbs=4096, schedule="interleaved", recompute="full", swap=False, dispatch="flat")


@dataclass(frozen=True)
class Pangu:
    """Predictions for the published runs.

    Attributes:
        baseline, optimised: both runs.
        steps: (technique, estimate) added one after the other, on the optimised cluster.
        slots_61, slots_66: 61 layers in 64 slots and 66 layers of equal parameters, same layout.
    """

    baseline: Estimate
    optimised: Estimate
    steps: tuple[tuple[str, Estimate], ...]
    slots_61: Estimate
    slots_66: Estimate

    @property
    def ratio(self) -> float:
        """Throughput per device, optimised over baseline."""
        return self.optimised.tokens_per_s_per_device / self.baseline.tokens_per_s_per_device

    @property
    def slot_gain(self) -> float:
        """How much faster 61 layers are than 66 at equal parameters."""
        return self.slots_61.tokens_per_s_per_device / self.slots_66.tokens_per_s_per_device - 1


def pangu() -> Pangu:
    """Simulate the published runs."""
    model = Model.preset("pangu-ultra-moe")
    cluster = Cluster.preset("Ascend-800T-A2", DEVICES)
    start = baseline_plan().replace(gbs=PUBLISHED.gbs)
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("baseline techniques", {}),
        ("+ hierarchical all-to-all", {"dispatch": "hierarchical"}),
        ("+ adaptive pipe overlap", {"schedule": "adaptive"}),
        ("+ fine-grained recompute", {"recompute": "fine-grained"}),
        ("+ swap", {"swap": True}),
    )
    steps = []
    plan = start
    for name, change in changes:
        plan = plan.replace(**change)
        steps.append((name, simulate(model, cluster, plan)))
    wide = shape_candidates(model, hidden=[model.hidden], layers=[66], experts=[256], topk=[8], tolerance=0.01)[0]
    slots = -wide.layers % (PUBLISHED.pp * PUBLISHED.vpp)
    return Pangu(
        baseline=simulate(model, Cluster.preset("Ascend-800T-A2", BASELINE_DEVICES), baseline_plan()),
        optimised=steps[-1][1],
        steps=tuple(steps),
        slots_61=steps[-1][1],
        slots_66=simulate(wide, cluster, PUBLISHED.replace(noop_slots=slots)),
    )


@dataclass(frozen=True)
class PanguSearch:
    """The search of all layouts of the 718B model on 6,144 devices, and where the published one stands (0: the best).

    Attributes:
        found: the search.
        place: share of faster plans among a random sample of those that fit, all event-simulated; `sample` of them.
        closed_form_place, closed_form_place_among_all: the same by the closed form, among all that fit, and among all
            that were looked at.
    """

    found: SearchResult
    place: float
    sample: int
    closed_form_place: float
    closed_form_place_among_all: float


def pangu_search(simulate_best: int = 120, sample: int = 300, processes: int | None = None) -> PanguSearch:
    """Search all layouts of the 718B model on 6,144 devices, and place the published one."""
    model, cluster = Model.preset("pangu-ultra-moe"), Cluster.preset("Ascend-800T-A2", DEVICES)
    found = search(model, cluster, PUBLISHED, top=10, simulate_best=simulate_best, processes=processes)
    own = simulate(model, cluster, PUBLISHED).tokens_per_s_per_device
    place, simulated = simulated_place(found, own, sample, processes=processes)
    closed = closed_form_score(model, cluster, PUBLISHED)
    return PanguSearch(found, place, simulated, found.rank_of(closed), found.rank_among_all(closed))


def run(output: Path, rows: Path | None = None) -> dict[str, Any]:
    """Predict everything, print it beside the published figures and write the result file."""
    started = time.perf_counter()
    answer = pangu()
    searched = pangu_search()
    found = searched.found
    best = found.best[0]
    headline: list[list[str | float | None]] = [
        [
            "baseline, 4,096 devices: tokens/s/device",
            answer.baseline.tokens_per_s_per_device,
            PUBLISHED_TOKENS["baseline"],
        ],
        [
            "optimised, 6,144 devices: tokens/s/device",
            answer.optimised.tokens_per_s_per_device,
            PUBLISHED_TOKENS["optimised"],
        ],
        ["optimised over baseline", answer.ratio, PUBLISHED_RATIO],
        ["MFU of the optimised run (peak 256 TFLOP/s, causal)", answer.optimised.mfu, 0.300],
        ["MFU of the baseline", answer.baseline.mfu, 0.189],
        ["61 layers in 64 slots over 66 layers, equal parameters", 1 + answer.slot_gain, 1 + PUBLISHED_SLOT_GAIN],
        [
            f"published layout: share of faster plans among {searched.sample} drawn from those that fit",
            searched.place,
            None,
        ],
        ["the same among all that fit, by the closed form", searched.closed_form_place, None],
        ["its memory, GiB of 64", answer.optimised.peak_memory_gib, None],
        ["best plan found: tokens/s/device", best.tokens_per_s_per_device, None],
    ]
    tables = [
        Table(
            "headline", "Pangu Ultra MoE, predicted beside published", ("quantity", "predicted", "published"), headline
        ),
        Table(
            "techniques",
            "the paper's techniques one after the other, published layout on 6,144 devices",
            ("plan", "tokens/s/device", "step s", "bubble", "GiB"),
            [
                [name, e.tokens_per_s_per_device, e.step_seconds, e.bubble, e.peak_memory_gib]
                for name, e in answer.steps
            ],
        ),
        Table(
            "search",
            f"best layouts of {found.candidates} on 6,144 devices",
            ("plan", "tokens/s/device", "MFU", "GiB"),
            [[e.plan.describe(), e.tokens_per_s_per_device, e.mfu, e.peak_memory_gib] for e in found.best],
        ),
    ]
    more: dict[str, Any] = {
        "ratio": answer.ratio,
        "slot_gain": answer.slot_gain,
        "search": {
            "candidates": found.candidates,
            "feasible": found.feasible,
            "score_seconds": found.score_seconds,
            "plans_per_second": found.plans_per_second,
            "simulate_seconds": found.simulate_seconds,
            "published_place": searched.place,
            "published_place_sample": searched.sample,
            "published_place_closed_form": searched.closed_form_place,
            "published_place_closed_form_among_all": searched.closed_form_place_among_all,
        },
    }
    if rows is not None:
        from tenfold.planner import evaluation

        report = evaluation.validate(rows)
        more["validation"] = report["groups"]
        more["kendall_tau"] = report["kendall_tau"]
        tables.append(
            Table(
                "validation",
                "error of tokens/s/device on published rows (the rows of the calibration), percent",
                ("rows", "n", "median", "mean", "p90", "bias", "in 80% interval"),
                [
                    [
                        name,
                        g["rows"],
                        *(f"{100 * g[k]:.1f}" for k in ("median", "mean", "p90", "bias")),
                        f"{100 * g['covered']:.0f}",
                    ]
                    for name, g in report["groups"].items()
                ],
            )
        )
    from tenfold.planner import evaluation
    from tenfold.planner.coefficients import load_calibration

    runs = evaluation.a100_runs(evaluation.a100_calibration())
    tables.append(
        Table(
            "a100",
            "the eight A100 runs of Korthikanti et al. with one A100 calibration (seconds of a step)",
            ("model", "recompute", "predicted", "published", "error %"),
            [
                [r["model"], r["recompute"], r["seconds"], r["published_seconds"], f"{100 * r['error']:+.1f}"]
                for r in runs
                if r["seconds"]
            ],
        )
    )
    tables.append(
        Table(
            "h800",
            "one forward-backward chunk pair of DeepSeek-V3 on H800 (ms; share for hidden)",
            ("quantity", "predicted", "measured"),
            [[name, *pair] for name, pair in evaluation.h800_chunk().items()],
        )
    )
    crossed = load_calibration().origin.get("cross_validated")
    if crossed:
        more["cross_validation"] = crossed
        tables.append(
            Table(
                "cross-validation",
                "error when the row's cluster (same model and hardware) was left out of the fit, percent",
                ("rows", "n", "median", "p90", "bias"),
                [
                    [name, g["rows"], *(f"{100 * g[k]:.1f}" for k in ("median", "p90", "bias"))]
                    for name, g in crossed.items()
                ],
            )
        )
    for table in tables:
        console.table(
            list(table.columns),
            [[f"{c:.4g}" if isinstance(c, float) else ("-" if c is None else c) for c in row] for row in table.rows],
            table.caption,
        )
    return write_results(
        output,
        room="planner",
        kind="reproduce",
        seconds=time.perf_counter() - started,
        tables=tables,
        config=PUBLISHED,
        packages=("tyro", "rich"),
        **more,
    )
