"""How answers look in the terminal: an estimate, a search, the error on rows."""

from __future__ import annotations

from typing import Any

from tenfold.core import console
from tenfold.planner.predictor import Estimate


def show_estimate(estimate: Estimate) -> None:
    """Print an estimate."""
    e = estimate
    console.say(
        f"{e.model.name} ({e.parameters / 1e9:.1f}B, {e.active_parameters / 1e9:.1f}B active) on {e.devices} x "
        f"{e.hardware}"
    )
    console.say(
        f"  {e.plan.describe()}, {e.microbatches} micro-batches, seq {e.plan.seq}, {e.plan.precision}, stack "
        f"{e.plan.stack}"
    )
    console.say(
        f"  {e.tokens_per_s_per_device:.1f} tokens/s/device (80% interval {e.low:.1f} to {e.high:.1f}), "
        f"{e.tokens_per_s_per_device * e.devices / 1e6:.3f}M tokens/s"
    )
    console.say(
        f"  step {e.step_seconds:.3f} s, MFU {100 * e.mfu:.1f}% ({e.mfu_convention}), bubble {100 * e.bubble:.1f}%"
    )
    noop = e.plan.noop_slots or 0
    if noop:
        console.say(
            f"  {e.model.layers} layers in {e.model.layers + noop} slots: {noop} empty slots beside head and MTP"
        )
    console.say(
        f"  memory {e.peak_memory_gib:.1f} GiB of {e.memory_limit_gib:.1f} GiB usable "
        f"({'fits' if e.fits else 'does not fit'})"
    )
    rows = [(name, f"{seconds:.3f}", f"{100 * seconds / e.step_seconds:.1f}%") for name, seconds in e.breakdown.items()]
    console.table(["seconds of a step, mean over ranks", "s", "share"], rows)


def explain(first: Estimate, second: Estimate) -> str:
    """Why the first plan beats the second: the cause whose seconds differ most."""
    names = set(first.breakdown) | set(second.breakdown)
    gaps = {name: second.breakdown.get(name, 0.0) - first.breakdown.get(name, 0.0) for name in names}
    name, gap = max(gaps.items(), key=lambda pair: pair[1])
    return f"the first beats the second mostly by {name}: {gap:.2f} s less of a step"


def show_validation(report: dict[str, Any]) -> None:
    """Print the errors of a report of `evaluation.validate` or `evaluation.calibrate`."""
    rows = [
        (
            name,
            g["rows"],
            f"{100 * g['median']:.1f}%",
            f"{100 * g['mean']:.1f}%",
            f"{100 * g['p90']:.1f}%",
            f"{100 * g['bias']:+.1f}%",
            f"{100 * g['covered']:.0f}%",
        )
        for name, g in report["groups"].items()
    ]
    console.table(["rows", "n", "median |e|", "mean |e|", "p90 |e|", "bias", "in 80% interval"], rows)
    if report.get("kendall_tau") is not None:
        console.say(f"ranking inside clusters: Kendall tau {report['kendall_tau']:.2f}")
    if report.get("cross_validation"):
        c = report["cross_validation"]
        console.say(f"leave-one-cluster-out: median {100 * c['median']:.1f}%, p90 {100 * c['p90']:.1f}%")
